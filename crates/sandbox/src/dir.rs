//! Where a sandbox keeps its files on the host: `/run/kata-containers/<sandbox>/`.

use kata_protocol::Id;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Directory of all sandboxes of this host.
pub const RUN_DIR: &str = "/run/kata-containers";

const TASK_SOCKET: &str = "task.sock";

/// One sandbox's directory. Holding one does not mean that it exists.
#[derive(Clone, Debug)]
pub struct SandboxDir {
    path: PathBuf,
}

impl SandboxDir {
    /// The directory of `sandbox`.
    pub fn of(sandbox: &Id) -> Self {
        Self { path: Path::new(RUN_DIR).join(sandbox.as_str()) }
    }

    /// Makes it, for its owner alone.
    ///
    /// # Errors
    /// `AlreadyExists` when a sandbox of this id exists.
    pub fn create(sandbox: &Id) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o711).create(RUN_DIR)?;
        let dir = Self::of(sandbox);
        DirBuilder::new().mode(0o700).create(&dir.path)?;
        Ok(dir)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was created on the host for this sandbox.
    pub fn state(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// The log of the sandbox server.
    pub fn log(&self) -> PathBuf {
        self.path.join("server.log")
    }

    /// How long each step of the start took.
    pub fn stages(&self) -> PathBuf {
        self.path.join("stages.json")
    }

    /// containerd's Task API.
    pub fn task_socket(&self) -> io::Result<SocketPath> {
        SocketPath::new(&self.path, TASK_SOCKET)
    }

    /// Where [`SandboxDir::task_socket`] is found, for a link to a socket elsewhere.
    pub fn task_link(&self) -> PathBuf {
        self.path.join(TASK_SOCKET)
    }

    /// Where stand-ins hand over the engine's descriptors.
    pub fn attach_socket(&self) -> io::Result<SocketPath> {
        SocketPath::new(&self.path, "attach.sock")
    }

    /// Removes it and all that is in it; fine when it is gone already.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Address of a unix socket that may lie deeper than `sun_path` is long (107 bytes):
/// it goes through a descriptor of the directory. Valid while this value lives.
#[derive(Debug)]
pub struct SocketPath {
    _dir: OwnedFd,
    path: PathBuf,
}

impl SocketPath {
    fn new(dir: &Path, name: &str) -> io::Result<Self> {
        let dir: OwnedFd = File::open(dir)?.into();
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
        Ok(Self { _dir: dir, path })
    }

    /// What to bind or connect to.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
