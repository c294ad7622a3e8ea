//! The mounts of the specification, in order, inside the container's root.

use super::failure::{Context, Failure, Step, reason};
use super::inside::{Inside, clean, is_directory, is_directory_at, proc_path};
use super::mount_options::{MountOptions, TreeAttributes};
use kata_oci::{Mount, Spec};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use rustix::fs::{FileType, OFlags, fstat, fstatfs};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Files below `/proc` that may be replaced, as lxcfs does.
const PROC_FILES: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

const PROC_MAGIC: i64 = 0x9fa0;
const NONE: Option<&str> = None;

/// A mount that is being made.
struct Job<'a> {
    inside: &'a Inside,
    mount: &'a Mount,
    /// Absolute and without dots.
    destination: PathBuf,
    options: MountOptions,
}

/// Makes all mounts.
pub(super) fn make_all(inside: &Inside, spec: &Spec) -> Step {
    for mount in &spec.mounts {
        let job = Job {
            inside,
            mount,
            destination: clean(&mount.destination),
            options: MountOptions::parse(&mount.options),
        };
        job.run().map_err(|failure| {
            let source = mount.source.as_deref().unwrap_or(Path::new(&mount.kind));
            Failure::setup(format!(
                "error mounting {:?} to rootfs at {:?}: {}",
                source, mount.destination, failure.text
            ))
        })?;
    }
    Ok(())
}

/// Makes read-only what had to be writable until now.
pub(super) fn finish(inside: &Inside, spec: &Spec) -> Step {
    for m in &spec.mounts {
        let options = MountOptions::parse(&m.options);
        if !options.flags.contains(MsFlags::MS_RDONLY) || !is_late(m) {
            continue;
        }
        let destination = clean(&m.destination);
        let what = || format!("make {} read-only", destination.display());
        let handle = inside.handle(&destination).context(what)?;
        make_readonly(handle.as_fd())?;
    }
    Ok(())
}

/// Whether something is still to be made on the mount.
fn is_late(mount: &Mount) -> bool {
    !mount.is_bind() && (mount.kind == "tmpfs" || clean(&mount.destination) == Path::new("/dev"))
}

