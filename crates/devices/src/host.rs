//! The server's side: start the process, attach and detach.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kata_jail::{Child, Launch, Role};
use rustix::fs::{AtFlags, Mode, OFlags, open, unlinkat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::handshake::{self, Message};
use crate::path::SharePath;
use crate::serve::{Arguments, Cache, FD_HANDSHAKE, FD_LISTENER, FD_ORIGIN};
use crate::tree::{self, FileSystem};

/// Name of the vhost-user socket while it is being connected.
const SOCKET_NAME: &str = "devices.sock";
/// Longest time from start to ready. It takes some ten milliseconds on an idle machine.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// What speaks to the process for the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Monitor {
    /// One that meets its devices.
    Executed,
    /// One that is to be forked, and its forks, which have met another ([`crate::greet`]).
    Forked,
}

/// How the share is served.
#[derive(Debug)]
pub struct Options {
    /// What the process calls itself (`argv[0]`), for people who look at `ps`.
    pub title: OsString,
    /// What the guest may keep in its page cache.
    pub cache: Cache,
    /// Threads beside the one that reads the queue; 0: that one does the work.
    pub threads: usize,
    /// Let the guest see each attached file system as one of its own (`st_dev`).
    pub announce_submounts: bool,
    /// What speaks to it.
    pub monitor: Monitor,
    /// From what it copies the machine's memory when it touches that: the machine's begins empty,
    /// and its monitor is served alike.
    pub touched: Option<OwnedFd>,
    /// Where its warnings go; nowhere when absent.
    pub stderr: Option<OwnedFd>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            title: "kata-devices".into(),
            cache: Cache::Auto,
            threads: 0,
            announce_submounts: false,
            monitor: Monitor::Executed,
            touched: None,
            stderr: None,
        }
    }
}

/// The server's handle of a devices process.
///
/// Dropping it does not end the process: that ends by itself when the VMM or the server does.
#[derive(Debug)]
pub struct DevicesProcess {
    child: Child,
    /// The line on which it says that it is ready, until it has.
    starting: Mutex<Option<UnixStream>>,
}

impl DevicesProcess {
    /// Starts the process and gives the connected vhost-user socket for the VMM.
    ///
    /// Returns at once; the first [`attach`](Self::attach) waits until the process is ready.
    /// `dir` is a directory that only root can enter; the socket's name is in it for an
    /// instant. The process is killed when the calling thread ends.
    pub fn spawn(dir: &Path, options: Options) -> Result<(Self, OwnedFd), Error> {
        let failed = |source| Error::Socket { dir: dir.to_owned(), source };
        let (listener, connected) = connected_listener(dir).map_err(failed)?;
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_read_timeout(Some(READY_TIMEOUT)).map_err(failed)?;
        let arguments = Arguments {
            cache: options.cache,
            threads: options.threads,
            announce_submounts: options.announce_submounts,
            monitor: options.monitor,
            touched: options.touched.is_some(),
        };
        let mut launch = Launch::role(Role::Devices, options.title, &arguments)?
            .fd(listener, FD_LISTENER)
            .fd(theirs.into(), FD_HANDSHAKE)
            .pid_namespace()
            .die_with_parent();
        if let Some(origin) = options.touched {
            launch = launch.fd(origin, FD_ORIGIN);
        }
        if let Some(stderr) = options.stderr {
            launch = launch.stderr(stderr);
        }
        let child = launch.spawn()?;
        Ok((Self { child, starting: Mutex::new(Some(ours)) }, connected))
    }

    /// The process, to watch its end.
    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Waits until the process is in its jail and can serve.
    pub fn ready(&self) -> Result<(), Error> {
        let mut starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = &*starting else { return Ok(()) };
        match handshake::receive(line) {
            Ok(Message::Ready) => {
                *starting = None;
                Ok(())
            }
            Ok(Message::Failed(cause)) => Err(Error::Refused(cause)),
            Ok(Message::Nothing) => Err(tree::died(&self.child)),
            Err(_) => Err(Error::Silent(READY_TIMEOUT.as_secs())),
        }
    }

    /// Puts the host's `source` (a directory or a file; symbolic links are followed) into the
    /// share at `at`, with the mounts below it when `recursive`. It is visible on return.
    ///
    /// A read-only one is so in the host's mount table, whatever the guest does. Mounts that
    /// the host makes later below a writable one appear in it, too.
    pub fn attach(
        &self,
        source: &Path,
        at: &Path,
        readonly: bool,
        recursive: bool,
    ) -> Result<(), Error> {
        let at = SharePath::new(at)?;
        self.ready()?;
        tree::attach(&self.child, source, &at, readonly, recursive)
    }

    /// Mounts a file system at `at` in the share: `kind`, `source` and `options` as mount(8)
    /// takes them; paths in them are the host's. The host itself never has it mounted. `dir` is
    /// a directory that only root can enter.
    pub fn mount(
        &self,
        kind: &str,
        source: &str,
        options: &[String],
        dir: &Path,
        at: &Path,
    ) -> Result<(), Error> {
        let at = SharePath::new(at)?;
        self.ready()?;
        tree::mount(&self.child, dir, &FileSystem { kind, source, options }, &at)
    }

    /// Takes what was attached at `at` out of the share. Nothing is left to do when the
    /// process has ended.
    ///
    /// Files that the guest still holds open stay usable for it until it closes them.
    pub fn detach(&self, at: &Path) -> Result<(), Error> {
        tree::detach(&self.child, &SharePath::new(at)?)
    }
}

/// A listening socket with one connection waiting in it, and the other end of that.
///
/// The vhost-user library accepts a connection; QEMU inherits one. So both are made here,
/// and nobody ever has to wait for a name to appear.
fn connected_listener(dir: &Path) -> io::Result<(OwnedFd, OwnedFd)> {
    let dir = open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Through the descriptor: a socket's name has 107 bytes at most, a directory's has not.
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}/{SOCKET_NAME}", dir.as_raw_fd()))?;
    let make = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let (listener, connected) = (make()?, make()?);
    match unlinkat(&dir, SOCKET_NAME, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    bind(&listener, &address)?;
    let result = listen(&listener, 1).and_then(|()| connect(&connected, &address));
    unlinkat(&dir, SOCKET_NAME, AtFlags::empty())?;
    result?;
    Ok((listener, connected))
}
