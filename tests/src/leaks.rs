//! What of the machine is compared before and after: nothing may be left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::arena::{Arena, cgroup_roots};
use crate::command;

/// Everything a runtime could leave behind, one line each.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What is not processes.
    things: BTreeSet<String>,
    /// Processes by what stays the same when one becomes another program; and as people know
    /// them.
    processes: BTreeMap<(i32, u64), String>,
}

impl Snapshot {
    /// Looks at processes, mounts, interfaces, network namespaces, cgroups and run-time files.
    pub fn take(arena: &Arena) -> Result<Self> {
        let mut seen = BTreeSet::new();
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let point = line.split(' ').nth(4).unwrap_or(line);
            seen.insert(format!("mount {point}"));
        }
        let links = command::ok(Command::new("ip").args(["-o", "link"]))?.out();
        seen.extend(
            links.lines().filter_map(|l| l.split(": ").nth(1)).map(|n| format!("link {n}")),
        );
        for root in cgroup_roots() {
            let root = root.join(&arena.name);
            directories(&root, &mut |dir| seen.insert(format!("cgroup {}", dir.display())));
        }
        for place in PLACES {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                seen.insert(format!("file {}", entry.path().display()));
            }
        }
        Ok(Self { things: seen, processes: processes()? })
    }

    /// Fails when the machine does not come back to this state within a few seconds.
    pub fn expect_again(&self, arena: &Arena) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let now = Self::take(arena)?;
            let things = now.things.difference(&self.things).filter(|line| !harmless(line));
            let new = |(id, line): (&(i32, u64), &String)| {
                (!self.processes.contains_key(id)).then(|| format!("process {} {line}", id.0))
            };
            let left: Vec<String> =
                things.cloned().chain(now.processes.iter().filter_map(new)).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let lines: Vec<_> = left.iter().map(|line| format!("  {line}")).collect();
                bail!("left behind:\n{}", lines.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Where runtimes and engines keep things while something runs.
const PLACES: [&str; 7] = [
    "/run/kata-containers",
    "/run/runc",
    "/run/netns",
    "/run/docker/netns",
    "/run/containerd/s",
    "/run/containerd/runc",
    "/var/lib/cni/results",
];

/// A process of ours that serves one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// containerd's side of it: the sandbox server, or runc's shim.
    Shim,
    /// The virtual machine.
    Hypervisor,
    /// What serves the share.
    Devices,
}

impl Part {
    fn is(self, program: &str, line: &str) -> bool {
        let hypervisor = program.contains("qemu-system");
        // Ours begin with a title of their own.
        match self {
            Self::Hypervisor => hypervisor,
            Self::Devices => !hypervisor && line.starts_with("kata-devices"),
            Self::Shim => line.contains("containerd-shim-"),
        }
    }
}

