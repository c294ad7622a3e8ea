//! Connecting a tap to an engine's interface, and taking the connection away.

use std::fmt;
use std::str::FromStr;

use kata_netlink::{Link, Request, Socket, flags};

use crate::{Netns, NetworkError, Tap};

/// How the VM's NIC and the engine's interface are connected (`internetworking_model`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Model {
    /// Each frame that arrives at one is sent out of the other, by traffic control.
    #[default]
    TcFilter,
    /// A macvtap on the interface ([`Tap::on_link`]).
    Macvtap,
    /// Not at all.
    None,
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TcFilter => "tcfilter",
            Self::Macvtap => "macvtap",
            Self::None => "none",
        })
    }
}

/// A text that names no [`Model`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network model {0:?} is unknown: use \"tcfilter\", \"macvtap\" or \"none\"")]
pub struct UnknownModel(String);

impl FromStr for Model {
    type Err = UnknownModel;

    fn from_str(text: &str) -> Result<Self, UnknownModel> {
        match text {
            "tcfilter" => Ok(Self::TcFilter),
            "macvtap" => Ok(Self::Macvtap),
            "none" => Ok(Self::None),
            other => Err(UnknownModel(other.to_owned())),
        }
    }
}

/// Makes `tap` carry what `link` carries. For [`Model::Macvtap`] the tap is one
/// [`Tap::on_link`] made, and nothing is left to do. Joining anew replaces what was.
///
/// # Errors
/// When the kernel refuses it; a half made connection may be left, for [`unjoin`].
pub fn join(netns: &Netns, link: &Link, tap: &Tap, model: Model) -> Result<(), NetworkError> {
    if model != Model::TcFilter {
        return Ok(());
    }
    let requests = vec![
        mtu(tap, link.mtu),
        // The host's own stack has nothing to say on the guest's wire.
        Link::no_own_addresses(tap.index),
        Link::up(tap.index),
        Link::up(link.index),
        remove_ingress(link.index),
        remove_ingress(tap.index),
        add_ingress(link.index),
        add_ingress(tap.index),
        redirect(link.index, tap.index),
        redirect(tap.index, link.index),
    ];
    netns.socket()?.send(requests).map_err(|e| netns.netlink(e))
}

fn mtu(tap: &Tap, mtu: u32) -> Request {
    Link::set("set the MTU of a tap", tap.index, libc::IFF_NOARP, libc::IFF_NOARP)
        .attr_u32(libc::IFLA_MTU, mtu)
}

/// Follows an interface whose MTU was changed after it was joined.
///
/// # Errors
/// When the kernel refuses it.
pub fn set_mtu(netns: &Netns, tap: &Tap, value: u32) -> Result<(), NetworkError> {
    netns.socket()?.send(vec![mtu(tap, value)]).map_err(|e| netns.netlink(e))
}

/// Takes a tap out of use after the interface it was joined to has gone: nothing that the
/// guest sends goes anywhere, and it may be joined again.
///
/// # Errors
/// When the kernel refuses it.
pub fn part(netns: &Netns, tap: &Tap) -> Result<(), NetworkError> {
    let requests = vec![Link::down(tap.index), remove_ingress(tap.index)];
    netns.socket()?.send(requests).map_err(|e| netns.netlink(e))
}

/// Undoes [`join`] and [`Tap::on_link`] by the names alone, whatever is left of them.
///
/// # Errors
/// When the kernel refuses it. Interfaces that are gone are none.
pub fn unjoin(netns: &Netns, link: &str, tap: &str) -> Result<(), NetworkError> {
    let mut socket = netns.socket()?;
    let links = Link::all(&mut socket).map_err(|e| netns.netlink(e))?;
    let find = |name: &str| links.iter().find(|link| link.name == name);
    let mut requests = Vec::new();
    requests.extend(find(link).map(|link| remove_ingress(link.index)));
    requests.extend(find(tap).map(|tap| Link::delete(tap.index).lenient()));
    if requests.is_empty() {
        return Ok(());
    }
    socket.send(requests).map_err(|e| netns.netlink(e))
}

pub(crate) fn delete_by_name(
    netns: &Netns,
    socket: &mut Socket,
    name: &str,
) -> Result<(), NetworkError> {
    let links = Link::all(socket).map_err(|e| netns.netlink(e))?;
    match links.iter().find(|link| link.name == name) {
        Some(link) => socket.send(vec![Link::delete(link.index)]).map_err(|e| netns.netlink(e)),
        None => Ok(()),
    }
}

