//! Reading what an engine put into a network namespace.

use std::collections::HashSet;

use kata_netlink::{Address, Ipv6, Link, Neighbour, NetlinkError, Route, Socket};
use tracing::warn;

use crate::tap::is_ours;
use crate::{Netns, NetworkError};

/// The network of a namespace, as far as a guest takes it over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsState {
    /// Ethernet interfaces in use, by number; without `lo` and our own taps.
    pub links: Vec<Link>,
    /// Their addresses, in the kernel's order.
    pub addresses: Vec<Address>,
    /// Their routes in the main table, in an order in which they can be set: those on
    /// the link before those that need a gateway.
    pub routes: Vec<Route>,
    /// Their permanent neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Whether IPv6 is off, or the host has none.
    pub ipv6_off: bool,
    /// Whether it is on `lo`.
    pub loopback_ipv6_off: bool,
}

/// Reads the namespace. Takes about a millisecond.
///
/// # Errors
/// When it cannot be entered, or the kernel does not list it.
pub fn scan(netns: &Netns) -> Result<NetnsState, NetworkError> {
    let (socket, ipv6_off) = netns.run(|| (Socket::open(), Ipv6::All.is_off().unwrap_or(true)))?;
    let state = socket.and_then(|mut socket| read(&mut socket));
    let state = state.map_err(|error| netns.netlink(error))?;
    Ok(NetnsState { ipv6_off, ..state })
}

fn read(socket: &mut Socket) -> Result<NetnsState, NetlinkError> {
    let mut links = Link::all(socket)?;
    let mut addresses = Address::all(socket)?;
    let mut routes = Route::all(socket)?;
    let mut neighbours = Neighbour::all(socket)?;

    let addressed: HashSet<u32> = addresses.iter().map(|address| address.link).collect();
    let loopback_ipv6_off = links.iter().any(|link| link.is_loopback() && link.ipv6_off);
    links.retain(|link| is_for_the_guest(link, addressed.contains(&link.index)));
    links.sort_by_key(|link| link.index);
    let kept: HashSet<u32> = links.iter().map(|link| link.index).collect();
    addresses.retain(|address| kept.contains(&address.link));
    neighbours.retain(|neighbour| kept.contains(&neighbour.link));
    routes.retain(|route| {
        if route.several {
            warn!(destination = %route.destination, "route with several next hops is left out");
        }
        // What a router announces, the guest hears by itself.
        !route.several && kept.contains(&route.link) && !route.is_announced()
    });
    // Stable: among equals the kernel's order stays.
    routes.sort_by_key(|route| !route.is_on_link());
    for link in &mut links {
        // Carrier, multicast and the like come and go, and are the guest's own business.
        link.flags &= (libc::IFF_UP | libc::IFF_NOARP) as u32;
    }
    Ok(NetnsState { links, addresses, routes, neighbours, loopback_ipv6_off, ipv6_off: false })
}

/// Kernels make tunnels (`tunl0`, `sit0`) in every namespace: down and without an address.
fn is_for_the_guest(link: &Link, addressed: bool) -> bool {
    if link.is_loopback() || is_ours(link) || !(link.is_up() || addressed) {
        return false;
    }
    if link.mac.is_none() {
        warn!(link = link.name, "interface that is no Ethernet is left out");
        return false;
    }
    true
}
