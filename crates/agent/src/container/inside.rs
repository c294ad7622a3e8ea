//! Paths inside a container's root: resolved and made without ever leaving it.
//!
//! Everything below the root is hostile, and a shared volume may even change while we
//! look. So each step is an `openat2` with `RESOLVE_IN_ROOT`, whatever the path says.

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// Most symbolic links on one path, as the kernel has it.
const MAX_LINKS: usize = 40;

/// What to make at the end of a path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaf {
    Directory,
    File,
}

/// A container's root directory.
pub(super) struct Inside {
    root: OwnedFd,
}

/// The path by which a descriptor can be mounted on or opened again.
pub(super) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

impl Inside {
    /// Takes the root at a trusted path.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: fs::open(path, flags, Mode::empty())? })
    }

    /// The root itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens what is there.
    pub fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel asks to try again when something was renamed below us.
        for _ in 0..64 {
            match fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// A handle on what is there, for mounting.
    pub fn handle(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, OFlags::PATH)
    }

    /// A handle on a directory, made with its parents where missing.
    pub fn make_directory(&self, path: &Path, mode: u32) -> io::Result<OwnedFd> {
        let handle = self.make(path, Leaf::Directory, mode)?;
        if !is_directory(&handle)? {
            return Err(Errno::NOTDIR.into());
        }
        Ok(handle)
    }

    /// A handle on a file, made empty with its parents where missing.
    pub fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        self.make(path, Leaf::File, 0o755)
    }

    /// A handle on a path's directory (made where missing), and the path's last name.
    pub fn make_parent(&self, path: &Path) -> io::Result<(OwnedFd, OsString)> {
        let name = path.file_name().ok_or(Errno::INVAL)?.to_owned();
        let parent = path.parent().unwrap_or(Path::new("/"));
        Ok((self.make_directory(parent, 0o755)?, name))
    }

    fn make(&self, path: &Path, leaf: Leaf, mode: u32) -> io::Result<OwnedFd> {
        match self.handle(path) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => return result,
        }
        let mut walk = Walk { done: PathBuf::from("/"), left: components(path), links: 0 };
        while let Some(name) = walk.left.pop_front() {
            self.step(&mut walk, name, leaf, mode)?;
        }
        self.handle(&walk.done)
    }

    /// One name further, which is made when missing.
    fn step(&self, walk: &mut Walk, name: OsString, leaf: Leaf, mode: u32) -> io::Result<()> {
        if name == ".." {
            walk.done.pop();
            return Ok(());
        }
        let last = walk.left.is_empty();
        let next = walk.done.join(&name);
        // Twice: what was missing may have been made by somebody else just now.
        for _ in 0..2 {
            match self.open(&next, OFlags::PATH | OFlags::NOFOLLOW) {
                Ok(fd) if FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) == FileType::Symlink => {
                    return walk.follow(&fd);
                }
                Ok(_) => {
                    walk.done = next;
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    let parent = self.open(&walk.done, OFlags::PATH | OFlags::DIRECTORY)?;
                    make_one(&parent, &name, if last { leaf } else { Leaf::Directory }, mode)?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Errno::NOENT.into())
    }
}

/// A path being walked: `done` is absolute and holds no links any more.
struct Walk {
    done: PathBuf,
    left: VecDeque<OsString>,
    links: usize,
}

impl Walk {
    fn follow(&mut self, link: &OwnedFd) -> io::Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = fs::readlinkat(link, "", Vec::new())?;
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.has_root() {
            self.done = PathBuf::from("/");
        }
        for name in components(&target).into_iter().rev() {
            self.left.push_front(name);
        }
        Ok(())
    }
}

fn make_one(parent: &OwnedFd, name: &OsString, leaf: Leaf, mode: u32) -> io::Result<()> {
    let made = match leaf {
        Leaf::Directory => fs::mkdirat(parent, name, Mode::from_raw_mode(mode)),
        Leaf::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            fs::openat(parent, name, flags, Mode::from_raw_mode(mode)).map(drop)
        }
    };
    match made {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The names of a path; `..` stays.
fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsString::from("..")),
            _ => None,
        })
        .collect()
}

/// The path from the root, without `.` and `..`, as text comparisons need it.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for name in components(path) {
        if name == ".." {
            clean.pop();
        } else {
            clean.push(std::ffi::OsStr::from_bytes(name.as_bytes()));
        }
    }
    clean
}

/// Whether a handle is one on a directory.
pub(super) fn is_directory(handle: impl AsFd) -> io::Result<bool> {
    let mode = fs::fstat(handle)?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::Directory)
}

/// Whether a trusted path is a directory.
pub(super) fn is_directory_at(path: &Path) -> io::Result<bool> {
    let mode = fs::statat(CWD, path, AtFlags::empty())?.st_mode;
    Ok(FileType::from_raw_mode(mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn tree() -> (tempfile::TempDir, Inside) {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let inside = Inside::at(&root).unwrap();
        (outside, inside)
    }

    #[test]
    fn missing_directories_are_made_through_dangling_links() {
        let (outside, inside) = tree();
        let root = outside.path().join("root");
        std::fs::create_dir(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        inside.make_directory(Path::new("/var/run/secrets/x"), 0o755).unwrap();
        assert!(root.join("run/secrets/x").is_dir());
    }

    #[test]
    fn links_and_dots_do_not_leave_the_root() {
        let (outside, inside) = tree();
        let root = outside.path().join("root");
        symlink("../../../../..", root.join("up")).unwrap();
        symlink("/", root.join("slash")).unwrap();
        inside.make_file(Path::new("/up/a")).unwrap();
        inside.make_file(Path::new("/slash/../../b")).unwrap();
        inside.make_file(Path::new("../../c")).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(outside.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["root"]);
        for name in ["a", "b", "c"] {
            assert!(root.join(name).is_file(), "{name}");
        }
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let (outside, inside) = tree();
        symlink("b", outside.path().join("root/a")).unwrap();
        symlink("a", outside.path().join("root/b")).unwrap();
        assert!(inside.make_directory(Path::new("/a/x"), 0o755).is_err());
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let (_outside, inside) = tree();
        inside.make_file(Path::new("/f")).unwrap();
        assert!(inside.make_directory(Path::new("/f"), 0o755).is_err());
        assert!(inside.make_directory(Path::new("/f/x"), 0o755).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whatever_the_links_say_nothing_is_made_outside(
            links in prop::collection::vec(("[a-d]", "(/|\\.\\./){0,3}([a-d]|\\.\\.)(/[a-d]|/\\.\\.){0,3}"), 0..6),
            paths in prop::collection::vec("(/?([a-d]|\\.\\.)){1,5}", 1..6),
        ) {
            let (outside, inside) = tree();
            for (name, target) in &links {
                let _ = symlink(target, outside.path().join("root").join(name));
            }
            for path in &paths {
                let _ = inside.make_directory(Path::new(path), 0o755);
                let _ = inside.make_file(&Path::new(path).join("f"));
            }
            prop_assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
        }

        #[test]
        fn cleaned_paths_have_no_dots(path in "(/|[a-c]|\\.|\\.\\.){0,8}") {
            let clean = clean(Path::new(&path));
            prop_assert!(clean.has_root());
            prop_assert!(clean.components().all(|c| matches!(c, Component::Normal(_) | Component::RootDir)));
        }
    }
}
