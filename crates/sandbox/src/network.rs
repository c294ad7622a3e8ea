//! The sandbox's network: what is in the engine's namespace becomes the guest's.
//!
//! With `tcfilter` one NIC is plugged before the guest starts, with a tap that nobody has
//! joined yet, so that an engine may connect the network late; a NIC whose interface is gone
//! waits for the next one, so that networks may come and go as often as the engine likes. A
//! machine that takes no NIC later has all from the start ([`Idle`]). A
//! macvtap belongs to its interface: there is a NIC when there is an interface, plugged if
//! the guest runs already. Each time the namespace changes, [`Network::grow`] makes the NICs
//! that are missing, and [`Network::sync`] joins what is new, parts from what is gone, and
//! says what the guest is to be told.

use crate::SandboxError;
use kata_network::{Attachment, Link, Mac, Model, Netns, NetworkError, TAP_PREFIX, Tap};
use kata_protocol::{agent, chain, limits};
use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

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

/// NICs that the machine has, and that may never be needed. Their taps are in a namespace that
/// nobody else has, and go with it.
struct Idle {
    netns: Netns,
    nics: VecDeque<Nic>,
}

/// The network of one sandbox.
pub(crate) struct Network {
    netns: Arc<Netns>,
    model: Model,
    /// Plugged, and not joined.
    spare: VecDeque<Nic>,
    idle: Option<Idle>,
    /// On the way to this namespace.
    moving: Option<JoinHandle<Result<VecDeque<Nic>, NetworkError>>>,
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
            idle: None,
            moving: None,
            joined: Vec::new(),
            made: 0,
            full: false,
            told: None,
        }
    }

    /// Goes to the engine's namespace, with the NICs that wait. That takes the kernel some
    /// twenty milliseconds, in which the guest can do something: who looks for the NICs next
    /// waits for the end of it.
    pub(crate) fn move_to(&mut self, netns: Netns) {
        let netns = Arc::new(netns);
        let (from, to) = (std::mem::replace(&mut self.netns, Arc::clone(&netns)), netns);
        let mut nics = std::mem::take(&mut self.spare);
        self.moving = Some(std::thread::spawn(move || {
            nics.iter_mut().try_for_each(|nic| nic.tap.move_to(&from, &to))?;
            Ok(nics)
        }));
    }

    fn arrive(&mut self) -> Result<(), SandboxError> {
        let Some(moving) = self.moving.take() else { return Ok(()) };
        let moved = moving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.spare.extend(moved?);
        Ok(())
    }

    pub(crate) fn netns(&self) -> Arc<Netns> {
        Arc::clone(&self.netns)
    }

    /// The NICs that the machine starts with, `count` of them if they are not made for an
    /// interface each: what the VMM needs for each. A clone's first one has the `known`
    /// address, that of its template.
    pub(crate) fn first_nics(
        &mut self,
        known: Option<Mac>,
        count: usize,
    ) -> Result<Vec<(OwnedFd, Mac)>, SandboxError> {
        match self.model {
            Model::TcFilter => {
                let mut nics = vec![self.add_spare(known)?];
                self.add_idle(count.saturating_sub(1), &mut nics)?;
                Ok(nics)
            }
            Model::Macvtap => std::iter::from_fn(|| self.grow().transpose()).collect(),
            Model::None => Ok(Vec::new()),
        }
    }

    /// Makes a NIC for an interface of the namespace that none stands for; none when there
    /// is no such. Gives what the VMM needs for it; it must be plugged before the next one
    /// is made, and before [`Network::sync`].
    pub(crate) fn grow(&mut self) -> Result<Option<(OwnedFd, Mac)>, SandboxError> {
        self.arrive()?;
        if self.full || self.joined.len() >= limits::INTERFACES {
            return Ok(None);
        }
        let state = kata_network::scan(&self.netns)?;
        // What is gone leaves a NIC for what is new.
        self.part_from_gone(&state.links);
        let new = state.links.iter().filter(|link| !self.is_joined(link.index));
        let new: Vec<&Link> = new.collect();
        while self.model == Model::TcFilter && new.len() > self.spare.len() && self.take_idle()? {}
        match self.model {
            Model::TcFilter if new.len() > self.spare.len() => self.add_spare(None).map(Some),
            Model::Macvtap => new.first().map(|link| self.add_on(link)).transpose(),
            Model::TcFilter | Model::None => Ok(None),
        }
    }

    /// A NIC with a tap that no interface uses yet.
    fn add_spare(&mut self, known: Option<Mac>) -> Result<(OwnedFd, Mac), SandboxError> {
        let name = self.next_name();
        let device = known.map_or_else(new_mac, Ok)?;
        let nic = Nic { tap: Tap::create(&self.netns, &name)?, device };
        let plugged = nic.plug()?;
        self.spare.push_back(nic);
        Ok(plugged)
    }

    /// NICs that wait for more interfaces than most sandboxes have.
    fn add_idle(
        &mut self,
        count: usize,
        plugged: &mut Vec<(OwnedFd, Mac)>,
    ) -> Result<(), SandboxError> {
        if count == 0 {
            return Ok(());
        }
        let mut idle = Idle { netns: Netns::create()?, nics: VecDeque::new() };
        for _ in 0..count {
            let tap = Tap::create_idle(&idle.netns, &self.next_name())?;
            let nic = Nic { tap, device: new_mac()? };
            plugged.push(nic.plug()?);
            idle.nics.push_back(nic);
        }
        self.idle = Some(idle);
        Ok(())
    }

    /// Brings an idle NIC to the engine's interfaces; false: there is none.
    fn take_idle(&mut self) -> Result<bool, SandboxError> {
        let Some(idle) = &mut self.idle else { return Ok(false) };
        let Some(mut nic) = idle.nics.pop_front() else { return Ok(false) };
        nic.tap.move_to(&idle.netns, &self.netns)?;
        self.spare.push_back(nic);
        Ok(true)
    }

    /// A NIC whose macvtap is on `link`.
    fn add_on(&mut self, link: &Link) -> Result<(OwnedFd, Mac), SandboxError> {
        let name = self.next_name();
        let nic = Nic { tap: Tap::on_link(&self.netns, link, &name)?, device: new_mac()? };
        let plugged = nic.plug()?;
        self.joined.push(Joined { link: link.clone(), nic, answers: false });
        Ok(plugged)
    }

    /// Takes back the NIC that was added last and could not be plugged.
    pub(crate) fn take_back(&mut self) {
        match self.model {
            Model::Macvtap => drop(self.joined.pop()),
            Model::TcFilter | Model::None => drop(self.spare.pop_back()),
        }
    }

    /// The machine has no room for more NICs than there are: none is missing from now on.
    /// Returns how many there are.
    pub(crate) fn settle_for_less(&mut self) -> usize {
        self.full = true;
        self.spare.len() + self.joined.len()
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
        self.arrive()?;
        let state = kata_network::scan(&self.netns)?;
        self.part_from_gone(&state.links);
        for link in &state.links {
            match self.joined.iter_mut().find(|joined| joined.link.index == link.index) {
                Some(joined) => joined.follow(&self.netns, link)?,
                None if self.model == Model::None => {}
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
        if resolver.is_some() && self.model == Model::TcFilter {
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

    /// What the guest is to be told when all interfaces have gone and others are to come. It is
    /// told what comes then, also if that is nothing.
    pub(crate) fn clear(&mut self) -> Result<agent::Network, SandboxError> {
        self.sync(None)?;
        let network = self.told.take().unwrap_or_default();
        Ok(agent::Network { keep_unused: true, ..network })
    }

    /// The NICs of interfaces that are gone wait for others.
    fn part_from_gone(&mut self, links: &[Link]) {
        let gone = |joined: &mut Joined| links.iter().all(|link| link.index != joined.link.index);
        let gone: Vec<Joined> = self.joined.extract_if(.., gone).collect();
        for Joined { link, nic, .. } in gone {
            if self.model == Model::Macvtap {
                // It went with its interface, and its device is of no use any more.
                continue;
            }
            if let Err(error) = kata_network::part(&self.netns, &nic.tap) {
                tracing::warn!(error = %chain(&error), link = link.name, "cannot part from a removed interface");
            }
            self.spare.push_back(nic);
        }
    }

    /// Takes our hands off the engine's interfaces.
    pub(crate) fn unjoin(&mut self) {
        for Joined { link, nic, .. } in self.joined.drain(..) {
            if let Err(error) = kata_network::unjoin(&self.netns, &link.name, &nic.tap.name) {
                // The namespace is the engine's and may be gone with all that is in it.
                tracing::debug!(error = %chain(&error), link = link.name, "cannot unjoin");
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
