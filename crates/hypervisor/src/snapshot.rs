//! A machine that was saved, and how others come to life from it.
//!
//! The guest's memory is a memfd that is sealed once the machine is saved: from then on the
//! kernel lets nobody change it, not even a monitor that its guest has taken over and that
//! has it open. So one file serves every clone, and no clone sees anything of another.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kata_pager::held_from;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, copy_file_range, fallocate, fcntl_add_seals,
    fcntl_get_seals, memfd_create,
};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::error::{HypervisorError, host};

/// What must not change any more.
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);
const MIB: u64 = 1 << 20;
/// What the host gives and takes back memory by, bytes.
const PAGE: usize = 4096;

/// How a machine comes to life.
#[derive(Debug, Default)]
pub enum Start {
    /// It boots.
    #[default]
    Boot,
    /// It boots, on memory from which [`crate::Hypervisor::save`] makes a [`Snapshot`].
    Template,
    /// It goes on where the machine of the snapshot stood. Everything else of the
    /// configuration must be as that machine's was ([`crate::VmConfig::fingerprint`]), but for
    /// taps and the share, which is plugged.
    Clone {
        /// The saved machine.
        snapshot: Snapshot,
        /// Its memory.
        memory: CloneMemory,
    },
    /// It goes on where the machine of a [`crate::Stem`] stands still, when its monitor is forked
    /// ([`crate::Qemu::order`]). As for a clone, everything else must be as that machine's was.
    Fork {
        /// The memory of the machine that stands still.
        from: StemMemory,
        /// What becomes of it.
        memory: ForkMemory,
    },
}

/// The memory of a machine that stands still, which nobody changes any more.
#[derive(Debug)]
pub struct StemMemory {
    /// All of it.
    pub whole: OwnedFd,
    /// The pages of it that are not as in the template it was cloned from, each in its place: what
    /// the guest has used to build a container, and will use soon in each fork.
    pub lively: OwnedFd,
}

impl StemMemory {
    /// Of a machine that stands still, and the memory of its template.
    pub(crate) fn new(whole: OwnedFd, template: BorrowedFd<'_>) -> io::Result<Self> {
        let lively = changed(whole.as_fd(), template)?;
        Ok(Self { whole, lively })
    }

    /// To hand them to another process.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.whole.as_fd(), self.lively.as_fd()]
    }

    /// As another process has handed them over.
    pub fn from_fds([whole, lively]: [OwnedFd; 2]) -> Self {
        Self { whole, lively }
    }

    /// Bytes of the host's memory that it takes.
    pub fn bytes(&self) -> u64 {
        let blocks = |fd| rustix::fs::fstat(fd).map_or(0, |stat| stat.st_blocks.cast_unsigned());
        self.fds().into_iter().map(blocks).sum::<u64>() * 512
    }
}

/// A file that holds the pages of one that are not in another.
fn changed(now: BorrowedFd<'_>, before: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let changed = memfd("kata-guest-memory-changed")?;
    rustix::fs::ftruncate(&changed, rustix::fs::fstat(now)?.st_size.cast_unsigned())?;
    let [now_file, before] = [now, before].map(|fd| fd.try_clone_to_owned().map(File::from));
    let (now_file, before) = (now_file?, before?);
    let (mut page, mut old) = ([0; PAGE], [0; PAGE]);
    let mut at = 0;
    while let Some(held) = held_from(now, at)? {
        for place in held.clone().step_by(PAGE) {
            now_file.read_exact_at(&mut page, place)?;
            before.read_exact_at(&mut old, place)?;
            if page != old {
                copy_range(now, changed.as_fd(), place, place + PAGE as u64)?;
            }
        }
        at = held.end;
    }
    fcntl_add_seals(&changed, SEALS)?;
    Ok(changed)
}

/// What a fork is to be.
#[derive(Debug)]
pub struct ForkOrder {
    /// Name of the machine.
    pub id: String,
    /// What its memory is.
    pub memory: ForkMemory,
    /// What goes with it, as [`crate::Stem::fork`] expects it.
    pub fds: Vec<OwnedFd>,
}

/// What a clone does with the memory of its snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloneMemory {
    /// Pages are the snapshot's until the clone writes to them. No other process can share
    /// such memory, so nothing by vhost-user.
    Private,
    /// A copy of all that the snapshot holds, which vhost-user processes can share.
    Copied,
}

/// What a fork does with the memory of the machine that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForkMemory {
    /// As [`CloneMemory::Private`].
    Private,
    /// As [`CloneMemory::Copied`].
    Copied,
    /// A copy of what is touched, and beforehand of what will be soon, which vhost-user processes
    /// can share.
    Touched,
}

