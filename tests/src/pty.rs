//! A terminal to run an interactive command on.

use std::fs::File;
use std::io::{Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::pty::{Winsize, openpty};

use crate::command;

/// The controlling end of a terminal, and what came out of it.
pub struct Terminal {
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts to gather what comes out of `master`.
    pub fn new(master: OwnedFd) -> Result<Self> {
        let master = File::from(master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, sink) = (master.try_clone()?, Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // What comes while the other end closes may be there after a first error only.
            while let Ok(count @ 1..) =
                reader.read(&mut buffer).or_else(|_| reader.read(&mut buffer))
            {
                sink.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..count]);
            }
        });
        Ok(Self { master, seen })
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("type into the terminal")
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and `size` lives through the call.
        let result =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        nix::errno::Errno::result(result)?;
        Ok(())
    }

    /// All that came so far.
    pub fn text(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits until `text` was shown.
    pub fn expect(&self, text: &str) -> Result<()> {
        command::eventually("text on the terminal", command::PATIENCE, || {
            Ok(self.text().contains(text))
        })
        .with_context(|| format!("waited for {text:?}, saw {:?}", self.text()))
    }
}

/// A command on a terminal of its own; killed when dropped.
pub struct Session {
    child: Child,
    terminal: Terminal,
}

impl Session {
    /// Starts `command` as leader of a session on a new terminal of this size.
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).context("open a terminal")?;
        let slave = |fd: &OwnedFd| -> Result<Stdio> { Ok(fd.try_clone()?.into()) };
        command.stdin(slave(&pty.slave)?).stdout(slave(&pty.slave)?).stderr(slave(&pty.slave)?);
        // SAFETY: setsid and ioctl are async-signal-safe and touch no memory of ours.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| command::shown(command))?;
        Ok(Self { child, terminal: Terminal::new(pty.master)? })
    }

    /// Waits for the end; returns the exit code.
    pub fn finish(&mut self, patience: Duration) -> Result<i32> {
        match command::wait(&mut self.child, patience)? {
            Some(status) => Ok(command::code(status)),
            None => bail!("did not end within {patience:?}; the terminal showed {:?}", self.text()),
        }
    }
}

impl Deref for Session {
    type Target = Terminal;

    fn deref(&self) -> &Terminal {
        &self.terminal
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Terminal {
        &mut self.terminal
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