impl Job<'_> {
    fn run(&self) -> Step {
        if self.options.id_mapped {
            return Err(Failure::setup("id-mapped mounts cannot be had in a guest"));
        }
        if self.mount.is_bind() {
            return self.bind();
        }
        match self.mount.kind.as_str() {
            "proc" => self.plain("proc"),
            "sysfs" => self.sysfs(),
            "tmpfs" => self.tmpfs(),
            "cgroup" | "cgroup2" => self.cgroup(),
            "" => Err(Failure::setup("the mount has neither a type nor the option bind")),
            other => {
                self.check_proc(None)?;
                self.plain(other)
            }
        }
    }

    /// Mounts a file system on the destination, made where missing.
    fn plain(&self, kind: &str) -> Step {
        let target = self.directory()?;
        if matches!(kind, "proc" | "sysfs") {
            // Else the container's own links would decide what is its /proc.
            let flags = OFlags::PATH | OFlags::NOFOLLOW;
            let itself = self.inside.open(&self.destination, flags).context(|| "open")?;
            let stat = fstat(&itself).context(|| "look at the destination")?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                return Err(Failure::setup(format!(
                    "filesystem {kind:?} must be mounted on ordinary directory"
                )));
            }
        }
        self.mount_on(target.as_fd(), self.source(kind), kind, &self.options.data)?;
        self.finish()
    }

    fn source(&self, kind: &str) -> PathBuf {
        self.mount.source.clone().unwrap_or_else(|| PathBuf::from(kind))
    }

    fn directory(&self) -> Step<OwnedFd> {
        self.inside.make_directory(&self.destination, 0o755).context(|| "make the destination")
    }

    fn mount_on(&self, target: BorrowedFd<'_>, source: PathBuf, kind: &str, data: &str) -> Step {
        let mut flags = self.options.flags;
        if is_late(self.mount) {
            flags.remove(MsFlags::MS_RDONLY);
        }
        let data = Some(data).filter(|data| !data.is_empty());
        mount(Some(&source), &proc_path(target), Some(kind), flags, data).map_err(|errno| {
            Failure::setup(format!(
                "mount {}:{}, flags: {:#x}: {}",
                source.display(),
                self.destination.display(),
                flags.bits(),
                reason(&errno.into())
            ))
        })
    }

    /// Propagation and tree attributes of what is mounted now.
    fn finish(&self) -> Step {
        for propagation in &self.options.propagation {
            let handle = self.reopen()?;
            mount(NONE, &proc_path(handle.as_fd()), NONE, *propagation, NONE)
                .context(|| "set the propagation")?;
        }
        match self.options.tree {
            Some(tree) => set_tree(self.reopen()?.as_fd(), tree),
            None => Ok(()),
        }
    }

    /// A handle on the mount, which covers what was there.
    fn reopen(&self) -> Step<OwnedFd> {
        self.inside.handle(&self.destination).context(|| "open what was mounted")
    }

    fn sysfs(&self) -> Step {
        let made = self.plain("sysfs");
        // The network namespace is not the user namespace's: show the guest's instead.
        match made {
            Err(failure) if failure.text.ends_with("operation not permitted") => {
                let target = self.directory()?;
                let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
                mount(Some("/sys"), &proc_path(target.as_fd()), NONE, flags, NONE)
                    .context(|| "bind /sys of the guest")?;
                self.remount_bind()?;
                self.finish()
            }
            result => result,
        }
    }

    fn tmpfs(&self) -> Step {
        let before = self.inside.handle(&self.destination).ok();
        let mut data = self.options.data.clone();
        if let Some(before) = &before {
            // What was there keeps its mode, unless another is asked for later in the data.
            let mode = fstat(before).context(|| "look at the destination")?.st_mode & 0o7777;
            let rest = if data.is_empty() { String::new() } else { format!(",{data}") };
            data = format!("mode={mode:04o}{rest}");
        }
        let target = self.directory()?;
        self.mount_on(target.as_fd(), self.source("tmpfs"), "tmpfs", &data)?;
        if self.options.copy_up && before.is_some() {
            copy_tree(&target, &self.reopen()?).context(|| "copy what was there into the tmpfs")?;
        }
        self.finish()
    }

    /// The guest has one hierarchy, v2, and the container its own view of it.
    fn cgroup(&self) -> Step {
        let target = self.directory()?;
        let made = self.mount_on(target.as_fd(), PathBuf::from("cgroup"), "cgroup2", "");
        match made {
            Err(failure)
                if failure.text.ends_with("operation not permitted")
                    || failure.text.ends_with("device or resource busy") =>
            {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
                mount(Some("/sys/fs/cgroup"), &proc_path(target.as_fd()), NONE, flags, NONE)
                    .context(|| "bind /sys/fs/cgroup of the guest")?;
                self.remount_bind()?;
            }
            result => result?,
        }
        self.finish()
    }

    fn bind(&self) -> Step {
        let Some(source) = &self.mount.source else {
            return Err(Failure::setup("the bind mount has no source"));
        };
        self.check_proc(Some(source))?;
        let directory = is_directory_at(source).context(|| format!("stat {}", source.display()))?;
        let target = if directory {
            self.directory()?
        } else {
            let what = || "make the destination";
            let file = self.inside.make_file(&self.destination).context(what)?;
            if is_directory(&file).context(what)? {
                // The words by which Docker explains it.
                return Err(Failure::setup(
                    "not a directory: are you trying to mount a file onto a directory?",
                ));
            }
            file
        };
        let flags = MsFlags::MS_BIND | (self.options.flags & MsFlags::MS_REC);
        mount(Some(source), &proc_path(target.as_fd()), NONE, flags, NONE)
            .context(|| format!("mount {}:{}", source.display(), self.destination.display()))?;
        for propagation in &self.options.propagation {
            let handle = self.reopen()?;
            mount(NONE, &proc_path(handle.as_fd()), NONE, *propagation, NONE)
                .context(|| "set the propagation")?;
        }
        self.remount_bind()?;
        match self.options.tree {
            Some(tree) => set_tree(self.reopen()?.as_fd(), tree),
            None => Ok(()),
        }
    }

    /// A bind mount takes its options by a second call only.
    fn remount_bind(&self) -> Step {
        if !self.options.bind_changes() {
            return Ok(());
        }
        let handle = self.reopen()?;
        let flags = (self.options.flags - MsFlags::MS_REC) | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        remount(handle.as_fd(), flags)
    }

    /// Refuses to cover `/proc` or most of what is in it.
    fn check_proc(&self, source: Option<&Path>) -> Step {
        let Ok(below) = self.destination.strip_prefix("/proc") else { return Ok(()) };
        let text = self.destination.to_string_lossy();
        if below.as_os_str().is_empty() {
            let is_proc = source.is_some_and(|source| {
                rustix::fs::statfs(source).is_ok_and(|stat| stat.f_type == PROC_MAGIC)
            });
            if is_proc {
                return Ok(());
            }
            return Err(Failure::setup(format!(
                "{text:?} cannot be mounted because it is not of type proc"
            )));
        }
        if PROC_FILES.contains(&text.as_ref()) {
            return Ok(());
        }
        Err(Failure::setup(format!("{text:?} cannot be mounted because it is inside /proc")))
    }
}

