//! A process that we started, or that was started for us.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};

use rustix::process::{Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// A process that we started, or that was started for us. Dropping it does *not* end the process.
#[derive(Debug)]
pub struct Child {
    pid: i32,
    pidfd: OwnedFd,
    status: Mutex<Option<ExitStatus>>,
    /// By whom we are told how it ended, if it is not ours to wait for.
    told: Option<watch::Receiver<Option<ExitStatus>>>,
}

impl Child {
    pub(crate) fn new(pid: i32, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, status: Mutex::new(None), told: None }
    }

    /// A process that another one started for us, and waits for: it tells how that ended.
    pub fn of_another(pid: i32, pidfd: OwnedFd, told: watch::Receiver<Option<ExitStatus>>) -> Self {
        Self { told: Some(told), ..Self::new(pid, pidfd) }
    }

    /// The pid, as seen in our PID namespace. To be shown; use [`Self::kill`] to signal.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The pidfd. Readable when the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` when the process has ended and was waited for; `EINVAL` for no signal.
    pub fn kill(&self, signal: i32) -> io::Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the number is one of a signal; delivery to another process is its affair.
        let signal = unsafe { Signal::from_raw_unchecked(signal) };
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, signal)?)
    }

    /// The status, if the process has ended.
    ///
    /// # Errors
    /// `ECHILD` when somebody else waited for it.
    pub fn try_wait(&self) -> io::Result<Option<ExitStatus>> {
        if let Some(told) = &self.told {
            return Ok(*told.borrow());
        }
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if status.is_some() {
            return Ok(*status);
        }
        let found = rustix::process::waitid(
            WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        )?;
        *status = found.map(|found| {
            let core = if found.dumped() { 0x80 } else { 0 };
            ExitStatus::from_raw(match (found.exit_status(), found.terminating_signal()) {
                (Some(code), _) => (code & 0xff) << 8,
                (None, signal) => signal.unwrap_or(libc::SIGKILL) | core,
            })
        });
        Ok(*status)
    }

    /// Waits until the process has ended. May be called again, and by several tasks.
    ///
    /// # Errors
    /// `ECHILD` when somebody else waited for it, and did not tell.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O.
    pub async fn wait(&self) -> io::Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        if let Some(told) = &self.told {
            let mut told = told.clone();
            let status = told.wait_for(Option::is_some).await.ok().and_then(|status| *status);
            return status.ok_or_else(|| io::Error::from_raw_os_error(libc::ECHILD));
        }
        // A copy, because one epoll set takes a descriptor only once.
        let copy = self.pidfd.try_clone()?;
        // SAFETY: the watch owns the copy, which thus stays open as long as it is registered.
        let watch = unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) }?;
        loop {
            watch.readable().await?.clear_ready();
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
        }
    }

    /// Waits, blocking this thread, until the process has ended.
    ///
    /// # Errors
    /// `ECHILD` when somebody else waited for it, or is to.
    pub fn wait_blocking(&self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            // Without the lock, so that others may look meanwhile. If one of them was
            // faster, this fails and the next look succeeds.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let waited = rustix::process::waitid(WaitId::PidFd(self.pidfd.as_fd()), options);
            if let (Err(error), None) = (waited, self.try_wait()?) {
                return Err(error.into());
            }
        }
    }
}

impl AsRawFd for Child {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.pidfd.as_raw_fd()
    }
}
