//! Reaps every child: processes the engine started, and orphans that end up with PID 1.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Exits kept for somebody who has not asked yet: a process may end before its builder
/// returns with its pid.
const RECENT: usize = 256;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 and the signal.
    pub code: u32,
    /// `CLOCK_REALTIME`, nanoseconds.
    pub at_ns: i64,
}

/// The table of who waits for whom.
#[derive(Debug, Default)]
pub struct Reaper {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    recent: VecDeque<(i32, Exit)>,
}

impl Reaper {
    /// Starts reaping. Needs a tokio runtime.
    ///
    /// # Errors
    /// When `SIGCHLD` cannot be caught.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let task = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                task.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// The end of a child, once. A child is not reaped before somebody could watch it, or
    /// its exit is remembered, so the answer is never that of another process.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state();
        if let Some(at) = state.recent.iter().rposition(|(recent, _)| *recent == pid)
            && let Some((_, exit)) = state.recent.remove(at)
        {
            let _ = sender.send(exit);
        } else {
            state.watched.insert(pid, sender);
        }
        receiver
    }

    /// Sends a signal to a child that is watched and not reaped: no other process can have
    /// its pid. False when it has ended.
    ///
    /// # Errors
    /// What `kill` gives, such as for a signal that does not exist.
    pub fn signal(&self, pid: i32, signal: i32) -> io::Result<bool> {
        let state = self.state();
        if !state.watched.contains_key(&pid) {
            return Ok(false);
        }
        // SAFETY: no pointers; the pid is that of our child, as `reap` needs the same lock.
        match unsafe { libc::kill(pid, signal) } {
            0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One `SIGCHLD` may stand for many children.
    fn reap(&self) {
        let mut state = self.state();
        // An error says that there are no children.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code.cast_unsigned(),
                (_, Some(signal)) => 128 + signal.cast_unsigned(),
                _ => continue,
            };
            let exit = Exit { code, at_ns: realtime_ns() };
            let pid = pid.as_raw_nonzero().get();
            tracing::debug!(pid, code, "reaped");
            match state.watched.remove(&pid) {
                // Who watched may be gone.
                Some(watcher) => drop(watcher.send(exit)),
                None => {
                    if state.recent.len() == RECENT {
                        state.recent.pop_front();
                    }
                    state.recent.push_back((pid, exit));
                }
            }
        }
    }
}

/// `CLOCK_REALTIME`, nanoseconds.
pub fn realtime_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}