impl ForkMemory {
    /// As a clone has it; but what would be copied is copied when it is touched, where the kernel
    /// tells of that.
    pub fn of(clone: CloneMemory) -> Self {
        match clone {
            CloneMemory::Private => Self::Private,
            CloneMemory::Copied if kata_pager::is_available() => Self::Touched,
            CloneMemory::Copied => Self::Copied,
        }
    }
}

/// A machine that was saved.
#[derive(Debug)]
pub struct Snapshot {
    memory: OwnedFd,
    devices: OwnedFd,
}

impl Snapshot {
    /// From the descriptors of another process's snapshot.
    ///
    /// # Errors
    /// When one of them can still be changed: then it is none.
    pub fn from_fds(memory: OwnedFd, devices: OwnedFd) -> io::Result<Self> {
        for fd in [&memory, &devices] {
            if !fcntl_get_seals(fd)?.contains(SEALS) {
                return Err(io::Error::other("a snapshot's file is not sealed"));
            }
        }
        Ok(Self { memory, devices })
    }

    /// Its memory and the state of its devices, to hand them to another process.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.memory.as_fd(), self.devices.as_fd()]
    }

    /// Bytes of the host's memory that it takes.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn bytes(&self) -> io::Result<u64> {
        let blocks = |fd| rustix::fs::fstat(fd).map(|stat| stat.st_blocks.cast_unsigned() * 512);
        Ok(blocks(&self.memory)? + blocks(&self.devices)?)
    }

    /// Seals the memory of a machine that has ended, and keeps its devices' state.
    pub(crate) fn seal(memory: OwnedFd, state: &[u8]) -> io::Result<Self> {
        give_back_zeros(memory.as_fd())?;
        let devices = memfd("kata-template-devices")?;
        let mut file = File::from(devices);
        file.write_all(state)?;
        let snapshot = Self { memory, devices: file.into() };
        for fd in snapshot.fds() {
            fcntl_add_seals(fd, SEALS)?;
        }
        Ok(snapshot)
    }

    pub(crate) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// What the devices were.
    pub(crate) fn state(&self) -> io::Result<Vec<u8>> {
        let file = File::from(self.devices.try_clone()?);
        let mut state = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
        // At a place: every process that has the snapshot shares the file's position.
        file.read_exact_at(&mut state, 0)?;
        Ok(state)
    }
}

/// Memory for a guest, all zeros.
pub(crate) fn guest_memory(mib: u32) -> io::Result<OwnedFd> {
    let memory = memfd("kata-guest-memory")?;
    rustix::fs::ftruncate(&memory, u64::from(mib) * MIB)?;
    Ok(memory)
}

fn memfd(name: &str) -> io::Result<OwnedFd> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?)
}

/// A copy of a template's memory that is being made, by a thread of its own.
#[derive(Debug)]
pub(crate) struct Copying(JoinHandle<io::Result<()>>);

impl Copying {
    /// Begins to copy.
    pub(crate) fn begin(from: OwnedFd, to: OwnedFd) -> Self {
        Self(tokio::task::spawn_blocking(move || copy(from.as_fd(), to.as_fd())))
    }

    /// Waits until it is done.
    pub(crate) async fn done(self) -> Result<(), HypervisorError> {
        const STEP: &str = "copy the template's memory";
        self.0.await.map_err(host(STEP))?.map_err(host(STEP))
    }
}

/// Copies what `from` holds; what is not there stays a hole.
fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut at = 0;
    while let Some(held) = held_from(from, at)? {
        at = held.end;
        copy_range(from, to, held.start, held.end)?;
    }
    Ok(())
}

/// Gives back to the host what holds zeros only, of memory that nobody writes to meanwhile: a
/// hole reads the same. A guest that has booted has cleared much that it does not use, and
/// each page is one that nobody has to copy, and no fork has mapped for nothing.
pub(crate) fn give_back_zeros(memory: BorrowedFd<'_>) -> io::Result<()> {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let file = File::from(memory.try_clone_to_owned()?);
    let mut buffer = vec![0; 64 * PAGE];
    let mut at = 0;
    while let Some(held) = held_from(memory, at)? {
        at = held.start;
        while at < held.end {
            let left = usize::try_from(held.end - at).unwrap_or(usize::MAX);
            let read = buffer.len().min(left);
            file.read_exact_at(&mut buffer[..read], at)?;
            let pages: Vec<bool> = buffer[..read].chunks(PAGE).map(|page| page == ZEROS).collect();
            for alike in pages.chunk_by(PartialEq::eq) {
                let length = (alike.len() * PAGE) as u64;
                if alike[0] {
                    fallocate(memory, hole, at, length)?;
                }
                at += length;
            }
        }
    }
    Ok(())
}

