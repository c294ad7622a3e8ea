//! The share: by which process the guest gets at host directories, and how they get there.

use crate::{SandboxDir, SandboxError};
use kata_config::{FsCache, SandboxConfig, SharedFs};
use kata_devices::{Cache, DevicesProcess, Monitor, SharePath};
use kata_hypervisor::{Qemu, Share as Device};
use kata_jail::Child;
use kata_protocol::{Id, SHARE_MOUNT, SHARE_TAG, agent as message};
use kata_storage::{Attachment, FileSystem, Source};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::{Mutex, OnceCell};
use tokio::task::{JoinHandle, spawn_blocking};

/// Where QEMU's own 9p server has the share, below the root of its jail.
const IN_MONITOR: &str = "share";

/// How the share of a machine is served.
pub(crate) enum Share {
    /// virtio-fs, by a devices process.
    VirtioFs {
        /// That process.
        devices: Arc<DevicesProcess>,
        /// By way of which file systems are mounted.
        dir: PathBuf,
    },
    /// 9p, by QEMU.
    NineP {
        /// QEMU, once it is in its jail.
        monitor: OnceCell<Arc<Child>>,
        /// By way of which file systems are mounted.
        dir: PathBuf,
        /// Bytes in one message.
        msize: u32,
    },
}

/// Of what kind of machine it is.
pub(crate) struct Of<'a> {
    /// What speaks to a devices process.
    pub monitor: Monitor,
    /// From what the memory is copied that it touches, if it is.
    pub touched: Option<BorrowedFd<'a>>,
}

/// A devices process that is being spoken to in a monitor's place.
pub(crate) struct Greeting(JoinHandle<std::io::Result<()>>);

impl Greeting {
    /// Begins to say to what serves this device what a forked monitor has said to another one. By
    /// 9p there is nothing else that serves it.
    pub(crate) fn begin(device: &Device) -> Option<Self> {
        let Device::VhostUserFs { socket, .. } = device else { return None };
        let socket = socket.try_clone();
        Some(Self(spawn_blocking(move || kata_devices::greet(socket?.as_fd()))))
    }

    /// Waits until all is said.
    pub(crate) async fn done(self) -> Result<(), SandboxError> {
        let said = self.0.await.map_err(std::io::Error::from);
        said.flatten().map_err(SandboxError::io("speak to the process that serves the share"))
    }
}

impl Share {
    /// Starts what serves it; gives the machine's device, too.
    pub(crate) fn start(
        config: &SandboxConfig,
        sandbox: &Id,
        dir: &SandboxDir,
        of: Of<'_>,
    ) -> Result<(Self, Device), SandboxError> {
        let tag = SHARE_TAG.to_owned();
        match config.hypervisor.shared_fs {
            SharedFs::VirtioFs => {
                let options = options(config, sandbox, dir, of)?;
                let (devices, socket) = DevicesProcess::spawn(dir.path(), options)?;
                let queue_size = config.hypervisor.virtio_fs_queue_size;
                let device = Device::VhostUserFs { socket, tag, queue_size };
                let (devices, dir) = (Arc::new(devices), dir.path().to_owned());
                Ok((Self::VirtioFs { devices, dir }, device))
            }
            SharedFs::Virtio9p => {
                let share = Self::NineP {
                    monitor: OnceCell::new(),
                    dir: dir.path().to_owned(),
                    msize: config.hypervisor.msize_9p,
                };
                Ok((share, Device::NineP { tag }))
            }
            SharedFs::None => Err(SandboxError::Unsupported(
                "shared_fs = \"none\" (root file systems are directories of the host: use \
                 \"virtio-fs\" or \"virtio-9p\")",
            )),
        }
    }

    /// Goes on as the share of a sandbox whose directory is this.
    pub(crate) fn move_to(&mut self, sandbox: &SandboxDir) {
        let (Self::VirtioFs { dir, .. } | Self::NineP { dir, .. }) = self;
        sandbox.path().clone_into(dir);
    }

    /// The process that serves nothing else than the share.
    pub(crate) fn process(&self) -> Option<&Child> {
        match self {
            Self::VirtioFs { devices, .. } => Some(devices.child()),
            Self::NineP { .. } => None,
        }
    }

    /// Ends what serves only the share; returns when nothing of it is left.
    pub(crate) async fn end(&self) {
        if let Some(process) = self.process() {
            let _ = process.kill(libc::SIGKILL);
            let _ = process.wait().await;
        }
    }

    /// What the agent mounts.
    pub(crate) fn storage(&self) -> message::Storage {
        let (driver, options) = match self {
            Self::VirtioFs { .. } => ("virtiofs", Vec::new()),
            // Without a cache of pages a file cannot be mapped by its processes together.
            Self::NineP { msize, .. } => {
                ("9p", vec![format!("msize={msize}"), "cache=mmap".to_owned()])
            }
        };
        message::Storage {
            driver: driver.to_owned(),
            source: SHARE_TAG.to_owned(),
            fstype: driver.to_owned(),
            options,
            mount_point: SHARE_MOUNT.to_owned(),
            ..Default::default()
        }
    }

