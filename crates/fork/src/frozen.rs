//! The process that stands still, and its forks.

use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use kata_pager::{Faults, Mapping as Piece, Origin};
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};
use rustix::process::{pidfd_getfd, pidfd_open, pidfd_send_signal};

use crate::by_page;
use crate::descriptors::Descriptors;
use crate::error::{ForkError, step};
use crate::maps::{self, Mapping};
use crate::puppet::{Puppet, map_scratch, number_of, word};
use crate::thread::Thread;
use crate::tracee::{self, Tracee, waits};
use crate::zeros;

/// Namespaces of a fork's own. It is somebody in them, and nobody outside.
const NAMESPACES: i32 = libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS;
/// Where the number of a thread to be made is in the scratch memory, and the status of a fork.
const NUMBER: u64 = 128;
const STATUS: u64 = 256;
/// Field of `/proc/pid/stat` with the address of the arguments, behind the name (proc(5): 48).
const ARGUMENTS_START: usize = 48 - 3;
/// How often a process is looked at whose threads are to come to rest, and how long it runs
/// between two looks.
const LOOKS: u32 = 200;
const LOOK: Duration = Duration::from_millis(10);

/// What a fork's shared memory is.
#[derive(Clone, Copy, Debug)]
pub enum Memory<'a> {
    /// What the frozen process has, page by page until the fork writes to one.
    Private,
    /// This file, which holds a copy of it.
    Shared(BorrowedFd<'a>),
    /// A file that is empty: who is given [`Forked::touches`] copies what the fork touches.
    Touched {
        /// That file, as long as the memory.
        file: BorrowedFd<'a>,
        /// The device of `kata_pager`.
        device: BorrowedFd<'a>,
    },
}

/// What a fork touches of its memory.
#[derive(Debug)]
pub struct Touches {
    /// It waits until these are served. If the last descriptor of them is closed before it has
    /// ended, it goes on with zeros.
    pub faults: Faults,
    /// Where its memory is that has something to be copied.
    pub pieces: Vec<Piece>,
}

/// What is a fork's own.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Descriptors, by the number of what they stand for.
    pub given: &'a [(RawFd, BorrowedFd<'a>)],
    /// Directories in which it has an empty file system of its own, by path: what is mounted
    /// below them is for one process. With them comes the number by which it has each open.
    pub emptied: &'a [(RawFd, &'a str)],
    /// The memory that the process shares.
    pub memory: Memory<'a>,
    /// The argument of the command line that is another for each, and what it is to be: no longer.
    pub argument: (&'a str, &'a str),
    /// Capabilities that it keeps, a set of bits: over files of users that we have, too.
    pub capabilities: u64,
}

/// A process that was made.
#[derive(Debug)]
pub struct Forked {
    /// As we know it.
    pub pid: i32,
    /// To signal it, and to learn that it ended.
    pub pidfd: OwnedFd,
    /// With memory of which it has what it touches.
    pub touches: Option<Touches>,
    /// As its parent knows it, which is the frozen process.
    number: i32,
}

/// A process that stands still.
///
/// All calls have to be made by the thread that froze it.
#[derive(Debug)]
pub struct Frozen {
    pid: i32,
    pidfd: OwnedFd,
    /// The first of them is the process's first.
    threads: Vec<Thread>,
    descriptors: Descriptors,
    /// Mappings of the shared memory.
    shared: Vec<Mapping>,
    /// The parts of them that hold something.
    held: Vec<Piece>,
    scratch: u64,
    /// The command line, and where it is.
    arguments: (u64, Vec<u8>),
    user_map: String,
    group_map: String,
}

