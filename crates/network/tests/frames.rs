//! Frames written to a tap arrive beyond the engine's interface, and the answers come back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use kata_network::{Link, Model, Netns, Tap, join, let_answers_in, scan, unjoin};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

mod common;
use common::{ip, netns, veth};

/// QEMU's default virtio-net header on a tap.
const VNET_HEADER: usize = 10;
const GUEST: [u8; 4] = [10, 9, 0, 2];
const PEER: [u8; 4] = [10, 9, 0, 1];
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 2];

/// A container's namespace with eth0 at 10.9.0.2, joined to one with 10.9.0.1.
fn network() -> (Netns, Netns, Link) {
    let (container, outside) = (netns(), netns());
    veth(&container, "eth0", &outside, "peer0");
    ip(
        &container,
        "link set eth0 address 02:00:00:00:09:02 mtu 1400
         link set eth0 up
         addr add 10.9.0.2/24 dev eth0",
    );
    ip(&outside, "link set peer0 up mtu 1400\n addr add 10.9.0.1/24 dev peer0");
    let link = scan(&container).unwrap().links.remove(0);
    (container, outside, link)
}

fn send(tap: &Tap, frame: &[u8]) {
    let mut bytes = vec![0; VNET_HEADER];
    bytes.extend_from_slice(frame);
    File::from(tap.fd.try_clone().unwrap()).write_all(&bytes).unwrap();
}

/// The first frame for which `wanted` holds, within two seconds.
fn receive(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
    let mut file = File::from(tap.fd.try_clone().unwrap());
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        let patience = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let mut fds = [PollFd::new(&tap.fd, PollFlags::IN)];
        if poll(&mut fds, Some(&patience)).unwrap() == 0 {
            continue;
        }
        let mut buffer = [0; 65536];
        let length = file.read(&mut buffer).unwrap();
        let frame = &buffer[VNET_HEADER..length];
        if wanted(frame) {
            return Some(frame.to_vec());
        }
    }
    None
}

fn arp_request() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend(GUEST);
    frame.extend([0; 6]);
    frame.extend(PEER);
    frame
}

fn is_arp_reply(frame: &[u8]) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == PEER
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn echo_request(to: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0, 0x4b, 0x41, 0, 1, 1, 2, 3, 4];
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    let mut packet = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 1, 0, 0];
    packet.extend(GUEST);
    packet.extend(PEER);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    let mut frame = to.to_vec();
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(packet);
    frame.extend(icmp);
    frame
}

fn is_echo_reply(frame: &[u8]) -> bool {
    frame.len() >= 46 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[34] == 0
}

fn ping_through(tap: &Tap) {
    send(tap, &arp_request());
    let reply = receive(tap, is_arp_reply).expect("no ARP reply came back");
    send(tap, &echo_request(&reply[22..28]));
    receive(tap, is_echo_reply).expect("no ICMP reply came back");
}

#[test]
fn a_joined_tap_carries_frames_both_ways() {
    let (container, _outside, link) = network();
    let tap = Tap::create(&container, "katatap0").unwrap();
    join(&container, &link, &tap, Model::TcFilter).unwrap();
    ping_through(&tap);

    // Joining again replaces the first connection.
    join(&container, &link, &tap, Model::TcFilter).unwrap();
    ping_through(&tap);
}

#[test]
fn a_tap_is_gone_with_its_descriptor_and_undone_by_name() {
    let (container, outside, link) = network();
    echo_server(&outside, 53);
    let tap = Tap::create(&container, "katatap0").unwrap();
    join(&container, &link, &tap, Model::TcFilter).unwrap();
    assert!(!ask(&container, "10.9.0.1:53"), "the tap did not take the frames");
    let has_tap =
        || container.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
    assert!(has_tap().unwrap().contains("katatap0"));
    drop(tap);
    assert!(!has_tap().unwrap().contains("katatap0"));

    // The engine's interface gets its frames again.
    unjoin(&container, "eth0", "katatap0").unwrap();
    assert!(ask(&container, "10.9.0.1:53"), "the namespace's own network is broken");
    // And once more, or with names of nothing.
    unjoin(&container, "eth0", "katatap0").unwrap();
    unjoin(&container, "eth7", "katatap7").unwrap();
}

#[test]
fn an_idle_tap_stays_until_it_is_used_and_then_goes_with_its_descriptor() {
    let (container, _outside, link) = network();
    let idle = netns();
    let has_tap = |netns: &Netns, name: &str| {
        let devices = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
        devices.unwrap().contains(name)
    };
    drop(Tap::create_idle(&idle, "katatap1").unwrap());
    assert!(has_tap(&idle, "katatap1"));

    let mut tap = Tap::create_idle(&idle, "katatap2").unwrap();
    tap.move_to(&idle, &container).unwrap();
    join(&container, &link, &tap, Model::TcFilter).unwrap();
    ping_through(&tap);
    drop(tap);
    assert!(!has_tap(&idle, "katatap2") && !has_tap(&container, "katatap2"));
}

#[test]
fn a_macvtap_carries_frames_both_ways_and_is_undone_by_name() {
    let (container, _outside, link) = network();
    let tap = Tap::on_link(&container, &link, "katatap0").unwrap();
    join(&container, &link, &tap, Model::Macvtap).unwrap();
    ping_through(&tap);
    drop(tap);
    unjoin(&container, "eth0", "katatap0").unwrap();
    let devices = container.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
    assert!(!devices.unwrap().contains("katatap0"));
}

#[test]
fn a_second_tap_of_the_same_name_is_refused() {
    let container = netns();
    let _tap = Tap::create(&container, "katatap0").unwrap();
    assert!(Tap::create(&container, "katatap0").is_err());
    for name in ["", "a/b", "a b", "0123456789abcdef", ".", ".."] {
        assert!(Tap::create(&container, name).is_err(), "{name:?} was taken");
    }
}

/// Sends each datagram back.
fn echo_server(outside: &Netns, port: u16) {
    let socket = outside.run(|| UdpSocket::bind(("10.9.0.1", port)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// Asks `server` from inside the namespace; whether an answer came.
fn ask(container: &Netns, server: &str) -> bool {
    let exchange = || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(server).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        socket.send(b"question").unwrap();
        socket.recv(&mut [0; 16]).is_ok()
    };
    container.run(exchange).unwrap()
}

#[test]
fn dns_answers_reach_the_namespace_and_nothing_else_does() {
    let (container, outside, link) = network();
    let tap = Tap::create(&container, "katatap0").unwrap();
    join(&container, &link, &tap, Model::TcFilter).unwrap();
    echo_server(&outside, 53);
    echo_server(&outside, 54);
    assert!(!ask(&container, "10.9.0.1:53"), "the tap did not take the answer");
    let_answers_in(&container, &link, &tap).unwrap();
    assert!(ask(&container, "10.9.0.1:53"), "the answer did not arrive");
    assert!(!ask(&container, "10.9.0.1:54"), "another port's answer arrived");
    ping_through(&tap);
}
