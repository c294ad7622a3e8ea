//! A standing thread in whose name system calls are made, and memory for their arguments.

use std::io;
use std::os::fd::RawFd;

use crate::error::{ForkError, step};
use crate::maps::Mapping;
use crate::thread::CloneArguments;
use crate::tracee::{Call, Memory, Registers, Tracee};

/// Memory that is mapped for what calls need, bytes.
const SCRATCH: u64 = 8192;
/// Where texts begin in it, and the room of each, bytes.
const TEXTS: u64 = 4096;
const TEXT: u64 = 256;
/// What is not to be had by way of a file system that is mounted for a fork.
const CLOSED: u64 = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
/// The size of an empty file system: it holds only names.
const EMPTY: &str = "mode=0755,size=1m,nr_inodes=4096";
/// Version of the structures of capset(2) that has 64 capabilities.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Maps the scratch memory of a process, by its first thread.
pub(crate) fn map_scratch(first: Tracee, at: &Registers) -> Result<u64, ForkError> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let arguments = [0, SCRATCH, protection as u64, flags as u64, u64::MAX, 0];
    first.ask("map memory to work with", at, Call::new(libc::SYS_mmap, arguments))
}

/// The first thread of a process, which stands.
pub(crate) struct Puppet<'a> {
    pub tracee: Tracee,
    /// Registers of when it stopped in a system call: by them the instruction is known.
    at: &'a Registers,
    pub memory: Memory,
    scratch: u64,
}

impl<'a> Puppet<'a> {
    pub(crate) fn new(tracee: Tracee, at: &'a Registers, scratch: u64) -> Result<Self, ForkError> {
        Ok(Self { tracee, at, memory: tracee.memory()?, scratch })
    }

    /// Makes a system call, which must return no error.
    pub(crate) fn ask<const N: usize>(
        &self,
        what: &'static str,
        number: libc::c_long,
        arguments: [u64; N],
    ) -> Result<u64, ForkError> {
        self.tracee.ask(what, self.at, Call::new(number, arguments))
    }

    /// Writes into the scratch memory; gives where that is.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<u64, ForkError> {
        self.memory.write(self.scratch + offset, bytes)?;
        Ok(self.scratch + offset)
    }

    /// Where this is in the scratch memory.
    pub(crate) fn scratch(&self, offset: u64) -> u64 {
        self.scratch + offset
    }

    /// Makes a process or a thread; gives it, stopped, and by which number it is known here.
    pub(crate) fn bear(
        &self,
        what: &'static str,
        arguments: &CloneArguments,
    ) -> Result<(Tracee, i32), ForkError> {
        let bytes = arguments.bytes();
        let at = self.write(0, &bytes)?;
        self.tracee.bear(what, self.at, Call::new(libc::SYS_clone3, [at, bytes.len() as u64]))
    }

    pub(crate) fn close(&self, number: RawFd) -> Result<(), ForkError> {
        self.ask("close a descriptor", libc::SYS_close, [word(number)]).map(drop)
    }

    /// Renumbers a descriptor, in the place of what has that number.
    pub(crate) fn place(&self, new: RawFd, number: RawFd) -> Result<(), ForkError> {
        let arguments = [word(new), word(number), libc::O_CLOEXEC as u64];
        self.ask("put a descriptor in its place", libc::SYS_dup3, arguments)?;
        self.close(new)
    }

    /// Mounts a `/proc` that shows this process's PID namespace.
    pub(crate) fn mount_proc(&self) -> Result<(), ForkError> {
        self.mount("proc", "/proc", "", CLOSED | libc::MS_RDONLY).map(drop)
    }

    /// Mounts an empty file system on a directory and opens that, under this number. It may not be
    /// written to; who mounts something below it can.
    pub(crate) fn mount_empty(&self, path: &str, number: RawFd) -> Result<(), ForkError> {
        let target = self.mount("tmpfs", path, EMPTY, CLOSED)?;
        let flags = CLOSED | libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
        self.ask("make a file system read-only", libc::SYS_mount, [0, target, 0, flags])?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let arguments = [word(libc::AT_FDCWD), target, flags as u64];
        let new = self.ask("open a directory", libc::SYS_openat, arguments)?;
        self.place(number_of(new), number)
    }

    /// Mounts a file system; gives where the path is in the scratch memory.
    fn mount(&self, kind: &str, path: &str, options: &str, flags: u64) -> Result<u64, ForkError> {
        const STEP: &str = "mount a file system";
        let mut places = [0; 3];
        for (index, text) in [kind, path, options].into_iter().enumerate() {
            let bytes = [text.as_bytes(), b"\0"].concat();
            if bytes.len() as u64 > TEXT {
                let long = io::Error::from(io::ErrorKind::InvalidFilename);
                return Err(step(STEP, self.tracee.0)(long));
            }
            places[index] = self.write(TEXTS + index as u64 * TEXT, &bytes)?;
        }
        let [kind, target, options] = places;
        self.ask(STEP, libc::SYS_mount, [kind, target, kind, flags, options])?;
        Ok(target)
    }

    /// Maps a file in the place of what is mapped there. `flags`: of mmap(2).
    pub(crate) fn map(
        &self,
        mapping: &Mapping,
        number: RawFd,
        flags: i32,
    ) -> Result<(), ForkError> {
        let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let arguments = [
            mapping.start,
            mapping.length(),
            mapping.protection as u64,
            flags as u64,
            word(number),
            mapping.offset,
        ];
        self.ask("map the memory", libc::SYS_mmap, arguments).map(drop)
    }

    /// Writes down which capabilities threads are to keep; gives the arguments of capset(2).
    pub(crate) fn capabilities(&self, kept: u64) -> Result<[u64; 2], ForkError> {
        let (low, high) = (kept as u32, (kept >> 32) as u32);
        // Version and pid; then effective, permitted and inheritable ones, the lower half first.
        let words = [CAPABILITY_VERSION, 0, low, low, 0, high, high, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = self.write(0, &bytes)?;
        Ok([header, header + 8])
    }
}

/// A descriptor as an argument of a system call.
pub(crate) fn word(number: RawFd) -> u64 {
    u64::from(number.cast_unsigned())
}

/// A descriptor that a system call returned.
pub(crate) fn number_of(word: u64) -> RawFd {
    word as u32 as RawFd
}
