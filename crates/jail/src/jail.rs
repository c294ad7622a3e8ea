//! What a jail is made of, and the way in.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Seccomp, privileges, root};

/// Where a process that talks to the guest lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// User of the process; one of its own for each sandbox.
    pub uid: u32,
    /// Group of the process.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// What the root holds, in this order. Nothing else is visible.
    pub binds: Vec<Bind>,
    /// Empty directories to have, for what is mounted in them later.
    pub directories: Vec<PathBuf>,
    /// Device nodes to have under the same path, usable by `uid` alone.
    pub devices: Vec<PathBuf>,
    /// Capabilities that the process keeps.
    pub capabilities: Vec<Capability>,
    /// Most descriptors it may have open; 0 leaves the limit as it is.
    pub nofile: u64,
    /// The network namespace it is in.
    pub network: Network,
    /// Whether /proc is there (read-only).
    pub proc: bool,
    /// The system calls it may make.
    pub seccomp: Option<Seccomp>,
}

/// A jail's network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// One of its own, with nothing in it.
    #[default]
    Empty,
    /// The one that this inherited descriptor is. It is closed on the way in.
    Joined(RawFd),
}

/// A file or directory of the host that is visible in the jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// The path on the host. If it is a symbolic link and `target` is the same path, the
    /// link itself is made again in the jail (`/lib` → `usr/lib`); else links are followed.
    pub source: PathBuf,
    /// The absolute path in the jail.
    pub target: PathBuf,
    /// Whether it is read-only, with all that is mounted below it.
    pub readonly: bool,
}

impl Bind {
    /// A read-only bind under the same path.
    pub fn same(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self { source: path.clone(), target: path, readonly: true }
    }
}

/// A capability that a jailed process may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // They are the kernel's, see capabilities(7).
pub enum Capability {
    Chown = 0,
    DacOverride = 1,
    DacReadSearch = 2,
    Fowner = 3,
    Fsetid = 4,
    Kill = 5,
    Setgid = 6,
    Setuid = 7,
    NetBindService = 10,
    NetAdmin = 12,
    IpcLock = 14,
    SysChroot = 18,
    SysAdmin = 21,
    SysNice = 23,
    SysResource = 24,
    Mknod = 27,
    Setfcap = 31,
}

/// Why a process could not enter its jail. It is half in then, and must end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call failed.
    #[error("cannot {step}")]
    Step {
        /// What was attempted.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A system call on a path failed.
    #[error("cannot {step} {path:?}")]
    Path {
        /// What was attempted.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A path in the jail is relative, or has `.` or `..` in it.
    #[error("{0:?} is no absolute, plain path in the jail")]
    Target(PathBuf),
    /// The system call filter could not be built.
    #[error("cannot build the system call filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Makes the error of a step.
pub(crate) fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step { step, source: source.into() }
}

impl Jail {
    /// Locks up the calling process for good. It must have one thread, and be root.
    ///
    /// The PID namespace stays: only a new process can have its own
    /// ([`crate::Launch::pid_namespace`], [`crate::Launch::jail`]).
    /// The parent-death signal is lost with the change of user, as the kernel has it.
    ///
    /// # Errors
    /// When a step fails. The process is half in then, and must end.
    pub fn enter(&self) -> Result<(), JailError> {
        self.enter_with(|| Ok(()))
    }

    /// As [`Self::enter`]; runs `last` when all but the system call filter is done.
    pub(crate) fn enter_with(
        &self,
        last: impl FnOnce() -> Result<(), JailError>,
    ) -> Result<(), JailError> {
        let filter = self.seccomp.as_ref().map(Seccomp::compile).transpose()?;
        root::change(self)?;
        privileges::drop(self)?;
        last()?;
        if let Some(filter) = filter {
            seccompiler::apply_filter(&filter)?;
        }
        Ok(())
    }
}
