//! Copies a directory tree, with modes, owners and links (`tmpcopyup`).

use rustix::fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

/// Deepest tree that is copied.
const MAX_DEPTH: usize = 64;

/// Copies what is in `from` into `to`. Neither follows a link; sockets are left out.
pub(super) fn copy_directory(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    copy_below(from, to, 0)
}

fn copy_below(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("the tree is too deep to copy"));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_one(from, to, name, depth)?;
        }
    }
    Ok(())
}

fn copy_one(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: usize) -> io::Result<()> {
    let stat = fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            fs::mkdirat(to, name, mode)?;
            let source = fs::openat(from, name, read | OFlags::DIRECTORY, Mode::empty())?;
            let target = fs::openat(to, name, read | OFlags::DIRECTORY, Mode::empty())?;
            copy_below(&source, &target, depth + 1)?;
        }
        FileType::RegularFile => {
            let mut source = File::from(fs::openat(from, name, read, Mode::empty())?);
            let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut target = File::from(fs::openat(to, name, write, mode)?);
            io::copy(&mut source, &mut target)?;
        }
        FileType::Symlink => {
            let target = fs::readlinkat(from, name, Vec::new())?;
            fs::symlinkat(&target, to, name)?;
        }
        FileType::Socket | FileType::Unknown => return Ok(()),
        kind => fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    keep_owner_and_times(to, name, &stat, mode)
}

fn keep_owner_and_times(to: &OwnedFd, name: &CStr, stat: &fs::Stat, mode: Mode) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    let link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    if !link {
        // Changing the owner drops the set-id bits.
        fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    let times = Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec.cast_signed() },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.cast_signed(),
        },
    };
    Ok(fs::utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Opens a directory of a test.
#[cfg(test)]
pub(super) fn open_directory(path: &std::path::Path) -> OwnedFd {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::openat(fs::CWD, path, flags, Mode::empty()).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_with_modes_and_links() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(from.path().join("a/b")).unwrap();
        std::fs::write(from.path().join("a/b/f"), "text").unwrap();
        let mode = std::fs::Permissions::from_mode(0o4711);
        std::fs::set_permissions(from.path().join("a/b/f"), mode).unwrap();
        symlink("/etc/passwd", from.path().join("a/l")).unwrap();
        copy_directory(&open_directory(from.path()), &open_directory(to.path())).unwrap();
        let copy = to.path().join("a/b/f");
        assert_eq!(std::fs::read(&copy).unwrap(), b"text");
        assert_eq!(std::fs::metadata(&copy).unwrap().mode() & 0o7777, 0o4711);
        let link = std::fs::read_link(to.path().join("a/l")).unwrap();
        assert_eq!(link, std::path::Path::new("/etc/passwd"));
    }
}
