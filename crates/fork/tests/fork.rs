//! Forks of a real process with several threads: this test program again, as `subject`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kata_fork::{ForkError, Frozen, Memory, Plan};
use kata_jail::{Child, Launch};

/// Where the subject has its line to the test, and its memory.
const LINE: RawFd = 10;
const MEMORY: RawFd = 11;
/// Where it has an eventfd, and what that has counted.
const EVENTS: RawFd = 12;
const COUNTED: u32 = 3;
/// Bytes of that memory.
const LENGTH: usize = 1 << 20;
/// Pages of the memory that it has cleared, and those of them that it has written to since.
const CLEARED: usize = 300;
const MARKED: [usize; 2] = [3, 200];
const PAGE: usize = 4096;
/// The argument that each fork has another of.
const NAME: &str = "subject-and-room-for-a-longer-name";

/// What the subject answers: a counter in its memory, and numbers of the process and of the
/// thread that counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    count: u32,
    pid: u32,
    tid: u32,
}

/// The subject, which is a process of its own: one thread reads what is asked, another counts.
#[test]
#[ignore = "is what the other tests start"]
fn subject() {
    // SAFETY: who starts the subject hands it this descriptor; nobody else takes it.
    let mut line = unsafe { UnixStream::from_raw_fd(LINE) };
    // SAFETY: a new mapping of a file that is as long.
    let memory = unsafe {
        let flags = libc::MAP_SHARED;
        let at = std::ptr::null_mut();
        libc::mmap(at, LENGTH, libc::PROT_READ | libc::PROT_WRITE, flags, MEMORY, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED);
    let counter = memory as usize;
    let mut cleared = vec![1_u8; CLEARED * PAGE];
    cleared.fill(0);
    MARKED.iter().for_each(|page| cleared[page * PAGE + 7] = 1);
    let state = Arc::new((Mutex::new((false, None)), Condvar::new()));
    let theirs = Arc::clone(&state);
    std::thread::spawn(move || {
        let (lock, changed) = &*theirs;
        loop {
            let mut state = changed.wait_while(lock.lock().unwrap(), |(go, _)| !*go).unwrap();
            // SAFETY: the mapping stays; only this thread uses it.
            let count = unsafe {
                let counter = counter as *mut u32;
                *counter += 1;
                *counter
            };
            // SAFETY: always safe.
            let (pid, tid) = unsafe { (libc::getpid(), libc::gettid()) };
            let answer = Answer { count, pid: pid.cast_unsigned(), tid: tid.cast_unsigned() };
            *state = (false, Some(answer));
            changed.notify_all();
        }
    });
    let (lock, changed) = &*state;
    let mut byte = [0];
    while line.read_exact(&mut byte).is_ok() {
        if byte == *b"x" {
            std::process::exit(7);
        }
        let mut state = lock.lock().unwrap();
        if byte == *b"e" {
            // SAFETY: who starts the subject hands it this descriptor; it stays open.
            let events = unsafe { std::os::fd::BorrowedFd::borrow_raw(EVENTS) };
            let mut bytes = [0; 8];
            rustix::io::read(events, &mut bytes).unwrap();
            let count = u32::try_from(u64::from_ne_bytes(bytes)).unwrap();
            state.1 = Some(Answer { count, pid: 0, tid: 0 });
        } else if byte == *b"z" {
            let count = cleared.iter().map(|byte| u32::from(*byte)).sum();
            let at = cleared.as_ptr() as usize;
            let [pid, tid] = [at >> 32, at & 0xffff_ffff].map(|half| u32::try_from(half).unwrap());
            state.1 = Some(Answer { count, pid, tid });
        } else {
            state.0 = true;
            changed.notify_all();
        }
        let mut state = changed.wait_while(state, |(_, answer)| answer.is_none()).unwrap();
        let Answer { count, pid, tid } = state.1.take().unwrap();
        let bytes: Vec<u8> = [count, pid, tid].iter().flat_map(|n| n.to_ne_bytes()).collect();
        line.write_all(&bytes).unwrap();
    }
}

/// The started subject.
struct Subject {
    child: Child,
    line: UnixStream,
    memory: OwnedFd,
}

impl Subject {
    /// With these descriptors beside the two that it uses.
    fn start(more: Vec<(OwnedFd, RawFd)>) -> Self {
        let (line, theirs) = UnixStream::pair().unwrap();
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("subject", flags).unwrap();
        rustix::fs::ftruncate(&memory, LENGTH as u64).unwrap();
        let flags = rustix::event::EventfdFlags::NONBLOCK;
        let events = rustix::event::eventfd(COUNTED, flags).unwrap();
        let program = std::env::current_exe().unwrap();
        let arguments =
            ["--exact", "subject", "--ignored", "--nocapture", "--skip", NAME].map(Into::into);
        let mut launch = Launch::program(&program, arguments.to_vec())
            .pid_namespace()
            .fd(theirs.into(), LINE)
            .fd(memory.try_clone().unwrap(), MEMORY)
            .fd(events, EVENTS);
        for (fd, at) in more {
            launch = launch.fd(fd, at);
        }
        Self { child: launch.spawn().unwrap(), line, memory }
    }

    fn freeze(&self) -> Frozen {
        Frozen::freeze(self.child.pid(), self.memory.as_fd(), || Ok(())).unwrap()
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill(libc::SIGKILL);
        let _ = self.child.wait_blocking();
    }
}

fn count(line: &mut UnixStream) -> io::Result<Answer> {
    ask(line, b"c")
}

fn ask(line: &mut UnixStream, what: &[u8]) -> io::Result<Answer> {
    line.set_read_timeout(Some(Duration::from_secs(20)))?;
    line.write_all(what)?;
    let mut bytes = [0; 12];
    line.read_exact(&mut bytes)?;
    let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    Ok(Answer { count: number(0), pid: number(4), tid: number(8) })
}

/// A fork that is reached by the socket that is given with it.
fn fork(frozen: &Frozen, memory: Memory<'_>) -> (kata_fork::Forked, UnixStream) {
    let (line, theirs) = UnixStream::pair().unwrap();
    let plan = Plan {
        given: &[(LINE, theirs.as_fd())],
        emptied: &[],
        memory,
        argument: (NAME, "another"),
        capabilities: 0,
    };
    (frozen.fork(&plan).unwrap(), line)
}

fn first_count(memory: &OwnedFd) -> u32 {
    let mut bytes = [0; 4];
    File::from(memory.try_clone().unwrap()).read_exact_at(&mut bytes, 0).unwrap();
    u32::from_ne_bytes(bytes)
}

#[test]
fn forks_go_on_where_the_process_stood_each_for_itself() {
    let mut subject = Subject::start(Vec::new());
    let before = count(&mut subject.line).unwrap();
    assert_eq!((before.count, before.pid), (1, 1));
    let frozen = subject.freeze();
    let mut forks: Vec<_> = (0..3).map(|_| fork(&frozen, Memory::Private)).collect();
    for round in 1..=3 {
        for (_, line) in &mut forks {
            let answer = count(line).unwrap();
            assert_eq!(answer, Answer { count: before.count + round, ..before });
        }
    }
    assert_eq!(first_count(&subject.memory), 1);
    // What one has read of an eventfd is still to be read in another.
    for (_, line) in &mut forks {
        assert_eq!(ask(line, b"e").unwrap().count, COUNTED);
    }
    let pids: Vec<i32> = forks.iter().map(|(fork, _)| fork.pid).collect();
    for kind in ["pid", "mnt", "net", "ipc", "uts", "user", "cgroup"] {
        let name = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        let mut names: Vec<_> = pids.iter().chain([&frozen.pid()]).map(name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 4, "{kind}: {names:?}");
    }
    for pid in &pids {
        let seen = std::fs::read_dir(format!("/proc/{pid}/root/proc")).unwrap();
        let seen = seen.filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        assert_eq!(seen.collect::<Vec<u32>>(), [1]);
    }
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", pids[0])).unwrap();
    assert!(line.contains("another\0") && !line.contains(NAME), "{line:?}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", pids[0])).unwrap();
    assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
}

