//! Both ends of the DNS relay together: a name asked for in the guest's namespace is
//! answered by a resolver on the loopback of the container's.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use kata_network::{Netns, serve_dns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

#[path = "../../network/tests/common/mod.rs"]
mod common;
use common::netns;

const RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
const LONG: usize = 5000;

/// Answers by UDP with a cut message, by TCP with a long one.
fn resolver(container: &Netns) {
    let bind =
        || (UdpSocket::bind((RESOLVER, 53)).unwrap(), TcpListener::bind((RESOLVER, 53)).unwrap());
    let (udp, tcp) = container.run(bind).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            // The last byte of the name says whether the answer is too long for UDP.
            buffer[2] |= if buffer[13] == b't' { 0x82 } else { 0x80 };
            let _ = udp.send_to(&buffer[..length], from);
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let mut answer = read_message(&mut stream);
            answer[2] |= 0x80;
            answer.resize(LONG, 7);
            write_message(&mut stream, &answer);
        }
    });
}

fn read_message(stream: &mut TcpStream) -> Vec<u8> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).unwrap();
    message
}

fn write_message(stream: &mut TcpStream, message: &[u8]) {
    stream.write_all(&(message.len() as u16).to_be_bytes()).unwrap();
    stream.write_all(message).unwrap();
}

/// A question for a name of one letter.
fn question(id: u8, name: u8) -> Vec<u8> {
    vec![0, id, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, name, 0, 0, 1, 0, 1]
}

async fn by_udp(question: &[u8]) -> Vec<u8> {
    let mut answer = vec![0; 65535];
    // The relay may still be taking its place; a resolver asks again, too.
    for _ in 0..50 {
        let socket = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
        socket.connect((RESOLVER, 53)).await.unwrap();
        socket.send(question).await.unwrap();
        let received = timeout(Duration::from_millis(200), socket.recv(&mut answer)).await;
        if let Ok(Ok(length)) = received {
            answer.truncate(length);
            return answer;
        }
    }
    panic!("no answer");
}

async fn by_tcp(question: &[u8]) -> Vec<u8> {
    let mut stream = tokio::net::TcpStream::connect((RESOLVER, 53)).await.unwrap();
    // Two on one connection.
    let mut answer = Vec::new();
    for _ in 0..2 {
        stream.write_u16(question.len() as u16).await.unwrap();
        stream.write_all(question).await.unwrap();
        answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut answer).await.unwrap();
    }
    answer
}

/// Takes port 53 of every address, as a container that serves DNS does.
fn serves_dns_itself() -> (UdpSocket, TcpListener) {
    let udp = UdpSocket::bind(("0.0.0.0", 53)).expect("port 53 is free for UDP");
    udp.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (udp, TcpListener::bind(("0.0.0.0", 53)).expect("port 53 is free for TCP"))
}

async fn conversation(container: Netns) {
    let (own, _own_tcp) = serves_dns_itself();
    let (host_end, guest_end) = tokio::io::duplex(1 << 14);
    let guest = tokio::spawn(kata_agent::dns::relay(RESOLVER, guest_end));
    let host = tokio::spawn(async move { serve_dns(&container, RESOLVER, host_end).await });

    let short = by_udp(&question(1, b's')).await;
    assert_eq!((short[1], short[2] & 0x82, short[13]), (1, 0x80, b's'));

    // Resolvers that do not connect look at who answers.
    let unconnected = tokio::net::UdpSocket::bind("0.0.0.0:0").await.unwrap();
    unconnected.send_to(&question(4, b's'), (RESOLVER, 53)).await.unwrap();
    let mut answer = [0; 512];
    let received = timeout(Duration::from_secs(5), unconnected.recv_from(&mut answer)).await;
    assert_eq!(received.unwrap().unwrap().1, (RESOLVER, 53).into());

    // An IPv6 socket reaches it by the address mapped.
    let mapped =
        std::net::SocketAddr::new(Ipv4Addr::new(127, 0, 0, 11).to_ipv6_mapped().into(), 53);
    let six = tokio::net::UdpSocket::bind("[::]:0").await.unwrap();
    six.send_to(&question(5, b's'), mapped).await.unwrap();
    let received = timeout(Duration::from_secs(5), six.recv_from(&mut answer)).await;
    assert_eq!(received.unwrap().unwrap().1, mapped);

    // What goes to the container's own server gets there.
    unconnected.send_to(b"mine", ("127.0.0.1", 53)).await.unwrap();
    // The first questions of all came before the relay was there.
    while own.recv(&mut answer).unwrap() != 4 {}
    assert_eq!(&answer[..4], b"mine");

    // Too long for UDP: marked as cut, and whole by TCP.
    let cut = by_udp(&question(2, b't')).await;
    assert_eq!((cut[1], cut[2] & 0x82), (2, 0x82));
    assert!(cut.len() <= 512, "{} bytes by UDP", cut.len());
    let whole = by_tcp(&question(3, b't')).await;
    assert_eq!((whole[1], whole.len()), (3, LONG));

    // Either end goes with the stream.
    guest.abort();
    timeout(Duration::from_secs(5), host).await.unwrap().unwrap().unwrap();
}

#[test]
fn names_are_resolved_from_the_guest_by_udp_and_tcp() {
    let (guest, container) = (netns(), netns());
    resolver(&container);
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(conversation(container));
    };
    guest.run(run).unwrap();
}
