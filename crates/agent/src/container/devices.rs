//! Device nodes and links below `/dev`.

use super::failure::{Context, Failure, Step};
use super::inside::{Inside, clean, proc_path};
use kata_oci::{Device, Spec};
use nix::mount::{MsFlags, mount};
use rustix::fs::{
    self, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Devices every container has: name, major, minor.
const DEFAULT: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
];

/// Links every container has.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Whether `/dev` is ours to fill: not when the engine binds one of the guest's.
pub(super) fn ours(spec: &Spec) -> bool {
    !spec.mounts.iter().any(|m| m.is_bind() && clean(&m.destination) == Path::new("/dev"))
}

/// Fills `/dev`. `bind` where nodes cannot be made (user namespaces).
pub(super) fn fill(inside: &Inside, spec: &Spec, bind: bool) -> Step {
    let linux = spec.linux();
    let named = |path: &str| linux.devices.iter().any(|d| clean(&d.path) == Path::new(path));
    for (path, major, minor) in DEFAULT.iter().filter(|(path, ..)| !named(path)) {
        let device = Device {
            kind: "c".into(),
            path: PathBuf::from(path),
            major: *major,
            minor: *minor,
            ..Device::default()
        };
        make(inside, &device, bind)?;
    }
    for device in linux.devices.iter().filter(|d| clean(&d.path) != Path::new("/dev/ptmx")) {
        make(inside, device, bind)?;
    }
    let (dev, ptmx) =
        inside.make_parent(Path::new("/dev/ptmx")).context(|| "open /dev of the container")?;
    match unlinkat(&dev, &ptmx, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => Err(error).context(|| "remove /dev/ptmx of the image")?,
    }
    link(&dev, "pts/ptmx", &ptmx)?;
    for (target, path) in LINKS {
        let (dev, name) =
            inside.make_parent(Path::new(path)).context(|| "open /dev of the container")?;
        link(&dev, target, &name)?;
    }
    if Path::new("/proc/kcore").exists() {
        link(&dev, "/proc/kcore", std::ffi::OsStr::new("core"))?;
    }
    Ok(())
}

fn link(directory: &OwnedFd, target: &str, name: &std::ffi::OsStr) -> Step {
    match symlinkat(target, directory, name) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).context(|| format!("link /dev/{} to {target}", name.display())),
    }
}

fn make(inside: &Inside, device: &Device, bind: bool) -> Step {
    let shown = device.path.display();
    let path = clean(&device.path);
    if bind {
        return make_bind(inside, &path);
    }
    let (parent, name) = inside
        .make_parent(&path)
        .context(|| format!("error creating device nodes: make the directory of {shown}"))?;
    let kind = match device.kind.as_str() {
        "c" | "u" => FileType::CharacterDevice,
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        other => {
            return Err(Failure::setup(format!("device {shown} has unknown type {other:?}")));
        }
    };
    let number = |n: i64| {
        u32::try_from(n).map_err(|_| Failure::setup(format!("device {shown} has number {n}")))
    };
    let id = match kind {
        FileType::Fifo => 0,
        _ => makedev(number(device.major)?, number(device.minor)?),
    };
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    match mknodat(&parent, &name, kind, mode, id) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        // Not ours to make: the guest's own node will do.
        Err(Errno::PERM) => return make_bind(inside, &path),
        Err(error) => {
            return Err(error).context(|| format!("error creating device nodes: mknod {shown}"));
        }
    }
    let (uid, gid) =
        (Uid::from_raw(device.uid.unwrap_or(0)), Gid::from_raw(device.gid.unwrap_or(0)));
    chownat(&parent, &name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .context(|| format!("error creating device nodes: chown {shown}"))
}

fn make_bind(inside: &Inside, path: &Path) -> Step {
    let what = || format!("bind the guest's device {} into the container", path.display());
    let target = inside.make_file(path).context(what)?;
    let none: Option<&str> = None;
    mount(Some(path), &proc_path(target.as_fd()), none, MsFlags::MS_BIND, none).context(what)
}

/// The container's null device if it is one, else the guest's.
pub(super) fn null(inside: &Inside) -> Step<OwnedFd> {
    if let Ok(handle) = inside.handle(Path::new("/dev/null"))
        && is_null(handle.as_fd())
    {
        return Ok(handle);
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    fs::openat(CWD, "/dev/null", flags, Mode::empty()).context(|| "open /dev/null of the guest")
}

/// Whether a descriptor is of the null device.
pub(super) fn is_null(fd: BorrowedFd<'_>) -> bool {
    fs::fstat(fd).is_ok_and(|stat| {
        let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        device && stat.st_rdev == makedev(1, 3)
    })
}
