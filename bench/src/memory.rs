//! What an idle container costs: PSS of every process of its sandbox.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use kata_e2e::arena::cgroup_roots;
use kata_e2e::docker::Docker;

use crate::report::Report;

/// Long enough for what runs once after the start.
const SETTLE: Duration = Duration::from_secs(5);

/// Starts one container, lets it rest, and adds up.
pub fn measure(docker: &Docker, report: &mut Report) -> Result<()> {
    eprintln!("bench: memory of an idle container");
    let container = docker.sleeper("")?;
    thread::sleep(SETTLE);
    let mut pids = BTreeSet::new();
    for root in cgroup_roots() {
        gather(&root.join(&docker.arena.name), &mut pids);
    }
    let stand_in =
        docker.ok(&format!("inspect --format '{{{{.State.Pid}}}}' {}", container.name))?;
    let mut by_kind: BTreeMap<&'static str, f64> = BTreeMap::new();
    for pid in pids {
        if let Ok(pss) = pss(pid) {
            *by_kind.entry(kind(pid, &stand_in)).or_default() += pss;
        }
    }
    for (kind, pss) in &by_kind {
        let bound = match *kind {
            "sandbox server" => Some(12.0),
            "stand-in" => Some(2.0),
            _ => None,
        };
        report.value(&format!("idle container, PSS of the {kind}"), *pss, "MiB", bound);
    }
    report.value("idle container, PSS of everything", by_kind.values().sum(), "MiB", None);
    Ok(())
}

fn gather(cgroup: &Path, pids: &mut BTreeSet<u32>) {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            gather(&entry.path(), pids);
        }
    }
}

fn kind(pid: u32, stand_in: &str) -> &'static str {
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&cmdline).into_owned();
    if pid.to_string() == stand_in {
        "stand-in"
    } else if line.contains("qemu-system") {
        "hypervisor, with what the guest touched"
    } else if line.contains("devices") {
        "devices process"
    } else {
        "sandbox server"
    }
}

fn pss(pid: u32) -> Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss line")?;
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}
