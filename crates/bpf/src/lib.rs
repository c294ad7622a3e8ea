//! Programs that the kernel runs for what processes of a cgroup do, or for what arrives in a
//! network namespace: the few instructions and the few calls of `bpf(2)` that are needed.
//!
//! Used on the host and in the guest. The kernel checks each program before it takes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// One instruction; the subset that is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What is done.
    pub code: u8,
    /// The register that is changed or compared.
    pub to: u8,
    /// The other register.
    pub from: u8,
    /// Of memory, in bytes; of a jump, in instructions.
    pub offset: i16,
    /// The number.
    pub value: i32,
}

impl Instruction {
    /// One on a register and a number.
    pub const fn new(code: u8, to: u8, value: i32) -> Self {
        Self { code, to, from: 0, offset: 0, value }
    }

    /// As the kernel reads it: little endian, registers in one byte.
    pub fn encode(&self) -> u64 {
        let [low, high] = self.offset.to_le_bytes();
        let [a, b, c, d] = self.value.to_le_bytes();
        u64::from_le_bytes([self.code, self.to | self.from << 4, low, high, a, b, c, d])
    }
}

/// `*(u32 *)(from + offset)`
pub const LOAD_WORD: u8 = 0x61;
/// `*(u32 *)(to + offset) = value`
pub const STORE_NUMBER: u8 = 0x62;
/// `*(u32 *)(to + offset) = from`
pub const STORE_WORD: u8 = 0x63;
/// `to = value`, whose upper half is the value of the instruction that follows
pub const SET_LONG: u8 = 0x18;
/// `to = value`
pub const SET: u8 = 0xb7;
/// `to = from`
pub const COPY: u8 = 0xbf;
/// `to += value`
pub const ADD: u8 = 0x07;
/// `to &= value`, 64 bits, sign-extended
pub const AND: u8 = 0x57;
/// `to >>= value`
pub const SHIFT_RIGHT: u8 = 0x77;
/// `if to == value goto offset`
pub const JUMP_EQUAL: u8 = 0x15;
/// `if to != value goto offset`
pub const JUMP_NOT_EQUAL: u8 = 0x55;
/// `if to != value goto offset`, 32 bits
pub const JUMP_WORD_NOT_EQUAL: u8 = 0x56;
/// `if to != from goto offset`
pub const JUMP_NOT_SAME: u8 = 0x5d;
/// `r0 = helper number value(r1, …)`
pub const CALL: u8 = 0x85;
/// `return r0`
pub const EXIT: u8 = 0x95;

/// When a program runs (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// A process opens or makes a device node.
    Device = 6,
    /// It connects a socket, by IPv4.
    Connect4 = 10,
    /// The same, by IPv6.
    Connect6 = 11,
    /// It sends a datagram, by IPv4.
    SendMessage4 = 14,
    /// The same, by IPv6.
    SendMessage6 = 15,
    /// It is told who sent a datagram, by IPv4.
    ReceiveMessage4 = 19,
    /// The same, by IPv6.
    ReceiveMessage6 = 20,
    /// It asks to whom a socket is connected, by IPv4.
    PeerName4 = 29,
    /// The same, by IPv6.
    PeerName6 = 30,
    /// Something that arrived in a network namespace looks for the socket that listens for it.
    SocketLookup = 36,
}

impl Hook {
    /// `enum bpf_prog_type`.
    fn program_type(self) -> u32 {
        match self {
            Self::Device => 15,
            Self::SocketLookup => 30,
            _ => 18,
        }
    }

    /// What is to be said of it when a program is loaded: only one kind of program has
    /// several hooks.
    fn expected(self) -> u32 {
        match self {
            Self::Device => 0,
            hook => hook as u32,
        }
    }
}

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;
const LINK_CREATE: libc::c_int = 28;
const ALLOW_MULTI: u32 = 2;
/// How often a program is offered to the kernel.
const RETRIES: usize = 100;
/// The kernel keeps at most so many programs at one cgroup.
const MAX_ATTACHED: usize = 64;

/// `union bpf_attr`, for `PROG_LOAD`, up to the fields used.
#[repr(C, align(8))]
struct Load {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u64; 3],
    name: [u8; 16],
    interface: u32,
    hook: u32,
}

/// `union bpf_attr` for attach, detach and links.
#[repr(C, align(8))]
struct Attach {
    first_fd: u32,
    second_fd: u32,
    hook: u32,
    flags: u32,
    replace_fd: u32,
    rest: [u32; 3],
}

/// `union bpf_attr` for `PROG_QUERY`.
#[repr(C, align(8))]
struct Query {
    target_fd: u32,
    hook: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    rest: [u64; 4],
}

/// `union bpf_attr` for `PROG_GET_FD_BY_ID`.
#[repr(C, align(8))]
struct ById {
    id: u32,
    next: u32,
    flags: u32,
    pad: u32,
}

/// `union bpf_attr`, for `MAP_CREATE`, up to the fields used.
#[repr(C, align(8))]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