impl Frozen {
    /// Brings a process to a stand when all its threads wait for something, which they have to do
    /// on their own within two seconds. It is the first of its PID namespace and has a `/proc`.
    /// From then on nobody can change `memory`, the one file that it maps to share it: `settle`
    /// is called before, while nothing of the process runs any more.
    ///
    /// # Errors
    /// It may not be traced, or has what two processes cannot have. It must be ended then.
    pub fn freeze(
        pid: i32,
        memory: BorrowedFd<'_>,
        settle: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, ForkError> {
        let pidfd = pidfd_of(pid)?;
        let tracees = stop_all(pid)?;
        let first = tracees[0].registers()?;
        let scratch = map_scratch(tracees[0], &first)?;
        let bytes = tracees[0].memory()?;
        let threads = tracees.into_iter().map(|tracee| Thread::of(tracee, scratch, &bytes));
        let threads = threads.collect::<Result<Vec<_>, _>>()?;
        let line = line(&Puppet::new(threads[0].tracee, &first, scratch)?, &pidfd)?;
        settle().map_err(step("settle the shared memory", pid))?;
        fcntl_add_seals(memory, SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW)
            .map_err(step("seal the shared memory", pid))?;
        let look = || step("look at the shared memory", pid);
        let memory = memory.try_clone_to_owned().map_err(look())?;
        let found = memory.try_clone().and_then(|fd| File::from(fd).metadata()).map_err(look())?;
        let shared = shared(pid, found.ino())?;
        let pieces: Vec<Piece> = shared.iter().map(Mapping::piece).collect();
        let held = Origin::new(memory).held(&pieces).map_err(look())?;
        let descriptors = Descriptors::of(pid, &found, line)?;
        let own = |name| {
            let path = format!("/proc/self/{name}");
            let text = fs::read_to_string(path).map_err(step("read our own ids for a fork", pid));
            text.map(|text| to_itself(&text))
        };
        let frozen = Self {
            pid,
            pidfd,
            descriptors,
            shared,
            held,
            scratch,
            arguments: arguments(pid)?,
            user_map: own("uid_map")?,
            group_map: own("gid_map")?,
            threads,
        };
        frozen.prepare()?;
        Ok(frozen)
    }

    /// What is done once, for all forks.
    fn prepare(&self) -> Result<(), ForkError> {
        let first = self.first()?;
        // None of them is to look into another, should it ever see one.
        let arguments = [libc::PR_SET_DUMPABLE as u64, 0];
        first.ask("make the memory unreadable", libc::SYS_prctl, arguments)?;
        for mapping in maps::read(self.pid)?.iter().filter(|mapping| mapping.not_forked) {
            let arguments = [mapping.start, mapping.length(), libc::MADV_DOFORK as u64];
            first.ask("let a fork have the memory", libc::SYS_madvise, arguments)?;
        }
        zeros::give_back(&first)
    }

    /// Its first thread.
    fn first(&self) -> Result<Puppet<'_>, ForkError> {
        self.puppet(self.threads[0].tracee)
    }

