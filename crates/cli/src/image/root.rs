//! A directory that no path leads out of: whatever links it holds are resolved inside.

use anyhow::{Context, Result};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fchmod, mkdirat, open, openat, openat2,
    statat, unlinkat,
};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// Deepest directory that is removed as a whole: one descriptor is open per level.
const MAX_DEPTH: usize = 256;

/// The directory.
pub struct ConfinedRoot(OwnedFd);

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl ConfinedRoot {
    /// Opens it.
    ///
    /// # Errors
    /// When it is no directory.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = open(path, DIRECTORY, Mode::empty())
            .with_context(|| format!("cannot open the directory {}", path.display()))?;
        Ok(Self(fd))
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = relative(path);
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel asks to try again when something was renamed meanwhile.
        loop {
            match openat2(&self.0, &path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// Opens a file to read.
    ///
    /// # Errors
    /// When it is not there or no ordinary file.
    pub fn read(&self, path: &Path) -> io::Result<File> {
        // Without O_NONBLOCK a pipe in the image would hang us.
        let file = File::from(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an ordinary file"));
        }
        Ok(file)
    }

    /// Opens a directory, which must exist.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.resolve(path, DIRECTORY)?)
    }

    /// Opens a directory; makes what is missing of it. Calls `made` with each new one's path.
    pub fn make_directories(
        &self,
        path: &Path,
        mut made: impl FnMut(&Path),
    ) -> io::Result<OwnedFd> {
        match self.resolve(path, DIRECTORY) {
            Err(Errno::NOENT) => {}
            other => return Ok(other?),
        }
        let mut reached = PathBuf::new();
        let mut parent = self.resolve(&reached, DIRECTORY)?;
        for part in relative(path).components() {
            let Component::Normal(name) = part else { continue };
            reached.push(name);
            parent = match self.resolve(&reached, DIRECTORY) {
                Err(Errno::NOENT) => {
                    mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                    made(&reached);
                    let fd = openat(&parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
                    fchmod(&fd, Mode::from_raw_mode(0o755))?;
                    fd
                }
                other => other?,
            };
        }
        Ok(parent)
    }
}

/// As openat2 wants it: it resolves absolute paths from the root, but not an empty one.
fn relative(path: &Path) -> PathBuf {
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() { PathBuf::from(".") } else { path.to_owned() }
}

/// Removes whatever is called `name` in a directory, following no link; fine if it is gone.
pub fn remove(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    remove_within(parent, &c_string(name)?, MAX_DEPTH)
}

fn remove_within(parent: BorrowedFd<'_>, name: &CStr, depth: usize) -> io::Result<()> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(unlinkat(parent, name, AtFlags::empty())?);
    }
    if depth == 0 {
        return Err(io::Error::other("a directory to be removed is too deep"));
    }
    let fd = openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    for child in children(fd.as_fd())? {
        remove_within(fd.as_fd(), &child, depth - 1)?;
    }
    Ok(unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

/// Names in a directory, but for itself and its parent.
pub fn children(fd: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    Ok(names)
}

fn c_string(name: &OsStr) -> io::Result<CString> {
    Ok(CString::new(name.as_bytes())?)
}
