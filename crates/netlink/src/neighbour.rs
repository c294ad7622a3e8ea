//! Neighbours that somebody set for good (static ARP and NDP entries).

use std::net::IpAddr;

use crate::mac::Mac;
use crate::message::{Attributes, Request, flags, u16_at, u32_at};
use crate::prefix::{self, octets};
use crate::socket::{NetlinkError, Socket, dump_request};

/// A permanent neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Neighbour {
    /// The interface's number.
    pub link: u32,
    /// Its IP address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: Mac,
    /// `NTF_…`
    pub flags: u8,
}

impl Neighbour {
    /// Every permanent neighbour.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn all(socket: &mut Socket) -> Result<Vec<Self>, NetlinkError> {
        let request = dump_request("list neighbours", libc::RTM_GETNEIGH, &[0; 12]);
        socket.dump(request, |kind, body| (kind == libc::RTM_NEWNEIGH).then(|| Self::read(body))?)
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        if u16_at(body, 8)? & libc::NUD_PERMANENT == 0 {
            return None;
        }
        let (mut address, mut mac) = (None, None);
        for (kind, value) in Attributes::new(body.get(12..)?) {
            match kind {
                libc::NDA_DST => address = prefix::address(value),
                libc::NDA_LLADDR => mac = Mac::from_slice(value),
                _ => {}
            }
        }
        Some(Self { link: u32_at(body, 4)?, address: address?, mac: mac?, flags: *body.get(10)? })
    }

    /// Sets it, for good.
    pub fn add(&self) -> Request {
        self.request("add a neighbour", libc::RTM_NEWNEIGH, flags::SET)
            .attr(libc::NDA_LLADDR, &self.mac.bytes())
    }

    /// Takes it away.
    pub fn delete(&self) -> Request {
        self.request("remove a neighbour", libc::RTM_DELNEIGH, flags::NONE).lenient()
    }

    fn request(&self, what: &'static str, kind: u16, flags: u16) -> Request {
        let mut fixed = [0; 12];
        fixed[0] = prefix::family(&self.address);
        fixed[4..8].copy_from_slice(&self.link.to_ne_bytes());
        fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        fixed[10] = self.flags;
        Request::new(what, kind, flags, &fixed).attr(libc::NDA_DST, octets(&self.address).as_ref())
    }
}
