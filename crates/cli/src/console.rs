//! Terminals: the pair that an engine or our own caller holds one end of.
//!
//! Line editing, echo and Ctrl-C happen on the guest's terminal; the host's pair is raw
//! and only carries bytes and the window's size.

use anyhow::{Context, Result};
use kata_channel::read_terminal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

/// What containerd's console package calls every master.
const MASTER_NAME: &[u8] = b"/dev/ptmx";

/// A pseudoterminal.
#[derive(Debug)]
pub struct Pty {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Pty {
    /// Opens a new pair, raw.
    ///
    /// # Errors
    /// When the host has no pseudoterminals left.
    pub fn open() -> Result<Self> {
        let open = || -> io::Result<Self> {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let slave = ioctl_tiocgptpeer(&master, flags)?;
            let mut mode = tcgetattr(&slave)?;
            mode.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &mode)?;
            Ok(Self { master, slave })
        };
        open().context("cannot allocate a pseudoterminal")
    }

    /// The end that the process has.
    pub fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }

    /// Rows and columns, if they were ever set.
    pub fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(&self.master).ok()?;
        (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
    }

    /// Sets rows and columns.
    pub fn resize(&self, rows: u16, columns: u16) {
        // A size is never worth failing for.
        let _ = tcsetwinsize(
            &self.master,
            Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 },
        );
    }

    /// Makes it as large as our own terminal, if we have one.
    pub fn resize_like_ours(&self) {
        if let Ok(size) = tcgetwinsize(io::stdin()) {
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    /// Gives the master to whoever listens on `socket`, as runc does.
    ///
    /// # Errors
    /// When nobody takes it.
    pub fn send_master(&self, socket: &Path) -> Result<()> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let send = || -> io::Result<()> {
            let stream = UnixStream::connect(socket)?;
            let fds = [self.master.as_raw_fd()];
            let data = [io::IoSlice::new(MASTER_NAME)];
            let control = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(stream.as_raw_fd(), &data, &control, MsgFlags::MSG_NOSIGNAL, None)?;
            Ok(())
        };
        send().with_context(|| format!("cannot send the terminal to {}", socket.display()))
    }

    /// Carries bytes between our standard streams and the master until [`Proxy::finish`];
    /// our own terminal is raw meanwhile.
    ///
    /// # Errors
    /// When our terminal cannot be made raw or no thread can be started.
    pub fn proxy(self) -> Result<Proxy> {
        let raw = RawTerminal::enter().context("cannot make the terminal raw")?;
        let Self { master, slave } = self;
        drop(slave);
        let copy = |fd: &OwnedFd| fd.try_clone().context("cannot copy the terminal");
        let (input, output) = (copy(&master)?, copy(&master)?);
        let (over, finish) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
            .context("cannot make a pipe")?;
        thread::Builder::new()
            .name("terminal-input".into())
            .spawn(move || carry(io::stdin().as_fd(), input.as_fd()))
            .context("cannot start a thread")?;
        let output = thread::Builder::new()
            .name("terminal-output".into())
            .spawn(move || carry_until(output.as_fd(), io::stdout().as_fd(), over.as_fd()))
            .context("cannot start a thread")?;
        Ok(Proxy { output, finish, master, _raw: raw })
    }
}

/// A terminal whose bytes are being carried.
pub struct Proxy {
    output: thread::JoinHandle<()>,
    /// Closed to tell the output's thread that no more will come.
    finish: OwnedFd,
    master: OwnedFd,
    _raw: Option<RawTerminal>,
}

impl Proxy {
    /// Makes the process's terminal as large as ours.
    pub fn resize_like_ours(&self) {
        if let Ok(size) = tcgetwinsize(io::stdin()) {
            let _ = tcsetwinsize(&self.master, size);
        }
    }

    /// Waits until the last byte is out. All of them are in the terminal by now: the server
    /// delivers before it reports the end.
    pub fn finish(self) {
        drop(self.finish);
        // The thread does not panic; if it did, its bytes are lost already.
        let _ = self.output.join();
    }
}

