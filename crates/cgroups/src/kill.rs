//! Stopping, killing and removing: all that deals with the processes of a cgroup.

use crate::{Cgroup, CgroupError, Hierarchy, file};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Freezing ends when every task is back from the kernel.
const FREEZE_TIME: Duration = Duration::from_secs(10);
/// A killed process ends when it is back from the kernel.
const KILL_TIME: Duration = Duration::from_secs(2);
/// Where nothing can be waited for, look again after this.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Nesting of cgroups inside a container's that is followed.
const MAX_DEPTH: usize = 64;

/// Directory whose freezer is used.
enum Freezer {
    V2(PathBuf),
    V1(PathBuf),
}

fn freezer(cgroup: &Cgroup) -> Result<Freezer, CgroupError> {
    if let Some(dir) = cgroup.v1_directory("freezer") {
        return Ok(Freezer::V1(dir));
    }
    match cgroup.unified_directory() {
        Some(dir) => Ok(Freezer::V2(dir)),
        None => Err(CgroupError::Unsupported {
            file: "freezer.state".to_owned(),
            value: "FROZEN".to_owned(),
            controller: "freezer".to_owned(),
            place: "this machine's cgroup v1".to_owned(),
        }),
    }
}

pub(crate) fn freeze(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let result = match freezer(cgroup)? {
        Freezer::V2(dir) => {
            file::write(&dir.join("cgroup.freeze"), "1")?;
            wait_for_event(&dir, "frozen", 1, FREEZE_TIME)
        }
        Freezer::V1(dir) => freeze_v1(&dir),
    };
    result.inspect_err(|_| {
        // Half frozen is worse than running.
        if let Err(error) = thaw(cgroup) {
            tracing::warn!(%error, "cgroup stays partly frozen");
        }
    })
}

fn freeze_v1(dir: &Path) -> Result<(), CgroupError> {
    let state = dir.join("freezer.state");
    let end = Instant::now() + FREEZE_TIME;
    loop {
        // Written again each time: tasks that were forked in between are caught so.
        file::write(&state, "FROZEN")?;
        if file::read(&state)?.trim() == "FROZEN" {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(timeout(dir, "frozen", FREEZE_TIME));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

pub(crate) fn thaw(cgroup: &Cgroup) -> Result<(), CgroupError> {
    match freezer(cgroup)? {
        Freezer::V2(dir) => file::write(&dir.join("cgroup.freeze"), "0"),
        Freezer::V1(dir) => file::write(&dir.join("freezer.state"), "THAWED"),
    }
}

pub(crate) fn is_frozen(cgroup: &Cgroup) -> Result<bool, CgroupError> {
    match freezer(cgroup)? {
        Freezer::V2(dir) => {
            let events = file::flat_keyed(&file::read(&dir.join("cgroup.events"))?);
            Ok(events.get("frozen") == Some(&1))
        }
        Freezer::V1(dir) => Ok(file::read(&dir.join("freezer.state"))?.trim() == "FROZEN"),
    }
}

fn timeout(dir: &Path, state: &'static str, time: Duration) -> CgroupError {
    CgroupError::Timeout { path: dir.to_owned(), state, seconds: time.as_secs() }
}

/// Waits until a line of `cgroup.events` has the value. The kernel wakes whoever polls it.
fn wait_for_event(
    dir: &Path,
    key: &'static str,
    value: u64,
    time: Duration,
) -> Result<(), CgroupError> {
    use std::io::{Read, Seek, SeekFrom};
    let path = dir.join("cgroup.events");
    let failed = |source| CgroupError::io("read", &path, source);
    let mut events = File::open(&path).map_err(failed)?;
    let end = Instant::now() + time;
    loop {
        let mut text = String::new();
        events.seek(SeekFrom::Start(0)).map_err(failed)?;
        events.read_to_string(&mut text).map_err(failed)?;
        if file::flat_keyed(&text).get(key) == Some(&value) {
            return Ok(());
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timeout(dir, key, time));
        }
        let mut poll = libc::pollfd { fd: events.as_raw_fd(), events: libc::POLLPRI, revents: 0 };
        let milliseconds = left.as_millis().min(1000) as libc::c_int + 1;
        // SAFETY: one valid pollfd, and its count is one.
        if unsafe { libc::poll(&mut poll, 1, milliseconds) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(failed(error));
            }
        }
    }
}

/// Processes of one directory and those below it.
fn pids_below(dir: &Path, depth: usize, out: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    // A threaded cgroup cannot be read; its processes are in its domain's list.
    if let Some(text) = file::read_optional(&dir.join("cgroup.procs"))? {
        out.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|&pid| pid > 0));
    }
    if depth < MAX_DEPTH {
        for child in file::children(dir) {
            pids_below(&child, depth + 1, out)?;
        }
    }
    Ok(())
}

