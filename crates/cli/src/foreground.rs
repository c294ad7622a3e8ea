//! Waiting for a process in the foreground: signals go to it, its exit code is ours.

use crate::console::{Proxy, Pty};
use crate::stand_in::launch;
use anyhow::{Context, Result};
use kata_jail::Child;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::Duration;

/// Signals held back until there is a process to have them.
pub struct Signals {
    set: SigSet,
    patience: Patience,
}

/// What becomes of a process that does not end when it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It goes on: an engine decides.
    Endless,
    /// The second time it is killed. The first process of a container ignores every signal
    /// that it has no handler for, and a person who types Ctrl-C twice means it.
    UntilSecond,
}

/// Signals that tell a process to end.
const END: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGHUP];

/// How long a process may take to end once it was told to, if patience has an end.
const GRACE: Duration = Duration::from_secs(10);

/// Those that are about ourselves, or cannot be held back.
const OURS: [Signal; 8] = [
    Signal::SIGCHLD,
    Signal::SIGPIPE,
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGURG,
    Signal::SIGABRT,
];

impl Signals {
    /// Holds them back from now on; must run before there is a second thread.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn hold() -> Result<Self> {
        let mut set = SigSet::all();
        OURS.into_iter().for_each(|signal| set.remove(signal));
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
            .context("cannot hold back signals")?;
        Ok(Self { set, patience: Patience::Endless })
    }

    /// The same with another patience.
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// Passes them on to `process`, for as long as it lives.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn pass_to(self, process: &Child, terminal: Option<OwnedFd>) -> Result<()> {
        let process = process.pidfd().try_clone_to_owned().context("cannot copy a descriptor")?;
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                let mut told = false;
                while let Ok(signal) = self.set.wait() {
                    let end = END.contains(&signal);
                    match &terminal {
                        Some(master) if signal == Signal::SIGWINCH => resize(master),
                        _ if end && told && self.patience == Patience::UntilSecond => {
                            send(&process, Signal::SIGKILL);
                        }
                        _ => send(&process, signal),
                    }
                    if end && !told && self.patience == Patience::UntilSecond {
                        kill_later(&process);
                    }
                    told |= end;
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }
}

/// Kills the process if it still lives after [`GRACE`].
fn kill_later(process: &OwnedFd) {
    let Ok(process) = process.try_clone() else { return };
    // Without the thread, the second signal still ends the process.
    let _ = thread::Builder::new().name("grace".into()).spawn(move || {
        thread::sleep(GRACE);
        send(&process, Signal::SIGKILL);
    });
}

fn resize(master: &OwnedFd) {
    if let Ok(size) = rustix::termios::tcgetwinsize(io::stdin().as_fd()) {
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}

fn send(process: &OwnedFd, signal: Signal) {
    if let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) {
        // A process that has ended needs no signal.
        let _ = rustix::process::pidfd_send_signal(process, signal);
    }
}

/// Waits for the stand-in's end; its exit code.
///
/// # Errors
/// When the terminal cannot be served.
pub async fn wait(stand_in: &Child, signals: Signals, terminal: Option<Pty>) -> Result<u8> {
    let proxy = terminal.map(Pty::proxy).transpose()?;
    let master =
        proxy.as_ref().map(Proxy::master).transpose().context("cannot copy the terminal")?;
    signals.pass_to(stand_in, master)?;
    let status = stand_in.wait().await.context("cannot wait for the container's process")?;
    if let Some(proxy) = proxy {
        proxy.finish();
    }
    Ok(launch::code(status))
}
