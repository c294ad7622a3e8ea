//! The jail's namespaces and its root: a small tmpfs with binds.
//!
//! Everything of the host is opened as a detached copy of its mount first (and made
//! read-only while nobody sees it), then the new root is built from these copies. So the
//! new root may be mounted anywhere, and no path is walked twice.

use std::ffi::{CStr, CString};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::jail::{Bind, Jail, JailError, Network, step};

/// Where the new root is mounted before it becomes the root. Any directory that every
/// host has will do: the mount namespace is our own.
const STAGE: &str = "/dev";
/// The new root holds only names: directories, mount points, links.
const ROOT_OPTIONS: &str = "mode=0755,size=1m,nr_inodes=4096";
/// `mount_setattr` of the mount itself, not of a path below it.
const ITSELF: &CStr = c"";

/// Moves the process to new namespaces, into the jail's root.
pub(crate) fn change(jail: &Jail) -> Result<(), JailError> {
    if let Network::Joined(namespace) = jail.network {
        // SAFETY: whoever starts the jailed program hands it this descriptor for this; nobody
        // else in the process knows of it.
        let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
        nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET)
            .map_err(step("join the network namespace"))?;
    }
    let mut namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    if jail.network == Network::Empty {
        namespaces |= CloneFlags::CLONE_NEWNET;
    }
    nix::sched::unshare(namespaces).map_err(step("make namespaces"))?;
    nix::unistd::sethostname("jail").map_err(step("set the host name"))?;
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .map_err(step("make all mounts private"))?;

    let pieces: Vec<Piece> =
        jail.binds.iter().map(Piece::open).collect::<Result<_, JailError>>()?;
    let devices: Vec<Device> =
        jail.devices.iter().map(|path| Device::open(path)).collect::<Result<_, JailError>>()?;

    nix::mount::mount(
        Some("jail"),
        STAGE,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some(ROOT_OPTIONS),
    )
    .map_err(step("mount the new root"))?;
    std::env::set_current_dir(STAGE).map_err(step("change to the new root"))?;
    for piece in pieces {
        piece.place()?;
    }
    for path in &jail.directories {
        directory(&in_jail(path)?)?;
    }
    for device in devices {
        device.place(jail)?;
    }
    if jail.proc {
        place_proc()?;
    }
    nix::unistd::pivot_root(".", ".").map_err(step("change the root"))?;
    nix::mount::umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    std::env::set_current_dir("/").map_err(step("change to the root"))?;
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REMOUNT
            | MsFlags::MS_BIND
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NOEXEC,
        None::<&str>,
    )
    .map_err(step("make the root read-only"))
}

/// Something of the host, taken out of the host's tree.
enum Piece {
    Link { target: PathBuf, to: PathBuf },
    Mount { target: PathBuf, tree: OwnedFd, directory: bool },
}

