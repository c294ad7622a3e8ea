//! Connections that somebody on the host makes to the namespace's own loopback.
//!
//! Engines reach a pod's ports so: containerd enters the pod's network namespace and dials
//! `localhost`. The process that listens is in the guest, whose loopback is another. So we
//! listen in its place: a program of the namespace hands us each TCP connection to 127.0.0.1
//! or ::1, whatever the port (other loopback addresses, such as Docker's resolver, are left
//! alone). Nothing is done to packets, and nothing stays: the programs are in force only
//! while their descriptors are open.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use kata_bpf::{
    self as bpf, ADD, CALL, COPY, EXIT, Hook, Instruction, JUMP_EQUAL, JUMP_WORD_NOT_EQUAL,
    LOAD_WORD, SET, STORE_NUMBER,
};
use tokio::net::{TcpListener, TcpStream};

use crate::{Netns, NetworkError};

/// What takes the connections, for as long as it lives.
#[derive(Debug)]
pub struct Loopback {
    four: TcpListener,
    /// Hosts may be without IPv6.
    six: Option<TcpListener>,
    #[allow(dead_code, reason = "they are in force while they are open")]
    links: Vec<OwnedFd>,
}

impl Loopback {
    /// Takes the place of whoever would listen in `netns`. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or its kernel (before 5.9) has no such programs.
    pub fn take(netns: &Netns) -> Result<Self, NetworkError> {
        let failed = |e| NetworkError::System("take the place of a namespace's loopback", e);
        let listen = |address: IpAddr| {
            let listener = std::net::TcpListener::bind((address, 0))?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>(listener)
        };
        let (four, six) = netns.run(|| {
            (listen(Ipv4Addr::LOCALHOST.into()), listen(Ipv6Addr::LOCALHOST.into()).ok())
        })?;
        let four = four.map_err(failed)?;
        let mut links = vec![hand_over(netns, Ipv4Addr::LOCALHOST.into(), &four).map_err(failed)?];
        if let Some(six) = &six {
            links.push(hand_over(netns, Ipv6Addr::LOCALHOST.into(), six).map_err(failed)?);
        }
        let four = TcpListener::from_std(four).map_err(failed)?;
        let six = six.map(TcpListener::from_std).transpose().map_err(failed)?;
        Ok(Self { four, six, links })
    }

    /// The next connection, and to which port it was made.
    ///
    /// # Errors
    /// Those of `accept`.
    pub async fn accept(&self) -> io::Result<(TcpStream, u16)> {
        let (stream, _from): (TcpStream, SocketAddr) = match &self.six {
            None => self.four.accept().await?,
            Some(six) => tokio::select! {
                accepted = self.four.accept() => accepted?,
                accepted = six.accept() => accepted?,
            },
        };
        // Of the connection, that is: not the one we were bound to.
        let port = stream.local_addr()?.port();
        Ok((stream, port))
    }
}

fn hand_over(
    netns: &Netns,
    address: IpAddr,
    listener: &std::net::TcpListener,
) -> io::Result<OwnedFd> {
    use std::os::fd::AsFd;
    let map = bpf::socket_map(listener)?;
    let program = bpf::load(&program(address, &map), Hook::SocketLookup)?;
    bpf::link(&netns.as_fd(), &program, Hook::SocketLookup)
}

