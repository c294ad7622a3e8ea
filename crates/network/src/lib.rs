//! The host's half of a sandbox's network.
//!
//! An engine gives a container a network namespace with interfaces in it. [`Netns`] names
//! it, [`scan()`] reads what is there, [`Tap`] makes the VM's end of a NIC in it,
//! [`join()`] connects the two, and [`guest_network`] is what the guest is told, so that
//! the guest becomes what the namespace was: same Ethernet and IP addresses, routes and
//! neighbours. [`Changes`] notices engines that connect a network late, and
//! [`serve_dns`] carries the guest's questions to a resolver that listens on the
//! namespace's own loopback (Docker's 127.0.0.11).
//!
//! [`Loopback`] is the other way: it takes what somebody on the host dials at `localhost` in
//! the namespace.
//!
//! [`check`] refuses the namespaces that no VM can take over. [`unjoin`] undoes by name.
//!
//! Trust: the namespace and the kernel are trusted. What comes out of the tap never meets
//! code of ours; what the guest sends over the DNS stream does, and is bounded there.

mod check;
mod dns;
mod error;
mod guest;
mod join;
mod loopback;
mod netns;
mod scan;
mod tap;
mod watch;

pub use check::check;
#[cfg(fuzzing)]
pub use dns::fuzz_questions;
pub use dns::{loopback_nameserver, serve_dns};
pub use error::NetworkError;
pub use guest::{Attachment, guest_network};
pub use join::{Model, join, let_answers_in, part, set_mtu, unjoin};
pub use kata_netlink::{Address, InvalidMac, Link, LinkKind, Mac, Neighbour, Prefix, Route};
pub use loopback::Loopback;
pub use netns::Netns;
pub use scan::{NetnsState, scan};
pub use tap::{TAP_PREFIX, Tap};
pub use watch::Changes;
