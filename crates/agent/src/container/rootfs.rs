//! The root of the container: prepared, entered, closed.

use super::devices;
use super::failure::{Context, Failure, Step};
use super::inside::{Inside, is_directory, proc_path};
use super::mounts;
use kata_oci::Spec;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, fchdir, pivot_root};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const NONE: Option<&str> = None;

/// The flags of `linux.rootfsPropagation`.
fn propagation(spec: &Spec) -> Step<MsFlags> {
    let recursive = MsFlags::MS_REC;
    Ok(match spec.linux().rootfs_propagation.as_deref() {
        None | Some("" | "rslave") => MsFlags::MS_SLAVE | recursive,
        Some("slave") => MsFlags::MS_SLAVE,
        Some("private") => MsFlags::MS_PRIVATE,
        Some("rprivate") => MsFlags::MS_PRIVATE | recursive,
        Some("shared") => MsFlags::MS_SHARED,
        Some("rshared") => MsFlags::MS_SHARED | recursive,
        Some("unbindable") => MsFlags::MS_UNBINDABLE,
        Some("runbindable") => MsFlags::MS_UNBINDABLE | recursive,
        Some(other) => {
            return Err(Failure::setup(format!("linux.rootfsPropagation {other:?} is unknown")));
        }
    })
}

/// Parts this mount namespace from the agent's and makes the root a mount of its own.
pub(super) fn prepare(spec: &Spec) -> Step<Inside> {
    let Some(root) = &spec.root else { return Err(Failure::setup("root is missing")) };
    mount(NONE, "/", NONE, propagation(spec)?, NONE)
        .context(|| "set the propagation of the root mount")?;
    make_parent_private(&root.path)?;
    let shown = root.path.display();
    mount(Some(&root.path), &root.path, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .context(|| format!("bind rootfs {shown}"))?;
    Inside::at(&root.path).context(|| format!("open rootfs {shown}"))
}

/// Pivoting asks that the mount which holds the root is not shared.
fn make_parent_private(root: &Path) -> Step {
    for path in root.ancestors() {
        match mount(NONE, path, NONE, MsFlags::MS_PRIVATE, NONE) {
            // Not a mount point: the one above it, then.
            Err(Errno::EINVAL) if path.parent().is_some() => {}
            result => {
                return result.context(|| format!("make the mount at {} private", path.display()));
            }
        }
    }
    Ok(())
}

/// Makes the root read-only where asked for, and hides and protects paths.
pub(super) fn close(inside: &Inside, spec: &Spec) -> Step {
    mounts::finish(inside, spec)?;
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        mounts::make_readonly(inside.root())?;
    }
    let linux = spec.linux();
    for path in &linux.readonly_paths {
        let what = || format!("readonly path {}", path.display());
        let Some(handle) = existing(inside, path)? else { continue };
        let place = proc_path(handle.as_fd());
        mount(Some(&place), &place, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .context(what)?;
        let Some(handle) = existing(inside, path)? else { continue };
        mounts::make_readonly(handle.as_fd())?;
    }
    if linux.masked_paths.is_empty() {
        return Ok(());
    }
    let null = devices::null(inside)?;
    for path in &linux.masked_paths {
        let what = || format!("mask path {}", path.display());
        let Some(handle) = existing(inside, path)? else { continue };
        let place = proc_path(handle.as_fd());
        if is_directory(&handle).context(what)? {
            mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::MS_RDONLY, NONE).context(what)?;
        } else {
            let null = proc_path(null.as_fd());
            mount(Some(&null), &place, NONE, MsFlags::MS_BIND, NONE).context(what)?;
        }
    }
    Ok(())
}

/// A handle on what is there, if it is.
fn existing(inside: &Inside, path: &Path) -> Step<Option<OwnedFd>> {
    match inside.handle(path) {
        Ok(handle) => Ok(Some(handle)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
            Ok(None)
        }
        Err(error) => Err(error).context(|| format!("open {}", path.display())),
    }
}

/// Makes the container's root this process's root and lets go of the old one.
pub(super) fn enter(inside: &Inside, spec: &Spec) -> Step {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).context(|| "open the old root")?;
    fchdir(inside.root()).context(|| "enter the new root")?;
    match pivot_root(".", ".") {
        Ok(()) => {
            fchdir(&old).context(|| "go to the old root")?;
            // Nothing that happens to the old root now is to reach where it came from.
            mount(NONE, ".", NONE, MsFlags::MS_SLAVE | MsFlags::MS_REC, NONE)
                .context(|| "part from the old root")?;
            umount2(".", MntFlags::MNT_DETACH).context(|| "unmount the old root")?;
        }
        // The guest's root is the kernel's own, which cannot be pivoted away.
        Err(Errno::EINVAL) => move_root(&old, inside)?,
        Err(error) => Err(error).context(|| "pivot_root")?,
    }
    chdir("/").context(|| "enter the new root")?;
    let kind = propagation(spec)?;
    if kind.intersects(MsFlags::MS_SHARED | MsFlags::MS_UNBINDABLE) {
        mount(NONE, "/", NONE, kind, NONE).context(|| "set the propagation of the root")?;
    }
    Ok(())
}

/// Covers the kernel's own root by the container's, after unmounting all that the agent
/// has mounted there, so that nothing of it can be reached.
fn move_root(old: &OwnedFd, inside: &Inside) -> Step {
    mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE).context(|| "move the root")?;
    fchdir(old).context(|| "go to the old root")?;
    let names = rustix::fs::Dir::read_from(old).context(|| "list the old root")?;
    for entry in names {
        let entry = entry.context(|| "list the old root")?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        // EINVAL: not a mount point. Detaching takes along what is mounted below.
        match umount2(name, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => Err(error).context(|| format!("unmount {name:?} of the guest"))?,
        }
    }
    fchdir(inside.root()).context(|| "enter the new root")?;
    chroot(".").context(|| "chroot into the new root")
}
