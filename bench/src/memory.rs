//! What an idle container costs: PSS of every process of its sandbox.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use kata_e2e::arena::cgroup_roots;
use kata_e2e::docker::Docker;
use kata_e2e::leaks::{self, Part};

use crate::report::Report;

/// Long enough for what runs once after the start.
const SETTLE: Duration = Duration::from_secs(5);

/// Starts one container with these options, lets it rest, and adds up.
pub fn measure(docker: &Docker, options: &str, what: &str, report: &mut Report) -> Result<()> {
    eprintln!("bench: memory of an idle {what}");
    let container = docker.sleeper(options)?;
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
        report.value(&format!("idle {what}, PSS of the {kind}"), *pss, "MiB", bound);
    }
    report.value(&format!("idle {what}, PSS of everything"), by_kind.values().sum(), "MiB", None);
    Ok(())
}

/// How many idle ones there are when it is measured what each of many takes.
pub const NUMBERS: &[usize] = &[1, 5, 10, 20];

/// PSS of containerd's shim for this pod, MiB.
pub fn of_shim(pod: &str) -> Result<f64> {
    leaks::processes_of(pod, Part::Shim)?.into_iter().map(|pid| pss(pid.unsigned_abs())).sum()
}

/// PSS of all processes of sandboxes together, by how many idle ones there are, MiB each.
pub fn by_number(
    docker: &Docker,
    options: &str,
    what: &str,
    numbers: &[usize],
    bound: Option<f64>,
    report: &mut Report,
) -> Result<()> {
    let mut containers = Vec::new();
    for number in numbers {
        eprintln!("bench: memory of an idle {what}, of {number}");
        while containers.len() < *number {
            containers.push(docker.sleeper(options)?);
        }
        thread::sleep(SETTLE);
        let mut pids = BTreeSet::new();
        for root in cgroup_roots() {
            gather(&root.join(&docker.arena.name), &mut pids);
        }
        let sum: f64 = pids.into_iter().filter_map(|pid| pss(pid).ok()).sum();
        report.value(
            &format!("idle {what}, PSS of each of {number}"),
            sum / *number as f64,
            "MiB",
            bound,
        );
    }
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
