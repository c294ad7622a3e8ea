//! Processes on their way into the sandbox's cgroup.
//!
//! Who moves one first waits for the kernel: ten to thirty milliseconds, in which it makes sure
//! that nobody forks (its cgroup.c, `cgroup_threadgroup_rwsem`). Those who follow soon do not.
//! Meanwhile a machine can be made and a guest can answer; but what is about to run for somebody
//! else (a hook, a container) waits for the end of all moves.

use crate::SandboxError;
use kata_cgroups::{Cgroup, CgroupError};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

/// The cgroup, and the moves into it.
#[derive(Debug)]
pub(crate) struct Joining {
    cgroup: Cgroup,
    moves: Mutex<JoinSet<Result<(), CgroupError>>>,
}

impl Joining {
    pub(crate) fn new(cgroup: Cgroup) -> Self {
        Self { cgroup, moves: Mutex::default() }
    }

    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Begins to move a process. One that has ended meanwhile is missed by who waits for it.
    pub(crate) async fn add(&self, pid: i32) {
        let cgroup = self.cgroup.clone();
        let add = move || match cgroup.add(pid) {
            Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {
                Ok(())
            }
            moved => moved,
        };
        self.moves.lock().await.spawn_blocking(add);
    }

    /// Waits until all are in it.
    ///
    /// # Errors
    /// Those of the first one that cannot be moved.
    pub(crate) async fn done(&self) -> Result<(), SandboxError> {
        let mut moves = self.moves.lock().await;
        let mut done = Ok(());
        while let Some(moved) = moves.join_next().await {
            let moved = match moved {
                Ok(moved) => moved.map_err(|source| self.failed(source)),
                Err(panic) => Err(SandboxError::io("move processes into the cgroup")(panic.into())),
            };
            done = done.and(moved);
        }
        done
    }

    /// What cannot be done with the cgroup, as an error of the sandbox.
    pub(crate) fn failed(&self, source: CgroupError) -> SandboxError {
        SandboxError::Cgroup { path: self.cgroup.path(), source }
    }
}
