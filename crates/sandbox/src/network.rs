//! The sandbox's network: what is in the engine's namespace becomes the guest's.
//!
//! One NIC is plugged before the guest starts, with a tap that nobody has joined yet, so
//! that an engine may connect the network late. Each time the namespace changes,
//! [`Network::sync`] joins what is new, parts from what is gone, and says what the guest is
//! to be told. A NIC whose interface is gone waits for the next one, so that networks may
//! come and go as often as the engine likes.

use crate::SandboxError;
use kata_network::{Attachment, Link, Mac, Model, Netns, TAP_PREFIX, Tap};
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

/// An interface of the engine's, and the NIC that stands for it.
struct Joined {
    link: Link,
    nic: Nic,
    /// The namespace's own resolver may ask through it.
    answers: bool,
}

/// The network of one sandbox.
pub(crate) struct Network {
    netns: Arc<Netns>,
    model: Model,
    /// Plugged, and not joined.
    spare: VecDeque<Nic>,
    joined: Vec<Joined>,
    made: u32,
    /// The machine takes no more NICs.
    full: bool,
    told: Option<agent::Network>,
}

impl Network {
    pub(crate) fn new(netns: Netns, model: Model) -> Self {
        Self {
            netns: Arc::new(netns),
            model,
            spare: VecDeque::new(),
            joined: Vec::new(),
            made: 0,
            full: false,
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

    /// Takes back the NIC that was added last, for which the machine has no room: none is
    /// missing from now on. Returns how many there are.
    pub(crate) fn take_back(&mut self) -> usize {
        self.spare.pop_back();
        self.full = true;
        self.spare.len() + self.joined.len()
    }

    /// Interfaces of the namespace that no NIC stands for, when no spare one is left:
    /// so many NICs must be plugged before [`Network::sync`].
    pub(crate) fn missing(&self) -> Result<usize, SandboxError> {
        if self.full {
            return Ok(0);
        }
        let state = kata_network::scan(&self.netns)?;
        let new = state.links.iter().filter(|link| !self.is_joined(link.index)).count();
        let room = limits::INTERFACES.saturating_sub(self.joined.len());
        Ok(new.min(room).saturating_sub(self.spare.len()))
    }

    fn is_joined(&self, index: u32) -> bool {
        self.joined.iter().any(|joined| joined.link.index == index)
    }

    /// Joins new interfaces to spare NICs. Gives the guest's network when it is not what
    /// the guest was told last.
    pub(crate) fn sync(
        &mut self,
        resolver: Option<IpAddr>,
    ) -> Result<Option<agent::Network>, SandboxError> {
        let state = kata_network::scan(&self.netns)?;
        self.part_from_gone(&state.links);
        for link in &state.links {
            match self.joined.iter_mut().find(|joined| joined.link.index == link.index) {
                Some(joined) => joined.follow(&self.netns, link)?,
                None => {
                    let Some(nic) = self.spare.pop_front() else {
                        tracing::warn!(link = link.name, "no room for this network in the guest");
                        break;
                    };
                    kata_network::join(&self.netns, link, &nic.tap, self.model)?;
                    self.joined.push(Joined { link: link.clone(), nic, answers: false });
                }
            }
        }
        if resolver.is_some() {
            for joined in self.joined.iter_mut().filter(|joined| !joined.answers) {
                kata_network::let_answers_in(&self.netns, &joined.link, &joined.nic.tap)?;
                joined.answers = true;
            }
        }
        let attached: Vec<Attachment> = self
            .joined
            .iter()
            .map(|joined| Attachment { link: joined.link.index, device: joined.nic.device })
            .collect();
        let mut network = kata_network::guest_network(&state, &attached);
        network.dns_relay = resolver.map(|address| address.to_string()).unwrap_or_default();
        if self.told.as_ref() == Some(&network) {
            return Ok(None);
        }
        self.told = Some(network.clone());
        Ok(Some(network))
    }

    /// The NICs of interfaces that are gone wait for others.
    fn part_from_gone(&mut self, links: &[Link]) {
        let gone = |joined: &mut Joined| links.iter().all(|link| link.index != joined.link.index);
        let gone: Vec<Joined> = self.joined.extract_if(.., gone).collect();
        for Joined { link, nic, .. } in gone {
            if let Err(error) = kata_network::part(&self.netns, &nic.tap) {
                tracing::warn!(%error, link = link.name, "cannot part from a removed interface");
            }
            self.spare.push_back(nic);
        }
    }

    /// Takes our hands off the engine's interfaces.
    pub(crate) fn unjoin(&mut self) {
        for Joined { link, nic, .. } in self.joined.drain(..) {
            if let Err(error) = kata_network::unjoin(&self.netns, &link.name, &nic.tap.name) {
                // The namespace is the engine's and may be gone with all that is in it.
                tracing::debug!(%error, link = link.name, "cannot unjoin");
            }
        }
    }

    fn next_name(&mut self) -> String {
        self.made += 1;
        format!("{TAP_PREFIX}{}", self.made - 1)
    }
}

impl Joined {
    /// Takes over what may change of an interface that stays.
    fn follow(&mut self, netns: &Netns, link: &Link) -> Result<(), SandboxError> {
        if self.link.mtu != link.mtu {
            kata_network::set_mtu(netns, &self.nic.tap, link.mtu)?;
        }
        self.link = link.clone();
        Ok(())
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
