//! What is read from a namespace is what `ip` put there.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use kata_network::{
    Attachment, LinkKind, Mac, Netns, NetworkError, Tap, check, guest_network, scan,
};

mod common;
use common::{ip, netns, veth};

#[test]
fn a_namespace_is_read_as_it_was_set_up() {
    let (container, outside) = (netns(), netns());
    veth(&container, "eth0", &outside, "peer0");
    ip(
        &container,
        "link set eth0 address 02:42:ac:11:00:02 mtu 1450
         link set eth0 up
         addr add 172.17.0.2/16 brd 172.17.255.255 dev eth0
         addr add fd00::2/64 dev eth0 nodad
         route add default via 172.17.0.1
         route add 10.1.0.0/16 via 172.17.0.9 metric 7 mtu 1400
         route add 192.0.2.1 dev eth0 src 172.17.0.2
         route add default via fd00::1
         route add 10.9.0.0/16 nexthop via 172.17.0.3 nexthop via 172.17.0.4
         route add 10.8.0.0/16 via 172.17.0.3 table 99
         neigh add 172.17.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent
         neigh add 172.17.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud reachable
         link add unused0 type veth peer name unused1",
    );
    let state = scan(&container).unwrap();

    assert_eq!(state.links.len(), 1, "{:?}", state.links);
    let link = &state.links[0];
    assert_eq!((link.name.as_str(), &link.kind, link.mtu), ("eth0", &LinkKind::Veth, 1450));
    assert_eq!(link.mac, Some("02:42:ac:11:00:02".parse().unwrap()));

    let addresses: Vec<_> = state.addresses.iter().map(|a| a.prefix.to_string()).collect();
    assert!(addresses.contains(&"172.17.0.2/16".to_owned()), "{addresses:?}");
    assert!(addresses.contains(&"fd00::2/64".to_owned()), "{addresses:?}");

    let routes: Vec<_> = state.routes.iter().map(|r| (r.destination.to_string(), r)).collect();
    let find = |to: &str| routes.iter().find(|(text, _)| text == to).map(|(_, route)| *route);
    assert_eq!(find("0.0.0.0/0").unwrap().gateway, Some("172.17.0.1".parse().unwrap()));
    assert_eq!(find("::/0").unwrap().gateway, Some("fd00::1".parse().unwrap()));
    let far = find("10.1.0.0/16").unwrap();
    assert_eq!((far.metric, far.mtu), (7, 1400));
    assert_eq!(find("192.0.2.1/32").unwrap().source, Some("172.17.0.2".parse().unwrap()));
    assert_eq!(find("172.17.0.0/16").unwrap().protocol, libc::RTPROT_KERNEL);
    assert!(find("10.9.0.0/16").is_none(), "a route with two next hops was taken");
    assert!(find("10.8.0.0/16").is_none(), "a route of another table was taken");
    let first_gateway = routes.iter().position(|(_, route)| !route.is_on_link()).unwrap();
    assert!(routes[first_gateway..].iter().all(|(_, route)| !route.is_on_link()));

    assert_eq!(state.neighbours.len(), 1);
    assert_eq!(state.neighbours[0].mac, "02:00:00:00:00:07".parse().unwrap());
}

#[test]
fn the_guest_is_told_what_its_nics_stand_for() {
    let (container, outside) = (netns(), netns());
    veth(&container, "eth0", &outside, "peer0");
    veth(&container, "eth1", &outside, "peer1");
    ip(
        &container,
        "link set eth0 up
         link set eth1 up
         addr add 10.0.0.2/24 dev eth0
         addr add 10.0.1.2/24 dev eth1
         route add default via 10.0.0.1",
    );
    let state = scan(&container).unwrap();
    let device = Mac::new([2, 0, 0, 0, 0, 1]);
    let eth0 = state.links.iter().find(|link| link.name == "eth0").unwrap();
    let network = guest_network(&state, &[Attachment { link: eth0.index, device }]);

    assert_eq!(network.interfaces.len(), 1);
    let interface = &network.interfaces[0];
    assert_eq!(interface.device_mac, "02:00:00:00:00:01");
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1500));
    assert!(interface.addresses.contains(&"10.0.0.2/24".to_owned()));
    assert!(network.routes.iter().all(|route| route.interface == "eth0"));
    assert!(network.routes.iter().any(|route| route.gateway == "10.0.0.1"));
}

#[test]
fn an_empty_namespace_has_nothing_for_the_guest() {
    let state = scan(&netns()).unwrap();
    assert_eq!(state, kata_network::NetnsState::default());
}

#[test]
fn the_hosts_network_is_refused_with_what_to_do_instead() {
    let host = Netns::of_process(std::process::id() as i32).unwrap();
    assert!(host.is_host());
    let error = check(&host, None).unwrap_err();
    assert!(matches!(error, NetworkError::Host));
    assert!(error.to_string().contains("-p"), "{error}");
}

#[test]
fn another_containers_network_is_refused() {
    let container = netns();
    check(&container, None).unwrap();
    check(&container, Some("/run/netns/cni-1".as_ref())).unwrap();
    let by_process = check(&container, Some("/proc/4711/ns/net".as_ref())).unwrap_err();
    assert!(matches!(by_process, NetworkError::Foreign(_)));

    let tap = Tap::create(&container, "katatap0").unwrap();
    assert!(matches!(check(&container, None), Err(NetworkError::Foreign(_))));
    assert_eq!(scan(&container).unwrap().links, [], "our own tap was taken for the engine's");
    drop(tap);
    check(&container, None).unwrap();
}

#[test]
fn a_namespace_that_is_gone_is_one_clear_error() {
    let error = Netns::open("/run/netns/kata-test-none".as_ref()).unwrap_err();
    assert!(error.to_string().contains("/run/netns/kata-test-none"), "{error}");
}
