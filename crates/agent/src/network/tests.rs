//! The guest's network against the host's, in namespaces: what the host reads from a
//! container's namespace, the agent makes of another, and reading that gives the same.

use kata_netlink::Ipv6;
use kata_network::{Attachment, Netns, guest_network, scan};
use proptest::prelude::*;

use super::*;

#[path = "../../../network/tests/common/mod.rs"]
mod common;
use common::{ip, netns, veth};

/// NICs of a guest: `nic<n>` with the address [`device`]`(n)`.
fn guest(nics: usize) -> (Netns, Netns) {
    let (guest, wire) = (netns(), netns());
    // As the kernel starts it.
    ip(&guest, "link set lo down");
    for nic in 0..nics {
        veth(&guest, &format!("nic{nic}"), &wire, &format!("peer{nic}"));
        ip(&guest, &format!("link set nic{nic} address {}", device(nic)));
        ip(&wire, &format!("link set peer{nic} up"));
    }
    (guest, wire)
}

fn device(nic: usize) -> Mac {
    Mac::new([2, 0, 0, 0, 1, nic as u8])
}

/// What `configure` does, in a namespace. A pair's end counts as a NIC.
fn configure_in(
    guest: &Netns,
    nics: &mut Nics,
    network: &agent::Network,
) -> Result<(), NetworkError> {
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(nics.configure_those(network, |link| link.kind == LinkKind::Veth))
    };
    guest.run(work).unwrap()
}

/// What the guest would be told of the namespace, its entries in an order of their own.
fn told(netns: &Netns) -> agent::Network {
    let state = scan(netns).unwrap();
    let mut links = state.links.clone();
    links.sort_by(|a, b| a.name.cmp(&b.name));
    let nics = links.iter().enumerate();
    let attached: Vec<_> =
        nics.map(|(nic, link)| Attachment { link: link.index, device: device(nic) }).collect();
    let mut network = guest_network(&state, &attached);
    for interface in &mut network.interfaces {
        interface.addresses.sort();
    }
    network.routes.sort_by_key(|one| format!("{one:?}"));
    network.neighbours.sort_by_key(|one| format!("{one:?}"));
    network
}

/// The order that routes need is the scan's; `told` sorts for the comparison only.
fn take_over(host: &Netns, guest: &Netns, known: &mut Nics) {
    let state = scan(host).unwrap();
    let mut links = state.links.clone();
    links.sort_by(|a, b| a.name.cmp(&b.name));
    let nics = links.iter().enumerate();
    let attached: Vec<_> =
        nics.map(|(nic, link)| Attachment { link: link.index, device: device(nic) }).collect();
    configure_in(guest, known, &guest_network(&state, &attached)).unwrap();
}

/// A container's network as an engine might make it.
#[derive(Clone, Debug)]
struct Engine {
    interfaces: Vec<EngineInterface>,
}

/// Middle bytes of every interface's Ethernet address. A pair's ends do not tell the
/// address they were made with, as NICs do, so it is one for both networks of a test.
type Vendor = [u8; 3];

#[derive(Clone, Debug)]
struct EngineInterface {
    mtu: u32,
    v4: Vec<u8>,
    v6: bool,
    /// As CNI's ptp plug-in does: the network is reached by the gateway only.
    point_to_point: bool,
    routes: u8,
    neighbours: u8,
}

fn engine() -> impl Strategy<Value = Engine> {
    let interface = (
        1280u32..9000,
        proptest::collection::btree_set(2u8..250, 0..3),
        any::<bool>(),
        any::<bool>(),
        0u8..4,
        0u8..3,
    );
    let interface =
        interface.prop_map(|(mtu, v4, v6, point_to_point, routes, neighbours)| EngineInterface {
            mtu,
            v4: v4.into_iter().collect(),
            v6,
            point_to_point,
            routes,
            neighbours,
        });
    proptest::collection::vec(interface, 1..4).prop_map(|interfaces| Engine { interfaces })
}

impl Engine {
    fn build(&self, vendor: Vendor) -> (Netns, Netns) {
        let (container, outside) = (netns(), netns());
        for (n, interface) in self.interfaces.iter().enumerate() {
            veth(&container, &format!("eth{n}"), &outside, &format!("peer{n}"));
            ip(&outside, &format!("link set peer{n} up"));
            ip(&container, &interface.lines(n, vendor));
        }
        // The kernel gives link-local addresses when it notices that there is a peer.
        let link_local = |interface: &agent::Interface| {
            interface.addresses.iter().any(|address| address.starts_with("fe80:"))
        };
        while !told(&container).interfaces.iter().all(link_local) {
            std::thread::sleep(Duration::from_millis(1));
        }
        (container, outside)
    }
}