#[test]
fn what_was_cleared_takes_no_memory() {
    let mut subject = Subject::start(Vec::new());
    count(&mut subject.line).unwrap();
    let Answer { count: marks, pid: high, tid: low } = ask(&mut subject.line, b"z").unwrap();
    let at = (u64::from(high) << 32 | u64::from(low)).next_multiple_of(PAGE as u64);
    let there = |pid: i32| {
        let known = File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut bytes = vec![0; (CLEARED - 1) * 8];
        known.read_exact_at(&mut bytes, at / PAGE as u64 * 8).unwrap();
        bytes.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count()
    };
    let before = there(subject.child.pid());
    assert!(before > CLEARED - 5, "{before}");
    let frozen = subject.freeze();
    let (forked, mut line) = fork(&frozen, Memory::Private);
    let [stands, forked] = [frozen.pid(), forked.pid].map(there);
    // The allocator may have a page of its own before and behind it.
    assert!((2..=4).contains(&stands) && forked <= stands, "{stands}, {forked}");
    assert_eq!((marks, ask(&mut line, b"z").unwrap().count), (2, 2));
}

#[test]
fn a_fork_shares_the_memory_that_it_is_given() {
    let mut subject = Subject::start(Vec::new());
    count(&mut subject.line).unwrap();
    let frozen = subject.freeze();
    let copy = rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut bytes = vec![0; LENGTH];
    let original = File::from(subject.memory.try_clone().unwrap());
    original.read_exact_at(&mut bytes, 0).unwrap();
    File::from(copy.try_clone().unwrap()).write_all_at(&bytes, 0).unwrap();
    let (_fork, mut line) = fork(&frozen, Memory::Shared(copy.as_fd()));
    assert_eq!(count(&mut line).unwrap().count, 2);
    assert_eq!((first_count(&copy), first_count(&subject.memory)), (2, 1));
    // Nor can anybody else change what all forks begin with.
    assert!(original.write_all_at(b"x", 0).is_err());
}