    /// Puts a host path into the share. The kernel takes its time for mounts, in which others can
    /// hear of the guest.
    pub(crate) async fn attach(
        &self,
        hypervisor: &Mutex<Qemu>,
        attachment: &Attachment,
    ) -> Result<(), SandboxError> {
        let attachment = attachment.clone();
        let attached = match self {
            Self::VirtioFs { devices, dir } => {
                let (devices, dir) = (Arc::clone(devices), dir.clone());
                spawn_blocking(move || attach_to_devices(&devices, &dir, &attachment))
            }
            Self::NineP { monitor, dir, .. } => {
                let process = async { hypervisor.lock().await.process().await };
                let monitor = Arc::clone(monitor.get_or_try_init(|| process).await?);
                let dir = dir.clone();
                spawn_blocking(move || attach_to_monitor(&monitor, &dir, &attachment))
            }
        };
        let attached = attached.await.map_err(std::io::Error::from);
        Ok(attached.map_err(SandboxError::io("attach to the share"))??)
    }

    /// Takes it out again.
    pub(crate) fn detach(&self, at: &Path) -> Result<(), SandboxError> {
        match self {
            Self::VirtioFs { devices, .. } => devices.detach(at)?,
            Self::NineP { monitor, .. } => {
                if let Some(monitor) = monitor.get() {
                    kata_devices::detach(monitor, &in_monitor(at)?)?;
                }
            }
        }
        Ok(())
    }
}

fn attach_to_devices(
    devices: &DevicesProcess,
    dir: &Path,
    Attachment { source, at, readonly, recursive }: &Attachment,
) -> Result<(), kata_devices::Error> {
    match source {
        Source::Path(path) => devices.attach(path, at, *readonly, *recursive),
        Source::FileSystem(fs) => devices.mount(&fs.kind, &fs.source, &fs.options, dir, at),
    }
}

fn attach_to_monitor(
    monitor: &Child,
    dir: &Path,
    Attachment { source, at, readonly, recursive }: &Attachment,
) -> Result<(), kata_devices::Error> {
    let at = in_monitor(at)?;
    match source {
        Source::Path(path) => kata_devices::attach(monitor, path, &at, *readonly, *recursive),
        Source::FileSystem(FileSystem { kind, source, options }) => {
            let fs = kata_devices::FileSystem { kind, source, options };
            kata_devices::mount(monitor, dir, &fs, &at)
        }
    }
}

/// The place in a share that is a directory of the jail's root.
fn in_monitor(at: &Path) -> Result<SharePath, kata_devices::Error> {
    Ok(SharePath::new(at)?.of_share_at(Path::new(IN_MONITOR)))
}

fn options(
    config: &SandboxConfig,
    sandbox: &Id,
    dir: &SandboxDir,
    of: Of<'_>,
) -> Result<kata_devices::Options, SandboxError> {
    let touched = of.touched.map(|origin| origin.try_clone_to_owned()).transpose();
    let log: OwnedFd = std::fs::File::options()
        .append(true)
        .create(true)
        .open(dir.log())
        .map_err(SandboxError::io("open the sandbox's log"))?
        .into();
    Ok(kata_devices::Options {
        title: format!("kata-devices {sandbox}").into(),
        cache: cache(config.hypervisor.virtio_fs_cache),
        monitor: of.monitor,
        touched: touched.map_err(SandboxError::io("share a template's memory"))?,
        stderr: Some(log),
        ..Default::default()
    })
}

fn cache(cache: FsCache) -> Cache {
    match cache {
        FsCache::Never => Cache::Never,
        // The library has no mode between these two; names and attributes are kept alike.
        FsCache::Metadata | FsCache::Auto => Cache::Auto,
        FsCache::Always => Cache::Always,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nine_p() -> Share {
        Share::NineP { monitor: OnceCell::new(), dir: PathBuf::new(), msize: 8192 }
    }

    #[test]
    fn a_9p_share_has_the_configured_message_size() {
        let storage = nine_p().storage();
        assert_eq!((storage.driver.as_str(), storage.source.as_str()), ("9p", "kataShared"));
        assert!(storage.options.contains(&"msize=8192".to_owned()));
    }

    #[test]
    fn nothing_is_attached_outside_the_share() {
        assert!(in_monitor(Path::new("c1/m0")).is_ok());
        for path in ["", "/etc", "..", "../lib"] {
            assert!(in_monitor(Path::new(path)).is_err(), "{path:?} was accepted");
        }
    }
}