pub(crate) fn pids(cgroup: &Cgroup) -> Result<Vec<i32>, CgroupError> {
    let mut pids = BTreeSet::new();
    let mut there = false;
    for dir in cgroup.directories() {
        if dir.is_dir() {
            there = true;
            pids_below(&dir, 0, &mut pids)?;
        }
    }
    match there {
        true => Ok(pids.into_iter().collect()),
        false => {
            let dir = cgroup.directories().into_iter().next().unwrap_or_default();
            Err(CgroupError::io("list", &dir, io::Error::from_raw_os_error(libc::ENOENT)))
        }
    }
}

fn signal(pid: i32, signal: i32) -> Result<(), CgroupError> {
    // SAFETY: no pointers; `pid` is positive, so one process is meant.
    if unsafe { libc::kill(pid, signal) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(CgroupError::io(
            format!("send signal {signal} to process"),
            &PathBuf::from(format!("/proc/{pid}")),
            error,
        )),
    }
}

pub(crate) fn kill(cgroup: &Cgroup, number: i32) -> Result<(), CgroupError> {
    if number == libc::SIGKILL
        && let Hierarchy::V2 { .. } = cgroup.hierarchy()
        && let Some(dir) = cgroup.unified_directory()
    {
        match file::write(&dir.join("cgroup.kill"), "1") {
            Ok(()) => return Ok(()),
            // Linux before 5.14 has no such file.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && dir.is_dir() => {}
            Err(error) => return Err(error),
        }
    }
    // Frozen, nobody forks between the listing and the signal. Whoever is frozen already
    // (a paused container) stays so, unless it is to die: v1 lets nobody die frozen.
    let frozen_before = is_frozen(cgroup).unwrap_or(false);
    if !frozen_before && let Err(error) = freeze(cgroup) {
        tracing::debug!(%error, "signalling a cgroup that could not be frozen");
    }
    let result = pids(cgroup)
        .and_then(|pids| pids.into_iter().map(|pid| signal(pid, number)).fold(Ok(()), Result::and));
    if !frozen_before || number == libc::SIGKILL {
        let thawed = thaw(cgroup);
        if cgroup.exists() {
            thawed?;
        }
    }
    result
}

/// Directories below, the deepest first, then the directory itself.
fn tree(dir: &Path, depth: usize, out: &mut Vec<PathBuf>) {
    if depth < MAX_DEPTH {
        for child in file::children(dir) {
            tree(&child, depth + 1, out);
        }
    }
    out.push(dir.to_owned());
}

pub(crate) fn delete(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let roots = cgroup.hierarchy().roots();
    for (root, dir) in roots.into_iter().zip(cgroup.directories()) {
        delete_tree(cgroup, root, &dir)?;
    }
    Ok(())
}

pub(crate) fn delete_unused(cgroup: &Cgroup) -> Result<bool, CgroupError> {
    cgroup.directories().iter().try_fold(true, |all, dir| Ok(remove(dir)? && all))
}

/// Removes one tree's directory; kills what is in the way.
fn delete_tree(cgroup: &Cgroup, root: &Path, dir: &Path) -> Result<(), CgroupError> {
    let end = Instant::now() + KILL_TIME;
    while !remove(dir)? {
        let mut pids = BTreeSet::new();
        pids_below(dir, 0, &mut pids)?;
        if pids.remove(&std::process::id().cast_signed()) {
            file::write(&root.join("cgroup.procs"), "0")?;
        }
        if Instant::now() > end {
            return Err(CgroupError::Busy {
                path: dir.to_owned(),
                pids: pids.into_iter().take(16).collect(),
            });
        }
        for &pid in &pids {
            signal(pid, libc::SIGKILL)?;
        }
        if !pids.is_empty() && matches!(is_frozen(cgroup), Ok(true)) {
            thaw(cgroup)?;
        }
        if cgroup.hierarchy().unified() == Some(root) {
            // A timeout is seen at the top of the loop; a cgroup that went meanwhile, too.
            let _ = wait_for_event(dir, "populated", 0, Duration::from_millis(50));
        } else {
            std::thread::sleep(LOOK_AGAIN);
        }
    }
    Ok(())
}

/// Removes the directories; false when one is in use.
fn remove(dir: &Path) -> Result<bool, CgroupError> {
    let mut directories = Vec::new();
    tree(dir, 0, &mut directories);
    for directory in directories {
        match std::fs::remove_dir(&directory) {
            Ok(()) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV) => {}
                // A child made meanwhile gives ENOTEMPTY; the next turn finds it.
                Some(libc::EBUSY | libc::ENOTEMPTY) => return Ok(false),
                _ => return Err(CgroupError::io("remove cgroup", &directory, error)),
            },
        }
    }
    Ok(true)
}
