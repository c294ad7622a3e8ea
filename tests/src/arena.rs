//! A private machine for the tests: namespaces, `/run`, `/etc`, `/opt`, `/usr` and `/var/lib` of its own.
//!
//! [`enter`] starts the calling program again inside and, outside, waits and cleans up.
//! Inside, PID 1 only reaps; when it ends, for whatever reason, the kernel ends every
//! process in the arena and with them its mounts and interfaces. What the kernel keeps
//! (the work directory, cgroups) is removed by the outer process, or, had that been
//! killed, by the next run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::command;

const STAGE: &str = "KATA_E2E_ARENA";
const NAME: &str = "KATA_E2E_NAME";
const WORK: &str = "KATA_E2E_WORK";

/// The private machine, seen from inside.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Unique among runs; the cgroup under which all containers are.
    pub name: String,
    /// Scratch space on a real file system, removed at the end.
    pub work: PathBuf,
}

impl Arena {
    /// A fresh directory in the scratch space.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.work.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }
}

/// Runs `main` inside an arena; the exit code is its own, or 2 when there is no arena.
///
/// `scratch` is a directory in which work directories may be made. With
/// `KATA_E2E_ARENA=host` in the environment the machine itself is the arena.
pub fn enter(scratch: &Path, main: impl FnOnce(&Arena) -> ExitCode) -> ExitCode {
    let code = match std::env::var(STAGE).as_deref() {
        Err(_) => outside(scratch),
        Ok("init") => reap(),
        Ok("host") => return whole_host(scratch, main),
        Ok(_) => inside().map(|arena| main(&arena)),
    };
    code.unwrap_or_else(|error| {
        eprintln!("arena: {error:#}");
        ExitCode::from(2)
    })
}

/// For a machine that is the tests' own, such as the KVM test host: nothing is hidden, so
/// that they meet its systemd, its daemons and its control groups as a user's containers do.
fn whole_host(scratch: &Path, main: impl FnOnce(&Arena) -> ExitCode) -> ExitCode {
    let name = format!("kata-e2e-{}", std::process::id());
    let work = scratch.join(&name);
    if let Err(error) = fs::create_dir_all(&work) {
        eprintln!("arena: make {}: {error}", work.display());
        return ExitCode::from(2);
    }
    let code = main(&Arena { name: name.clone(), work: work.clone() });
    remove(&work, &name);
    code
}

fn outside(scratch: &Path) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the end-to-end tests need root: they start a Docker daemon and virtual machines");
    }
    remove_stale(scratch);
    let name = format!("kata-e2e-{}", std::process::id());
    let work = scratch.join(&name);
    fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
    let signals = blocked()?;
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--pid", "--mount"])
        .args(["--mount-proc", "--net", "--ipc", "--uts", "--propagation", "private"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "init")
        .env(NAME, &name)
        .env(WORK, &work)
        .spawn()
        .context("start unshare")?;
    let status = loop {
        match signals.wait()? {
            Signal::SIGCHLD => {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
            }
            // Killing unshare kills PID 1 of the arena, and that everything.
            _ => child.kill()?,
        }
    };
    remove(&work, &name);
    Ok(ExitCode::from(u8::try_from(command::code(status)).unwrap_or(2)))
}

fn blocked() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block()?;
    Ok(signals)
}

/// PID 1 of the arena: starts the real program and reaps what is orphaned.
fn reap() -> Result<ExitCode> {
    let signals = blocked()?;
    let main = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "inside")
        .spawn()
        .context("start the tests")?;
    let main = Pid::from_raw(i32::try_from(main.id())?);
    loop {
        if signals.wait()? != Signal::SIGCHLD {
            return Ok(ExitCode::from(130));
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == main => {
                    return Ok(ExitCode::from(u8::try_from(code).unwrap_or(2)));
                }
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => {
                    bail!("the tests were killed by {signal}");
                }
                Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::ECHILD) => break,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn inside() -> Result<Arena> {
    let arena = Arena {
        name: std::env::var(NAME)?,
        work: std::env::var(WORK).map(PathBuf::from)?.canonicalize()?,
    };
    mount(&["-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"])?;
    fs::create_dir_all("/run/lock")?;
    // What is installed inside, and how the daemon is configured, stays inside.
    for dir in ["etc", "opt", "usr", "var/lib"] {
        let name = dir.replace('/', "-");
        let upper = arena.dir(&format!("{name}-upper"))?;
        let scratch = arena.dir(&format!("{name}-work"))?;
        let options =
            format!("lowerdir=/{dir},upperdir={},workdir={}", upper.display(), scratch.display());
        mount(&["-t", "overlay", "-o", &options, "overlay", &format!("/{dir}")])?;
    }
    // A sysfs shows the interfaces of the network namespace it was mounted in.
    let cgroups = arena.dir("cgroups")?;
    let cgroups = cgroups.to_string_lossy();
    mount(&["--rbind", "/sys/fs/cgroup", &cgroups])?;
    mount(&["-t", "sysfs", "sysfs", "/sys"])?;
    mount(&["--rbind", &cgroups, "/sys/fs/cgroup"])?;
    command::ok(Command::new("umount").args(["-R", &cgroups]))?;
    command::ok(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    Ok(arena)
}

fn mount(args: &[&str]) -> Result<()> {
    command::ok(Command::new("mount").args(args)).map(drop)
}

/// Removes what runs left whose outer process was killed.
fn remove_stale(scratch: &Path) {
    let Ok(entries) = fs::read_dir(scratch) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix("kata-e2e-") else { continue };
        if !Path::new("/proc").join(pid).exists() {
            remove(&entry.path(), &name);
        }
    }
}

fn remove(work: &Path, name: &str) {
    for root in cgroup_roots() {
        remove_cgroup(&root.join(name));
    }
    if let Err(error) = fs::remove_dir_all(work) {
        eprintln!("arena: remove {}: {error}", work.display());
    }
}

/// Where cgroup hierarchies are mounted: several for version 1, one for version 2.
pub fn cgroup_roots() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| fields.len() > 2 && matches!(fields[2], "cgroup" | "cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .collect()
}

fn remove_cgroup(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    // The last processes may still be on their way out.
    for _ in 0..50 {
        if fs::remove_dir(dir).is_ok() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    eprintln!("arena: cgroup {} cannot be removed", dir.display());
}
