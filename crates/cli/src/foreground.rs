//! Waiting for a process in the foreground: signals go to it, its exit code is ours.

use crate::console::Pty;
use crate::stand_in::launch;
use anyhow::{Context, Result, bail};
use kata_jail::Child;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// Our signals, read one by one instead of interrupting us.
pub struct Signals {
    source: AsyncFd<SignalFd>,
    patience: Patience,
}

/// What becomes of a process that does not end when it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// It goes on: an engine decides.
    Endless,
    /// The second time, or after [`GRACE`], it is killed. The first process of a container
    /// ignores every signal that it has no handler for, and a person who types Ctrl-C means it.
    Limited,
}

/// Those that are about ourselves, or cannot be held back.
const OURS: [i32; 8] = [
    libc::SIGCHLD,
    libc::SIGPIPE,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGURG,
    libc::SIGABRT,
];

/// Signals that tell a process to end.
const END: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGQUIT, libc::SIGHUP];

/// How long a process may take to end once it was told to, if patience is limited.
const GRACE: Duration = Duration::from_secs(10);

impl Signals {
    /// Takes them from now on; must run on the only thread.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take(patience: Patience) -> Result<Self> {
        let mut set = SigSet::all();
        for signal in OURS {
            if let Ok(signal) = signal.try_into() {
                set.remove(signal);
            }
        }
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
            .context("cannot hold back signals")?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot watch signals")?;
        // SAFETY: the descriptor is owned by the watch, which outlives its registration.
        let source = unsafe { AsyncFd::register(fd) }.context("cannot watch signals")?;
        Ok(Self { source, patience })
    }

    /// The next signal.
    async fn next(&self) -> Result<i32> {
        loop {
            let mut ready = self.source.readable().await.context("cannot watch signals")?;
            let read = ready.try_io(|fd| {
                fd.get_ref().read_signal()?.ok_or_else(|| std::io::ErrorKind::WouldBlock.into())
            });
            if let Ok(info) = read {
                // Signal numbers are small.
                return Ok(info.context("cannot read a signal")?.ssi_signo.cast_signed());
            }
        }
    }

    /// Does `work`, unless we are told to end meanwhile; then `undo` is done.
    ///
    /// # Errors
    /// Those of either, or that it was interrupted.
    pub async fn unless_told_to_end<T>(
        &self,
        work: impl Future<Output = Result<T>>,
        undo: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<T> {
        let told = async {
            while !END.contains(&self.next().await?) {}
            Ok::<(), anyhow::Error>(())
        };
        tokio::select! {
            result = work => return result,
            told = told => told?,
        }
        undo().await?;
        bail!("interrupted while the container was being created")
    }
}

/// Waits for the stand-in's end, passing our signals on; its exit code.
///
/// # Errors
/// When the terminal cannot be served.
pub async fn wait(stand_in: &Child, signals: &Signals, terminal: Option<Pty>) -> Result<u8> {
    let proxy = terminal.map(Pty::proxy).transpose()?;
    let mut deadline: Option<Instant> = None;
    let ended = stand_in.wait();
    tokio::pin!(ended);
    let status = loop {
        let overdue = async {
            match deadline {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            status = &mut ended => {
                break status.context("cannot wait for the container's process")?;
            }
            () = overdue => {
                deadline = None;
                signal(stand_in, libc::SIGKILL);
            }
            number = signals.next() => {
                let number = number?;
                let limited = signals.patience == Patience::Limited && END.contains(&number);
                match &proxy {
                    Some(proxy) if number == libc::SIGWINCH => proxy.resize_like_ours(),
                    _ if limited && deadline.is_some() => signal(stand_in, libc::SIGKILL),
                    _ => signal(stand_in, number),
                }
                if limited {
                    deadline.get_or_insert(Instant::now() + GRACE);
                }
            }
        }
    };
    if let Some(proxy) = proxy {
        proxy.finish();
    }
    Ok(launch::code(status))
}

fn signal(process: &Child, number: i32) {
    // A process that has ended needs no signal.
    let _ = process.kill(number);
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_jail::Launch;
    use std::path::Path;

    fn sh(script: &str) -> Child {
        Launch::program(Path::new("/bin/sh"), vec!["-c".into(), script.into()]).spawn().unwrap()
    }

    /// Runs `test` in a process of its own: signal masks belong to whole processes, and the
    /// test runner has threads.
    fn alone(test: impl FnOnce() -> Result<u8>) -> i32 {
        // SAFETY: the child runs only this thread; it allocates, which glibc allows after fork.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let code = test().unwrap_or(200);
                // SAFETY: ends the child without running the test runner's exit handlers.
                unsafe { libc::_exit(i32::from(code)) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                match nix::sys::wait::waitpid(child, None).unwrap() {
                    nix::sys::wait::WaitStatus::Exited(_, code) => code,
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn blocking(script: &str, patience: Patience, send: &'static [i32]) -> Result<u8> {
        crate::runtime::block_on(async {
            let signals = Signals::take(patience)?;
            let child = sh(script);
            tokio::spawn(async move {
                for number in send {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    // SAFETY: sends a signal to ourselves, which is held back.
                    unsafe { libc::kill(libc::getpid(), *number) };
                }
            });
            wait(&child, &signals, None).await
        })
    }

    #[test]
    fn signals_reach_the_process_and_its_code_is_ours() {
        let script = "trap 'exit 7' TERM; while :; do sleep 0.05; done";
        assert_eq!(alone(|| blocking(script, Patience::Endless, &[libc::SIGTERM])), 7);
        assert_eq!(alone(|| blocking("exit 3", Patience::Endless, &[])), 3);
    }

    #[test]
    fn the_second_ctrl_c_kills_what_ignores_the_first() {
        let script = "trap '' INT; while :; do sleep 0.05; done";
        let twice = &[libc::SIGINT, libc::SIGINT];
        assert_eq!(alone(|| blocking(script, Patience::Limited, twice)), 137);
    }

    #[test]
    fn work_is_undone_when_we_are_told_to_end() {
        let code = alone(|| {
            crate::runtime::block_on(async {
                let signals = Signals::take(Patience::Endless)?;
                // SAFETY: sends a signal to ourselves, which is held back.
                unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
                let mut undone = false;
                let result: Result<()> = signals
                    .unless_told_to_end(std::future::pending(), async || {
                        undone = true;
                        Ok(())
                    })
                    .await;
                Ok(u8::from(undone && result.is_err()))
            })
        });
        assert_eq!(code, 1);
    }
}
