//! File systems that an engine describes instead of mounting them.
//!
//! Each is mounted in a mount namespace that lives for that one call, a copy of the host's,
//! and leaves it as a detached tree: the host itself never has it mounted, whatever happens.
//! Paths become relative to the directory that they share, which keeps the options of an
//! overlay with many layers below the page that the kernel takes.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::thread;

use rustix::fs::CWD;
use rustix::mount::{MountFlags, MountPropagationFlags, OpenTreeFlags, mount_change, open_tree};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::mounts::VISITOR_STACK;

/// Options that are no file system's own. A share needs none of them: nothing in it can
/// be run or opened as a device anyway.
const GENERIC: [&str; 16] = [
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "sync",
    "async",
    "atime",
    "noatime",
    "relatime",
    "norelatime",
    "diratime",
    "nodiratime",
    "defaults",
];
/// What an overlay has its layers in.
const LAYERS: [&str; 3] = ["lowerdir", "upperdir", "workdir"];

/// A file system to mount, with all its paths made relative.
#[derive(Debug)]
pub(crate) struct NewMount {
    base: PathBuf,
    kind: String,
    source: PathBuf,
    flags: MountFlags,
    data: CString,
}

impl NewMount {
    /// Prepares the mount.
    pub(crate) fn plan(kind: &str, source: &str, options: &[String]) -> io::Result<Self> {
        let overlay = kind == "overlay";
        let mut flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        let mut own = Vec::new();
        for option in options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
            match option {
                "ro" => flags |= MountFlags::RDONLY,
                generic if GENERIC.contains(&generic) => {}
                own_option => own.push(own_option),
            }
        }
        let mut paths: Vec<&Path> = Vec::new();
        if overlay {
            paths.extend(own.iter().filter_map(|o| layers(o)).flat_map(|(_, dirs)| {
                dirs.split(':').filter(|dir| !dir.is_empty()).map(Path::new)
            }));
        } else {
            paths.push(Path::new(source));
        }
        let base = common_directory(&paths)?;
        let data: Vec<String> = own
            .iter()
            .map(|option| match layers(option) {
                Some((name, dirs)) if overlay => format!("{name}={}", relative_all(dirs, &base)),
                _ => (*option).to_owned(),
            })
            .collect();
        Ok(Self {
            source: if overlay { source.into() } else { relative(Path::new(source), &base) },
            base,
            kind: kind.to_owned(),
            flags,
            data: CString::new(data.join(","))?,
        })
    }

    /// Mounts it, detached from every namespace. `over` is a directory of the host that is
    /// covered meanwhile, where nobody sees it.
    pub(crate) fn detached(&self, over: &Path) -> io::Result<OwnedFd> {
        thread::scope(|scope| {
            let mounter = thread::Builder::new()
                .name("mount".to_owned())
                .stack_size(VISITOR_STACK)
                .spawn_scoped(scope, || self.mount_in_a_copy(over))?;
            mounter.join().unwrap_or_else(|_| Err(io::Error::other("the mount thread panicked")))
        })
    }

    fn mount_in_a_copy(&self, over: &Path) -> io::Result<OwnedFd> {
        // SAFETY: this thread gets a working directory and a mount namespace of its own and
        // ends soon; no descriptor changes.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS)? };
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        rustix::process::chdir(&self.base)?;
        let data = Some(self.data.as_c_str());
        rustix::mount::mount(&self.source, over, self.kind.as_str(), self.flags, data)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(open_tree(CWD, over, flags)?)
    }
}

fn layers(option: &str) -> Option<(&str, &str)> {
    option.split_once('=').filter(|(name, _)| LAYERS.contains(name))
}

/// The deepest directory that all paths are below; they must be absolute and plain.
fn common_directory(paths: &[&Path]) -> io::Result<PathBuf> {
    let bad = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
    let mut common: Option<PathBuf> = None;
    for path in paths {
        let plain =
            path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        let Some(parent) = path.parent().filter(|_| path.has_root() && plain) else {
            return Err(bad(format!("{} is not a plain absolute path", path.display())));
        };
        common = Some(match common {
            None => parent.to_owned(),
            Some(so_far) => so_far
                .ancestors()
                .find(|ancestor| parent.starts_with(ancestor))
                .unwrap_or(Path::new("/"))
                .to_owned(),
        });
    }
    common.ok_or_else(|| bad("it names no path to mount".to_owned()))
}

fn relative(path: &Path, base: &Path) -> PathBuf {
    path.strip_prefix(base).unwrap_or(path).to_owned()
}

fn relative_all(dirs: &str, base: &Path) -> String {
    let one = |dir: &str| relative(Path::new(dir), base).display().to_string();
    dirs.split(':').map(one).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|o| (*o).to_owned()).collect()
    }

    #[test]
    fn layers_become_relative_to_the_directory_they_share() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let list = [
            "index=off".to_owned(),
            format!("workdir={at}/3/work"),
            format!("upperdir={at}/3/fs"),
            format!("lowerdir={at}/2/fs:{at}/1/fs"),
            "noatime,ro".to_owned(),
        ];
        let mount = NewMount::plan("overlay", "overlay", &list).unwrap();
        let expected = c"index=off,workdir=3/work,upperdir=3/fs,lowerdir=2/fs:1/fs";
        assert_eq!(mount.data.as_c_str(), expected);
        assert!(mount.flags.contains(MountFlags::RDONLY | MountFlags::NODEV));
        assert_eq!(mount.source, Path::new("overlay"));
    }

    #[test]
    fn a_hundred_layers_fit_into_a_page() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("a".repeat(200)).join("snapshots");
        std::fs::create_dir_all(&at).unwrap();
        let dirs: Vec<String> = (0..100).map(|n| format!("{}/{n}/fs", at.display())).collect();
        let list = [format!("lowerdir={}", dirs.join(":"))];
        let mount = NewMount::plan("overlay", "overlay", &list).unwrap();
        assert!(mount.data.as_bytes().len() < 1024);
    }

    #[test]
    fn a_device_becomes_relative_and_paths_that_climb_are_refused() {
        let mount = NewMount::plan("ext4", "/dev/null", &options(&["discard"])).unwrap();
        assert_eq!((mount.source.as_path(), &*mount.data), (Path::new("null"), c"discard"));
        for bad in ["lowerdir=a:/b", "lowerdir=/a/../b", "index=off", "lowerdir=/"] {
            assert!(NewMount::plan("overlay", "overlay", &options(&[bad])).is_err(), "{bad}");
        }
    }
}
