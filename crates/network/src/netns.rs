//! Network namespaces.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kata_netlink::{Ipv6, NetlinkError, Socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::NetworkError;

/// A network namespace, held open: it exists at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    path: PathBuf,
    identity: (u64, u64),
}

impl Netns {
    /// The namespace that `path` names: `/run/netns/…`, `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        let error = |e: io::Error| NetworkError::Open(path.to_owned(), e);
        let fd = OwnedFd::from(File::open(path).map_err(error)?);
        let stat = rustix::fs::fstat(&fd).map_err(|e| error(e.into()))?;
        Ok(Self { fd, path: path.to_owned(), identity: (stat.st_dev, stat.st_ino) })
    }

    /// A new one, without a name and with nothing in it but a loopback interface.
    ///
    /// # Errors
    /// When the kernel makes none.
    pub fn create() -> Result<Self, NetworkError> {
        use rustix::thread::{UnshareFlags, unshare_unsafe};
        let create = || {
            // SAFETY: the thread shares no namespace-bound state with others; it ends at once.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .map_err(|e| NetworkError::System("make a network namespace", e.into()))?;
            Self::open(Path::new("/proc/thread-self/ns/net"))
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(create);
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The namespace of a process.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of_process(pid: i32) -> Result<Self, NetworkError> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// Switches IPv6 on in it, or off, as Docker does where a network has none. Says whether it is
    /// on, which it is never where the kernel has none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn switch_ipv6(&self, on: bool) -> Result<bool, NetworkError> {
        match self.run(|| Ipv6::All.switch(!on))? {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(NetworkError::System("switch IPv6 on or off", error)),
            Ok(()) => Ok(on),
        }
    }

    /// Whether it is the host's: the one of process 1, or our own.
    pub fn is_host(&self) -> bool {
        ["/proc/1/ns/net", "/proc/self/ns/net"]
            .into_iter()
            .filter_map(|path| Self::open(Path::new(path)).ok())
            .any(|host| host == *self)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` in the namespace, on a thread of its own that ends with it: the
    /// calling thread stays where it is. Sockets opened by `work` stay in the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered; what `work` returns is the value.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetworkError> {
        let enter = || {
            move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|e| NetworkError::Enter(self.path.clone(), e.into()))?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, enter)
                .map_err(|e| NetworkError::System("start a thread", e))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A netlink socket in the namespace.
    pub(crate) fn socket(&self) -> Result<Socket, NetworkError> {
        self.run(Socket::open)?.map_err(|e| self.netlink(e))
    }

    pub(crate) fn netlink(&self, error: NetlinkError) -> NetworkError {
        NetworkError::Netlink(self.path.clone(), error)
    }
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for Netns {}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
