//! Host trees put into the mount namespace of the process that serves the share.
//!
//! That is a [`crate::DevicesProcess`], or any other jailed process of ours whose root is
//! a tmpfs (as QEMU with its own 9p server).

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use kata_jail::Child;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::Error;
use crate::mounts::{self, MountError};
use crate::new_mount::NewMount;
use crate::path::SharePath;

/// Puts the host's `source` (a directory or a file; symbolic links are followed) at `at`
/// below the root of `process`, with the mounts below it when `recursive`. It is visible
/// on return. The process must be in its jail.
///
/// A read-only one is so in the host's mount table, whatever the guest does. Mounts that
/// the host makes later below a writable one appear in it, too.
///
/// # Errors
/// When there is no such path, the place is taken, or the process is gone.
pub fn attach(
    process: &Child,
    source: &Path,
    at: &SharePath,
    readonly: bool,
    recursive: bool,
) -> Result<(), Error> {
    let tree = mounts::clone_tree(source, readonly, recursive)
        .map_err(|e| Error::Source { path: source.to_owned(), source: e })?;
    mounts::mount_in(process.pidfd(), tree.as_fd(), at).map_err(|e| {
        let (source_path, at) = (source.to_owned(), at.as_path().to_owned());
        match e {
            MountError::Occupied => Error::Occupied { source_path, at },
            MountError::Io(e) if is_gone(&e) => died(process),
            MountError::Io(source) => Error::Attach { source_path, at, source },
        }
    })
}

/// A file system to mount, as mount(8) takes it; paths are the host's.
#[derive(Clone, Copy, Debug)]
pub struct FileSystem<'a> {
    /// Its type.
    pub kind: &'a str,
    /// Its device, or what its type wants there.
    pub source: &'a str,
    /// Its options.
    pub options: &'a [String],
}

/// Mounts a file system at `at` below the root of `process`, by way of `dir`, a directory
/// that only root can enter. The host itself never has it mounted.
///
/// # Errors
/// When it cannot be mounted, the place is taken, or the process is gone.
pub fn mount(
    process: &Child,
    dir: &Path,
    fs: &FileSystem<'_>,
    at: &SharePath,
) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Mount {
        kind: fs.kind.to_owned(),
        source_path: fs.source.into(),
        at: at.as_path().to_owned(),
        source,
    };
    let planned = NewMount::plan(fs.kind, fs.source, fs.options);
    let tree = planned.and_then(|mount| mount.detached(dir)).map_err(failed)?;
    mounts::mount_in(process.pidfd(), tree.as_fd(), at).map_err(|e| match e {
        MountError::Occupied => {
            Error::Occupied { source_path: fs.source.into(), at: at.as_path().to_owned() }
        }
        MountError::Io(e) if is_gone(&e) => died(process),
        MountError::Io(e) => failed(e),
    })
}

/// Takes away what was attached at `at`. Nothing is left to do when the process has ended.
///
/// Files that the guest still holds open stay usable for it until it closes them.
///
/// # Errors
/// When nothing is attached there.
pub fn detach(process: &Child, at: &SharePath) -> Result<(), Error> {
    match mounts::unmount_in(process.pidfd(), at) {
        Err(error) if is_gone(&error) => Ok(()),
        Err(source) => Err(Error::Detach { at: at.as_path().to_owned(), source }),
        Ok(()) => Ok(()),
    }
}

/// It is ending or has ended; gives it a moment to have a status.
pub(crate) fn died(process: &Child) -> Error {
    let pidfd = process.pidfd();
    let mut ended = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let moment = Timespec { tv_sec: 1, tv_nsec: 0 };
    // Without a status the error says that there is none yet.
    let _ = rustix::event::poll(&mut ended, Some(&moment));
    Error::Died(process.try_wait().ok().flatten())
}

/// The process has ended, or is about to.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}