    /// Its first thread, or that of a fork.
    fn puppet(&self, tracee: Tracee) -> Result<Puppet<'_>, ForkError> {
        Puppet::new(tracee, &self.threads[0].registers, self.scratch)
    }

    /// The process that stands still.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Makes a process that goes on where this one stood.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub fn fork(&self, plan: &Plan<'_>) -> Result<Forked, ForkError> {
        let given = plan.given.iter().map(|(number, _)| *number);
        let emptied = plan.emptied.iter().map(|(number, _)| *number);
        self.descriptors.check(&given.chain(emptied).collect::<Vec<_>>())?;
        let arguments = self.threads[0].first_arguments(NAMESPACES);
        let (born, number) = self.first()?.bear("fork", &arguments)?;
        let mut tracees = vec![born];
        let completed = pidfd_of(born.0).and_then(|pidfd| {
            let touches = self.complete(&mut tracees, &pidfd, plan)?;
            tracees.iter().try_for_each(|tracee| tracee.release())?;
            Ok(Forked { pid: born.0, pidfd, touches, number })
        });
        if completed.is_err() {
            self.abandon(&tracees, number);
        }
        completed
    }

    /// Makes a newborn process what the plan says; it does not run yet. What is in it goes into
    /// `tracees`, where its first thread is.
    fn complete(
        &self,
        tracees: &mut Vec<Tracee>,
        pidfd: &OwnedFd,
        plan: &Plan<'_>,
    ) -> Result<Option<Touches>, ForkError> {
        let born = self.puppet(tracees[0])?;
        for (name, map) in [("uid_map", &self.user_map), ("gid_map", &self.group_map)] {
            fs::write(format!("/proc/{}/{name}", born.tracee.0), map)
                .map_err(step("say which ids are whose in a fork", born.tracee.0))?;
        }
        self.descriptors.renew(&born, plan.given)?;
        born.mount_proc()?;
        for (number, path) in plan.emptied {
            born.mount_empty(path, *number)?;
        }
        let touches = self.map(&born, pidfd, plan.memory)?;
        self.descriptors.hang_up(&born)?;
        self.rename(&born, plan.argument)?;
        for thread in &self.threads[1..] {
            let number_at = born.write(NUMBER, &thread.number().to_ne_bytes())?;
            tracees.push(born.bear("make a thread", &thread.arguments(number_at))?.0);
        }
        let kept = born.capabilities(plan.capabilities)?;
        tracees
            .iter()
            .zip(&self.threads)
            .try_for_each(|(tracee, thread)| thread.dress(*tracee, kept))?;
        Ok(touches)
    }

    /// Maps the fork's memory where the process shares its own.
    fn map(
        &self,
        born: &Puppet<'_>,
        pidfd: &OwnedFd,
        what: Memory<'_>,
    ) -> Result<Option<Touches>, ForkError> {
        let mut numbers = self.descriptors.memory().peekable();
        let Some(number) = numbers.peek().copied() else {
            let what = "it has closed its shared memory".to_owned();
            return Err(ForkError::Unfit { pid: self.pid, what });
        };
        let flags = match what {
            Memory::Private => libc::MAP_PRIVATE,
            Memory::Shared(file) | Memory::Touched { file, .. } => {
                let given: Vec<_> = numbers.map(|number| (number, file)).collect();
                self.descriptors.give(born, &given)?;
                libc::MAP_SHARED
            }
        };
        self.shared.iter().try_for_each(|mapping| born.map(mapping, number, flags))?;
        let Memory::Touched { device, .. } = what else {
            by_page::come(born, pidfd, &self.shared);
            return Ok(None);
        };
        let pieces = self.held.clone();
        let faults = by_page::faults(born, pidfd, &self.descriptors, device, &pieces)?;
        Ok(Some(Touches { faults, pieces }))
    }

    /// Changes the command line that others see.
    fn rename(&self, born: &Puppet<'_>, (before, after): (&str, &str)) -> Result<(), ForkError> {
        let (start, line) = &self.arguments;
        let mut offset = 0;
        for argument in line.split(|byte| *byte == 0) {
            if argument == before.as_bytes() && after.len() <= before.len() {
                let mut bytes = after.as_bytes().to_vec();
                bytes.resize(before.len(), 0);
                return born.memory.write(start + offset, &bytes);
            }
            offset += argument.len() as u64 + 1;
        }
        let what = format!("{before:?} is none of its arguments, or {after:?} is too long");
        Err(ForkError::Unfit { pid: self.pid, what })
    }

    /// Ends a process that could not be completed.
    fn abandon(&self, tracees: &[Tracee], number: i32) {
        if let Some(pid) = Pid::from_raw(tracees[0].0) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        // To us it ends first, then to its parent.
        tracee::take_note(tracees);
        let _ = self.wait_for(number);
    }

    /// How a fork ended, if it has; it is gone then.
    ///
    /// # Errors
    /// The process that stands still has ended, or the fork is known already to have.
    pub fn reap(&self, forked: &Forked) -> Result<Option<ExitStatus>, ForkError> {
        self.wait_for(forked.number)
    }

    fn wait_for(&self, number: i32) -> Result<Option<ExitStatus>, ForkError> {
        let first = self.first()?;
        let options = (libc::__WALL | libc::WNOHANG) as u32;
        let arguments = [word(number), first.scratch(STATUS), options.into(), 0];
        match first.ask("wait for a fork", libc::SYS_wait4, arguments)? {
            0 => Ok(None),
            _ => {
                let mut bytes = [0; 4];
                first.memory.read(first.scratch(STATUS), &mut bytes)?;
                Ok(Some(ExitStatus::from_raw(i32::from_ne_bytes(bytes))))
            }
        }
    }

    /// Whether the process still stands; its forks have ended if it does not.
    pub fn stands(&self) -> bool {
        self.threads.iter().all(|thread| thread.tracee.lives())
    }
}

impl Drop for Frozen {
    /// It cannot go on. Its forks end with it.
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        // Who started it learns of its end when we have taken note of its other threads'.
        let others = self.threads[1..].iter().map(|thread| thread.tracee);
        tracee::take_note(&others.collect::<Vec<_>>());
    }
}