/// `struct bpf_sk_lookup`: where things are.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Chooses the socket in `map` for what goes to `address` by TCP.
fn program(address: IpAddr, map: &OwnedFd) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const FIRST: u8 = 1;
    const SECOND: u8 = 2;
    const THIRD: u8 = 3;
    const CONTEXT: u8 = 6;
    const SOCKET: u8 = 7;
    const FRAME: u8 = 10;
    const KEY: i16 = -4;
    const MAP_LOOKUP: i32 = 1;
    const RELEASE: i32 = 86;
    const ASSIGN: i32 = 124;
    let op = Instruction::new;
    let copy = |to, from| Instruction { from, ..op(COPY, to, 0) };

    let mut choose = vec![Instruction { offset: KEY, ..op(STORE_NUMBER, FRAME, 0) }];
    choose.extend(bpf::set_map(FIRST, map));
    choose.extend([
        copy(SECOND, FRAME),
        op(ADD, SECOND, KEY.into()),
        op(CALL, 0, MAP_LOOKUP),
        // Over the seven that follow.
        Instruction { offset: 7, ..op(JUMP_EQUAL, RESULT, 0) },
        copy(SOCKET, RESULT),
        copy(FIRST, CONTEXT),
        copy(SECOND, SOCKET),
        op(SET, THIRD, 0),
        op(CALL, 0, ASSIGN),
        copy(FIRST, SOCKET),
        op(CALL, 0, RELEASE),
    ]);
    let tests = tests(address);
    let mut out = vec![copy(CONTEXT, FIRST)];
    for (index, (offset, value)) in tests.iter().enumerate() {
        // Over the tests that follow, of two instructions each, and the choice.
        let rest = (tests.len() - index - 1) * 2 + choose.len();
        out.push(Instruction { from: CONTEXT, offset: *offset, ..op(LOAD_WORD, SECOND, 0) });
        out.push(Instruction {
            offset: rest as i16,
            ..op(JUMP_WORD_NOT_EQUAL, SECOND, *value as i32)
        });
    }
    out.extend(choose);
    // It passes, to the socket that was chosen or to the one that would have been found.
    out.extend([op(SET, RESULT, 1), op(EXIT, 0, 0)]);
    out
}

/// The words of the context that must be so: offset and value, as loaded.
fn tests(address: IpAddr) -> Vec<(i16, u32)> {
    let mut tests = vec![(PROTOCOL, libc::IPPROTO_TCP.cast_unsigned())];
    match address {
        IpAddr::V4(address) => {
            tests.push((FAMILY, libc::AF_INET.cast_unsigned()));
            tests.push((LOCAL_IP4, u32::from_ne_bytes(address.octets())));
        }
        IpAddr::V6(address) => {
            tests.push((FAMILY, libc::AF_INET6.cast_unsigned()));
            let octets = address.octets();
            let words = octets.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes));
            tests.extend((LOCAL_IP6..).step_by(4).zip(words));
        }
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A namespace of a thread that stays for the test, with its loopback up.
    fn namespace() -> Option<Netns> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: only this thread's network namespace changes.
            unsafe {
                rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET).unwrap()
            };
            let up = ["link", "set", "lo", "up"];
            assert!(std::process::Command::new("ip").args(up).status().unwrap().success());
            send.send(Netns::open("/proc/thread-self/ns/net".as_ref()).unwrap()).unwrap();
        });
        Some(receive.recv().unwrap())
    }

    #[tokio::test]
    async fn connections_to_any_port_of_the_loopback_arrive_with_their_port() {
        let Some(netns) = namespace() else { return };
        let loopback = Loopback::take(&netns).unwrap();
        for address in ["127.0.0.1:8080", "[::1]:443"] {
            let address: SocketAddr = address.parse().unwrap();
            let mut client = netns
                .run(|| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5)))
                .unwrap()
                .unwrap();
            let (mut stream, port) = loopback.accept().await.unwrap();
            assert_eq!(port, address.port());
            client.write_all(b"ping").unwrap();
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).await.unwrap();
            stream.write_all(b"pong").await.unwrap();
            client.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"pong");
        }
    }

    #[tokio::test]
    async fn other_loopback_addresses_are_left_alone_and_nothing_stays() {
        let Some(netns) = namespace() else { return };
        let loopback = Loopback::take(&netns).unwrap();
        let resolver: SocketAddr = "127.0.0.11:53".parse().unwrap();
        let own = netns.run(|| std::net::TcpListener::bind(resolver)).unwrap().unwrap();
        let connect = |address: SocketAddr| {
            netns.run(|| std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5)))
        };
        assert!(connect(resolver).unwrap().is_ok());
        assert!(own.accept().is_ok());
        assert!(connect("127.0.0.12:53".parse().unwrap()).unwrap().is_err());
        drop(loopback);
        assert!(connect("127.0.0.1:8080".parse().unwrap()).unwrap().is_err());
    }
}