/// How long a terminal may take to move bytes from one end to the other (a kernel worker
/// does it), once nobody writes any more.
const SETTLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Copies until the other end of the terminal is closed everywhere; or, once `over` was
/// closed, until there is nothing left to read.
fn carry_until(from: BorrowedFd<'_>, to: BorrowedFd<'_>, over: BorrowedFd<'_>) {
    let mut finishing = false;
    let mut buffer = vec![0; 32 << 10];
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(from, PollFlags::IN),
            PollFd::from_borrowed_fd(over, PollFlags::IN),
        ];
        let (watched, timeout) =
            if finishing { (&mut fds[..1], Some(&SETTLE)) } else { (&mut fds[..], None) };
        match rustix::io::retry_on_intr(|| poll(watched, timeout)) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        finishing |= !fds[1].revents().is_empty();
        if !fds[0].revents().is_empty() && !carry_once(from, to, &mut buffer) {
            return;
        }
    }
}

/// Copies until either side ends.
fn carry(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    let mut buffer = vec![0; 32 << 10];
    while carry_once(from, to, &mut buffer) {}
}

/// Copies what there is; whether more may come.
fn carry_once(from: BorrowedFd<'_>, to: BorrowedFd<'_>, buffer: &mut [u8]) -> bool {
    let Ok(length @ 1..) = read_terminal(from, &mut *buffer) else { return false };
    let mut rest = &buffer[..length];
    while !rest.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::write(to, rest)) {
            Ok(written) => rest = &rest[written..],
            Err(rustix::io::Errno::AGAIN) => wait_writable(to),
            Err(_) => return false,
        }
    }
    true
}

/// Our standard output may be somebody's non-blocking pipe.
fn wait_writable(fd: BorrowedFd<'_>) {
    let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None);
}

/// Our own terminal in raw mode, until dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::io::{IoSliceMut, Read, Write};
    use std::os::fd::FromRawFd;
    use std::os::unix::net::UnixListener;

    #[test]
    fn bytes_pass_a_raw_terminal_unchanged() {
        let pty = Pty::open().unwrap();
        let mut master = std::fs::File::from(pty.master.try_clone().unwrap());
        let mut slave = std::fs::File::from(pty.slave.try_clone().unwrap());
        slave.write_all(b"a\nb\x03").unwrap();
        let mut bytes = [0; 4];
        master.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"a\nb\x03");
    }

    #[test]
    fn the_last_bytes_come_out_though_somebody_keeps_the_terminal_open() {
        let pty = Pty::open().unwrap();
        let kept = pty.slave.try_clone().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (over, finish) = rustix::pipe::pipe().unwrap();
        let master = pty.master.try_clone().unwrap();
        let thread =
            thread::spawn(move || carry_until(master.as_fd(), write.as_fd(), over.as_fd()));
        std::fs::File::from(kept.try_clone().unwrap()).write_all(b"last").unwrap();
        drop(finish);
        thread.join().unwrap();
        let mut text = String::new();
        std::fs::File::from(read).read_to_string(&mut text).unwrap();
        assert_eq!(text, "last");
        drop(kept);
    }

    #[test]
    fn the_size_is_what_was_set() {
        let pty = Pty::open().unwrap();
        assert_eq!(pty.size(), None);
        pty.resize(40, 100);
        assert_eq!(pty.size(), Some((40, 100)));
    }

    #[test]
    fn the_engine_receives_the_master_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let pty = Pty::open().unwrap();
        pty.send_master(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut name = [0; 64];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut data = [IoSliceMut::new(&mut name)];
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut space), MsgFlags::empty())
                .unwrap();
        let length = message.bytes;
        let Some(ControlMessageOwned::ScmRights(fds)) = message.cmsgs().unwrap().next() else {
            panic!("no descriptor came");
        };
        assert_eq!(fds.len(), 1);
        // SAFETY: the kernel has just given us this descriptor.
        let master = unsafe { OwnedFd::from_raw_fd(fds[0]) };
        assert!(isatty(&master));
        assert_eq!(&name[..length], MASTER_NAME);
    }
}
