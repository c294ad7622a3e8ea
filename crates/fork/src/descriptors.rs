//! What becomes of each descriptor in a fork.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::error::{ForkError, step};
use crate::puppet::{Puppet, number_of, word};

/// Descriptors that one message carries at most (`SCM_MAX_FD`).
const MOST: usize = 253;
/// Bytes of a control message's head, and of what is to be read of a message with it.
const HEAD: usize = 16;
/// Major number of the devices that have no state: null, zero, random.
const MEMORY_DEVICES: u32 = 1;
/// Where a message is put together, from the beginning of the scratch memory.
const MESSAGE: u64 = 512;
/// Where its descriptors arrive.
const CONTROL: u64 = 1024;

/// What a descriptor is, as far as that decides what a fork has in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Harmless for as many as have it.
    Stateless,
    /// The memory that the caller named.
    Memory,
    /// An eventfd: a fork has one of its own, with the same count.
    Event { count: u64, flags: u64 },
    /// An epoll set that watches nothing: a fork has one of its own.
    Epoll,
    /// Nothing but another one can take its place.
    Own(String),
}

/// The descriptors of a process that stands still.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pid: i32,
    all: Vec<(RawFd, Kind)>,
    /// By which descriptors come into a fork: our end, and the number of the other one.
    line: (OwnedFd, RawFd),
}

