//! What the agent mounts in the guest: shares, block devices, tmpfs, binds, overlays.
//!
//! One row per driver in [`DRIVERS`]. The requests come from the host, which the guest
//! trusts; mount points are checked all the same, so that a mistake shows as one.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use kata_protocol::agent::Storage;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::uevent;

/// How long a plugged device may take to show up.
const DEVICE_TIME: Duration = Duration::from_secs(10);

/// Why something could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A driver we do not know.
    #[error("storage driver {0:?} is unknown; known are {known}", known = known())]
    Driver(String),
    /// A mount point that is none.
    #[error("storage mount point {0:?} must be an absolute path without ..")]
    MountPoint(String),
    /// No file system type where the driver needs one.
    #[error("storage of driver {0} for {1:?} must name its file system type")]
    Type(&'static str, String),
    /// No such device came.
    #[error("block device {0:?} did not appear in the guest")]
    Device(String, #[source] io::Error),
    /// The mount point could not be made.
    #[error("cannot make mount point {0}")]
    Make(PathBuf, #[source] io::Error),
    /// The kernel refused.
    #[error("cannot mount {source_name:?} ({fstype}) on {target} with options {options:?}")]
    Mount {
        /// What.
        source_name: String,
        /// Its file system.
        fstype: String,
        /// Where.
        target: PathBuf,
        /// How.
        options: String,
        /// Why not.
        #[source]
        cause: io::Error,
    },
}

/// What a driver's `source` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Handed to the kernel as it is.
    Name,
    /// The tag of a share, which may be being plugged.
    Tag,
    /// A block device, named by path, serial number or PCI address.
    Device,
    /// A path in the guest, to be bound.
    Path,
}

struct Driver {
    name: &'static str,
    source: Source,
    /// Empty: the request says.
    fstype: &'static str,
    /// Before those of the request.
    options: &'static str,
}

const DRIVERS: &[Driver] = &[
    Driver { name: "virtiofs", source: Source::Tag, fstype: "virtiofs", options: "" },
    Driver {
        name: "9p",
        source: Source::Name,
        fstype: "9p",
        options: "trans=virtio,version=9p2000.L",
    },
    Driver { name: "blk", source: Source::Device, fstype: "", options: "" },
    Driver { name: "tmpfs", source: Source::Name, fstype: "tmpfs", options: "" },
    Driver { name: "bind", source: Source::Path, fstype: "bind", options: "" },
    Driver { name: "overlay", source: Source::Name, fstype: "overlay", options: "" },
];

fn known() -> String {
    DRIVERS.iter().map(|driver| driver.name).collect::<Vec<_>>().join(", ")
}

/// A mount that goes away with this value.
#[derive(Debug)]
pub struct Mounted {
    target: PathBuf,
    kept: bool,
}

impl Mounted {
    /// Leaves it mounted for as long as the guest lives.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(target = %self.target.display(), %error, "cannot unmount");
        }
    }
}

