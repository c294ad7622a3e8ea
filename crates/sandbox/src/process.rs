//! One process of a container, as the host sees it.

use crate::agent::ProcessRef;
use crate::io::{EngineStreams, Relay};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;
use tokio::sync::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n when signal n ended it.
    pub code: u8,
    /// When.
    pub at: SystemTime,
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessStatus {
    /// Known; not running yet.
    Created,
    /// Running.
    Running,
    /// Ended, and all its output is delivered.
    Exited(Exit),
}

/// Where the engine said the streams are; only repeated to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// What an engine gives for a process.
#[derive(Debug, Default)]
pub struct Stdio {
    /// The open streams.
    pub streams: EngineStreams,
    /// The process has a terminal.
    pub terminal: bool,
    /// Its first height; 0: unknown.
    pub rows: u16,
    /// Its first width; 0: unknown.
    pub columns: u16,
    /// As the engine named them.
    pub paths: StdioPaths,
}

impl Stdio {
    pub(crate) fn message(&self) -> kata_protocol::agent::Stdio {
        kata_protocol::agent::Stdio {
            terminal: self.terminal,
            stdin: self.streams.stdin.is_some(),
            stdout: self.streams.stdout.is_some(),
            stderr: self.streams.stderr.is_some() && !self.terminal,
            rows: self.rows.into(),
            columns: self.columns.into(),
            ..Default::default()
        }
    }
}

/// An exec that is known but not started.
pub(crate) struct Pending {
    pub spec: kata_oci::Process,
    pub stdio: Stdio,
}

/// One process.
pub(crate) struct Process {
    pub reference: ProcessRef,
    /// The host process that stands for it.
    pub pid: i32,
    pub terminal: bool,
    pub paths: StdioPaths,
    pending: Mutex<Option<Pending>>,
    size: Mutex<Option<(u32, u32)>>,
    relay: Mutex<Option<std::sync::Arc<Relay>>>,
    status: watch::Sender<ProcessStatus>,
    order: tokio::sync::Mutex<()>,
}

impl Process {
    pub(crate) fn new(reference: ProcessRef, pid: i32, stdio: &Stdio) -> Self {
        Self {
            reference,
            pid,
            terminal: stdio.terminal,
            paths: stdio.paths.clone(),
            pending: Mutex::new(None),
            size: Mutex::new(None),
            relay: Mutex::new(None),
            status: watch::Sender::new(ProcessStatus::Created),
            order: tokio::sync::Mutex::new(()),
        }
    }

    pub(crate) fn pending(
        reference: ProcessRef,
        pid: i32,
        spec: kata_oci::Process,
        stdio: Stdio,
    ) -> Self {
        let process = Self::new(reference, pid, &stdio);
        *lock(&process.pending) = Some(Pending { spec, stdio });
        process
    }

    /// Held while the process is started, and to tell that it ended: engines are told so
    /// in this order.
    pub(crate) async fn order(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.order.lock().await
    }

    /// Notes the size of an exec's terminal, which the guest does not know yet.
    pub(crate) fn note_size(&self, rows: u32, columns: u32) {
        *lock(&self.size) = Some((rows, columns));
    }

    /// The size that was noted and not told to the guest.
    pub(crate) fn take_size(&self) -> Option<(u32, u32)> {
        lock(&self.size).take()
    }

    pub(crate) fn take_pending(&self) -> Option<Pending> {
        lock(&self.pending).take()
    }

    pub(crate) fn set_relay(&self, relay: Relay) {
        *lock(&self.relay) = Some(std::sync::Arc::new(relay));
    }

    pub(crate) fn relay(&self) -> Option<std::sync::Arc<Relay>> {
        lock(&self.relay).clone()
    }

    pub(crate) fn status(&self) -> ProcessStatus {
        *self.status.borrow()
    }

    pub(crate) fn running(&self) {
        self.status.send_if_modified(|status| {
            let first = *status == ProcessStatus::Created;
            if first {
                *status = ProcessStatus::Running;
            }
            first
        });
    }

    /// The first exit counts; returns whether this was it.
    pub(crate) fn exited(&self, exit: Exit) -> bool {
        self.status.send_if_modified(|status| {
            let first = !matches!(status, ProcessStatus::Exited(_));
            if first {
                *status = ProcessStatus::Exited(exit);
            }
            first
        })
    }

    /// Waits for the end.
    pub(crate) async fn wait(&self) -> Exit {
        let mut status = self.status.subscribe();
        loop {
            if let ProcessStatus::Exited(exit) = *status.borrow_and_update() {
                return exit;
            }
            if status.changed().await.is_err() {
                // The sender lives in `self`, so this cannot be; an end is the safe reading.
                return Exit { code: crate::LOST, at: SystemTime::now() };
            }
        }
    }
}

/// A lock whose holder panicked still guards a plain value.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        let reference = ProcessRef { container: "c".parse().unwrap(), exec: None };
        Process::new(reference, 1, &Stdio::default())
    }

    #[tokio::test]
    async fn first_exit_counts() {
        let process = process();
        let exit = |code| Exit { code, at: SystemTime::UNIX_EPOCH };
        assert!(process.exited(exit(3)));
        assert!(!process.exited(exit(137)));
        assert_eq!(process.wait().await.code, 3);
    }

    #[test]
    fn a_size_is_noted_until_it_is_told() {
        let process = process();
        process.note_size(1, 2);
        process.note_size(24, 80);
        assert_eq!(process.take_size(), Some((24, 80)));
        assert_eq!(process.take_size(), None);
    }

    #[test]
    fn an_exited_process_does_not_run_again() {
        let process = process();
        process.exited(Exit { code: 0, at: SystemTime::UNIX_EPOCH });
        process.running();
        assert!(matches!(process.status(), ProcessStatus::Exited(_)));
    }
}