/// `union bpf_attr` for `MAP_UPDATE`.
#[repr(C, align(8))]
struct Update {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn call<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: `attr` is a `repr(C)` prefix of `union bpf_attr` of the given size, zeroed
    // where unused; pointers in it are to live buffers of the lengths it states.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    match libc::c_int::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn raw(fd: &impl AsRawFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn own(fd: libc::c_int) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Has the kernel check and take a program.
///
/// # Errors
/// The kernel's.
pub fn load(program: &[Instruction], hook: Hook) -> io::Result<OwnedFd> {
    let words: Vec<u64> = program.iter().map(Instruction::encode).collect();
    let license = c"Apache-2.0";
    let mut attr = Load {
        kind: hook.program_type(),
        instruction_count: u32::try_from(words.len()).unwrap_or(u32::MAX),
        instructions: words.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log: [0; 3],
        name: [0; 16],
        interface: 0,
        hook: hook.expected(),
    };
    // A signal, as of a child that ended, makes the kernel stop looking at it: none comes
    // meanwhile. Other work of the kernel for this thread does the same, and is done once.
    let _undisturbed = Undisturbed::begin();
    for _ in 0..RETRIES {
        match call(PROG_LOAD, &mut attr) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            result => return result.map(own),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// No signal reaches this thread as long as it lives; those that came wait.
struct Undisturbed {
    before: libc::sigset_t,
}

impl Undisturbed {
    fn begin() -> Self {
        // SAFETY: a set of signals is plain data, and both calls are given sets that live.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
            Self { before }
        }
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        // SAFETY: the set is the one that the kernel gave.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut());
        }
    }
}

/// A map that holds one listening socket, under the number 0.
///
/// # Errors
/// When the kernel has no such maps, or does not take the socket.
pub fn socket_map(socket: &impl AsRawFd) -> io::Result<OwnedFd> {
    const SOCKMAP: u32 = 15;
    let mut create = Create { kind: SOCKMAP, key_size: 4, value_size: 4, entries: 1 };
    let map = call(MAP_CREATE, &mut create).map(own)?;
    let (key, value) = (0_u32, raw(socket));
    let mut update = Update {
        map_fd: raw(&map),
        pad: 0,
        key: (&raw const key) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    call(MAP_UPDATE, &mut update)?;
    Ok(map)
}

/// The two instructions that put a map into a register.
pub fn set_map(to: u8, map: &OwnedFd) -> [Instruction; 2] {
    const MAP_DESCRIPTOR: u8 = 1;
    let set =
        Instruction { from: MAP_DESCRIPTOR, ..Instruction::new(SET_LONG, to, map.as_raw_fd()) };
    [set, Instruction::new(0, 0, 0)]
}

fn attachment(first_fd: u32, second_fd: u32, hook: Hook, flags: u32) -> Attach {
    Attach { first_fd, second_fd, hook: hook as u32, flags, replace_fd: 0, rest: [0; 3] }
}

/// Puts a program in force until it is detached or the cgroup goes.
///
/// # Errors
/// The kernel's.
pub fn attach(cgroup: &File, program: &OwnedFd, hook: Hook) -> io::Result<()> {
    let mut attr = attachment(raw(cgroup), raw(program), hook, ALLOW_MULTI);
    call(PROG_ATTACH, &mut attr).map(drop)
}

/// Takes a program out of force.
///
/// # Errors
/// The kernel's.
pub fn detach(cgroup: &File, program: &OwnedFd, hook: Hook) -> io::Result<()> {
    call(PROG_DETACH, &mut attachment(raw(cgroup), raw(program), hook, 0)).map(drop)
}

/// Puts a program in force, at a cgroup or network namespace, for as long as the descriptor
/// is open.
///
/// # Errors
/// The kernel's.
pub fn link(at: &impl AsRawFd, program: &OwnedFd, hook: Hook) -> io::Result<OwnedFd> {
    call(LINK_CREATE, &mut attachment(raw(program), raw(at), hook, 0)).map(own)
}

/// The programs in force.
///
/// # Errors
/// The kernel's.
pub fn attached(cgroup: &File, hook: Hook) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_ATTACHED];
    let mut attr = Query {
        target_fd: raw(cgroup),
        hook: hook as u32,
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MAX_ATTACHED as u32,
        pad: 0,
        rest: [0; 4],
    };
    call(PROG_QUERY, &mut attr)?;
    Ok(ids.into_iter().take(attr.count as usize).collect())
}

/// A program by its number.
///
/// # Errors
/// The kernel's.
pub fn by_id(id: u32) -> io::Result<OwnedFd> {
    call(PROG_GET_FD_BY_ID, &mut ById { id, next: 0, flags: 0, pad: 0 }).map(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let jump = Instruction { offset: 2, ..Instruction::new(JUMP_NOT_EQUAL, 4, 5) };
        assert_eq!(jump.encode(), 0x0000_0005_0002_0455);
        let copy = Instruction { from: 2, ..Instruction::new(COPY, 3, 0) };
        assert_eq!(copy.encode(), 0x23bf);
    }
}