/// Mounts one storage.
///
/// # Errors
/// [`StorageError`] says what and why.
pub async fn mount(storage: &Storage) -> Result<Mounted, StorageError> {
    let driver = DRIVERS
        .iter()
        .find(|driver| driver.name == storage.driver)
        .ok_or_else(|| StorageError::Driver(storage.driver.clone()))?;
    let target = mount_point(&storage.mount_point)?;
    let source = match driver.source {
        Source::Device => device(&storage.source).await?,
        Source::Name | Source::Tag | Source::Path => storage.source.clone(),
    };
    let fstype = match (driver.fstype, storage.fstype.as_str()) {
        ("", "") => return Err(StorageError::Type(driver.name, source)),
        ("", given) => given,
        (fixed, _) => fixed,
    };
    let is_file = driver.source == Source::Path
        && fs::metadata(&source).is_ok_and(|metadata| !metadata.is_dir());
    make(&target, is_file).map_err(|error| StorageError::Make(target.clone(), error))?;
    let mut options = Options::new();
    options.read(driver.options);
    for option in &storage.options {
        options.read(option);
    }
    let result = match driver.source {
        Source::Path => bind(&source, &target, &options),
        Source::Tag => share(|| options.mount(&source, &target, fstype)).await,
        Source::Name | Source::Device => options.mount(&source, &target, fstype),
    };
    let result = result.and_then(|()| match options.propagation {
        Some(propagation) => rustix::mount::mount_change(&target, propagation),
        None => Ok(()),
    });
    match result {
        Ok(()) => Ok(Mounted { target, kept: false }),
        Err(error) => Err(StorageError::Mount {
            source_name: source,
            fstype: fstype.to_owned(),
            target,
            options: storage.options.join(","),
            cause: match error {
                rustix::io::Errno::NODEV => {
                    io::Error::other(format!("the guest's kernel has no {fstype}"))
                }
                other => other.into(),
            },
        }),
    }
}

/// Mounts a share as soon as it is there: without a device of that tag the kernel says that
/// the argument is invalid.
async fn share(mount: impl Fn() -> rustix::io::Result<()>) -> rustix::io::Result<()> {
    let try_it = || Some(mount()).filter(|done| *done != Err(rustix::io::Errno::INVAL));
    match uevent::wait_for(DEVICE_TIME, try_it).await {
        Ok(done) => done,
        Err(_) => mount(),
    }
}

fn bind(source: &str, target: &Path, options: &Options) -> rustix::io::Result<()> {
    if options.recursive {
        rustix::mount::mount_bind_recursive(source, target)?;
    } else {
        rustix::mount::mount_bind(source, target)?;
    }
    if options.flags.is_empty() {
        return Ok(());
    }
    rustix::mount::mount_remount(target, options.flags | MountFlags::BIND, c"")
}

/// A NUL in an option ends it, which the kernel would do as well.
fn cstring(text: &str) -> std::ffi::CString {
    let text = text.split('\0').next().unwrap_or_default();
    std::ffi::CString::new(text).unwrap_or_default()
}

fn mount_point(text: &str) -> Result<PathBuf, StorageError> {
    let path = Path::new(text);
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !path.has_root() || !plain || path.parent().is_none() || text.contains('\0') {
        return Err(StorageError::MountPoint(text.to_owned()));
    }
    Ok(path.to_owned())
}

