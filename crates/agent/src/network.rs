//! Makes the guest's network what the host says it is.
//!
//! The NICs were plugged before anybody knew what network the container gets, so each
//! interface of the message names the NIC it is for by its first Ethernet address.
//! [`Nics::configure`] may be called again and again: what is there and not wanted goes, and a
//! NIC that no interface uses is put out of the containers' sight ([`Parking`]), unless it is
//! about to be used: the way there and back takes tens of milliseconds. Only the
//! VM's NICs are touched; what containers make for themselves (bridges, tunnels) is theirs.
//!
//! On a fresh boot all of it is one list of interfaces read and one batch of requests
//! sent, because each round trip and each page of code costs under binary translation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use kata_netlink::{
    Address, Groups, Link, LinkKind, Mac, Neighbour, NetlinkError, Prefix, Request, Route, Socket,
    Watch,
};
use kata_protocol::{agent, limits};
use tokio::time::timeout;

mod ipv6;
mod parking;
mod sleeping;
#[cfg(test)]
mod tests;

use ipv6::Switches;
use parking::Parking;
use sleeping::Sleeping;

/// How long a NIC that was plugged may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);
/// Routes, neighbours, or addresses of one interface.
const ENTRIES: usize = 4096;
/// `lo`, in every namespace.
const LOOPBACK: u32 = 1;