fn copy_range(from: BorrowedFd<'_>, to: BorrowedFd<'_>, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let length = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        let copied = copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), length)?;
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// A snapshot for tests.
#[cfg(test)]
pub(crate) fn sample() -> Snapshot {
    let memory = guest_memory(4).unwrap();
    let file = File::from(memory.try_clone().unwrap());
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(b"later", 3 << 20).unwrap();
    Snapshot::seal(memory, b"devices").unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_what_was_saved_and_cannot_be_changed() {
        let snapshot = sample();
        assert_eq!(snapshot.state().unwrap(), b"devices");
        let file = File::from(snapshot.memory.try_clone().unwrap());
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(file.set_len(1).is_err());
        assert!(snapshot.bytes().unwrap() < MIB, "holes take nothing");
    }

    #[test]
    fn a_copy_has_the_data_and_the_holes() {
        let snapshot = sample();
        let copied = guest_memory(4).unwrap();
        copy(snapshot.memory(), copied.as_fd()).unwrap();
        let file = File::from(copied);
        let mut buffer = [0; 5];
        file.read_exact_at(&mut buffer, 3 << 20).unwrap();
        assert_eq!(&buffer, b"later");
        file.read_exact_at(&mut buffer, 1 << 20).unwrap();
        assert_eq!(buffer, [0; 5]);
        assert!(rustix::fs::fstat(&file).unwrap().st_blocks < 64);
    }

    #[test]
    fn what_has_changed_since_is_what_differs() {
        let (before, now) = (guest_memory(1).unwrap(), guest_memory(1).unwrap());
        let [old, new] = [&before, &now].map(|fd| File::from(fd.try_clone().unwrap()));
        for (page, was, is) in [(1, 5, 5), (2, 5, 6), (3, 0, 7), (4, 8, 0)] {
            old.write_all_at(&[was; 9], page * PAGE as u64).unwrap();
            new.write_all_at(&[is; 9], page * PAGE as u64 + u64::from(is == 7)).unwrap();
        }
        let memory = StemMemory::new(now, before.as_fd()).unwrap();
        assert_eq!(memory.bytes(), 7 * PAGE as u64);
        let file = File::from(memory.lively);
        let page = |page: u64| {
            let mut bytes = [9; 2];
            file.read_exact_at(&mut bytes, page * PAGE as u64).unwrap();
            bytes
        };
        assert_eq!([0, 1, 2, 3, 4].map(page), [[0, 0], [0, 0], [6, 6], [0, 7], [0, 0]]);
        assert!(file.set_len(1).is_err());
    }

    #[test]
    fn zeros_are_given_back_and_nothing_else() {
        const PAGES: usize = 300;
        let memory = guest_memory(4).unwrap();
        let file = File::from(memory.try_clone().unwrap());
        // Runs of zeros and of data, some longer than what is read at once; data that is one byte
        // at either end of its page.
        let mut written = vec![0; PAGES * PAGE];
        for page in (0..PAGES).filter(|page| page % 7 == 3 || (100..180).contains(page)) {
            written[page * PAGE + (page % 2) * (PAGE - 1)] = 1;
        }
        file.write_all_at(&written, MIB).unwrap();
        give_back_zeros(memory.as_fd()).unwrap();
        let mut read = vec![9; 4 << 20];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read[..1 << 20].iter().chain(&read[(1 << 20) + written.len()..]).all(|b| *b == 0));
        assert!(read[1 << 20..][..written.len()] == written);
        let data = written.chunks(PAGE).filter(|page| page.contains(&1)).count();
        let mut held = 0;
        let mut at = 0;
        while let Some(range) = held_from(memory.as_fd(), at).unwrap() {
            held += usize::try_from(range.end - range.start).unwrap() / PAGE;
            at = range.end;
        }
        assert_eq!(held, data);
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
    }

    #[test]
    fn what_can_still_be_changed_is_no_snapshot() {
        let open = || guest_memory(1).unwrap();
        assert!(Snapshot::from_fds(open(), open()).is_err());
        let [memory, devices] = sample().fds().map(|fd| fd.try_clone_to_owned().unwrap());
        assert!(Snapshot::from_fds(memory, open()).is_err());
        let memory = sample().memory;
        assert_eq!(Snapshot::from_fds(memory, devices).unwrap().state().unwrap(), b"devices");
    }
}
