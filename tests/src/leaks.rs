//! What of the machine is compared before and after: nothing may be left.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::arena::{Arena, cgroup_roots};
use crate::command;

/// Everything a runtime could leave behind, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at processes, mounts, interfaces, network namespaces, cgroups and run-time files.
    pub fn take(arena: &Arena) -> Result<Self> {
        let mut seen = BTreeSet::new();
        processes(&mut seen)?;
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
        for place in ["/run/kata-containers", "/run/runc", "/run/netns", "/run/docker/netns"] {
            for entry in fs::read_dir(place).into_iter().flatten().flatten() {
                seen.insert(format!("file {}", entry.path().display()));
            }
        }
        Ok(Self(seen))
    }

    /// Fails when the machine does not come back to this state within a few seconds.
    pub fn expect_again(&self, arena: &Arena) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let now = Self::take(arena)?;
            let left: Vec<_> = now.0.difference(&self.0).filter(|line| !harmless(line)).collect();
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

/// What Docker keeps by itself, and what is cached on purpose until the next boot.
fn harmless(line: &str) -> bool {
    matches!(line, "link docker0" | "file /run/docker/netns/default")
        || matches!(
            line,
            "file /run/kata-containers/host.json" | "file /run/kata-containers/qemu.json"
        )
        || line.starts_with("mount /run/docker/netns")
        || (line.starts_with("cgroup ")
            && !line[7..].trim_start_matches('/').contains("/kata-e2e-"))
}

fn processes(seen: &mut BTreeSet<String>) -> Result<()> {
    let own = std::process::id();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(cmdline) = fs::read(entry.path().join("cmdline")) else { continue };
        // Kernel threads and zombies have none; a zombie is reaped by PID 1 in no time.
        if pid == 1 || pid == own || cmdline.is_empty() {
            continue;
        }
        let line = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        seen.insert(format!("process {pid} {}", line.trim()));
    }
    Ok(())
}

fn directories(dir: &Path, found: &mut impl FnMut(&Path) -> bool) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found(&entry.path());
            directories(&entry.path(), found);
        }
    }
}