impl Descriptors {
    /// Those of the process; `memory` is what it shares.
    pub(crate) fn of(
        pid: i32,
        memory: &fs::Metadata,
        line: (OwnedFd, RawFd),
    ) -> Result<Self, ForkError> {
        let failed = || step("look at the descriptors", pid);
        let mut all = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed())? {
            let name = entry.map_err(failed())?.file_name();
            let number: Option<RawFd> = name.to_str().and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|number| *number != line.1) else { continue };
            all.push((number, kind(pid, number, memory).map_err(failed())?));
        }
        Ok(Self { pid, all, line })
    }

    /// Whether a fork has its own of all that needs it, if it has its own under these numbers.
    pub(crate) fn check(&self, numbers: &[RawFd]) -> Result<(), ForkError> {
        let unfit = |what| Err(ForkError::Unfit { pid: self.pid, what });
        for (number, kind) in &self.all {
            if let Kind::Own(name) = kind
                && !numbers.contains(number)
            {
                return unfit(format!("descriptor {number} is {name}"));
            }
        }
        match numbers.len() {
            0..=MOST => Ok(()),
            more => unfit(format!("{more} descriptors are to be its own")),
        }
    }

    /// Numbers of those that are the shared memory.
    pub(crate) fn memory(&self) -> impl Iterator<Item = RawFd> {
        let memory = self.all.iter().filter(|(_, kind)| *kind == Kind::Memory);
        memory.map(|(number, _)| *number)
    }

    /// Gives a fork its own.
    pub(crate) fn renew(
        &self,
        fork: &Puppet<'_>,
        given: &[(RawFd, BorrowedFd<'_>)],
    ) -> Result<(), ForkError> {
        self.give(fork, given)?;
        for (number, kind) in &self.all {
            let new = match kind {
                Kind::Event { count, flags } => {
                    fork.ask("make an eventfd", libc::SYS_eventfd2, [*count, *flags])?
                }
                Kind::Epoll => {
                    let flags = [libc::O_CLOEXEC as u64];
                    fork.ask("make an epoll set", libc::SYS_epoll_create1, flags)?
                }
                Kind::Stateless | Kind::Memory | Kind::Own(_) => continue,
            };
            fork.place(number_of(new), *number)?;
        }
        Ok(())
    }

    /// Puts these in the place of those that a fork has under the same numbers.
    pub(crate) fn give(
        &self,
        fork: &Puppet<'_>,
        given: &[(RawFd, BorrowedFd<'_>)],
    ) -> Result<(), ForkError> {
        if given.is_empty() {
            return Ok(());
        }
        let fds: Vec<BorrowedFd<'_>> = given.iter().map(|(_, fd)| *fd).collect();
        self.send(&fds)?;
        let mut both = given.iter().zip(self.receive(fork, given.len())?);
        both.try_for_each(|((number, _), new)| fork.place(new, *number))
    }

    /// Gives a fork one more; by which number it has it.
    pub(crate) fn lend(&self, fork: &Puppet<'_>, fd: BorrowedFd<'_>) -> Result<RawFd, ForkError> {
        self.send(&[fd])?;
        let none = io::Error::from(io::ErrorKind::InvalidData);
        self.receive(fork, 1)?.pop().ok_or_else(|| step("lend a descriptor", self.pid)(none))
    }

    /// Closes a fork's end of the line: what comes by it later is for others.
    pub(crate) fn hang_up(&self, fork: &Puppet<'_>) -> Result<(), ForkError> {
        fork.close(self.line.1)
    }

    fn send(&self, fds: &[BorrowedFd<'_>]) -> Result<(), ForkError> {
        let mut space =
            vec![std::mem::MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(fds));
        let byte = [io::IoSlice::new(&[0])];
        sendmsg(self.line.0.as_fd(), &byte, &mut control, SendFlags::NOSIGNAL)
            .map_err(step("send descriptors to a fork", self.pid))?;
        Ok(())
    }

    /// recvmsg(2), with the structures of the kernel in the scratch memory.
    fn receive(&self, fork: &Puppet<'_>, count: usize) -> Result<Vec<RawFd>, ForkError> {
        const STEP: &str = "receive descriptors";
        let [message, control] = [MESSAGE, CONTROL].map(|offset| fork.scratch(offset));
        let (vector, byte) = (message + 64, message + 80);
        let length = HEAD + count * size_of::<RawFd>();
        fork.memory.write_words(message, &[0, 0, vector, 1, control, length as u64, 0])?;
        fork.memory.write_words(vector, &[byte, 1])?;
        let flags = libc::MSG_CMSG_CLOEXEC as u64;
        fork.ask(STEP, libc::SYS_recvmsg, [word(self.line.1), message, flags])?;
        let mut bytes = vec![0; length];
        fork.memory.read(control, &mut bytes)?;
        let (head, numbers) = bytes.split_at(HEAD);
        if head[..8] != (length as u64).to_ne_bytes() {
            let cut = io::Error::from(io::ErrorKind::InvalidData);
            return Err(step(STEP, fork.tracee.0)(cut));
        }
        let numbers = numbers.chunks_exact(size_of::<RawFd>());
        Ok(numbers.map(|n| RawFd::from_ne_bytes([n[0], n[1], n[2], n[3]])).collect())
    }
}

fn kind(pid: i32, number: RawFd, memory: &fs::Metadata) -> io::Result<Kind> {
    let path = format!("/proc/{pid}/fd/{number}");
    let name = fs::read_link(&path)?.display().to_string();
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
    let field = |key: &str| info.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let number_of = |key, radix| field(key).and_then(|text| u64::from_str_radix(text, radix).ok());
    let flags = number_of("flags:", 8).ok_or(io::ErrorKind::InvalidData)?;
    if let Some(anonymous) = name.strip_prefix("anon_inode:") {
        return Ok(match anonymous {
            "[eventfd]" => Kind::Event {
                count: number_of("eventfd-count:", 16).ok_or(io::ErrorKind::InvalidData)?,
                flags: flags & (libc::O_NONBLOCK | libc::O_CLOEXEC) as u64,
            },
            "[eventpoll]" if field("tfd:").is_none() => Kind::Epoll,
            // It has the signals of whoever reads.
            "[signalfd]" => Kind::Stateless,
            _ => Kind::Own(name),
        });
    }
    let found = fs::metadata(&path)?;
    if (found.dev(), found.ino()) == (memory.dev(), memory.ino()) {
        return Ok(Kind::Memory);
    }
    let writes = flags & libc::O_ACCMODE as u64 != libc::O_RDONLY as u64;
    let only_a_place = flags & libc::O_PATH as u64 != 0;
    let file_type = found.file_type();
    let harmless = if file_type.is_char_device() {
        rustix::fs::major(found.rdev()) == MEMORY_DEVICES
    } else {
        // A directory leads to what is mounted for the process, not for a fork.
        file_type.is_file() && (only_a_place || !writes)
    };
    Ok(if harmless { Kind::Stateless } else { Kind::Own(name) })
}