#[test]
fn a_fork_has_of_its_memory_what_it_touches() {
    let subject = Subject::start(Vec::new());
    let full = vec![1; LENGTH];
    let copy = rustix::fs::memfd_create("subject", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for memory in [&subject.memory, &copy] {
        File::from(memory.try_clone().unwrap()).write_all_at(&full, 0).unwrap();
    }
    let mut line = subject.line.try_clone().unwrap();
    count(&mut line).unwrap();
    // Bytes of the memory that are mapped.
    let mapped = |pid: i32| -> usize {
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let memory = smaps.split("/memfd:subject").nth(1).unwrap();
        let resident = memory.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        let kib: usize = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
        kib << 10
    };
    // Who reads a page gets those around it.
    assert!(mapped(subject.child.pid()) > PAGE);
    let frozen = subject.freeze();
    for memory in [Memory::Private, Memory::Shared(copy.as_fd())] {
        let (forked, mut line) = fork(&frozen, memory);
        count(&mut line).unwrap();
        assert_eq!(mapped(forked.pid), PAGE);
    }
}

#[test]
fn what_a_fork_touches_is_copied_by_who_is_told() {
    use std::os::unix::fs::MetadataExt;
    let mut subject = Subject::start(Vec::new());
    count(&mut subject.line).unwrap();
    let frozen = subject.freeze();
    let copy = rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let copy = File::from(copy);
    copy.set_len(LENGTH as u64).unwrap();
    let device = kata_pager::device().unwrap();
    let (forked, mut line) =
        fork(&frozen, Memory::Touched { file: copy.as_fd(), device: device.as_fd() });
    // It has no descriptor of it.
    for entry in std::fs::read_dir(format!("/proc/{}/fd", forked.pid)).unwrap() {
        let name = std::fs::read_link(entry.unwrap().path()).unwrap();
        assert!(!name.to_str().unwrap().contains("userfaultfd"), "{name:?}");
    }
    line.write_all(b"c").unwrap();
    // It waits.
    line.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(line.read(&mut [0]).is_err());
    let kata_fork::Touches { faults, pieces } = forked.touches.unwrap();
    let origin = kata_pager::Origin::new(subject.memory.try_clone().unwrap());
    let _pager = kata_pager::Pager::start(faults, origin, pieces, |error| panic!("{error}"));
    line.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = [0; 12];
    line.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes[..4], 2_u32.to_ne_bytes());
    assert_eq!(
        (first_count(&copy.try_clone().unwrap().into()), copy.metadata().unwrap().blocks()),
        (2, 8)
    );
}

#[test]
fn the_end_of_a_fork_is_told_with_its_status() {
    let mut subject = Subject::start(Vec::new());
    count(&mut subject.line).unwrap();
    let frozen = subject.freeze();
    let [(exits, mut line), (killed, _line)] = [(); 2].map(|()| fork(&frozen, Memory::Private));
    assert!(frozen.reap(&exits).unwrap().is_none());
    line.write_all(b"x").unwrap();
    rustix::process::pidfd_send_signal(&killed.pidfd, rustix::process::Signal::KILL).unwrap();
    let ended = |fork: &kata_fork::Forked| {
        let mut ready = [rustix::event::PollFd::new(&fork.pidfd, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut ready, None).unwrap(), 1);
        frozen.reap(fork).unwrap().unwrap()
    };
    assert_eq!(ended(&exits).code(), Some(7));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended(&killed)), Some(9));
    assert!(frozen.reap(&exits).is_err(), "it is gone");
    assert!(frozen.stands());
}

#[test]
fn forks_end_with_the_process_that_stands_still() {
    let mut subject = Subject::start(Vec::new());
    count(&mut subject.line).unwrap();
    let frozen = subject.freeze();
    let (fork, _line) = fork(&frozen, Memory::Private);
    drop(frozen);
    subject.child.wait_blocking().unwrap();
    let mut ready = [rustix::event::PollFd::new(&fork.pidfd, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut ready, None).unwrap(), 1);
}

#[test]
fn what_two_processes_cannot_have_is_named() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut subject = Subject::start(vec![(theirs.into(), 13)]);
    count(&mut subject.line).unwrap();
    let frozen = subject.freeze();
    let (_line, line) = UnixStream::pair().unwrap();
    let mut plan = Plan {
        given: &[(LINE, line.as_fd())],
        emptied: &[],
        memory: Memory::Private,
        argument: (NAME, "another"),
        capabilities: 0,
    };
    let error = frozen.fork(&plan).unwrap_err().to_string();
    assert!(error.contains("descriptor 13 is socket:"), "{error}");
    // What fails later leaves nothing, either.
    let all = [(LINE, line.as_fd()), (13, line.as_fd())];
    (plan.given, plan.argument) = (&all, ("nothing", "another"));
    assert!(matches!(frozen.fork(&plan), Err(ForkError::Unfit { .. })));
    let children = format!("/proc/{0}/task/{0}/children", frozen.pid());
    assert_eq!(std::fs::read_to_string(children).unwrap(), "");
    plan.argument = (NAME, "another");
    frozen.fork(&plan).unwrap();
    assert!(line.as_raw_fd() > 0);
}