fn make(target: &Path, is_file: bool) -> io::Result<()> {
    if !is_file {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::OpenOptions::new().write(true).create(true).truncate(false).open(target).map(drop)
}

/// Mount options, told apart.
#[derive(Debug)]
struct Options {
    flags: MountFlags,
    recursive: bool,
    propagation: Option<MountPropagationFlags>,
    data: String,
}

impl Options {
    fn new() -> Self {
        let flags = MountFlags::empty();
        Self { flags, recursive: false, propagation: None, data: String::new() }
    }

    /// Mounts a file system of this type with them.
    fn mount(&self, source: &str, target: &Path, fstype: &str) -> rustix::io::Result<()> {
        let data = cstring(&self.data);
        rustix::mount::mount(source, target, fstype, self.flags, Some(data.as_c_str()))
    }

    /// Reads options separated by commas.
    fn read(&mut self, options: &str) {
        for option in options.split(',').filter(|option| !option.is_empty()) {
            self.one(option);
        }
    }

    fn one(&mut self, option: &str) {
        let recursive = MountPropagationFlags::REC;
        match option {
            "ro" => self.flags |= MountFlags::RDONLY,
            "rw" => self.flags -= MountFlags::RDONLY,
            "nosuid" => self.flags |= MountFlags::NOSUID,
            "nodev" => self.flags |= MountFlags::NODEV,
            "noexec" => self.flags |= MountFlags::NOEXEC,
            "noatime" => self.flags |= MountFlags::NOATIME,
            "nodiratime" => self.flags |= MountFlags::NODIRATIME,
            "relatime" => self.flags |= MountFlags::RELATIME,
            "strictatime" => self.flags |= MountFlags::STRICTATIME,
            "sync" => self.flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => self.flags |= MountFlags::DIRSYNC,
            "defaults" | "bind" | "suid" | "dev" | "exec" | "atime" | "async" => {}
            "rbind" => self.recursive = true,
            "private" => self.propagation = Some(MountPropagationFlags::PRIVATE),
            "rprivate" => self.propagation = Some(MountPropagationFlags::PRIVATE | recursive),
            "shared" => self.propagation = Some(MountPropagationFlags::SHARED),
            "rshared" => self.propagation = Some(MountPropagationFlags::SHARED | recursive),
            "slave" => self.propagation = Some(MountPropagationFlags::DOWNSTREAM),
            "rslave" => self.propagation = Some(MountPropagationFlags::DOWNSTREAM | recursive),
            data => {
                if !self.data.is_empty() {
                    self.data.push(',');
                }
                self.data.push_str(data);
            }
        }
    }
}

/// The device node of a block device named by path, serial number or PCI address.
async fn device(name: &str) -> Result<String, StorageError> {
    if name.is_empty() {
        return Err(StorageError::Device(name.to_owned(), io::ErrorKind::InvalidInput.into()));
    }
    uevent::wait_for(DEVICE_TIME, || find_device(name))
        .await
        .map_err(|error| StorageError::Device(name.to_owned(), error))
}

fn find_device(name: &str) -> Option<String> {
    if name.starts_with('/') {
        return Path::new(name).exists().then(|| name.to_owned());
    }
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let serial = fs::read_to_string(entry.path().join("serial")).unwrap_or_default();
        // The link goes through every PCI address on the way to the disk.
        let link = fs::read_link(entry.path()).unwrap_or_default();
        let at_address = name.contains(':')
            && link.components().any(|part| part.as_os_str().to_str() == Some(name));
        (serial.trim_end() == name || at_address)
            .then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn storage(driver: &str, source: &str, options: &[&str], target: &Path) -> Storage {
        Storage {
            driver: driver.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            mount_point: target.display().to_string(),
            ..Storage::default()
        }
    }

    #[tokio::test]
    async fn tmpfs_and_binds_are_mounted_and_unmounted_by_drop() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/b");
        let mounted =
            mount(&storage("tmpfs", "tmpfs", &["nosuid", "size=64k"], &target)).await.unwrap();
        fs::write(target.join("f"), "x").unwrap();
        let bound = dir.path().join("bound");
        let source = target.join("f").display().to_string();
        let bind = mount(&storage("bind", &source, &["ro"], &bound)).await.unwrap();
        assert_eq!(fs::read_to_string(&bound).unwrap(), "x");
        let error = fs::write(&bound, "y").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        drop(bind);
        drop(mounted);
        assert!(!target.join("f").exists());
    }

    #[tokio::test]
    async fn what_cannot_be_mounted_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let error = mount(&storage("floppy", "x", &[], dir.path())).await.unwrap_err();
        assert!(error.to_string().contains("known are virtiofs, 9p, blk"), "{error}");
        let error = mount(&storage("overlay", "o", &["lowerdir=/nowhere"], dir.path())).await;
        assert!(error.unwrap_err().to_string().contains("lowerdir=/nowhere"));
        let error = mount(&storage("blk", "/dev/null", &[], dir.path())).await.unwrap_err();
        assert!(error.to_string().contains("file system type"), "{error}");
    }

    proptest! {
        #[test]
        fn mount_points_stay_where_they_say(text in "[a/.]{0,12}") {
            if let Ok(path) = mount_point(&text) {
                prop_assert!(path.has_root() && path != Path::new("/"));
                prop_assert!(!path.components().any(|part| part == Component::ParentDir));
            }
        }
    }
}
