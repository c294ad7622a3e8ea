//! Where a `kata-ctl run` keeps its bundle, and how the next one removes what a killed one
//! left: each run holds a lock on its directory, and a directory without one is nobody's.
//! A keeper, a process that waits for the end of the run, sees to it at once.

use crate::record::Root;
use crate::runtime::{self, Global};
use anyhow::{Context, Result};
use kata_jail::Launch;
use kata_protocol::Id;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// On a disk, not on a tmpfs: images are large.
const PARENT: &str = "/var/lib/kata-containers/ctl";

/// Records of containers made by `kata-ctl`.
const ROOT: &str = "/run/kata-ctl";

/// The settings of `kata-ctl`'s containers.
pub fn global(config: Option<&Path>) -> Global {
    Global { root: Root::new(ROOT), config: config.map(Path::to_owned), ..Global::default() }
}

/// One run's directory, removed when dropped.
pub struct Workdir {
    path: PathBuf,
    _lock: File,
}

impl Workdir {
    /// Makes it.
    pub fn create(id: &Id) -> Result<Self> {
        Self::create_in(Path::new(PARENT), id)
    }

    fn create_in(parent: &Path, id: &Id) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        // Nobody looks for abandoned directories until this one has its lock.
        let _no_sweep = lock(parent, FlockOperation::LockShared)
            .with_context(|| format!("cannot lock {}", parent.display()))?;
        let path = parent.join(id.as_str());
        DirBuilder::new().mode(0o711).create(&path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => anyhow::anyhow!("container {id} exists already"),
            _ => anyhow::Error::new(error).context(format!("cannot create {}", path.display())),
        })?;
        let lock = lock(&path, FlockOperation::NonBlockingLockExclusive)
            .context("cannot lock the work directory")?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Descriptor at which the keeper finds its parent's pidfd.
const PARENT_FD: RawFd = 3;

/// Hidden command that makes a process the keeper.
pub const KEEP: &str = "keep";

/// Starts the keeper of this process.
pub fn start_keeper(config: Option<&Path>) -> Result<()> {
    let parent = pidfd_open(getpid(), PidfdFlags::empty()).context("cannot watch ourselves")?;
    let mut argv: Vec<OsString> = vec!["kata-ctl".into(), KEEP.into()];
    if let Some(config) = config {
        argv.extend(["--config".into(), config.as_os_str().to_owned()]);
    }
    Launch::program(Path::new("/proc/self/exe"), Vec::new())
        .argv(argv)
        .fd(parent, PARENT_FD)
        .new_session()
        .spawn()
        .context("cannot start the keeper")?;
    Ok(())
}

/// Plays the keeper: waits for the parent's end, and removes what it left.
pub fn keep(global: &Global) -> Result<u8> {
    // SAFETY: the parent opened this descriptor for the keeper alone.
    let parent = unsafe { OwnedFd::from_raw_fd(PARENT_FD) };
    let mut fds = [PollFd::new(&parent, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, None)).context("cannot wait for the parent")?;
    runtime::block_on(async {
        sweep(global).await;
        Ok(0)
    })
}

/// Removes what runs that were killed left behind.
pub async fn sweep(global: &Global) {
    for (id, _lock) in abandoned(Path::new(PARENT)) {
        tracing::warn!("removing container {id}, whose kata-ctl was killed");
        let removed = async {
            runtime::destroy(global, &id).await?;
            super::network::remove(&id);
            fs::remove_dir_all(Path::new(PARENT).join(id.as_str()))?;
            Ok::<_, anyhow::Error>(())
        };
        if let Err(error) = removed.await {
            tracing::warn!("cannot remove container {id}: {error:#}");
        }
    }
}

/// The directories that nobody holds; the caller does from now on.
fn abandoned(parent: &Path) -> Vec<(Id, File)> {
    let Ok(_no_create) = lock(parent, FlockOperation::LockExclusive) else { return Vec::new() };
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let held = take_over(&entry.path(), File::open(entry.path()).ok()?)?;
            Some((entry.file_name().to_str()?.parse().ok()?, held))
        })
        .collect()
}

/// Takes the directory that was opened, if nobody holds it and it is still there: a run that
/// ends by itself removes its own before it lets go of it. The caller keeps others from making
/// one of the same name.
fn take_over(path: &Path, opened: File) -> Option<File> {
    let held = lock_opened(opened, FlockOperation::NonBlockingLockExclusive).ok()?;
    path.exists().then_some(held)
}

fn lock(directory: &Path, how: FlockOperation) -> io::Result<File> {
    lock_opened(File::open(directory)?, how)
}

fn lock_opened(opened: File, how: FlockOperation) -> io::Result<File> {
    rustix::io::retry_on_intr(|| flock(&opened, how))?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_ended_runs_are_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let (alive, dead): (Id, Id) = ("alive".parse().unwrap(), "dead".parse().unwrap());
        let held = Workdir::create_in(dir.path(), &alive).unwrap();
        fs::create_dir(dir.path().join(dead.as_str())).unwrap();
        let found = abandoned(dir.path());
        assert_eq!(found.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&dead]);
        // Who found it has it.
        assert!(abandoned(dir.path()).is_empty());
        assert!(Workdir::create_in(dir.path(), &alive).is_err());
        drop(held);
        assert!(!dir.path().join("alive").exists());
    }

    #[test]
    fn a_run_that_ended_while_it_was_looked_at_is_not_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let run = Workdir::create_in(dir.path(), &"run".parse().unwrap()).unwrap();
        let path = run.path().to_owned();
        let (before, after) = (File::open(&path).unwrap(), File::open(&path).unwrap());
        assert!(take_over(&path, before).is_none());
        drop(run);
        assert!(take_over(&path, after).is_none());
    }

    #[test]
    fn a_directory_that_is_being_made_is_not_abandoned() {
        let dir = tempfile::tempdir().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sweeper = scope.spawn(|| {
                let mut found = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    found += abandoned(dir.path()).len();
                }
                found
            });
            for n in 0..500 {
                let id = format!("c{n}").parse().unwrap();
                Workdir::create_in(dir.path(), &id).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(sweeper.join().unwrap(), 0);
        });
    }
}