impl EngineInterface {
    fn lines(&self, n: usize, [a, b, c]: Vendor) -> String {
        let mtu = self.mtu;
        let mut lines = format!(
            "link set eth{n} address 02:{a:02x}:{b:02x}:{c:02x}:00:0{n} mtu {mtu}
             link set eth{n} up\n"
        );
        for host in &self.v4 {
            lines += &format!("addr add 10.{n}.0.{host}/24 brd + dev eth{n}\n");
        }
        let Some(first) = self.v4.first() else { return lines };
        if self.point_to_point {
            lines += &format!(
                "route del 10.{n}.0.0/24 dev eth{n}
                 route add 10.{n}.0.1 dev eth{n} scope link src 10.{n}.0.{first}
                 route add 10.{n}.0.0/24 via 10.{n}.0.1 src 10.{n}.0.{first}\n"
            );
        }
        if n == 0 {
            lines += "route add default via 10.0.0.1\n";
        }
        for route in 0..self.routes {
            let mtu = if route % 2 == 0 { "" } else { "mtu 1300" };
            lines += &format!(
                "route add 172.{n}.{route}.0/24 via 10.{n}.0.1 metric {} {mtu}\n",
                route * 10
            );
        }
        for neighbour in 0..self.neighbours {
            lines += &format!(
                "neigh add 10.{n}.0.25{neighbour} lladdr 02:00:00:00:00:0{neighbour} \
                 dev eth{n} nud permanent\n"
            );
        }
        if self.v6 {
            lines += &format!(
                "addr add fd00:{n}::2/64 dev eth{n} nodad
                 route add fd01:{n}::/32 via fd00:{n}::1\n"
            );
        }
        lines
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn the_guest_becomes_what_the_namespace_is_and_then_what_another_is(
        first in engine(), second in engine(), vendor: Vendor
    ) {
        let (guest, _wire) = guest(3);
        let mut nics = Nics::default();
        for engine in [first, second] {
            let (container, _outside) = engine.build(vendor);
            take_over(&container, &guest, &mut nics);
            prop_assert_eq!(told(&guest), told(&container));
            // Nothing changes when it is said again.
            take_over(&container, &guest, &mut nics);
            prop_assert_eq!(told(&guest), told(&container));
        }
    }
}

/// An interface that is to be like this NIC.
fn interface(nic: usize, name: &str, address: &str) -> agent::Interface {
    agent::Interface {
        device_mac: device(nic).to_string(),
        name: name.to_owned(),
        mac: device(nic).to_string(),
        mtu: 1500,
        addresses: vec![address.to_owned()],
        ..agent::Interface::default()
    }
}

fn network(interfaces: Vec<agent::Interface>) -> agent::Network {
    agent::Network { interfaces, ..agent::Network::default() }
}

#[test]
fn interfaces_may_trade_names() {
    let (guest, _wire) = guest(2);
    let mut nics = Nics::default();
    let both = |a, b| network(vec![interface(0, a, "10.0.0.2/24"), interface(1, b, "10.1.0.2/24")]);
    for (a, b) in [("eth0", "eth1"), ("eth1", "eth0"), ("nic1", "nic0")] {
        configure_in(&guest, &mut nics, &both(a, b)).unwrap();
        let state = scan(&guest).unwrap();
        let named = |nic| state.links.iter().find(|l| l.mac == Some(device(nic))).unwrap();
        assert_eq!((named(0).name.as_str(), named(1).name.as_str()), (a, b));
    }
}

#[test]
fn a_nic_that_is_plugged_later_is_waited_for() {
    let (guest, wire) = (netns(), netns());
    std::thread::scope(|scope| {
        let wanted = network(vec![interface(0, "eth0", "10.0.0.2/24")]);
        let guest = &guest;
        let waiting = scope.spawn(move || configure_in(guest, &mut Nics::default(), &wanted));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished(), "nothing was there to configure");
        veth(guest, "nic0", &wire, "peer0");
        ip(guest, &format!("link set nic0 address {}", device(0)));
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(scan(&guest).unwrap().links[0].name, "eth0");
}

#[test]
fn lo_is_up_even_without_a_network() {
    let (guest, _wire) = guest(0);
    configure_in(&guest, &mut Nics::default(), &agent::Network::default()).unwrap();
    let bind = || std::net::UdpSocket::bind("127.0.0.11:0").map(drop);
    guest.run(bind).unwrap().unwrap();
    assert!(has_ipv6_loopback(&guest));
}

fn has_ipv6_loopback(guest: &Netns) -> bool {
    guest.run(|| std::net::UdpSocket::bind("[::1]:0").is_ok()).unwrap()
}

fn ipv6_off(netns: &Netns, name: &str) -> bool {
    let what = if name == "all" { Ipv6::All } else { Ipv6::On(name) };
    netns.run(|| what.is_off().unwrap()).unwrap()
}

#[test]
fn ipv6_is_off_where_the_engine_switched_it_off() {
    let ((guest, _wire), mut nics) = (guest(2), Nics::default());
    let (container, outside) = (netns(), netns());
    let add = |n: usize, address: &str, off: bool| {
        veth(&container, &format!("eth{n}"), &outside, &format!("peer{n}"));
        container.run(|| Ipv6::On(&format!("eth{n}")).switch(off).unwrap()).unwrap();
        let device = device(n);
        ip(
            &container,
            &format!("link set eth{n} address {device} up\naddr add {address} dev eth{n}"),
        );
    };
    // Docker's network without IPv6, and then another with it for the same container.
    container.run(|| Ipv6::All.switch(true).unwrap()).unwrap();
    add(0, "10.0.0.2/24", true);
    take_over(&container, &guest, &mut nics);
    assert!(["all", "lo", "eth0"].into_iter().all(|name| ipv6_off(&guest, name)));
    assert!(!has_ipv6_loopback(&guest));
    assert_eq!(addresses(&guest), ["10.0.0.2/24"]);

    container.run(|| Ipv6::On("lo").switch(false).unwrap()).unwrap();
    add(1, "fd00::2/64 nodad", false);
    take_over(&container, &guest, &mut nics);
    let off = ["all", "lo", "eth0", "eth1"].map(|name| ipv6_off(&guest, name));
    assert_eq!(off, [true, false, true, false]);
    assert!(has_ipv6_loopback(&guest));
    assert!(addresses(&guest).contains(&"fd00::2/64".to_owned()));
}

#[test]
fn ipv6_that_a_container_switched_for_itself_stays() {
    let ((guest, _wire), mut nics) = (guest(1), Nics::default());
    let one = |address| agent::Network {
        ipv6_off: true,
        loopback_ipv6_off: true,
        ..network(vec![agent::Interface { ipv6_off: true, ..interface(0, "eth0", address) }])
    };
    configure_in(&guest, &mut nics, &one("10.0.0.2/24")).unwrap();
    guest.run(|| Ipv6::All.switch(false).unwrap()).unwrap();
    configure_in(&guest, &mut nics, &one("10.0.0.3/24")).unwrap();
    assert!(["all", "lo", "eth0"].into_iter().all(|name| !ipv6_off(&guest, name)));
    // The next one is on: nothing was off as the host knows it.
    let on = network(vec![interface(0, "eth0", "10.0.0.3/24")]);
    configure_in(&guest, &mut nics, &on).unwrap();
    assert!(!ipv6_off(&guest, "all") && has_ipv6_loopback(&guest));
}

/// Names of all interfaces, also of those that are down.
fn names(guest: &Netns) -> Vec<String> {
    let all = guest.run(|| Link::all(&mut Socket::open().unwrap()).unwrap()).unwrap();
    let mut names: Vec<_> = all.into_iter().map(|link| link.name).collect();
    names.retain(|name| name == "lo" || name.starts_with("eth") || name.starts_with("nic"));
    names.sort();
    names
}

#[test]
fn unused_nics_are_out_of_sight_until_they_are_wanted() {
    let (guest, _wire) = guest(2);
    let mut nics = Nics::default();
    configure_in(&guest, &mut nics, &agent::Network::default()).unwrap();
    assert_eq!(names(&guest), ["lo"]);
    for round in 0..5 {
        let nic = round % 2;
        let one = network(vec![interface(nic, "eth0", "10.0.0.2/24")]);
        configure_in(&guest, &mut nics, &one).unwrap();
        assert_eq!(names(&guest), ["eth0", "lo"]);
        let state = scan(&guest).unwrap();
        assert_eq!(state.links[0].mac, Some(device(nic)));
        assert_eq!(state.addresses[0].prefix.to_string(), "10.0.0.2/24");
        let both =
            vec![interface(nic, "eth0", "10.0.0.2/24"), interface(1 - nic, "eth1", "10.1.0.2/24")];
        configure_in(&guest, &mut nics, &network(both)).unwrap();
        assert_eq!(names(&guest), ["eth0", "eth1", "lo"]);
        configure_in(&guest, &mut nics, &agent::Network::default()).unwrap();
        assert_eq!(names(&guest), ["lo"]);
    }
}

#[test]
fn a_nic_that_is_kept_is_as_before_its_first_use() {
    let (guest, _wire) = guest(1);
    let mut nics = Nics::default();
    let kept = agent::Network { keep_unused: true, ..agent::Network::default() };
    configure_in(&guest, &mut nics, &kept).unwrap();
    assert_eq!(names(&guest), ["lo", "nic0"]);
    let used = vec![interface(0, "eth0", "10.0.0.2/24"), interface(0, "eth1", "fd00::2/64")];
    for interface in used {
        let wanted = network(vec![interface.clone()]);
        configure_in(&guest, &mut nics, &wanted).unwrap();
        // What a router announced went with the link, what was set would not.
        assert_eq!(addresses(&guest), interface.addresses);
        configure_in(&guest, &mut nics, &kept).unwrap();
        assert_eq!(names(&guest), [interface.name.as_str(), "lo"]);
        assert_eq!(addresses(&guest), [""; 0]);
        let links = guest.run(|| Link::all(&mut Socket::open().unwrap()).unwrap()).unwrap();
        assert!(links.iter().all(|link| link.is_up() == link.is_loopback()), "{links:?}");
    }
    configure_in(&guest, &mut nics, &agent::Network::default()).unwrap();
    assert_eq!(names(&guest), ["lo"]);
}

/// All addresses but those of `lo`.
fn addresses(guest: &Netns) -> Vec<String> {
    let all = guest.run(|| Address::all(&mut Socket::open().unwrap()).unwrap()).unwrap();
    let others = all.into_iter().filter(|address| address.link != LOOPBACK);
    others.map(|address| address.prefix.to_string()).collect()
}

#[test]
fn what_a_container_made_for_itself_stays() {
    let (guest, _wire) = guest(1);
    ip(
        &guest,
        "link add tun7 type bridge
         addr add 192.168.7.1/24 dev tun7
         link set tun7 up",
    );
    let one = network(vec![interface(0, "eth0", "10.0.0.2/24")]);
    let mut nics = Nics::default();
    configure_in(&guest, &mut nics, &one).unwrap();
    let other = network(vec![interface(0, "eth0", "10.0.0.3/24")]);
    configure_in(&guest, &mut nics, &other).unwrap();
    let state = scan(&guest).unwrap();
    let addresses: Vec<_> = state.addresses.iter().map(|a| a.prefix.to_string()).collect();
    assert!(addresses.contains(&"192.168.7.1/24".to_owned()), "{addresses:?}");
    assert!(addresses.contains(&"10.0.0.3/24".to_owned()), "{addresses:?}");
    assert!(!addresses.contains(&"10.0.0.2/24".to_owned()), "{addresses:?}");
}

#[test]
fn messages_that_describe_no_network_are_refused() {
    let good = || interface(0, "eth0", "10.0.0.2/24");
    let refused = |interface: agent::Interface| Wanted::parse(&network(vec![interface])).is_err();
    assert!(!refused(good()));
    for name in ["", "lo", "a/b", "a b", "..", "0123456789abcdef"] {
        assert!(refused(agent::Interface { name: name.to_owned(), ..good() }), "{name:?}");
    }
    for mac in ["", "02:00", "01:00:00:00:00:01", "00:00:00:00:00:00"] {
        let device_mac = mac.to_owned();
        assert!(refused(agent::Interface { device_mac, ..good() }), "{mac:?}");
    }
    assert!(refused(agent::Interface { mtu: 67, ..good() }));
    assert!(refused(agent::Interface { addresses: vec!["10.0.0.2".to_owned()], ..good() }));
    assert!(Wanted::parse(&network(vec![good(), good()])).is_err());
    assert!(Wanted::parse(&network(vec![good(); 33])).is_err());

    let route = |interface: &str, destination: &str, family| {
        let (interface, destination) = (interface.to_owned(), destination.to_owned());
        let route = agent::Route { interface, destination, family, ..agent::Route::default() };
        Wanted::parse(&agent::Network { routes: vec![route], ..network(vec![good()]) }).is_err()
    };
    assert!(!route("eth0", "10.0.0.0/8", 4));
    assert!(route("eth1", "10.0.0.0/8", 4));
    assert!(route("eth0", "10.0.0.0/8", 6));
    assert!(route("eth0", "", 5));
}
