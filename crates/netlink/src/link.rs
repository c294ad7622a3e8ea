//! Network interfaces.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::mac::Mac;
use crate::message::{Attributes, Request, flags, text, u16_at, u32_at};
use crate::socket::{NetlinkError, Socket, dump_request};

const ARPHRD_ETHER: u16 = 1;

/// What drives an interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// A device of the machine (a NIC, a virtual function): the kernel names no kind.
    Device,
    /// One end of a pair.
    Veth,
    /// A sub-interface with an Ethernet address of its own.
    Macvlan,
    /// A macvlan whose frames are a file.
    Macvtap,
    /// A sub-interface that shares its parent's Ethernet address.
    Ipvlan,
    /// A tun or tap.
    Tun,
    /// Another one, by the kernel's name for it.
    Other(String),
}

impl From<String> for LinkKind {
    fn from(kind: String) -> Self {
        match kind.as_str() {
            "veth" => Self::Veth,
            "macvlan" => Self::Macvlan,
            "macvtap" => Self::Macvtap,
            "ipvlan" => Self::Ipvlan,
            "tun" => Self::Tun,
            _ => Self::Other(kind),
        }
    }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Link {
    /// Number, unique in its namespace.
    pub index: u32,
    /// Name, as in `eth0`.
    pub name: String,
    /// Driver.
    pub kind: LinkKind,
    /// Ethernet address; none if it carries something else than Ethernet.
    pub mac: Option<Mac>,
    /// The address the device was made with, where its driver tells.
    pub permanent_mac: Option<Mac>,
    /// Largest packet.
    pub mtu: u32,
    /// `IFF_…`
    pub flags: u32,
    /// Whether IPv6 is switched off on it ([`Ipv6`](crate::Ipv6)).
    pub ipv6_off: bool,
}

impl Link {
    /// Every interface.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub fn all(socket: &mut Socket) -> Result<Vec<Self>, NetlinkError> {
        let request = dump_request("list interfaces", libc::RTM_GETLINK, &header(0, 0, 0))
            .attr_u32(libc::IFLA_EXT_MASK, libc::RTEXT_FILTER_SKIP_STATS as u32);
        socket.dump(request, |kind, body| (kind == libc::RTM_NEWLINK).then(|| Self::read(body))?)
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let ethernet = u16_at(body, 2)? == ARPHRD_ETHER;
        let mut link = Self {
            index: u32_at(body, 4)?,
            name: String::new(),
            kind: LinkKind::Device,
            mac: None,
            permanent_mac: None,
            mtu: 0,
            flags: u32_at(body, 8)?,
            ipv6_off: false,
        };
        for (kind, value) in Attributes::new(body.get(16..)?) {
            match kind {
                libc::IFLA_IFNAME => link.name = text(value),
                libc::IFLA_MTU => link.mtu = u32_at(value, 0)?,
                libc::IFLA_ADDRESS if ethernet => link.mac = Mac::from_slice(value),
                libc::IFLA_PERM_ADDRESS if ethernet => link.permanent_mac = Mac::from_slice(value),
                libc::IFLA_LINKINFO => {
                    let mut inner = Attributes::new(value);
                    if let Some((_, kind)) = inner.find(|(kind, _)| *kind == libc::IFLA_INFO_KIND) {
                        link.kind = text(kind).into();
                    }
                }
                libc::IFLA_AF_SPEC => link.ipv6_off = ipv6_is_off(value),
                _ => {}
            }
        }
        Some(link)
    }

    /// Whether it is up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Whether it is `lo`.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }

    /// Whether it asks nobody for Ethernet addresses.
    pub fn is_no_arp(&self) -> bool {
        self.flags & libc::IFF_NOARP as u32 != 0
    }

    /// A request about the link `index` that sets those of its flags that are in `mask`;
    /// further attributes may be added.
    pub fn set(what: &'static str, index: u32, set: i32, mask: i32) -> Request {
        let fixed = header(index, set as u32, mask as u32);
        Request::new(what, libc::RTM_NEWLINK, flags::NONE, &fixed)
    }

    /// Takes it up.
    pub fn up(index: u32) -> Request {
        Self::set("take an interface up", index, libc::IFF_UP, libc::IFF_UP)
    }

    /// Takes it down.
    pub fn down(index: u32) -> Request {
        Self::set("take an interface down", index, 0, libc::IFF_UP)
    }

    /// Makes the kernel give it no IPv6 address by itself (on a link that is taken up
    /// later). Lenient: a kernel without IPv6 gives none anyway.
    pub fn no_own_addresses(index: u32) -> Request {
        const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
        const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
        Self::set("switch automatic addresses off", index, 0, 0)
            .nested(libc::IFLA_AF_SPEC, |request| {
                request.nested(libc::AF_INET6 as u16, |request| {
                    request.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
                })
            })
            .lenient()
    }

    /// Moves it into another network namespace, where it is down and has nothing of what was
    /// set on it but its Ethernet address and MTU. It is called `name` there, in which the
    /// kernel replaces a `%d` by the first number that is free.
    pub fn move_to(index: u32, netns: BorrowedFd<'_>, name: &str) -> Request {
        let fixed = header(index, 0, 0);
        let what = "move an interface to another network namespace";
        Request::new(what, libc::RTM_NEWLINK, flags::NONE, &fixed)
            .attr(libc::IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes())
            .attr_text(libc::IFLA_IFNAME, name)
    }

    /// Removes it.
    pub fn delete(index: u32) -> Request {
        let fixed = header(index, 0, 0);
        Request::new("remove an interface", libc::RTM_DELLINK, flags::NONE, &fixed)
    }

    /// Makes one of `kind` called `name`; further attributes may be added.
    pub fn create(name: &str, kind: &str, data: impl FnOnce(Request) -> Request) -> Request {
        let fixed = header(0, 0, 0);
        Request::new("make an interface", libc::RTM_NEWLINK, flags::NEW, &fixed)
            .attr_text(libc::IFLA_IFNAME, name)
            .nested(libc::IFLA_LINKINFO, |request| {
                request.attr_text(libc::IFLA_INFO_KIND, kind).nested(libc::IFLA_INFO_DATA, data)
            })
    }
}

/// From what each address family says of an interface: of IPv6, numbers in the order of
/// `linux/ipv6.h`.
fn ipv6_is_off(families: &[u8]) -> bool {
    const IFLA_INET6_CONF: u16 = 2;
    const DEVCONF_DISABLE_IPV6: usize = 26;
    let ipv6 = Attributes::new(families).find(|(family, _)| *family == libc::AF_INET6 as u16);
    ipv6.and_then(|(_, ipv6)| Attributes::new(ipv6).find(|(kind, _)| *kind == IFLA_INET6_CONF))
        .and_then(|(_, numbers)| u32_at(numbers, DEVCONF_DISABLE_IPV6 * 4))
        .is_some_and(|off| off != 0)
}

/// `struct ifinfomsg`.
fn header(index: u32, flags: u32, mask: u32) -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..16].copy_from_slice(&mask.to_ne_bytes());
    fixed
}
