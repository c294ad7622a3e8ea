//! The process from which inits are forked.
//!
//! The agent has threads and keeps what it knows of other containers in memory, so it does
//! not fork. To execute its own program for each process costs, where the processor is
//! emulated, a tenth of a container's start: the kernel's execve, the C library's and the
//! standard library's beginnings. So a child is forked once, before the agent has threads or
//! knows anything; it waits for a socket, forks an init that talks on it, and has nothing
//! else to do. What it forks is the agent's child.
//!
//! One exchange: a byte with the init's socket goes there, and the new pid, or an error
//! number below zero, comes back.

use super::init::init_main;
use super::wire::{receive_some, send_some};
use crate::fork::{self, Parent};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// `argv[0]` that makes the agent's program a zygote.
pub const ZYGOTE: &str = "zygote";

/// The agent's hold on its zygote, which ends with it.
#[derive(Debug)]
pub struct Zygote {
    /// What is started where the zygote is gone.
    program: PathBuf,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line(OwnedFd);

impl Zygote {
    /// Forks it off this process.
    ///
    /// # Safety
    /// This process has one thread, so that the child may go on in it as after fork(2).
    ///
    /// # Errors
    /// When there is no room for one more process.
    pub unsafe fn fork() -> io::Result<Self> {
        let (ours, theirs) = pair()?;
        // SAFETY: the caller says that there is one thread.
        match unsafe { fork::fork(Parent::This) }? {
            None => {
                drop(ours);
                serve(&theirs)
            }
            Some(_) => Ok(Self { program: "/proc/self/exe".into(), line: Mutex::new(Line(ours)) }),
        }
    }

    /// Starts `program`, which must call [`zygote_main`] when `argv[0]` is [`ZYGOTE`]. It is a
    /// child that nobody waits for here: the agent reaps whatever ends.
    ///
    /// # Errors
    /// When it cannot be executed.
    pub fn launch(program: impl Into<PathBuf>) -> io::Result<Self> {
        let program = program.into();
        let line = Mutex::new(Line::launch(&program)?);
        Ok(Self { program, line })
    }

    /// Makes an init that talks on `socket`, and gives its pid.
    pub(super) fn init(&self, socket: &OwnedFd) -> io::Result<i32> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        // Only before it has the socket is another one asked: two inits must not share it.
        match line.ask(socket) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                tracing::warn!("the zygote is gone; starting another");
                *line = Line::launch(&self.program)?;
                line.ask(socket)?;
            }
            asked => asked?,
        }
        line.answer()
    }
}

impl Line {
    fn launch(program: &Path) -> io::Result<Self> {
        let (socket, theirs) = pair()?;
        Command::new(program)
            .arg0(ZYGOTE)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        Ok(Self(socket))
    }

    fn ask(&self, init: &OwnedFd) -> io::Result<()> {
        send_some(self.0.as_fd(), &[0], &[init.as_fd()]).map(drop)
    }

    /// Waits for the answer: the zygote does nothing that takes time.
    fn answer(&self) -> io::Result<i32> {
        let mut answer = [0; 4];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut answer))? {
            4 => match i32::from_ne_bytes(answer) {
                pid if pid > 0 => Ok(pid),
                error => Err(io::Error::from_raw_os_error(-error)),
            },
            _ => Err(io::Error::other("the zygote was killed")),
        }
    }
}

/// Messages with edges: one read is one message.
fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Plays the zygote: its socket is standard input.
///
/// To be called first thing in `main`, while the process has one thread.
pub fn zygote_main() -> ! {
    // SAFETY: descriptor 0 is the agent's socket and owned by nobody else.
    let input = unsafe { OwnedFd::from_raw_fd(0) };
    // Not a standard stream any more from here on.
    let moved = rustix::io::fcntl_dupfd_cloexec(&input, 3).and_then(|socket| {
        let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, 0.into())?;
        rustix::stdio::dup2_stdin(&null)?;
        Ok(socket)
    });
    // It is the null device now, or this process ends.
    std::mem::forget(input);
    match moved {
        Ok(socket) => serve(&socket),
        Err(_) => end(),
    }
}

/// Forks inits until the agent is gone.
fn serve(socket: &OwnedFd) -> ! {
    loop {
        let mut fds = Vec::new();
        match receive_some(socket.as_fd(), &mut [0], &mut fds) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(1) => {}
            _ => end(),
        }
        let Some(init) = fds.pop() else { end() };
        // SAFETY: this process has one thread.
        let answer = match unsafe { fork::fork(Parent::Its) } {
            Ok(None) => {
                // SAFETY: an init does not come back here, where it is used.
                unsafe { libc::close(socket.as_raw_fd()) };
                init_main(init)
            }
            Ok(Some(pid)) => pid,
            Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
        };
        drop(init);
        if send_some(socket.as_fd(), &answer.to_ne_bytes(), &[]).is_err() {
            end();
        }
    }
}

fn end() -> ! {
    // SAFETY: ends the process; there is nothing to destroy.
    unsafe { libc::_exit(0) }
}
