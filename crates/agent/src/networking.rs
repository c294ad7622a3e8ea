//! The guest's network as calls and streams change it.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use kata_channel::Stream;
use kata_protocol::agent::Network;
use kata_protocol::chain;
use tokio::task::JoinHandle;

use crate::dns;
use crate::error::AgentError;
use crate::network::Nics;

/// Interfaces, and the DNS relay once its address and its stream are both known.
#[derive(Debug, Default)]
pub struct Networking {
    /// One change of the interfaces at a time.
    nics: tokio::sync::Mutex<Nics>,
    relay: Mutex<Relay>,
}

#[derive(Debug, Default)]
struct Relay {
    address: Option<IpAddr>,
    /// Came, and is not in use yet.
    stream: Option<Stream>,
    task: Option<(IpAddr, JoinHandle<()>)>,
}

impl Networking {
    /// Of the machine that is all ours.
    pub fn of_guest() -> Self {
        Self { nics: tokio::sync::Mutex::new(Nics::of_guest()), ..Self::default() }
    }

    /// Makes the network what the message says.
    ///
    /// # Errors
    /// When the message is invalid or the kernel refuses.
    pub async fn configure(&self, wanted: &Network) -> Result<(), AgentError> {
        let address = match wanted.dns_relay.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                AgentError::Invalid(format!("DNS relay address {text:?} is no IP address"))
            })?),
        };
        let mut nics = self.nics.lock().await;
        nics.configure(wanted).await.map_err(|error| AgentError::Network(chain(&error)))?;
        self.change(|relay| relay.address = address);
        Ok(())
    }

    /// Wakes the NIC that each clone needs, and makes the place for unused ones, ahead. A network
    /// namespace is a tenth of all code that a clone without a network would run, and need not
    /// be made in each.
    ///
    /// # Errors
    /// When the NIC cannot be woken, or there can be no such place.
    pub async fn prepare(&self) -> Result<(), AgentError> {
        let mut nics = self.nics.lock().await;
        nics.prepare().map_err(|error| AgentError::Network(chain(&error)))
    }

    /// The host opened the stream on which it answers DNS. It opens a new one for each
    /// address, which it tells before or after.
    pub fn dns_stream(&self, stream: Stream) {
        self.change(|relay| relay.stream = Some(stream));
    }

    /// No stream that came over the channel carries anything any more.
    pub fn channel_lost(&self) {
        self.change(|relay| {
            relay.stream = None;
            relay.end();
        });
    }

    fn change(&self, change: impl FnOnce(&mut Relay)) {
        let mut relay = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut relay);
        relay.settle();
    }
}

impl Relay {
    /// Ends a relay that is not wanted any more, and starts the one that is.
    fn settle(&mut self) {
        if self
            .task
            .as_ref()
            .is_some_and(|(at, task)| Some(*at) != self.address || task.is_finished())
        {
            self.end();
        }
        if self.task.is_none()
            && let Some(address) = self.address
            && let Some(stream) = self.stream.take()
        {
            let relay = async move {
                if let Err(error) = dns::relay(address, stream).await {
                    tracing::warn!(%error, "DNS relay ended");
                }
            };
            self.task = Some((address, tokio::spawn(relay)));
        }
    }

    fn end(&mut self) {
        if let Some((_, task)) = self.task.take() {
            task.abort();
        }
    }
}
