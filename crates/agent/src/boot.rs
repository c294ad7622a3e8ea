//! The guest from the kernel's first user process to where the agent can serve.
//!
//! Little on purpose: where the processor is emulated, every page of code executed for
//! the first time is translated, and all of this is before the first answer.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use kata_cgroups::Hierarchy;
use rustix::fs::Mode;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::{RebootCommand, reboot};

use crate::console;

/// Ordered list of modules (paths in the initramfs) that the kernel needs; may be missing.
const MODULES: &str = "/etc/kata/modules";
/// Where the real root is prepared.
const NEW_ROOT: &str = "/root";
/// Open files, for the agent and what it starts.
const FILES: u64 = 1 << 20;

/// Why the guest cannot come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system is not to be had.
    #[error("cannot mount {0}")]
    Mount(&'static str, #[source] io::Error),
    /// A module is not to be had.
    #[error("cannot load kernel module {0}")]
    Module(String, #[source] io::Error),
    /// Another step failed.
    #[error("cannot {0}")]
    Step(&'static str, #[source] io::Error),
}

/// What the kernel command line asks of the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `agent.channel=vsock`; else the virtio-serial port.
    pub vsock: bool,
    /// `agent.log=debug`.
    pub debug: bool,
}

impl Settings {
    fn parse(command_line: &str) -> Self {
        let mut settings = Self::default();
        for word in command_line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("agent.channel", value)) => settings.vsock = value == "vsock",
                Some(("agent.log", value)) => settings.debug = value == "debug",
                _ => {}
            }
        }
        settings
    }
}

struct Entry {
    source: &'static str,
    target: &'static str,
    fstype: &'static str,
    flags: MountFlags,
    data: &'static CStr,
}

const HARDENED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounted in this order below the new root. Containers bring the rest: a `devpts` each.
const MOUNTS: &[Entry] = &[
    Entry { source: "proc", target: "proc", fstype: "proc", flags: HARDENED, data: c"" },
    Entry { source: "sysfs", target: "sys", fstype: "sysfs", flags: HARDENED, data: c"" },
    Entry {
        source: "cgroup2",
        target: "sys/fs/cgroup",
        fstype: "cgroup2",
        flags: HARDENED,
        data: c"nsdelegate,memory_recursiveprot",
    },
    Entry {
        source: "devtmpfs",
        target: "dev",
        fstype: "devtmpfs",
        flags: MountFlags::NOSUID,
        data: c"mode=755",
    },
    Entry {
        source: "tmpfs",
        target: "dev/shm",
        fstype: "tmpfs",
        flags: HARDENED,
        data: c"mode=1777",
    },
    Entry {
        source: "tmpfs",
        target: "run",
        fstype: "tmpfs",
        flags: MountFlags::NOSUID.union(MountFlags::NODEV),
        data: c"mode=755",
    },
];

/// Brings the guest up.
///
/// # Errors
/// When it cannot; the caller then ends the guest.
pub fn boot() -> Result<Settings, BootError> {
    new_root().map_err(|error| BootError::Mount("a new root", error))?;
    for entry in MOUNTS {
        let target = Path::new(NEW_ROOT).join(entry.target);
        let mounted = match fs::create_dir(&target) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => mount(entry.source, &target, entry.fstype, entry.flags, entry.data)
                .map_err(io::Error::from),
        };
        mounted.map_err(|error| BootError::Mount(entry.target, error))?;
    }
    // Without a console there is nobody to tell.
    let _ = console::keep(&Path::new(NEW_ROOT).join("dev/console"));
    hurry_grace_periods();
    load_modules()?;
    switch_root().map_err(|error| BootError::Step("switch to the new root", error))?;
    let limit = Rlimit { current: Some(FILES), maximum: Some(FILES) };
    setrlimit(Resource::Nofile, limit)
        .map_err(|error| BootError::Step("raise the limit of open files", error.into()))?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    Ok(Settings::parse(&command_line))
}

/// The cgroups that [`boot`] has mounted.
pub fn hierarchy() -> Hierarchy {
    Hierarchy::V2 { root: PathBuf::from("/sys/fs/cgroup") }
}

/// The initial root cannot be left by `pivot_root`, which each container needs to do: so
/// everything is to be on a file system of our own.
fn new_root() -> io::Result<()> {
    match fs::create_dir(NEW_ROOT) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    mount("root", NEW_ROOT, "tmpfs", MountFlags::empty(), c"mode=755")?;
    Ok(())
}

fn switch_root() -> io::Result<()> {
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    fs::create_dir("/tmp")?;
    rustix::fs::chmod("/tmp", Mode::from_raw_mode(0o1777))?;
    Ok(())
}

/// Whoever changes cgroups or namespaces waits for a grace period of the kernel's RCU: some
/// twenty milliseconds, which would be the largest part of starting a process. Expedited,
/// it interrupts the guest's few processors instead, and is over at once.
fn hurry_grace_periods() {
    // A kernel without the file has one processor, and no grace periods to wait for.
    let _ = fs::write(Path::new(NEW_ROOT).join("sys/kernel/rcu_expedited"), "1");
}

fn load_modules() -> Result<(), BootError> {
    let Ok(list) = fs::read_to_string(MODULES) else { return Ok(()) };
    for path in list.lines().filter(|line| !line.is_empty()) {
        load_module(path).map_err(|error| BootError::Module(path.to_owned(), error))?;
    }
    Ok(())
}

fn load_module(path: &str) -> io::Result<()> {
    let file = fs::File::open(path)?;
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Ends the guest with one line on its console, which the host shows.
pub fn fail(text: &str) -> ! {
    console::say(&format!("kata-agent: fatal: {}\n", text.escape_debug()));
    end_machine()
}

/// Ends the machine: no monitor of ours lets one start again. Where there is no ACPI it cannot be
/// powered off, and Linux would stand still instead, which nobody notices.
fn end_machine() -> ! {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::Restart);
    std::process::exit(1)
}

/// PID 1 must not end: the kernel would panic over it and hide the cause.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| fail(&panic.to_string())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_chooses_channel_and_log() {
        let line = "console=hvc0 quiet agent.channel=vsock agent.log=debug x\n";
        assert_eq!(Settings::parse(line), Settings { vsock: true, debug: true });
        assert_eq!(Settings::parse("agent.channel=serial"), Settings::default());
    }
}
