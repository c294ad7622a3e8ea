//! A network that is connected late is noticed, and DNS is answered over the stream.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::time::Duration;

use kata_network::{Changes, Netns, scan, serve_dns};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

mod common;
use common::{ip, netns, veth};

const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_late_interface_is_noticed_once_it_is_set_up() {
    let (container, outside) = (netns(), netns());
    let mut changes = Changes::watch(&container).unwrap();
    assert_eq!(scan(&container).unwrap().links, []);
    assert!(timeout(Duration::from_millis(50), changes.next()).await.is_err(), "nothing changed");

    let connect = std::thread::spawn(move || {
        veth(&container, "eth0", &outside, "peer0");
        ip(
            &container,
            "addr add 10.0.0.2/24 dev eth0\n link set eth0 up\n route add default via 10.0.0.1",
        );
        (container, outside)
    });
    // `ip` takes its time between the steps, so there may be several changes.
    let (container, _outside) = connect.join().unwrap();
    timeout(SOON, changes.next()).await.expect("no change was noticed").unwrap();
    let state = scan(&container).unwrap();
    assert_eq!(state.links.len(), 1);
    assert!(state.routes.iter().any(|route| !route.is_on_link()));
}

/// A resolver on the namespace's loopback: answers with the question, cut by UDP if the
/// question ends in 't', and with 3000 bytes by TCP.
fn resolver(netns: &Netns) {
    let (udp, tcp) = netns
        .run(|| {
            (UdpSocket::bind((RESOLVER, 53)).unwrap(), TcpListener::bind((RESOLVER, 53)).unwrap())
        })
        .unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            let answer = &mut buffer[..length];
            answer[2] |= if answer.ends_with(b"t") { 0x82 } else { 0x80 };
            let _ = udp.send_to(answer, from);
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut message).unwrap();
            message[2] |= 0x80;
            message.resize(3000, 7);
            stream.write_all(&3000u16.to_be_bytes()).unwrap();
            stream.write_all(&message).unwrap();
        }
    });
}

async fn send(stream: &mut DuplexStream, id: u32, message: &[u8]) {
    stream.write_u32(id).await.unwrap();
    stream.write_u16(message.len() as u16).await.unwrap();
    stream.write_all(message).await.unwrap();
}

async fn receive(stream: &mut DuplexStream) -> (u32, Vec<u8>) {
    let id = timeout(SOON, stream.read_u32()).await.expect("no answer").unwrap();
    let mut message = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut message).await.unwrap();
    (id, message)
}

fn question(id: u16, name: &[u8]) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    message.extend(name);
    message
}

#[tokio::test]
async fn questions_are_answered_by_the_namespaces_own_resolver() {
    let container = netns();
    resolver(&container);
    let (mut guest, host) = tokio::io::duplex(1 << 16);
    let serve = async move { serve_dns(&container, IpAddr::V4(RESOLVER), host).await };
    let server = tokio::spawn(serve);

    // One DNS id twice: the frame's id tells them apart.
    send(&mut guest, 70_000, &question(5, b"a")).await;
    send(&mut guest, 2, &question(5, b"b")).await;
    let mut answers = [receive(&mut guest).await, receive(&mut guest).await];
    answers.sort();
    assert_eq!((answers[0].0, answers[0].1.last()), (2, Some(&b'b')));
    assert_eq!((answers[1].0, answers[1].1.last()), (70_000, Some(&b'a')));
    assert_eq!(answers[0].1[..3], [0, 5, 0x81]);

    // What is no question gets no answer and does no harm.
    send(&mut guest, 3, b"short").await;
    send(&mut guest, 4, &[0xff; 100]).await;
    send(&mut guest, 5, &[0; 60_000]).await;

    // A cut answer is fetched whole by TCP.
    send(&mut guest, 6, &question(9, b"t")).await;
    let (id, message) = receive(&mut guest).await;
    assert_eq!((id, message.len(), &message[..2]), (6, 3000, &[0, 9][..]));

    drop(guest);
    timeout(SOON, server).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_guest_that_floods_and_never_reads_is_bounded_and_harmless() {
    let container = netns();
    resolver(&container);
    let (mut guest, host) = tokio::io::duplex(1 << 12);
    let server = tokio::spawn(async move { serve_dns(&container, RESOLVER.into(), host).await });
    let flood = async {
        for id in 0..20_000 {
            send(&mut guest, id, &question(id as u16, b"flood")).await;
        }
    };
    timeout(Duration::from_secs(20), flood).await.expect("questions were not taken");
    assert!(!server.is_finished());
    drop(guest);
    let _ = timeout(SOON, server).await.expect("the relay did not end with its stream");
}
