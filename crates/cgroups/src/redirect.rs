//! What processes send to one address, delivered to another port of it.
//!
//! A resolver that engines put on port 53 of a loopback address must not take that port from
//! a container that serves DNS itself on all addresses. So it listens on some other port, and
//! programs of the cgroup change the port as a process connects or sends, and change it back
//! as the process is told whom it received from. Sockets of other network namespaces are
//! left alone: they have a loopback of their own.

use crate::bpf::{
    self, CALL, COPY, EXIT, Hook, Instruction, JUMP_NOT_SAME, JUMP_WORD_NOT_EQUAL, LOAD_WORD, SET,
    SET_LONG, STORE_WORD,
};
use crate::{CgroupError, Hierarchy};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A redirection, in force for as long as this value lives.
#[derive(Debug)]
pub struct Redirect(
    #[allow(dead_code, reason = "they are in force while they are open")] Vec<OwnedFd>,
);

impl Redirect {
    /// Delivers to `port` what any process in the network namespace of `socket` sends to `to`,
    /// by UDP or TCP, IPv4 or IPv6.
    ///
    /// # Errors
    /// When there is no cgroup v2 here, or the kernel refuses a program.
    pub fn install(
        hierarchy: &Hierarchy,
        to: SocketAddr,
        port: u16,
        socket: impl AsFd,
    ) -> Result<Self, CgroupError> {
        let root = hierarchy.unified().ok_or(CgroupError::NotMounted)?;
        let failed = |source| CgroupError::io("redirect a port in", root, source);
        let cgroup = File::open(root).map_err(failed)?;
        let netns = netns_cookie(socket).map_err(failed)?;
        let mut links = Vec::new();
        for (hook, outward) in hooks(to.ip()) {
            let (seen, put) = if *outward { (to.port(), port) } else { (port, to.port()) };
            let program = program(&words(*hook, to.ip()), seen, put, netns);
            let program = bpf::load(&program, *hook).map_err(failed)?;
            links.push(bpf::link(&cgroup, &program, *hook).map_err(failed)?);
        }
        Ok(Self(links))
    }
}

/// Hooks of sockets that may talk to an address, and whether they look at what is sent
/// (else at what is received).
fn hooks(address: IpAddr) -> &'static [(Hook, bool)] {
    const ALL: [(Hook, bool); 8] = [
        (Hook::Connect4, true),
        (Hook::SendMessage4, true),
        (Hook::ReceiveMessage4, false),
        (Hook::PeerName4, false),
        (Hook::Connect6, true),
        (Hook::SendMessage6, true),
        (Hook::ReceiveMessage6, false),
        (Hook::PeerName6, false),
    ];
    // IPv6 sockets talk to IPv4 as well.
    if address.is_ipv4() { &ALL } else { &ALL[4..] }
}

/// `struct bpf_sock_addr`: where the address is, for hooks of IPv4 and IPv6, and the port.
const IP4: i16 = 4;
const IP6: i16 = 8;
const PORT: i16 = 24;

/// The words that an address is in a hook's context: offset and value, as loaded.
fn words(hook: Hook, address: IpAddr) -> Vec<(i16, u32)> {
    let ip6 = match (hook, address) {
        (
            Hook::Connect4 | Hook::SendMessage4 | Hook::ReceiveMessage4 | Hook::PeerName4,
            IpAddr::V4(address),
        ) => return vec![(IP4, word(address))],
        (_, IpAddr::V4(address)) => address.to_ipv6_mapped(),
        (_, IpAddr::V6(address)) => address,
    };
    let octets = ip6.octets();
    let words = octets.as_chunks::<4>().0.iter().map(|bytes| u32::from_ne_bytes(*bytes));
    (IP6..).step_by(4).zip(words).collect()
}

fn word(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

/// Puts one port in the place of another where the address and the namespace are right.
fn program(address: &[(i16, u32)], seen: u16, put: u16, netns: u64) -> Vec<Instruction> {
    const RESULT: u8 = 0;
    const ARGUMENT: u8 = 1;
    const VALUE: u8 = 2;
    const CONTEXT: u8 = 6;
    const GET_NETNS_COOKIE: i32 = 122;
    let op = Instruction::new;
    let copy = |to, from| Instruction { from, ..op(COPY, to, 0) };
    let port = |port: u16| u32::from(port.to_be());

    let mut tests = address.to_owned();
    tests.push((PORT, port(seen)));
    let change = [
        copy(ARGUMENT, CONTEXT),
        op(CALL, 0, GET_NETNS_COOKIE),
        op(SET_LONG, VALUE, netns as u32 as i32),
        op(0, 0, (netns >> 32) as u32 as i32),
        Instruction { from: VALUE, offset: 2, ..op(JUMP_NOT_SAME, RESULT, 0) },
        op(SET, VALUE, port(put) as i32),
        Instruction { from: VALUE, offset: PORT, ..op(STORE_WORD, CONTEXT, 0) },
    ];
    let mut out = vec![copy(CONTEXT, ARGUMENT)];
    for (index, (offset, value)) in tests.iter().enumerate() {
        // Over the tests that follow, of two instructions each, and the change.
        let rest = (tests.len() - index - 1) * 2 + change.len();
        out.push(Instruction { from: CONTEXT, offset: *offset, ..op(LOAD_WORD, VALUE, 0) });
        out.push(Instruction {
            offset: rest as i16,
            ..op(JUMP_WORD_NOT_EQUAL, VALUE, *value as i32)
        });
    }
    out.extend(change);
    // Nothing is forbidden.
    out.extend([op(SET, RESULT, 1), op(EXIT, 0, 0)]);
    out
}

/// The number of a socket's network namespace that programs see.
fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    #[test]
    fn addresses_are_compared_as_the_kernel_shows_them() {
        let docker = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
        let v4 = u32::from_ne_bytes([127, 0, 0, 11]);
        assert_eq!(words(Hook::Connect4, docker), [(4, v4)]);
        let mapped = u32::from_ne_bytes([0, 0, 0xff, 0xff]);
        assert_eq!(words(Hook::Connect6, docker), [(8, 0), (12, 0), (16, mapped), (20, v4)]);
        let one = u32::from_ne_bytes([0, 0, 0, 1]);
        let localhost = IpAddr::V6(Ipv6Addr::LOCALHOST);
        assert_eq!(words(Hook::Connect6, localhost), [(8, 0), (12, 0), (16, 0), (20, one)]);
        assert!(hooks(localhost).iter().all(|(hook, _)| words(*hook, localhost).len() == 4));
    }

    #[test]
    fn whatever_is_not_meant_jumps_to_the_end() {
        let program = program(&[(4, 1), (8, 2)], 53, 5353, 7 << 40);
        let end = program.len() - 2;
        for (at, instruction) in program.iter().enumerate() {
            if matches!(instruction.code, JUMP_WORD_NOT_EQUAL | JUMP_NOT_SAME) {
                assert_eq!(at + 1 + instruction.offset as usize, end, "{program:?}");
            }
        }
    }
}
