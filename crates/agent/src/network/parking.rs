//! NICs that no interface uses, out of the containers' sight.
//!
//! The containers live in the guest's own network namespace, where every NIC of the VM
//! appears. One that was plugged before anybody knew whether it would be used, or whose
//! network was taken away, is kept in another namespace: there it is in no list of
//! interfaces, and nobody can take it up. Leaving a namespace, an interface loses its
//! addresses and routes.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use kata_netlink::{Link, Socket};
use nix::sched::{CloneFlags, unshare};

use super::NetworkError;

/// What a NIC is called until it has a name: no engine's interface is called so.
const NAME: &str = "nic%d";

/// Where unused NICs are. The namespace is made when the first one is put into it, because
/// most guests use all that they have; in a template ahead ([`Parking::prepare`]).
#[derive(Debug, Default)]
pub struct Parking {
    place: Option<Place>,
    /// There may be NICs in it.
    used: bool,
}

#[derive(Debug)]
struct Place {
    netns: OwnedFd,
    socket: Socket,
    /// The guest's own namespace.
    home: OwnedFd,
}

impl Parking {
    /// Puts NICs away.
    ///
    /// # Errors
    /// When there can be no other namespace, or a NIC does not go there.
    pub(super) fn put(&mut self, home: &mut Socket, nics: &[u32]) -> Result<(), NetworkError> {
        if nics.is_empty() {
            return Ok(());
        }
        self.used = true;
        let place = self.place()?;
        let moves = nics.iter().map(|nic| Link::move_to(*nic, place.netns.as_fd(), NAME));
        Ok(home.send(moves.collect())?)
    }

    /// Makes the namespace now.
    ///
    /// # Errors
    /// When there can be no other namespace.
    pub(crate) fn prepare(&mut self) -> Result<(), NetworkError> {
        self.place().map(drop)
    }

    fn place(&mut self) -> Result<&mut Place, NetworkError> {
        match &mut self.place {
            Some(place) => Ok(place),
            none => Ok(none.insert(Place::make()?)),
        }
    }

    /// Brings those back that are wanted.
    ///
    /// # Errors
    /// When they cannot be listed or moved.
    pub(super) fn fetch(&mut self, wanted: impl Fn(&Link) -> bool) -> Result<(), NetworkError> {
        if !self.used {
            return Ok(());
        }
        let Some(Place { socket, home, .. }) = &mut self.place else { return Ok(()) };
        let parked = Link::all(socket)?;
        let moves = parked
            .iter()
            .filter(|link| !link.is_loopback() && wanted(link))
            .map(|link| Link::move_to(link.index, home.as_fd(), NAME));
        Ok(socket.send(moves.collect())?)
    }
}

impl Place {
    /// A namespace lives as long as a descriptor of it; the thread that makes it ends.
    fn make() -> Result<Self, NetworkError> {
        let netns = || File::open("/proc/thread-self/ns/net").map(OwnedFd::from);
        let home = netns().map_err(NetworkError::Parking)?;
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| NetworkError::Parking(error.into()))?;
            let netns = netns().map_err(NetworkError::Parking)?;
            Ok(Self { netns, socket: Socket::open()?, home })
        };
        let thread = std::thread::Builder::new()
            .name("parking".to_owned())
            .spawn(make)
            .map_err(NetworkError::Parking)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