fn pidfd_of(pid: i32) -> Result<OwnedFd, ForkError> {
    let of = Pid::from_raw(pid).ok_or(ForkError::Ended(pid))?;
    pidfd_open(of, PidfdFlags::empty()).map_err(step("open a pidfd", pid))
}

/// Stops all threads when each of them waits.
fn stop_all(pid: i32) -> Result<Vec<Tracee>, ForkError> {
    for _ in 0..LOOKS {
        let tracees = seize_all(pid)?;
        let waits = tracees.iter().map(|tracee| Ok(waits(&tracee.registers()?)));
        if waits.collect::<Result<Vec<bool>, ForkError>>()?.iter().all(|waits| *waits) {
            return Ok(tracees);
        }
        tracees.iter().try_for_each(|tracee| tracee.release())?;
        std::thread::sleep(LOOK);
    }
    Err(ForkError::Unfit { pid, what: "its threads do not come to rest".to_owned() })
}

/// Stops all threads; more may come until the last has stopped.
fn seize_all(pid: i32) -> Result<Vec<Tracee>, ForkError> {
    let mut seized: Vec<Tracee> = vec![Tracee::seize(pid)?];
    loop {
        let before = seized.len();
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        for task in tasks.map_err(step("list the threads", pid))?.flatten() {
            let tid = task.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(tid) = tid.filter(|tid| seized.iter().all(|tracee| tracee.0 != *tid)) {
                seized.push(Tracee::seize(tid)?);
            }
        }
        if seized.len() == before {
            return Ok(seized);
        }
    }
}

/// A pair of sockets, made by the process: our end, and the number of the other one.
fn line(first: &Puppet<'_>, pidfd: &OwnedFd) -> Result<(OwnedFd, RawFd), ForkError> {
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    let arguments = [libc::AF_UNIX as u64, kind as u64, 0, first.scratch(0)];
    first.ask("make a pair of sockets", libc::SYS_socketpair, arguments)?;
    let pair = first.memory.read_word(first.scratch(0))?;
    let [ours, theirs] = [pair, pair >> 32].map(number_of);
    let fd = pidfd_getfd(pidfd, ours, PidfdGetfdFlags::empty());
    let fd = fd.map_err(step("take over a socket", first.tracee.0))?;
    first.close(ours)?;
    Ok((fd, theirs))
}

/// The mappings of the memory of this inode; what else is shared could not be given anew.
fn shared(pid: i32, inode: u64) -> Result<Vec<Mapping>, ForkError> {
    let writable = |mapping: &Mapping| mapping.shared && mapping.protection & libc::PROT_WRITE != 0;
    let all: Vec<Mapping> = maps::read(pid)?.into_iter().filter(writable).collect();
    match all.iter().find(|mapping| mapping.inode != inode) {
        Some(other) => {
            let what = format!("it shares memory: {:?} at {:#x}", other.path, other.start);
            Err(ForkError::Unfit { pid, what })
        }
        None => Ok(all),
    }
}

/// The command line, and where it is in the memory.
fn arguments(pid: i32) -> Result<(u64, Vec<u8>), ForkError> {
    let failed = || step("find the command line", pid);
    let line = fs::read(format!("/proc/{pid}/cmdline")).map_err(failed())?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(failed())?;
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields).unwrap_or_default();
    let start = fields.split_ascii_whitespace().nth(ARGUMENTS_START);
    let start = start.and_then(|start| start.parse().ok()).filter(|start| *start != 0);
    Ok((start.ok_or_else(|| failed()(io::ErrorKind::InvalidData.into()))?, line))
}

/// Of a map of ids, one that maps each of them to itself (user_namespaces(7)).
fn to_itself(map: &str) -> String {
    let line = |line: &str| {
        let mut numbers = line.split_ascii_whitespace();
        let (inside, count) = (numbers.next()?, numbers.nth(1)?);
        Some(format!("{inside} {inside} {count}\n"))
    };
    map.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_that_we_have_is_itself_in_a_fork() {
        let map = "         0          0 4294967295\n";
        assert_eq!(to_itself(map), "0 0 4294967295\n");
        let map = "         0     100000      1000\n      1000       1000         1\n";
        assert_eq!(to_itself(map), "0 0 1000\n1000 1000 1\n");
    }
}
