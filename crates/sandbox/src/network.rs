//! The sandbox's network: what is in the engine's namespace becomes the guest's.
//!
//! One NIC is plugged before the guest starts, with a tap that nobody has joined yet, so
//! that an engine may connect the network late. Each time the namespace changes,
//! [`Network::sync`] joins what is new and says what the guest is to be told.

use crate::SandboxError;
use kata_network::{Attachment, Mac, Model, Netns, TAP_PREFIX, Tap};
use kata_protocol::{agent, limits};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// A NIC of the VM, whether or not an interface uses it.
pub(crate) struct Nic {
    tap: Tap,
    device: Mac,
}

/// The network of one sandbox.
pub(crate) struct Network {
    netns: Arc<Netns>,
    model: Model,
    /// Plugged, and not joined.
    spare: VecDeque<Nic>,
    /// Joined: number and name of the interface, and its NIC.
    joined: Vec<(u32, String, Nic)>,
    made: u32,
    told: Option<agent::Network>,
}

/// What [`Network::sync`] found.
pub(crate) struct Change {
    /// What the guest is to be told.
    pub network: agent::Network,
}

impl Network {
    pub(crate) fn new(netns: Netns, model: Model) -> Self {
        Self {
            netns: Arc::new(netns),
            model,
            spare: VecDeque::new(),
            joined: Vec::new(),
            made: 0,
            told: None,
        }
    }

    pub(crate) fn netns(&self) -> Arc<Netns> {
        Arc::clone(&self.netns)
    }

    /// Makes a tap for a NIC that is plugged before any interface is known.
    /// Gives what the VMM needs for it.
    pub(crate) fn add_spare(&mut self) -> Result<(OwnedFd, Mac), SandboxError> {
        let name = self.next_name();
        let nic = Nic { tap: Tap::create(&self.netns, &name)?, device: new_mac()? };
        let plugged = nic.plug()?;
        self.spare.push_back(nic);
        Ok(plugged)
    }

    /// Interfaces of the namespace that no NIC stands for, when no spare one is left:
    /// so many NICs must be plugged before [`Network::sync`].
    pub(crate) fn missing(&self) -> Result<usize, SandboxError> {
        let state = kata_network::scan(&self.netns)?;
        let new = state.links.iter().filter(|link| !self.is_joined(link.index)).count();
        let room = limits::INTERFACES.saturating_sub(self.joined.len());
        Ok(new.min(room).saturating_sub(self.spare.len()))
    }

    fn is_joined(&self, index: u32) -> bool {
        self.joined.iter().any(|(joined, ..)| *joined == index)
    }

    /// Joins new interfaces to spare NICs. Gives the guest's network when it is not what
    /// the guest was told last.
    pub(crate) fn sync(
        &mut self,
        resolver: Option<IpAddr>,
    ) -> Result<Option<Change>, SandboxError> {
        let state = kata_network::scan(&self.netns)?;
        self.joined.retain(|(index, ..)| state.links.iter().any(|link| link.index == *index));
        for link in &state.links {
            if self.is_joined(link.index) {
                continue;
            }
            let Some(nic) = self.spare.pop_front() else { break };
            kata_network::join(&self.netns, link, &nic.tap, self.model)?;
            if resolver.is_some() {
                kata_network::let_answers_in(&self.netns, link, &nic.tap)?;
            }
            self.joined.push((link.index, link.name.clone(), nic));
        }
        let attached: Vec<Attachment> = self
            .joined
            .iter()
            .map(|(index, _, nic)| Attachment { link: *index, device: nic.device })
            .collect();
        let mut network = kata_network::guest_network(&state, &attached);
        network.dns_relay = resolver.map(|address| address.to_string()).unwrap_or_default();
        if self.told.as_ref() == Some(&network) {
            return Ok(None);
        }
        self.told = Some(network.clone());
        Ok(Some(Change { network }))
    }

    /// Takes our hands off the engine's interfaces.
    pub(crate) fn unjoin(&mut self) {
        for (_, link, nic) in self.joined.drain(..) {
            if let Err(error) = kata_network::unjoin(&self.netns, &link, &nic.tap.name) {
                // The namespace is the engine's and may be gone with all that is in it.
                tracing::debug!(%error, link, "cannot unjoin");
            }
        }
    }

    fn next_name(&mut self) -> String {
        self.made += 1;
        format!("{TAP_PREFIX}{}", self.made - 1)
    }
}

impl Nic {
    fn plug(&self) -> Result<(OwnedFd, Mac), SandboxError> {
        let fd = self.tap.fd.try_clone().map_err(SandboxError::io("duplicate a tap"))?;
        Ok((fd, self.device))
    }
}

/// A fresh, locally administered address, by which the guest finds the device.
fn new_mac() -> Result<Mac, SandboxError> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| SandboxError::io("make an Ethernet address")(error.into()))?;
    bytes[0] = 0x02;
    Ok(Mac::new(bytes))
}