/// The living processes whose command line names `id` and that are this part of it.
pub fn processes_of(id: &str, part: Part) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for (pid, line) in command_lines()? {
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if line.contains(id) && part.is(&program.to_string_lossy(), &line) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The living processes that call themselves `title`.
pub fn processes_named(title: &str) -> Result<Vec<i32>> {
    let named = |(pid, line): (i32, String)| (line == title).then_some(pid);
    Ok(command_lines()?.into_iter().filter_map(named).collect())
}

/// Kills these processes; returns when the first of them was dead.
pub fn kill_and_wait(pids: &[i32]) -> Result<Instant> {
    use nix::sys::signal::{Signal, kill};
    for pid in pids {
        kill(nix::unistd::Pid::from_raw(*pid), Signal::SIGKILL).ok();
    }
    let dead = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/stat"))
            .map_or(true, |stat| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")))
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while !pids.is_empty() && !pids.iter().any(dead) {
        if Instant::now() > deadline {
            bail!("{pids:?} do not die");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Instant::now())
}

/// Where containerd and shims agree on the socket of a container in a namespace.
pub fn socket_of(namespace: &str, id: &str) -> Result<PathBuf> {
    let name = format!("{}/{namespace}/{id}", crate::containerd::SOCKET);
    Ok(Path::new("/run/containerd/s").join(crate::images::sha256(name.as_bytes())?))
}

/// Fails when something is left, after a few seconds, that carries one of these ids in its name.
pub fn expect_no_trace(ids: &[&str]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left = traces(ids)?;
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left behind:\n  {}", left.join("\n  "));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn traces(ids: &[&str]) -> Result<Vec<String>> {
    let named = |text: &str| ids.iter().any(|id| text.contains(id));
    let mut left = Vec::new();
    let lines = command_lines()?.into_iter().filter(|(_, line)| named(line));
    left.extend(lines.map(|(pid, line)| format!("process {pid} {line}")));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    left.extend(mounts.lines().filter(|line| named(line)).map(|line| format!("mount {line}")));
    for root in cgroup_roots() {
        entries(&root, 4, &mut |path| {
            if path.is_dir() && named(&path.to_string_lossy()) {
                left.push(format!("cgroup {}", path.display()));
            }
        });
    }
    for place in ["/run", "/var/lib/cni"] {
        entries(Path::new(place), 6, &mut |path| {
            // FIFOs are the client's, who may have been gone when it could have removed them.
            let named = path.file_name().is_some_and(|name| named(&name.to_string_lossy()));
            if named && !path.starts_with("/run/containerd/fifo") {
                left.push(format!("file {}", path.display()));
            }
        });
    }
    Ok(left)
}

/// Everything below `dir`, so deep.
fn entries(dir: &Path, deep: usize, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found(&entry.path());
        // Root file systems have names of their own.
        let inside = deep > 0 && entry.file_name() != "rootfs";
        if inside && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            entries(&entry.path(), deep - 1, found);
        }
    }
}

/// What Docker keeps by itself, and what is cached on purpose until the next boot.
fn harmless(line: &str) -> bool {
    matches!(line, "link docker0" | "file /run/docker/netns/default")
        // Who first names a network namespace makes their directory a mount.
        || line == "mount /run/netns"
        // CNI's bridge plugin keeps its bridges.
        || line.starts_with("link cni-")
        || line.starts_with("link uplink")
        // runc's shims keep a directory for each namespace, and sockets that were killed.
        || line.starts_with("file /run/containerd/runc/")
        || matches!(
            line,
            "file /run/kata-containers/host.json"
                | "file /run/kata-containers/qemu.json"
                | "file /run/kata-containers/.factory.lock"
                | "file /run/kata-containers/.factory.log"
        )
        || line.starts_with("mount /run/docker/netns")
        || (line.starts_with("cgroup ")
            && !line[7..].trim_start_matches('/').contains("/kata-e2e-"))
}

fn processes() -> Result<BTreeMap<(i32, u64), String>> {
    let known = |(pid, line)| Some(((pid, started(pid)?), line));
    Ok(command_lines()?.into_iter().filter_map(known).collect())
}

/// When a process was started, in clock ticks since boot; none when it has ended.
fn started(pid: i32) -> Option<u64> {
    const FIELDS_BEHIND_THE_NAME: usize = 19;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(FIELDS_BEHIND_THE_NAME)?.parse().ok()
}

/// All processes but PID 1 and our own.
fn command_lines() -> Result<Vec<(i32, String)>> {
    let own = std::process::id().cast_signed();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(cmdline) = fs::read(entry.path().join("cmdline")) else { continue };
        // Kernel threads and zombies have none; a zombie is reaped by PID 1 in no time.
        if pid == 1 || pid == own || cmdline.is_empty() {
            continue;
        }
        found.push((pid, String::from_utf8_lossy(&cmdline).replace('\0', " ").trim().to_owned()));
    }
    Ok(found)
}

fn directories(dir: &Path, found: &mut impl FnMut(&Path) -> bool) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found(&entry.path());
            directories(&entry.path(), found);
        }
    }
}