impl Piece {
    fn open(bind: &Bind) -> Result<Self, JailError> {
        let failed = |step| on(step, &bind.source);
        let target = in_jail(&bind.target)?;
        let metadata = fs::symlink_metadata(&bind.source).map_err(failed("look at"))?;
        if metadata.is_symlink() && bind.source == bind.target {
            let to = fs::read_link(&bind.source).map_err(failed("read the link"))?;
            return Ok(Self::Link { target, to });
        }
        let directory = fs::metadata(&bind.source).map_err(failed("look at"))?.is_dir();
        let tree = rustix::mount::open_tree(
            rustix::fs::CWD,
            &bind.source,
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .map_err(|error| failed("open the mount of")(error.into()))?;
        let mut attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        if bind.readonly {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        set_attributes(&tree, attributes).map_err(failed("restrict the mount of"))?;
        Ok(Self::Mount { target, tree, directory })
    }

    fn place(self) -> Result<(), JailError> {
        match self {
            Self::Link { target, to } => {
                parents(&target)?;
                symlink(to, &target).map_err(on("make the link", &target))
            }
            Self::Mount { target, tree, directory } => {
                mount_point(&target, directory)?;
                attach(&tree, &target)
            }
        }
    }
}

/// A device of the host.
struct Device {
    path: PathBuf,
    mode: libc::mode_t,
    number: u64,
    node: OwnedFd,
}

impl Device {
    fn open(path: &Path) -> Result<Self, JailError> {
        let metadata = fs::metadata(path).map_err(on("look at", path))?;
        let kind = metadata.file_type();
        let mode = if kind.is_char_device() {
            libc::S_IFCHR
        } else if kind.is_block_device() {
            libc::S_IFBLK
        } else {
            return Err(on("find a device at", path)(io::ErrorKind::InvalidInput.into()));
        };
        let node = rustix::mount::open_tree(
            rustix::fs::CWD,
            path,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
        )
        .map_err(|error| on("open the mount of", path)(error.into()))?;
        Ok(Self { path: path.to_owned(), mode, number: metadata.rdev(), node })
    }

    /// A node of its own belongs to the jail's user alone. Where none may be made (we are
    /// root of a user namespace only), the host's node is bound, with the host's rights.
    fn place(self, jail: &Jail) -> Result<(), JailError> {
        let target = in_jail(&self.path)?;
        parents(&target)?;
        let name = CString::new(target.as_os_str().as_bytes())
            .map_err(|_| JailError::Target(target.clone()))?;
        // SAFETY: a plain system call on a C string.
        let made = unsafe { libc::mknod(name.as_ptr(), self.mode | 0o600, self.number) };
        if made == 0 {
            return std::os::unix::fs::chown(&target, Some(jail.uid), Some(jail.gid))
                .map_err(on("give away", &target));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EPERM) {
            return Err(on("make the device", &target)(error));
        }
        mount_point(&target, false)?;
        attach(&self.node, &target)
    }
}

fn place_proc() -> Result<(), JailError> {
    mount_point(Path::new("proc"), true)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("proc"), "proc", Some("proc"), flags, None::<&str>)
        .map_err(step("mount /proc"))
}

/// The path relative to the new root, which is the working directory.
fn in_jail(path: &Path) -> Result<PathBuf, JailError> {
    let mut parts = path.components();
    if parts.next() != Some(Component::RootDir) {
        return Err(JailError::Target(path.to_owned()));
    }
    let mut relative = PathBuf::new();
    for part in parts {
        match part {
            Component::Normal(name) => relative.push(name),
            _ => return Err(JailError::Target(path.to_owned())),
        }
    }
    if relative.as_os_str().is_empty() {
        return Err(JailError::Target(path.to_owned()));
    }
    Ok(relative)
}

fn parents(target: &Path) -> Result<(), JailError> {
    match target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => directory(parent),
        None => Ok(()),
    }
}

/// Makes a directory, whatever the umask, and those above it.
fn directory(path: &Path) -> Result<(), JailError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(on("make the directory", path))
}

fn mount_point(target: &Path, is_directory: bool) -> Result<(), JailError> {
    if is_directory {
        return directory(target);
    }
    parents(target)?;
    match File::options().write(true).create(true).truncate(false).open(target) {
        Ok(_) => Ok(()),
        Err(error) => Err(on("make the mount point", target)(error)),
    }
}

fn attach(tree: &OwnedFd, target: &Path) -> Result<(), JailError> {
    rustix::mount::move_mount(
        tree,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(|error| on("mount", target)(error.into()))
}

/// Sets attributes on a detached tree, all mounts of it.
fn set_attributes(tree: &OwnedFd, attributes: u64) -> io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: a plain system call; the structure outlives it and its size is right.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            ITSELF.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const change,
            size_of_val(&change),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the error of a step on a path.
fn on(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JailError {
    let path = path.to_owned();
    move |source| JailError::Path { step, path, source }
}

/// Keeps the parent's pid readable after /proc is out of sight.
pub(crate) struct ParentWatch(File);

impl ParentWatch {
    /// To be opened while /proc is the one of the parent's PID namespace.
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/stat").map(Self)
    }

    /// The pid of the parent as its own PID namespace has it.
    pub(crate) fn parent(&self) -> io::Result<u32> {
        let mut buffer = [0u8; 512];
        // SAFETY: the buffer is ours, of the length given.
        let length =
            unsafe { libc::pread(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
        // "pid (name) state ppid …", where the name may hold anything.
        let text = String::from_utf8_lossy(&buffer[..length]);
        text.rsplit_once(')')
            .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1))
            .and_then(|ppid| ppid.parse().ok())
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_target_that_could_leave_the_jail_is_refused() {
        for path in ["", "/", "a", "a/b", "/a/../b", "..", "/..", "./a"] {
            assert!(in_jail(Path::new(path)).is_err(), "{path:?} was accepted");
        }
        assert_eq!(in_jail(Path::new("/a/b")).unwrap(), Path::new("a/b"));
    }

    #[test]
    fn the_parent_is_read_from_proc() {
        let parent = ParentWatch::open().unwrap().parent().unwrap();
        assert_eq!(parent, std::os::unix::process::parent_id());
    }

    proptest! {
        #[test]
        fn an_accepted_target_stays_below_the_root(path in "[a./]{0,12}") {
            if let Ok(relative) = in_jail(Path::new(&path)) {
                prop_assert!(relative.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
