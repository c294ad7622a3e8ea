//! The guest's network as calls and streams change it.

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use kata_channel::Stream;
use kata_protocol::agent::Network;
use tokio::task::AbortHandle;

use crate::error::{AgentError, chain};
use crate::{dns, network};

/// Interfaces, and the DNS relay once its address and its stream are both known.
#[derive(Debug, Default)]
pub struct Networking {
    relay: Mutex<Relay>,
}

#[derive(Debug, Default)]
struct Relay {
    address: Option<IpAddr>,
    stream: Option<Stream>,
    task: Option<AbortHandle>,
}

impl Networking {
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
        network::configure(wanted).await.map_err(|error| AgentError::Network(chain(&error)))?;
        self.change(|relay| relay.address = address);
        Ok(())
    }

    /// The host opened the stream on which it answers DNS.
    pub fn dns_stream(&self, stream: Stream) {
        self.change(|relay| relay.stream = Some(stream));
    }

    fn change(&self, change: impl FnOnce(&mut Relay)) {
        let mut relay = self.relay.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut relay);
        if let Some(address) = relay.address
            && let Some(stream) = relay.stream.take()
        {
            if let Some(old) = relay.task.take() {
                old.abort();
            }
            let task = tokio::spawn(async move {
                if let Err(error) = dns::relay(address, stream).await {
                    tracing::warn!(%error, "DNS relay ended");
                }
            });
            relay.task = Some(task.abort_handle());
        }
    }
}
