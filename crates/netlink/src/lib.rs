//! rtnetlink in the few messages that both ends of a sandbox need: the host reads an
//! engine's network and joins taps to it, the guest makes its own network the same.
//!
//! Small on purpose: in a guest under binary translation each page of code executed for
//! the first time costs, so requests are laid out by hand and sent many at a time
//! ([`Socket::send`]), and only the fields we use are decoded. Start with [`Socket`],
//! then [`Link`], [`Address`], [`Route`] and [`Neighbour`].
//!
//! It trusts the kernel, which writes what is decoded here, but never indexes out of a
//! message that is shorter than it says.

mod address;
#[cfg(fuzzing)]
pub mod fuzzing;
mod ipv6;
mod link;
mod mac;
mod message;
mod neighbour;
mod prefix;
mod route;
mod socket;

pub use address::Address;
pub use ipv6::Ipv6;
pub use link::{Link, LinkKind};
pub use mac::{InvalidMac, Mac};
pub use message::{Attributes, Request, flags};
pub use neighbour::Neighbour;
pub use prefix::{InvalidPrefix, Prefix};
pub use route::Route;
pub use socket::{Groups, NetlinkError, Socket, Watch};
