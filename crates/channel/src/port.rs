//! The guest's virtio-serial port.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, epoll};
use rustix::fs::{Mode, OFlags};

use crate::FdIo;
use crate::fd_io::register;

const PORTS: &str = "/sys/class/virtio-ports";

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The list of ports cannot be read.
    #[error("cannot list the virtio-serial ports in {PORTS}")]
    List(#[source] io::Error),
    /// No port of that name.
    #[error("there is no virtio-serial port named {0}; the virtual machine needs one")]
    Missing(String),
    /// The device cannot be opened.
    #[error("cannot open virtio-serial port {0}")]
    Open(PathBuf, #[source] io::Error),
    /// Waiting failed.
    #[error("cannot wait for the host to open virtio-serial port {0}")]
    Wait(PathBuf, #[source] io::Error),
}

/// A virtio-serial port, opened.
///
/// Until the host has opened its end, and after it has closed it, the port polls as hung up
/// and reads as ended. That state sticks to a tokio registration, so each connection gets a
/// registration of its own, made once the host is there.
#[derive(Debug)]
pub struct SerialPort {
    path: PathBuf,
    fd: OwnedFd,
}

impl SerialPort {
    /// Opens the port's device where it is known, and else the one that the virtual machine gave
    /// this name.
    ///
    /// # Errors
    /// When there is none or it cannot be opened.
    pub fn open(known: &Path, name: &str) -> Result<Self, PortError> {
        match Self::open_device(known.to_owned()) {
            Err(PortError::Open(_, error)) if error.kind() == io::ErrorKind::NotFound => {
                Self::open_device(find(name)?)
            }
            opened => opened,
        }
    }

    fn open_device(path: PathBuf) -> Result<Self, PortError> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { path, fd }),
            Err(error) => Err(PortError::Open(path, error.into())),
        }
    }

    /// Waits until the host has opened its end, and gives a connection that ends when the
    /// host closes it. Whoever opens the port anew for the next one lets the host see that
    /// this one is forgotten.
    ///
    /// # Errors
    /// When the port cannot be polled.
    pub async fn connection(self) -> Result<FdIo, PortError> {
        self.connected().await.map_err(|error| PortError::Wait(self.path.clone(), error))
    }

    async fn connected(&self) -> io::Result<FdIo> {
        if hung_up(&self.fd)? {
            self.wait().await?;
        }
        FdIo::new(self.fd.try_clone()?)
    }

    /// A hang-up is always reported, so waiting for its end needs an edge: an epoll instance
    /// of our own, edge-triggered, which itself can be waited for.
    async fn wait(&self) -> io::Result<()> {
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edges, &self.fd, epoll::EventData::new_u64(0), flags)?;
        let edges = register(edges)?;
        loop {
            let mut guard = edges.readable().await?;
            let mut events: Vec<epoll::Event> = Vec::with_capacity(1);
            epoll::wait(
                edges.get_ref(),
                rustix::buffer::spare_capacity(&mut events),
                Some(&Timespec::default()),
            )?;
            if !hung_up(&self.fd)? {
                return Ok(());
            }
            guard.clear_ready();
        }
    }
}

fn hung_up(fd: &impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec::default()))?;
    Ok(polled[0].revents().contains(PollFlags::HUP))
}

fn find(name: &str) -> Result<PathBuf, PortError> {
    for entry in fs::read_dir(PORTS).map_err(PortError::List)? {
        let entry = entry.map_err(PortError::List)?;
        let text = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if text.trim_end() == name {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(PortError::Missing(name.to_owned()))
}
