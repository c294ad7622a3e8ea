//! Learns that QEMU ended, and why.

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kata_jail::Child;
use nix::sys::signal::Signal;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use crate::console::Console;
use crate::error::{HypervisorError, host};
use crate::exit::{Exited, VmExit};
use crate::qemu::qmp::{Event, Qmp};

/// How long what QEMU had written may take to be read after it ended. Its ends of the
/// sockets are closed then, so this is not waited for.
const DRAIN: Duration = Duration::from_millis(100);
/// Lines of the console that go into the report.
const CONSOLE_LINES: usize = 20;
/// Lines of standard error that go into the report.
const STDERR_LINES: usize = 3;

/// Knows how QEMU ended, or will know.
#[derive(Debug)]
pub(crate) struct Watch {
    sender: watch::Sender<Option<VmExit>>,
    expected: Arc<AtomicBool>,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Self { sender: watch::Sender::new(None), expected: Arc::default() }
    }

    pub(crate) fn exited(&self) -> Exited {
        Exited(self.sender.subscribe())
    }

    /// From now on an end is what we want.
    pub(crate) fn expect_end(&self) {
        self.expected.store(true, Ordering::Relaxed);
    }

    /// Follows the process and all that it says, until it ends.
    pub(crate) fn start(
        &self,
        child: Arc<Child>,
        qmp: &Qmp,
        reader: JoinHandle<()>,
        console_socket: UnixStream,
        stderr: std::io::PipeReader,
        console: Console,
    ) -> Result<(), HypervisorError> {
        let stderr = pipe::Receiver::from_owned_fd(OwnedFd::from(stderr))
            .map_err(host("watch qemu's standard error"))?;
        let said = Console::default();
        let mut events = qmp.events();
        let console_reader = tokio::spawn(console.clone().follow(console_socket));
        let stderr_reader = tokio::spawn(said.clone().follow(stderr));
        let (sender, expected) = (self.sender.clone(), Arc::clone(&self.expected));
        tokio::spawn(async move {
            let status = child.wait().await;
            let drained = async { tokio::join!(reader, console_reader, stderr_reader) };
            let _ = tokio::time::timeout(DRAIN, drained).await;
            let end = End {
                status: status.ok(),
                expected: expected.load(Ordering::Relaxed),
                shutdown: shutdown_reason(&mut events),
                stderr: said.last_lines(STDERR_LINES),
            };
            let exit = end.explain(&console);
            if exit.expected {
                tracing::debug!(cause = exit.cause, "qemu ended");
            } else {
                tracing::warn!(cause = exit.cause, "qemu ended");
            }
            let _ = sender.send(Some(exit));
        });
        Ok(())
    }
}

/// Why QEMU said it would end, if it did.
fn shutdown_reason(events: &mut broadcast::Receiver<Event>) -> Option<String> {
    loop {
        match events.try_recv() {
            Ok(event) if event.name == "SHUTDOWN" => {
                return event.data["reason"].as_str().map(str::to_owned);
            }
            Ok(_) | Err(broadcast::error::TryRecvError::Lagged(_)) => {}
            Err(_) => return None,
        }
    }
}

/// All that is known of an end.
struct End {
    status: Option<ExitStatus>,
    expected: bool,
    shutdown: Option<String>,
    stderr: Vec<String>,
}

impl End {
    fn explain(self, console: &Console) -> VmExit {
        let panic = console.panic_line();
        let mut cause = match (&panic, self.status) {
            _ if self.expected => "it was stopped".to_owned(),
            (Some(line), _) => format!("the guest panicked: {line}"),
            (None, Some(status)) => describe(status, self.shutdown.as_deref()),
            (None, None) => "qemu ended, and it is not known how".to_owned(),
        };
        if !self.expected && panic.is_none() && !self.stderr.is_empty() {
            cause = format!("{cause}: {}", self.stderr.join(" | "));
        }
        VmExit {
            status: self.status,
            expected: self.expected,
            panicked: panic.is_some(),
            cause,
            console: console.last_lines(CONSOLE_LINES),
        }
    }
}

fn describe(status: ExitStatus, shutdown: Option<&str>) -> String {
    if let Some(number) = status.signal() {
        let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
        return format!("qemu was killed by signal {number} ({name})");
    }
    match (status.code(), shutdown) {
        (Some(0), Some("guest-reset")) => "the guest restarted itself".to_owned(),
        (Some(0), Some("guest-shutdown")) => "the guest powered itself off".to_owned(),
        (Some(0), Some(reason)) => format!("qemu ended ({})", crate::console::sanitise(reason)),
        (code, _) => format!("qemu exited with code {}", code.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(status: i32) -> End {
        let status = Some(ExitStatus::from_raw(status));
        End { status, expected: false, shutdown: None, stderr: Vec::new() }
    }

    fn cause(end: End) -> String {
        end.explain(&Console::default()).cause
    }

    #[test]
    fn a_kill_is_told_with_its_signal() {
        assert_eq!(cause(end(9)), "qemu was killed by signal 9 (SIGKILL)");
    }

    #[test]
    fn qemus_own_words_are_part_of_the_cause() {
        let stderr = vec!["qemu: no such machine".to_owned()];
        let cause = cause(End { stderr, ..end(1 << 8) });
        assert_eq!(cause, "qemu exited with code 1: qemu: no such machine");
    }

    #[test]
    fn a_panic_is_the_cause_however_qemu_ended() {
        let console = Console::default();
        console.push(b"hello\n[ 1.0] Kernel panic - not syncing: VFS\n");
        let exit = end(0).explain(&console);
        assert!(exit.panicked);
        assert_eq!(exit.cause, "the guest panicked: Kernel panic - not syncing: VFS");
        assert_eq!(exit.console.len(), 2);
    }

    #[test]
    fn an_end_that_was_asked_for_is_no_fault() {
        let exit = End { expected: true, ..end(9) }.explain(&Console::default());
        assert_eq!((exit.expected, exit.to_string().as_str()), (true, "it was stopped"));
    }

    #[test]
    fn the_guests_own_end_is_told_from_qemus() {
        let told = |reason: &str| cause(End { shutdown: Some(reason.to_owned()), ..end(0) });
        assert_eq!(told("guest-reset"), "the guest restarted itself");
        assert_eq!(told("guest-shutdown"), "the guest powered itself off");
        assert_eq!(cause(end(0)), "qemu exited with code 0");
    }
}
