//! Mount calls: trees cloned on the host's side, put into another mount namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::thread::{
    ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe,
};

use crate::path::SharePath;

/// Stack of the short-lived threads that visit another namespace.
pub(crate) const VISITOR_STACK: usize = 128 * 1024;

/// No component may be a symbolic link, nor lead out of the tree.
const BELOW: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// Nor may one lead onto another mount.
const STRICT: ResolveFlags = BELOW.union(ResolveFlags::NO_XDEV);

/// A change of mount attributes.
#[derive(Default)]
struct Change {
    set: u64,
    clear: u64,
    /// 0: as it is.
    propagation: u64,
}

impl Change {
    /// Applies it to the mount that `tree` refers to (with `recursive`: and to those below).
    fn apply(&self, tree: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
        let change = libc::mount_attr {
            attr_set: self.set,
            attr_clr: self.clear,
            propagation: self.propagation,
            userns_fd: 0,
        };
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the path is a C string, and the structure lives for the call and has the
        // size that is passed with it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const change,
                size_of::<libc::mount_attr>(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Clones what is mounted at `source`, detached from every namespace.
///
/// Devices cannot be opened and nothing runs through the clone. A writable one still gets
/// the mounts that the host makes below `source` later; a read-only one does not, for
/// those would not be read-only.
pub(crate) fn clone_tree(source: &Path, readonly: bool, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags)?;
    let mut attributes = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    if readonly {
        attributes |= libc::MOUNT_ATTR_RDONLY;
    }
    let propagation = if readonly { libc::MS_PRIVATE } else { libc::MS_SLAVE };
    Change { set: attributes, propagation, ..Change::default() }.apply(tree.as_fd(), true)?;
    Ok(tree)
}

/// Why [`mount_in`] failed.
#[derive(Debug)]
pub(crate) enum MountError {
    /// Something is at the place already.
    Occupied,
    Io(io::Error),
}

impl<E: Into<io::Error>> From<E> for MountError {
    fn from(error: E) -> Self {
        Self::Io(error.into())
    }
}

/// Mounts `tree` at `at` in the mount namespace of `process`.
pub(crate) fn mount_in(
    process: BorrowedFd<'_>,
    tree: BorrowedFd<'_>,
    at: &SharePath,
) -> Result<(), MountError> {
    visit(process, |root| {
        let root = share_in(root, at)?;
        let share = writable(root.as_fd())?;
        make_mount_point(share.as_fd(), at, tree)?;
        let mounted = open_dir(root.as_fd(), at.parent()).and_then(|parent| {
            move_mount(tree, "", &parent, at.name(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        });
        if mounted.is_err() {
            // The first error is the one to report.
            let _ = remove_mount_point(share.as_fd(), at);
        }
        Ok(mounted?)
    })
}

/// Unmounts what is at `at` in the mount namespace of `process`, and removes the mount
/// point; what is in use stays until it is not.
pub(crate) fn unmount_in(process: BorrowedFd<'_>, at: &SharePath) -> io::Result<()> {
    visit(process, |root| {
        let root = share_in(root, at)?;
        let parent = open_dir(root.as_fd(), at.parent())?;
        // umount2 knows no directory descriptor; the working directory is the thread's own.
        rustix::process::fchdir(&parent)?;
        unmount(at.name(), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        let share = writable(root.as_fd())?;
        Ok(remove_mount_point(share.as_fd(), at)?)
    })
}

/// The share in the root of its process; it may be a mount of its own.
fn share_in(root: BorrowedFd<'_>, at: &SharePath) -> rustix::io::Result<OwnedFd> {
    open_by(root, at.share(), BELOW)
}

/// The process has the share read-only; this is the same file system, writable, and
/// without what is mounted in it.
fn writable(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let share = open_tree(root, "", flags)?;
    let writable = Change { clear: libc::MOUNT_ATTR_RDONLY, ..Change::default() };
    writable.apply(share.as_fd(), false)?;
    Ok(share)
}

/// Makes the mount point `at` for `tree` in the share's own file system `share`.
fn make_mount_point(
    share: BorrowedFd<'_>,
    at: &SharePath,
    tree: BorrowedFd<'_>,
) -> Result<(), MountError> {
    for parent in at.parents() {
        match mkdirat(share, parent, Mode::from(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let parent = open_dir(share, at.parent())?;
    let stat = rustix::fs::fstat(tree)?;
    let made = if FileType::from_raw_mode(stat.st_mode).is_dir() {
        mkdirat(&parent, at.name(), Mode::from(0o755))
    } else {
        mknodat(&parent, at.name(), FileType::RegularFile, Mode::from(0o644), 0)
    };
    made.map_err(|error| match error {
        Errno::EXIST => MountError::Occupied,
        other => other.into(),
    })
}

/// Takes the mount point `at` away, and the directories above it when they are empty.
fn remove_mount_point(share: BorrowedFd<'_>, at: &SharePath) -> rustix::io::Result<()> {
    match unlinkat(share, at.as_path(), AtFlags::REMOVEDIR) {
        Err(Errno::NOTDIR) => unlinkat(share, at.as_path(), AtFlags::empty())?,
        other => other?,
    }
    for parent in at.parents().into_iter().rev() {
        match unlinkat(share, parent, AtFlags::REMOVEDIR) {
            Ok(()) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOENT) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn open_dir(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    open_by(root, path, STRICT)
}

fn open_by(root: BorrowedFd<'_>, path: &Path, rules: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), rules)
}

/// Runs `work` in a thread that has entered the mount namespace of `process` (a pidfd),
/// with its root directory.
fn visit<T: Send, E: From<io::Error> + Send>(
    process: BorrowedFd<'_>,
    work: impl FnOnce(BorrowedFd<'_>) -> Result<T, E> + Send,
) -> Result<T, E> {
    thread::scope(|scope| {
        let visitor = thread::Builder::new()
            .name("mount".to_owned())
            .stack_size(VISITOR_STACK)
            .spawn_scoped(scope, move || {
                let root = enter(process)?;
                work(root.as_fd())
            })?;
        visitor.join().unwrap_or_else(|_| Err(io::Error::other("the mount thread panicked").into()))
    })
}

fn enter(process: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: only the working directory and the umask become the thread's own; no
    // descriptor changes.
    unsafe { unshare_unsafe(UnshareFlags::FS)? };
    rustix::process::umask(Mode::empty());
    move_into_thread_name_spaces(process, ThreadNameSpaceType::MOUNT)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/", flags, Mode::empty())?)
}
