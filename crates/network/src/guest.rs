//! What the guest is told of the network it takes over.

use kata_protocol::agent;

use crate::{Address, Mac, Neighbour, NetnsState, Route};

/// Which NIC of the VM stands for which interface of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attachment {
    /// Number of the interface in the namespace.
    pub link: u32,
    /// The address the NIC was plugged with.
    pub device: Mac,
}

/// The network of the guest, such that it becomes what the namespace is. Interfaces that
/// no NIC stands for are left out, with all that uses them.
pub fn guest_network(state: &NetnsState, attached: &[Attachment]) -> agent::Network {
    let named = |index: u32| {
        attached.iter().find(|attachment| attachment.link == index)?;
        state.links.iter().find(|link| link.index == index).map(|link| link.name.clone())
    };
    let interfaces = attached.iter().filter_map(|attachment| interface(state, *attachment));
    let routes = state.routes.iter().filter_map(|r| Some(self::route(r, named(r.link)?)));
    let neighbours =
        state.neighbours.iter().filter_map(|n| Some(self::neighbour(n, named(n.link)?)));
    agent::Network {
        interfaces: interfaces.collect(),
        routes: routes.collect(),
        neighbours: neighbours.collect(),
        ipv6_off: state.ipv6_off,
        loopback_ipv6_off: state.loopback_ipv6_off,
        ..agent::Network::default()
    }
}

fn interface(state: &NetnsState, attachment: Attachment) -> Option<agent::Interface> {
    let link = state.links.iter().find(|link| link.index == attachment.link)?;
    let of_link = |address: &&Address| address.link == link.index;
    let addresses = state.addresses.iter().filter(of_link);
    Some(agent::Interface {
        device_mac: attachment.device.to_string(),
        name: link.name.clone(),
        mac: link.mac.map_or_else(String::new, |mac| mac.to_string()),
        mtu: link.mtu,
        addresses: addresses.map(|address| address.prefix.to_string()).collect(),
        no_arp: link.is_no_arp(),
        ipv6_off: link.ipv6_off,
        ..agent::Interface::default()
    })
}

fn route(route: &Route, interface: String) -> agent::Route {
    let default = route.destination.length == 0;
    agent::Route {
        destination: if default { String::new() } else { route.destination.to_string() },
        gateway: route.gateway.map_or_else(String::new, |gateway| gateway.to_string()),
        interface,
        source: route.source.map_or_else(String::new, |source| source.to_string()),
        scope: u32::from(route.scope),
        family: if route.destination.address.is_ipv4() { 4 } else { 6 },
        metric: route.metric,
        onlink: route.onlink,
        protocol: u32::from(route.protocol),
        mtu: route.mtu,
        ..agent::Route::default()
    }
}

fn neighbour(neighbour: &Neighbour, interface: String) -> agent::Neighbour {
    agent::Neighbour {
        address: neighbour.address.to_string(),
        mac: neighbour.mac.to_string(),
        interface,
        state: u32::from(libc::NUD_PERMANENT),
        flags: u32::from(neighbour.flags),
        ..agent::Neighbour::default()
    }
}
