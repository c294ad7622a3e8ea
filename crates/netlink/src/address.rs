//! Addresses of interfaces.

use crate::message::{Attributes, Request, flags, u32_at};
use crate::prefix::{self, Prefix, octets};
use crate::socket::{NetlinkError, Socket, dump_request};

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The interface's number.
    pub link: u32,
    /// The address and its network.
    pub prefix: Prefix,
    /// Whether somebody set it, as opposed to one that a router announced and that ends.
    pub permanent: bool,
}

impl Address {
    /// Every address.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn all(socket: &mut Socket) -> Result<Vec<Self>, NetlinkError> {
        let request = dump_request("list addresses", libc::RTM_GETADDR, &[0; 8]);
        socket.dump(request, |kind, body| (kind == libc::RTM_NEWADDR).then(|| Self::read(body))?)
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut length = *body.get(1)?;
        let mut flags = u32::from(*body.get(2)?);
        let (mut local, mut address) = (None, None);
        for (kind, value) in Attributes::new(body.get(8..)?) {
            match kind {
                libc::IFA_LOCAL => local = prefix::address(value),
                libc::IFA_ADDRESS => address = prefix::address(value),
                libc::IFA_FLAGS => flags = u32_at(value, 0)?,
                _ => {}
            }
        }
        // On a point-to-point link the length is that of the peer's network, which has
        // a route of its own.
        if local.is_some() && address.is_some() && local != address {
            length = if local?.is_ipv4() { 32 } else { 128 };
        }
        Some(Self {
            link: u32_at(body, 4)?,
            prefix: Prefix::new(local.or(address)?, length)?,
            permanent: flags & libc::IFA_F_PERMANENT != 0,
        })
    }

    /// Gives `link` the address: usable at once, and without the route to its network
    /// that the kernel would add (routes are set one by one).
    pub fn add(link: u32, prefix: Prefix) -> Request {
        let family_flags = if prefix.address.is_ipv6() { libc::IFA_F_NODAD } else { 0 }
            | libc::IFA_F_NOPREFIXROUTE;
        let mut request = Self::request("add an address", libc::RTM_NEWADDR, link, prefix)
            .attr_u32(libc::IFA_FLAGS, family_flags);
        if let Some(broadcast) = prefix.broadcast() {
            request = request.attr(libc::IFA_BROADCAST, &broadcast.octets());
        }
        request
    }

    /// Takes the address away.
    pub fn delete(link: u32, prefix: Prefix) -> Request {
        Self::request("remove an address", libc::RTM_DELADDR, link, prefix).lenient()
    }

    fn request(what: &'static str, kind: u16, link: u32, prefix: Prefix) -> Request {
        let mut fixed = [prefix::family(&prefix.address), prefix.length, 0, 0, 0, 0, 0, 0];
        if is_link_local(prefix) {
            fixed[3] = libc::RT_SCOPE_LINK;
        }
        fixed[4..8].copy_from_slice(&link.to_ne_bytes());
        let bytes = octets(&prefix.address);
        let flags = if kind == libc::RTM_NEWADDR { flags::SET } else { flags::NONE };
        Request::new(what, kind, flags, &fixed)
            .attr(libc::IFA_LOCAL, bytes.as_ref())
            .attr(libc::IFA_ADDRESS, bytes.as_ref())
    }
}

/// `fe80::/10`: its scope is the link. (IPv4's 169.254/16 is given with scope global by
/// engines that use it.)
fn is_link_local(prefix: Prefix) -> bool {
    matches!(prefix.address, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local())
}
