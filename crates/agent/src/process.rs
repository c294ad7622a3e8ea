//! One process that the engine started, from its pid to its exit.

use std::sync::Arc;

use kata_cgroups::Cgroup;
use kata_protocol::Id;
use kata_protocol::agent::WaitResponse;
use tokio::sync::watch;

use crate::error::AgentError;
use crate::reaper::{Exit, Reaper};
use crate::stdio::Stdio;

/// A container's first process, or one of an exec.
#[derive(Debug)]
pub struct Process {
    /// None for the container's first process.
    pub exec: Option<Id>,
    /// In the guest.
    pub pid: i32,
    /// Its input and output.
    pub stdio: Stdio,
    ended: watch::Receiver<Option<Ended>>,
}

/// All that `Wait` tells.
#[derive(Clone, Copy, Debug)]
struct Ended {
    exit: Exit,
    stdout: u64,
    stderr: u64,
    oom_killed: bool,
}

impl Process {
    /// Watches a process that was just built.
    pub fn watch(
        exec: Option<Id>,
        pid: i32,
        stdio: Stdio,
        reaper: &Reaper,
        cgroup: Option<&Cgroup>,
    ) -> Arc<Self> {
        let (sender, ended) = watch::channel(None);
        let process = Arc::new(Self { exec, pid, stdio, ended });
        let exit = reaper.watch(pid);
        let oom_kills = |cgroup: &Cgroup| cgroup.oom_kills().unwrap_or(0);
        let before = cgroup.map_or(0, oom_kills);
        let (watched, cgroup) = (Arc::clone(&process), cgroup.cloned());
        tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            let (stdout, stderr) = watched.stdio.settle();
            let oom_killed = exit.code != 0 && cgroup.as_ref().map_or(0, oom_kills) > before;
            sender.send_replace(Some(Ended { exit, stdout, stderr, oom_killed }));
        });
        process
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// Waits for its end. Any number may wait, also afterwards.
    ///
    /// # Errors
    /// When nobody watches it any more.
    pub async fn wait(&self) -> Result<WaitResponse, AgentError> {
        let mut ended = self.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map_err(|_| AgentError::GivenUp)?;
        let Some(ended) = *ended else { return Err(AgentError::GivenUp) };
        Ok(WaitResponse {
            exit_code: ended.exit.code,
            exited_at_ns: ended.exit.at_ns,
            stdout_bytes: ended.stdout,
            stderr_bytes: ended.stderr,
            oom_killed: ended.oom_killed,
            ..WaitResponse::default()
        })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended, or there is no such signal.
    pub fn signal(&self, reaper: &Reaper, signal: i32) -> Result<(), AgentError> {
        match reaper.signal(self.pid, signal) {
            Ok(true) => Ok(()),
            Ok(false) => Err(AgentError::Finished),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(AgentError::Invalid(format!("signal {signal} does not exist")))
            }
            Err(error) => Err(AgentError::System("send a signal", error)),
        }
    }
}
