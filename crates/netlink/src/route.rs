//! Routes of the main table.

use std::net::IpAddr;

use crate::message::{Attributes, Request, flags, u32_at};
use crate::prefix::{self, Prefix, octets};
use crate::socket::{NetlinkError, Socket, dump_request};

/// A unicast route of the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where to; all zero with length 0 is the default route.
    pub destination: Prefix,
    /// The next machine; none if the destination is on the link. May be IPv6 for an IPv4
    /// destination.
    pub gateway: Option<IpAddr>,
    /// The interface's number; 0 if the route has several (see `several`).
    pub link: u32,
    /// Address to send from.
    pub source: Option<IpAddr>,
    /// `RT_SCOPE_…`; 0 for IPv6.
    pub scope: u8,
    /// Priority: less is better.
    pub metric: u32,
    /// Who set it, `RTPROT_…`.
    pub protocol: u8,
    /// The gateway is on the link although no route says so.
    pub onlink: bool,
    /// Largest packet, 0 for the link's.
    pub mtu: u32,
    /// It names several ways at once, which `gateway` and `link` cannot tell.
    pub several: bool,
}

impl Route {
    /// Every unicast route of the main table.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn all(socket: &mut Socket) -> Result<Vec<Self>, NetlinkError> {
        let request = dump_request("list routes", libc::RTM_GETROUTE, &[0; 12]);
        socket.dump(request, |kind, body| (kind == libc::RTM_NEWROUTE).then(|| Self::read(body))?)
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let fixed: &[u8; 12] = body.get(..12)?.try_into().ok()?;
        let [family, length, _, _, table, protocol, scope, kind, ..] = *fixed;
        let flags = u32_at(body, 8)?;
        let unspecified: IpAddr = match i32::from(family) {
            libc::AF_INET => std::net::Ipv4Addr::UNSPECIFIED.into(),
            libc::AF_INET6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        if kind != libc::RTN_UNICAST || flags & libc::RTM_F_CLONED != 0 {
            return None;
        }
        let mut table = u32::from(table);
        let mut route = Self {
            destination: Prefix::new(unspecified, length)?,
            gateway: None,
            link: 0,
            source: None,
            scope,
            metric: 0,
            protocol,
            onlink: flags & RTNH_F_ONLINK != 0,
            mtu: 0,
            several: false,
        };
        for (kind, value) in Attributes::new(&body[12..]) {
            match kind {
                libc::RTA_TABLE => table = u32_at(value, 0)?,
                libc::RTA_DST => route.destination.address = prefix::address(value)?,
                libc::RTA_GATEWAY => route.gateway = prefix::address(value),
                // struct rtvia: family, then the address.
                libc::RTA_VIA => route.gateway = prefix::address(value.get(2..)?),
                libc::RTA_OIF => route.link = u32_at(value, 0)?,
                libc::RTA_PREFSRC => route.source = prefix::address(value),
                libc::RTA_PRIORITY => route.metric = u32_at(value, 0)?,
                libc::RTA_METRICS => route.mtu = mtu(value),
                libc::RTA_MULTIPATH => route.several = true,
                _ => {}
            }
        }
        (table == u32::from(libc::RT_TABLE_MAIN)).then_some(route)
    }

    /// Whether it leads to a network on the link itself.
    pub fn is_on_link(&self) -> bool {
        self.gateway.is_none()
    }

    /// Whether a router announced it, and the kernel keeps it by itself.
    pub fn is_announced(&self) -> bool {
        const RTPROT_RA: u8 = 9;
        self.protocol == RTPROT_RA
    }

    /// Adds it, behind any other to the same destination with the same metric (each of two
    /// interfaces has its own to `fe80::/64`).
    pub fn add(&self) -> Request {
        let mut request = self.request("add a route", libc::RTM_NEWROUTE, flags::APPEND);
        if let Some(source) = &self.source {
            request = request.attr(libc::RTA_PREFSRC, octets(source).as_ref());
        }
        if self.mtu != 0 {
            request = request.nested(libc::RTA_METRICS, |r| r.attr_u32(RTAX_MTU, self.mtu));
        }
        request
    }

    /// Takes it away.
    pub fn delete(&self) -> Request {
        self.request("remove a route", libc::RTM_DELROUTE, flags::NONE).lenient()
    }

    fn request(&self, what: &'static str, kind: u16, flags: u16) -> Request {
        let onlink = if self.onlink { RTNH_F_ONLINK } else { 0 };
        let family = prefix::family(&self.destination.address);
        let mut fixed = [0; 12];
        fixed[0] = family;
        fixed[1] = self.destination.length;
        fixed[4] = libc::RT_TABLE_MAIN;
        fixed[5] = self.protocol;
        fixed[6] = self.scope;
        fixed[7] = libc::RTN_UNICAST;
        fixed[8..12].copy_from_slice(&onlink.to_ne_bytes());
        let mut request =
            Request::new(what, kind, flags, &fixed).attr_u32(libc::RTA_OIF, self.link);
        if self.destination.length > 0 {
            request = request.attr(libc::RTA_DST, octets(&self.destination.address).as_ref());
        }
        match &self.gateway {
            Some(gateway) if prefix::family(gateway) == family => {
                request = request.attr(libc::RTA_GATEWAY, octets(gateway).as_ref());
            }
            Some(gateway) => {
                let mut via = Vec::with_capacity(18);
                via.extend_from_slice(&u16::from(prefix::family(gateway)).to_ne_bytes());
                via.extend_from_slice(octets(gateway).as_ref());
                request = request.attr(libc::RTA_VIA, &via);
            }
            None => {}
        }
        if self.metric != 0 {
            request = request.attr_u32(libc::RTA_PRIORITY, self.metric);
        }
        request
    }
}

const RTAX_MTU: u16 = 2;
const RTNH_F_ONLINK: u32 = 4;

fn mtu(metrics: &[u8]) -> u32 {
    let mut metrics = Attributes::new(metrics);
    let found = metrics.find(|(kind, _)| *kind == RTAX_MTU);
    found.and_then(|(_, value)| u32_at(value, 0)).unwrap_or(0)
}