/// Why the guest's network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The message does not describe a network.
    #[error("cannot configure the network: {field} {value:?} is invalid")]
    Invalid {
        /// What it says.
        field: &'static str,
        /// The text in question.
        value: String,
    },
    /// More than we take.
    #[error("cannot configure the network: too many {0}")]
    TooMany(&'static str),
    /// No NIC has the address.
    #[error("no network device with address {0} appeared in time: was its NIC plugged?")]
    NoDevice(Mac),
    /// No place for unused NICs.
    #[error("cannot make a network namespace for unused network devices")]
    Parking(#[source] std::io::Error),
    /// A NIC does not start.
    #[error("cannot take a network device into use")]
    Wake(#[source] std::io::Error),
    /// IPv6 does not go off or on.
    #[error("cannot switch IPv6 of {0} off or on")]
    Ipv6(String, #[source] std::io::Error),
    /// The kernel's refusal.
    #[error("cannot configure the network")]
    Netlink(#[from] NetlinkError),
}

/// The NICs of the machine, and what is remembered of its network.
#[derive(Debug, Default)]
pub struct Nics {
    parking: Parking,
    sleeping: Sleeping,
    switches: Switches,
    /// Those of the last message.
    addresses: Vec<Address>,
}

impl Nics {
    /// Of the machine that is all ours.
    pub fn of_guest() -> Self {
        Self { sleeping: Sleeping::of_guest(), ..Self::default() }
    }

    /// Makes the network so, and takes `lo` up. NICs that are still being plugged are waited for.
    ///
    /// # Errors
    /// When the message is invalid, a NIC does not appear, or the kernel refuses something.
    pub async fn configure(&mut self, network: &agent::Network) -> Result<(), NetworkError> {
        // Virtual interfaces have a kind, the VM's own NICs have none.
        self.configure_those(network, |link| link.kind == LinkKind::Device).await
    }

    /// Does ahead what a first network takes.
    ///
    /// # Errors
    /// When a NIC cannot be woken, or there can be no place for unused ones.
    pub fn prepare(&mut self) -> Result<(), NetworkError> {
        self.sleeping.wake(1).map_err(NetworkError::Wake)?;
        self.parking.prepare()
    }

    async fn configure_those(
        &mut self,
        network: &agent::Network,
        is_nic: impl Fn(&Link) -> bool,
    ) -> Result<(), NetworkError> {
        let wanted = Wanted::parse(network)?;
        let mut socket = Socket::open()?;
        let is_wanted = |parked: &Link| wanted.interfaces.iter().any(|one| one.is(parked));
        self.parking.fetch(is_wanted)?;
        self.sleeping.wake(wanted.interfaces.len()).map_err(NetworkError::Wake)?;
        let (links, indexes) = devices(&mut socket, &mut self.sleeping, &wanted).await?;
        let is_unused =
            |link: &Link| is_nic(link) && !link.is_loopback() && !indexes.contains(&link.index);
        let (unused, mut links): (Vec<_>, Vec<_>) = links.into_iter().partition(is_unused);
        if network.keep_unused {
            self.lay_down(&mut socket, &unused)?;
            links.extend(unused);
        } else {
            let unused: Vec<u32> = unused.iter().map(|link| link.index).collect();
            self.parking.put(&mut socket, &unused)?;
        }
        self.switches.set(&wanted, &links, &indexes)?;
        let tables = wanted.resolve(&indexes);
        apply(&mut socket, &wanted, &tables, &links, &indexes)?;
        self.addresses = tables.addresses;
        Ok(())
    }

    /// Takes NICs down, without the addresses that they would keep; all else goes with that.
    fn lay_down(&self, socket: &mut Socket, nics: &[Link]) -> Result<(), NetlinkError> {
        let mut requests = Vec::new();
        for nic in nics.iter().filter(|nic| nic.is_up()) {
            let addresses = self.addresses.iter().filter(|address| address.link == nic.index);
            requests.extend(addresses.map(|a| Address::delete(a.link, a.prefix)));
            requests.push(Link::down(nic.index));
        }
        socket.send(requests)
    }
}

/// Takes `lo` up, which gives it 127.0.0.1/8 and ::1.
///
/// # Errors
/// When the kernel refuses it.
pub fn loopback_up() -> Result<(), NetworkError> {
    Ok(Socket::open()?.send(vec![Link::up(LOOPBACK)])?)
}

/// The message, checked and typed. Routes and neighbours name their interface by its
/// position in `interfaces` until [`Wanted::resolve`] puts the kernel's number there.
struct Wanted {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
    ipv6_off: bool,
    loopback_ipv6_off: bool,
}

struct Interface {
    device: Mac,
    name: String,
    mac: Mac,
    /// 0 leaves what the device has.
    mtu: u32,
    addresses: Vec<Prefix>,
    no_arp: bool,
    ipv6_off: bool,
}

impl Wanted {
    fn parse(network: &agent::Network) -> Result<Self, NetworkError> {
        if network.interfaces.len() > limits::INTERFACES {
            return Err(NetworkError::TooMany("interfaces"));
        }
        if network.routes.len() > ENTRIES || network.neighbours.len() > ENTRIES {
            return Err(NetworkError::TooMany("routes or neighbours"));
        }
        let mut interfaces: Vec<Interface> = Vec::with_capacity(network.interfaces.len());
        for message in &network.interfaces {
            let interface = Interface::parse(message)?;
            let same = |i: &Interface| i.name == interface.name || i.device == interface.device;
            if interfaces.iter().any(same) {
                return Err(invalid("second interface", &interface.name));
            }
            interfaces.push(interface);
        }
        let position = |name: &str| {
            let found = interfaces.iter().position(|interface| interface.name == name);
            found.map(|at| at as u32).ok_or_else(|| invalid("interface", name))
        };
        let routes = network.routes.iter().map(|r| route(r, position(&r.interface)?));
        let routes = routes.collect::<Result<_, _>>()?;
        let neighbours = network.neighbours.iter();
        let neighbours = neighbours.map(|n| neighbour(n, position(&n.interface)?));
        let neighbours = neighbours.collect::<Result<_, _>>()?;
        let agent::Network { ipv6_off, loopback_ipv6_off, .. } = *network;
        Ok(Self { interfaces, routes, neighbours, ipv6_off, loopback_ipv6_off })
    }

    /// All that is to be there, with the kernel's numbers of the interfaces.
    fn resolve(&self, indexes: &[u32]) -> Tables {
        let index = |position: u32| indexes[position as usize];
        let addresses = self.interfaces.iter().zip(indexes).flat_map(|(interface, link)| {
            let address =
                |prefix: &Prefix| Address { link: *link, prefix: *prefix, permanent: true };
            interface.addresses.iter().map(address)
        });
        let routes = self.routes.iter().map(|r| Route { link: index(r.link), ..*r });
        let neighbours = self.neighbours.iter().map(|n| Neighbour { link: index(n.link), ..*n });
        Tables {
            addresses: addresses.collect(),
            routes: routes.collect(),
            neighbours: neighbours.collect(),
        }
    }
}

impl Interface {
    fn parse(message: &agent::Interface) -> Result<Self, NetworkError> {
        const MTU: std::ops::RangeInclusive<u32> = 68..=65535;
        let graphic = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
        let name = message.name.as_str();
        let named = (1..libc::IFNAMSIZ).contains(&name.len()) && name.bytes().all(graphic);
        if !named || name == "." || name == ".." || name == "lo" {
            return Err(invalid("interface name", name));
        }
        if message.mtu != 0 && !MTU.contains(&message.mtu) {
            return Err(invalid("MTU", &message.mtu.to_string()));
        }
        if message.addresses.len() > ENTRIES {
            return Err(NetworkError::TooMany("addresses"));
        }
        let addresses = message.addresses.iter();
        let addresses = addresses.map(|a| a.parse().map_err(|_| invalid("address", a)));
        let device = mac(&message.device_mac)?;
        Ok(Self {
            device,
            name: name.to_owned(),
            mac: if message.mac.is_empty() { device } else { mac(&message.mac)? },
            mtu: message.mtu,
            addresses: addresses.collect::<Result<_, _>>()?,
            no_arp: message.no_arp,
            ipv6_off: message.ipv6_off,
        })
    }
}

fn invalid(field: &'static str, value: &str) -> NetworkError {
    NetworkError::Invalid { field, value: value.chars().take(64).collect() }
}

fn mac(text: &str) -> Result<Mac, NetworkError> {
    let mac = text.parse().ok().filter(|mac: &Mac| mac.is_unicast());
    mac.ok_or_else(|| invalid("Ethernet address", text))
}

fn address(text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| invalid("address", text))
}

fn route(message: &agent::Route, interface: u32) -> Result<Route, NetworkError> {
    let any: IpAddr = match message.family {
        4 => Ipv4Addr::UNSPECIFIED.into(),
        6 => Ipv6Addr::UNSPECIFIED.into(),
        other => return Err(invalid("route family", &other.to_string())),
    };
    let text = &message.destination;
    let destination = match text.as_str() {
        "" => Prefix { address: any, length: 0 },
        text => text.parse().map_err(|_| invalid("route to", text))?,
    };
    if destination.address.is_ipv4() != any.is_ipv4() {
        return Err(invalid("route to", text));
    }
    let byte =
        |field, value: u32| u8::try_from(value).map_err(|_| invalid(field, &value.to_string()));
    Ok(Route {
        destination,
        gateway: address(&message.gateway)?,
        link: interface,
        source: address(&message.source)?,
        scope: byte("route scope", message.scope)?,
        metric: message.metric,
        protocol: match byte("route protocol", message.protocol)? {
            0 => libc::RTPROT_STATIC,
            protocol => protocol,
        },
        onlink: message.onlink,
        mtu: message.mtu,
        several: false,
    })
}

fn neighbour(message: &agent::Neighbour, interface: u32) -> Result<Neighbour, NetworkError> {
    let field = "neighbour";
    Ok(Neighbour {
        link: interface,
        address: address(&message.address)?.ok_or_else(|| invalid(field, ""))?,
        mac: mac(&message.mac)?,
        flags: u8::try_from(message.flags).map_err(|_| invalid(field, &message.address))?,
    })
}

/// All interfaces there are, and the numbers of the wanted ones, once all are there.
async fn devices(
    socket: &mut Socket,
    sleeping: &mut Sleeping,
    wanted: &Wanted,
) -> Result<(Vec<Link>, Vec<u32>), NetworkError> {
    let missing = loop {
        let links = Link::all(socket)?;
        match find(&links, wanted) {
            Ok(indexes) => return Ok((links, indexes)),
            Err(missing) if !sleeping.wake_next().map_err(NetworkError::Wake)? => break missing,
            Err(_) => {}
        }
    };
    // Watched first and looked again after: nothing that appears between is missed.
    let mut watch = Watch::new(Watch::subscribe(Groups::Links)?)?;
    let appear = async {
        loop {
            let links = Link::all(socket)?;
            if let Ok(indexes) = find(&links, wanted) {
                return Ok((links, indexes));
            }
            watch.changed().await?;
        }
    };
    timeout(PATIENCE, appear).await.unwrap_or(Err(NetworkError::NoDevice(missing)))
}

/// The number of each wanted interface's NIC, or the address of the first missing one.
fn find(links: &[Link], wanted: &Wanted) -> Result<Vec<u32>, Mac> {
    let mut found: Vec<u32> = Vec::with_capacity(wanted.interfaces.len());
    for interface in &wanted.interfaces {
        let free = |link: &&Link| !found.contains(&link.index);
        let link = links.iter().filter(free).find(|link| interface.is(link));
        found.push(link.ok_or(interface.device)?.index);
    }
    Ok(found)
}

fn apply(
    socket: &mut Socket,
    wanted: &Wanted,
    tables: &Tables,
    links: &[Link],
    indexes: &[u32],
) -> Result<(), NetworkError> {
    let ours: Vec<&Link> = links.iter().filter(|link| indexes.contains(&link.index)).collect();
    let mut requests = link_requests(wanted, links, indexes);
    let mut present = Tables::default();
    // An interface that was never up, or was laid down, has nothing that could be in the way.
    if ours.iter().any(|link| link.is_up()) {
        socket.send(std::mem::take(&mut requests))?;
        let stale = Tables::read(socket, &ours)?.without(tables);
        socket.send(stale.delete())?;
        // The kernel drops with an address what depends on it, so look again.
        present = Tables::read(socket, &ours)?;
    }
    requests.extend(tables.without(&present).add());
    socket.send(requests)?;
    Ok(())
}

/// What makes the interfaces themselves right.
fn link_requests(wanted: &Wanted, links: &[Link], indexes: &[u32]) -> Vec<Request> {
    let mut requests = Vec::with_capacity(64);
    if !links.iter().any(|link| link.is_loopback() && link.is_up()) {
        requests.push(Link::up(LOOPBACK));
    }
    let holder = |name: &str| {
        indexes
            .iter()
            .zip(&wanted.interfaces)
            .find(|(_, i)| i.name == name)
            .map(|(index, _)| *index)
    };
    for link in links {
        // Its name is another's from now on; it gets its own, if it is to have one, below.
        if holder(&link.name).is_some_and(|index| index != link.index) {
            requests.push(Link::down(link.index));
            let rename = Link::set("rename an interface", link.index, 0, 0);
            requests.push(rename.attr_text(libc::IFLA_IFNAME, &format!("unused{}", link.index)));
        }
    }
    for (index, interface) in indexes.iter().zip(&wanted.interfaces) {
        if let Some(link) = links.iter().find(|link| link.index == *index) {
            interface.requests(link, &mut requests);
        }
    }
    requests
}

impl Interface {
    /// Whether the NIC is the one it names. Drivers that do not tell what address a NIC was
    /// made with: it has that still, or got the wanted one.
    fn is(&self, nic: &Link) -> bool {
        match nic.permanent_mac {
            Some(mac) => mac == self.device,
            None => nic.mac == Some(self.device) || nic.mac == Some(self.mac),
        }
    }

    /// Whether the NIC is this interface already, and in use.
    fn is_made_of(&self, nic: &Link) -> bool {
        nic.is_up() && nic.name == self.name && nic.mac == Some(self.mac)
    }

    fn requests(&self, link: &Link, requests: &mut Vec<Request>) {
        let renamed = link.name != self.name;
        let moved = link.mac != Some(self.mac);
        let resized = self.mtu != 0 && link.mtu != self.mtu;
        let rearped = link.is_no_arp() != self.no_arp;
        if self.is_made_of(link) {
            if resized || rearped {
                requests.push(self.settings(link.index, resized));
            }
            return;
        }
        if link.is_up() {
            requests.push(Link::down(link.index));
        }
        let mut settings = self.settings(link.index, resized);
        if moved {
            settings = settings.attr(libc::IFLA_ADDRESS, &self.mac.bytes());
        }
        if renamed {
            settings = settings.attr_text(libc::IFLA_IFNAME, &self.name);
        }
        requests.push(settings);
        if !self.ipv6_off {
            requests.push(Link::no_own_addresses(link.index));
        }
        requests.push(Link::up(link.index));
    }

    fn settings(&self, link: u32, resized: bool) -> Request {
        let arp = if self.no_arp { libc::IFF_NOARP } else { 0 };
        let request = Link::set("set up an interface", link, arp, libc::IFF_NOARP);
        if resized { request.attr_u32(libc::IFLA_MTU, self.mtu) } else { request }
    }
}

/// What is set on interfaces.
#[derive(Default)]
struct Tables {
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

impl Tables {
    /// What is there on `links`, without what a router announced.
    fn read(socket: &mut Socket, links: &[&Link]) -> Result<Self, NetlinkError> {
        let ours = |index: u32| links.iter().any(|link| link.index == index);
        let mut addresses = Address::all(socket)?;
        addresses.retain(|address| ours(address.link) && address.permanent);
        let mut routes = Route::all(socket)?;
        routes.retain(|route| ours(route.link) && !route.is_announced());
        let mut neighbours = Neighbour::all(socket)?;
        neighbours.retain(|neighbour| ours(neighbour.link));
        Ok(Self { addresses, routes, neighbours })
    }

    fn without(&self, other: &Self) -> Self {
        fn difference<T: Copy + PartialEq>(all: &[T], without: &[T]) -> Vec<T> {
            all.iter().filter(|item| !without.contains(item)).copied().collect()
        }
        Self {
            addresses: difference(&self.addresses, &other.addresses),
            routes: difference(&self.routes, &other.routes),
            neighbours: difference(&self.neighbours, &other.neighbours),
        }
    }

    /// Routes go last: they may need an address to send from.
    fn add(&self) -> Vec<Request> {
        let addresses = self.addresses.iter().map(|a| Address::add(a.link, a.prefix));
        let neighbours = self.neighbours.iter().map(Neighbour::add);
        addresses.chain(neighbours).chain(self.routes.iter().map(Route::add)).collect()
    }

    /// Routes go first, those that others lean on after the others.
    fn delete(&self) -> Vec<Request> {
        let routes = self.routes.iter().rev().map(Route::delete);
        let neighbours = self.neighbours.iter().map(Neighbour::delete);
        let addresses = self.addresses.iter().map(|a| Address::delete(a.link, a.prefix));
        routes.chain(neighbours).chain(addresses).collect()
    }
}
