//! What is seen by whoever enters the mount namespace of a container's stand-in: the
//! container's root file system and volumes, and nothing of the host.
//!
//! Tools do enter it. `podman cp` writes to a path of the container there, and in the host's
//! namespace that would be the host's file of this name.

use kata_oci::Spec;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::pivot_root;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2, symlinkat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// The container's file system, as far as the host has it.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct Root {
    rootfs: PathBuf,
    readonly: bool,
    volumes: Vec<Volume>,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
struct Volume {
    source: PathBuf,
    at: PathBuf,
    readonly: bool,
}

impl Root {
    /// That of a bundle.
    pub fn of(bundle: &Path, rootfs: &Path, spec: &Spec) -> Self {
        let binds = spec.mounts.iter().filter(|mount| mount.is_bind());
        let volume = |mount: &kata_oci::Mount| {
            Some(Volume {
                source: bundle.join(mount.source.as_ref()?),
                at: mount.destination.clone(),
                readonly: mount.is_readonly(),
            })
        };
        Self {
            rootfs: rootfs.to_owned(),
            readonly: spec.root.as_ref().is_some_and(|root| root.readonly),
            volumes: binds.filter_map(volume).collect(),
        }
    }

    /// Makes it the calling process's root, in a mount namespace of its own.
    ///
    /// # Errors
    /// When the kernel refuses it. A volume whose place is not there yet (the guest makes it) is
    /// left out.
    pub fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // What the host unmounts while the old root is still there goes here, too.
        let below = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", below)?;
        let root = clone_tree(&self.rootfs)?;
        move_mount(&root, "", CWD, &self.rootfs, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        for volume in &self.volumes {
            // Files of the container's own choosing may be in the way.
            let _ = volume.mount(&root);
        }
        // An image may have no /proc: then there is nothing to see there.
        let _ = show_this_process(&root);
        if self.readonly {
            make_readonly(&root)?;
        }
        rustix::process::fchdir(&root)?;
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        std::env::set_current_dir("/")
    }
}

impl Volume {
    fn mount(&self, root: &OwnedFd) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let at = openat2(root, &self.at, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let tree = clone_tree(&self.source)?;
        let both =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&tree, "", &at, "", both)?;
        if self.readonly { make_readonly(&tree) } else { Ok(()) }
    }
}

/// In the container's `/proc`, what tells of this process and nothing of the others: `podman top`
/// looks there.
fn show_this_process(root: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    let at = openat2(root, "proc", flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let at = PathBuf::from(format!("/proc/self/fd/{}", at.as_raw_fd()));
    mount("proc", &at, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=555,size=64k")?;
    // The descriptor is of what lies below.
    let at = openat2(root, "proc", flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let pid = std::process::id().to_string();
    mkdirat(&at, &pid, Mode::from(0o555))?;
    symlinkat(&pid, &at, "self")?;
    for name in ["stat", "uptime"] {
        mknodat(&at, name, FileType::RegularFile, Mode::from(0o444), 0)?;
    }
    for name in [pid.as_str(), "stat", "uptime"] {
        let tree = clone_tree(&Path::new("/proc").join(name))?;
        move_mount(&tree, "", &at, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}

fn clone_tree(source: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(CWD, source, flags)?)
}

fn make_readonly(tree: impl AsFd) -> io::Result<()> {
    let path = format!("/proc/self/fd/{}", tree.as_fd().as_raw_fd());
    Ok(mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, "")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Runs `inside` in a child that has entered `root`; whether it gave true.
    fn in_child(root: &Root, inside: impl FnOnce() -> bool) -> bool {
        use nix::sys::wait::{WaitStatus, waitpid};
        // SAFETY: the child allocates, which a child of a threaded program must not do while
        // another thread holds the allocator's lock; glibc takes care of that in fork.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let good = root.enter().is_ok() && inside();
                // SAFETY: ends the child without unwinding into the test harness.
                unsafe { libc::_exit(i32::from(!good)) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                matches!(waitpid(child, None).unwrap(), WaitStatus::Exited(_, 0))
            }
        }
    }

    fn only_this_process_is_shown() -> bool {
        let names = fs::read_dir("/proc").unwrap().map(|e| e.unwrap().file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse::<u32>().ok());
        numbers.eq([std::process::id()]) && Path::new("/proc/self/cmdline").exists()
    }

    #[test]
    fn entering_shows_the_container_and_not_the_host() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (rootfs, volume) = (dir.path().join("rootfs"), dir.path().join("volume"));
        fs::create_dir_all(rootfs.join("v")).unwrap();
        fs::create_dir_all(rootfs.join("ro")).unwrap();
        fs::create_dir_all(rootfs.join("proc")).unwrap();
        fs::create_dir_all(&volume).unwrap();
        fs::write(rootfs.join("here"), "").unwrap();
        // A link that a container made, to have its volume mounted on the host's /.
        std::os::unix::fs::symlink("/../../..", rootfs.join("trap")).unwrap();
        let mount = |at: &str, readonly| Volume { source: volume.clone(), at: at.into(), readonly };
        let volumes = vec![
            mount("/v", false),
            mount("/ro", true),
            mount("/missing", false),
            mount("/trap/v", false),
        ];
        let root = Root { rootfs: rootfs.clone(), readonly: false, volumes };
        assert!(in_child(&root, || {
            Path::new("/here").exists()
                && !Path::new("/etc").exists()
                && fs::write("/made", "").is_ok()
                && fs::write("/v/made", "").is_ok()
                && fs::write("/ro/not", "").is_err()
                && only_this_process_is_shown()
        }));
        assert!(rootfs.join("made").exists() && volume.join("made").exists());
        let readonly = Root { readonly: true, ..root };
        assert!(in_child(&readonly, || fs::write("/other", "").is_err()));
        assert!(Path::new("/etc").exists(), "we ourselves are where we were");
    }
}