/// Lets the namespace itself ask DNS servers outside, although a VM has taken its
/// interface over. Docker's embedded resolver forwards questions from inside the
/// container's namespace; without this the answers would go to the guest.
///
/// Of what arrives at a joined `link`, ARP is copied, and what comes from port 53 to a
/// small range of ports is kept, for the namespace; the namespace's sockets use only
/// ports of that range.
///
/// # Errors
/// When the kernel refuses it.
pub fn let_answers_in(netns: &Netns, link: &Link, tap: &Tap) -> Result<(), NetworkError> {
    let range = format!("{} {}", PORTS.0, u16::MAX);
    netns
        .run(|| std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", &range))?
        .map_err(|e| NetworkError::System("set the port range of a network namespace", e))?;
    let requests = vec![
        keep_answers(link.index, libc::IPPROTO_UDP, 1),
        keep_answers(link.index, libc::IPPROTO_TCP, 2),
        copy_arp(link.index, tap.index),
    ];
    netns.socket()?.send(requests).map_err(|e| netns.netlink(e))
}

/// First port and mask of the range: the last 256, which guests pick least (Linux's own
/// choice ends at 60999).
const PORTS: (u16, u16) = (0xff00, 0xff00);

const INGRESS_PARENT: u32 = 0xffff_fff1;
const INGRESS: u32 = 0xffff_0000;
/// After every other filter of ours.
const LAST: u16 = 100;
const ETH_P_ALL: u16 = libc::ETH_P_ALL as u16;
const ETH_P_IP: u16 = libc::ETH_P_IP as u16;
const ETH_P_ARP: u16 = libc::ETH_P_ARP as u16;
const TC_ACT_OK: u32 = 0;
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;
const TCA_EGRESS_MIRROR: u32 = 2;

fn remove_ingress(link: u32) -> Request {
    let fixed = tcmsg(link, INGRESS, INGRESS_PARENT, 0);
    let what = "remove the ingress queue of an interface";
    Request::new(what, libc::RTM_DELQDISC, flags::NONE, &fixed).lenient()
}

fn add_ingress(link: u32) -> Request {
    let fixed = tcmsg(link, INGRESS, INGRESS_PARENT, 0);
    let what = "add an ingress queue to an interface (is sch_ingress available?)";
    Request::new(what, libc::RTM_NEWQDISC, flags::NEW, &fixed).attr_text(libc::TCA_KIND, "ingress")
}

/// Everything that arrives at `from` leaves by `to`.
fn redirect(from: u32, to: u32) -> Request {
    filter(from, LAST, ETH_P_ALL, &[Key::default()], |r| {
        action(r, TCA_EGRESS_REDIR, TC_ACT_STOLEN, to)
    })
}

/// ARP goes to `to` as well as to the namespace itself.
fn copy_arp(from: u32, to: u32) -> Request {
    filter(from, 3, ETH_P_ARP, &[Key::default()], |r| action(r, TCA_EGRESS_MIRROR, TC_ACT_OK, to))
}

/// What a DNS server sends to the namespace's ports stays: a filter without an action
/// lets the packet pass.
fn keep_answers(link: u32, protocol: i32, priority: u16) -> Request {
    const DNS: u32 = 53;
    let keys = [
        // IPv4 without options, so that the ports are where they are looked for.
        Key { mask: 0xff00_0000, value: 0x4500_0000, offset: 0 },
        // Not a fragment (of which only the first has ports).
        Key { mask: 0x0000_3fff, value: 0, offset: 4 },
        Key { mask: 0x00ff_0000, value: (protocol as u32) << 16, offset: 8 },
        Key {
            mask: 0xffff_0000 | u32::from(PORTS.1),
            value: DNS << 16 | u32::from(PORTS.0),
            offset: 20,
        },
    ];
    filter(link, priority, ETH_P_IP, &keys, |r| r)
}

/// 32 bits of a packet, in network order, `offset` bytes into its IP header.
#[derive(Clone, Copy, Default)]
struct Key {
    mask: u32,
    value: u32,
    offset: u32,
}

/// A `u32` filter at the ingress of `link` (the one classifier every kernel has).
fn filter(
    link: u32,
    priority: u16,
    protocol: u16,
    keys: &[Key],
    actions: impl FnOnce(Request) -> Request,
) -> Request {
    const TCA_U32_CLASSID: u16 = 1;
    const TCA_U32_SEL: u16 = 5;
    const TC_U32_TERMINAL: u8 = 1;
    let info = u32::from(priority) << 16 | u32::from(protocol.to_be());
    let fixed = tcmsg(link, 0, INGRESS, info);
    // struct tc_u32_sel, then struct tc_u32_key for each key.
    let mut selector = vec![0; 16];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = keys.len() as u8;
    for key in keys {
        selector.extend_from_slice(&key.mask.to_be_bytes());
        selector.extend_from_slice(&key.value.to_be_bytes());
        selector.extend_from_slice(&key.offset.to_ne_bytes());
        selector.extend_from_slice(&[0; 4]);
    }
    let what = "add a traffic filter to an interface (are cls_u32 and act_mirred available?)";
    Request::new(what, libc::RTM_NEWTFILTER, flags::NEW, &fixed)
        .attr_text(libc::TCA_KIND, "u32")
        .nested(libc::TCA_OPTIONS, |request| {
            actions(request.attr_u32(TCA_U32_CLASSID, INGRESS | 1).attr(TCA_U32_SEL, &selector))
        })
}

/// The `mirred` action: send a copy out of `to` (or the packet itself, and stop).
fn action(request: Request, kind: u32, verdict: u32, to: u32) -> Request {
    const TCA_U32_ACT: u16 = 7;
    const FIRST: u16 = 1;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;
    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex.
    let mut parameters = [0; 28];
    parameters[8..12].copy_from_slice(&verdict.to_ne_bytes());
    parameters[20..24].copy_from_slice(&kind.to_ne_bytes());
    parameters[24..28].copy_from_slice(&to.to_ne_bytes());
    request.nested(TCA_U32_ACT, |request| {
        request.nested(FIRST, |request| {
            request
                .attr_text(TCA_ACT_KIND, "mirred")
                .nested(TCA_ACT_OPTIONS, |request| request.attr(TCA_MIRRED_PARMS, &parameters))
        })
    })
}

/// `struct tcmsg`.
fn tcmsg(link: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut fixed = [0; 20];
    fixed[4..8].copy_from_slice(&link.to_ne_bytes());
    fixed[8..12].copy_from_slice(&handle.to_ne_bytes());
    fixed[12..16].copy_from_slice(&parent.to_ne_bytes());
    fixed[16..20].copy_from_slice(&info.to_ne_bytes());
    fixed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_named_as_in_the_configuration() {
        for model in [Model::TcFilter, Model::Macvtap, Model::None] {
            assert_eq!(model.to_string().parse(), Ok(model));
        }
        assert!("bridge".parse::<Model>().is_err());
    }
}