/// Changes a mount's flags. Those that a user namespace must not drop are kept.
pub(super) fn remount(handle: BorrowedFd<'_>, flags: MsFlags) -> Step {
    let path = proc_path(handle);
    match mount(NONE, &path, NONE, flags, NONE) {
        Err(Errno::EPERM) => {
            let kept = kept_flags(handle)?;
            mount(NONE, &path, NONE, flags | kept, NONE).context(|| "change the mount's flags")
        }
        result => result.context(|| "change the mount's flags"),
    }
}

/// Flags of the mount that a handle is on.
fn kept_flags(handle: BorrowedFd<'_>) -> Step<MsFlags> {
    const KEPT: u64 = 0x0f | 0x400 | 0x800;
    const RELATIME: u64 = 0x1000;
    let stat = rustix::fs::fstatvfs(handle).context(|| "look at the mount")?;
    let bits = stat.f_flag.bits();
    let mut flags = MsFlags::from_bits_retain(bits & KEPT);
    if bits & RELATIME != 0 {
        flags |= MsFlags::MS_RELATIME;
    }
    Ok(flags)
}

/// Makes the mount of a handle read-only and keeps its other flags.
pub(super) fn make_readonly(handle: BorrowedFd<'_>) -> Step {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    remount(handle, flags | kept_flags(handle)?)
}

/// Changes attributes of a mount and all below it.
fn set_tree(handle: BorrowedFd<'_>, tree: TreeAttributes) -> Step {
    let attributes =
        libc::mount_attr { attr_set: tree.set, attr_clr: tree.clear, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is an empty NUL-terminated string and the structure lives through
    // the call, which is told its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            handle.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error()).context(|| "set recursive mount attributes")
}

/// Copies a directory's content: what a tmpfs covers into the tmpfs.
fn copy_tree(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    // Handles for mounting cannot be listed: open them again for reading.
    let open = |fd: &OwnedFd| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(fd, ".", flags, rustix::fs::Mode::empty())
    };
    super::copy::copy_directory(&open(from)?, &open(to)?)
}

/// Whether a handle is on a devpts.
pub(super) fn is_devpts(handle: BorrowedFd<'_>) -> bool {
    const DEVPTS_MAGIC: i64 = 0x1cd1;
    fstatfs(handle).is_ok_and(|stat| stat.f_type == DEVPTS_MAGIC)
}
