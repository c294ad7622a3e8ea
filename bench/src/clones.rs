//! The same figures for machines that are cloned from a template instead of booted.

use std::process::Command;

use anyhow::Result;
use kata_e2e::assets::CTL;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::{Docker, IMAGE};

use crate::report::Report;
use crate::{THEIRS, burst, in_turn, memory, stages, timed};

/// How clones share their files, the runtime of the harness that does so, and how long one may
/// take from the start of its monitor until that stage, ms.
const WAYS: [(&str, &str, &str, f64); 2] = [
    ("virtio-fs", "kata-template", stages::MOUNTED, 180.0),
    ("9p", "kata-template-9p", stages::READY, 110.0),
];

/// What an idle one may take, all processes together, MiB.
const IDLE: f64 = 40.0;

/// Templates are made beforehand, and forgotten afterwards.
pub fn measure(docker: &Docker, runs: usize, short: bool, report: &mut Report) -> Result<()> {
    for (share, runtime, end, bound) in WAYS {
        eprintln!("bench: clones that share by {share}, {runs} runs");
        let config = docker.arena.work.join(format!("{runtime}.toml"));
        command::ok(Command::new(CTL).arg("--config").arg(&config).args(["factory", "init"]))?;
        let line = |runtime: &str| format!("run --rm --runtime {runtime} {IMAGE} true");
        let [ours, theirs] = in_turn(runs, |which| {
            timed(docker, &line(if which == THEIRS { THEIRS } else { runtime }))
        })?;
        let what = format!("docker run --rm busybox true, cloned ({share})");
        report.compare(&what, &ours, &theirs, (share == "virtio-fs").then_some(1.6));
        let what = format!("VM exec to {end}, cloned ({share})");
        let options = format!("--runtime {runtime}");
        stages::measure(docker, &options, (&what, end, bound), runs, report, || Ok(()))?;
        memory::measure(docker, &options, &format!("clone ({share})"), report)?;
        if !short {
            let (what, numbers) = (format!("clone ({share})"), memory::NUMBERS);
            memory::by_number(docker, &options, &what, numbers, Some(IDLE), report)?;
            burst::measure(docker, runtime, &format!("cloned ({share})"), report)?;
        }
        command::ok(Command::new(CTL).args(["factory", "destroy"]))?;
    }
    Ok(())
}

/// The runtime of the harness that keeps spares.
const SPARES: &str = "kata-pool";

/// Machines that wait; each run begins when there are as many as there should be.
pub fn measure_spares(docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: spares, {runs} runs");
    let config = docker.arena.work.join(format!("{SPARES}.toml"));
    command::ok(Command::new(CTL).arg("--config").arg(&config).args(["factory", "init"]))?;
    let filled = || {
        command::eventually("the spares are there", PATIENCE, || {
            let status = command::ok(Command::new(CTL).args(["factory", "status"]))?.out();
            Ok(status.contains("2/2"))
        })
    };
    let line = |runtime: &str| format!("run --rm --runtime {runtime} {IMAGE} true");
    let [ours, theirs] = in_turn(runs, |which| {
        filled()?;
        timed(docker, &line(if which == THEIRS { THEIRS } else { SPARES }))
    })?;
    report.compare("docker run --rm busybox true, from a spare", &ours, &theirs, Some(1.6));
    let what = ("spare taken to agent ready", stages::READY, 15.0);
    stages::measure(docker, &format!("--runtime {SPARES}"), what, runs, report, filled)?;
    command::ok(Command::new(CTL).args(["factory", "destroy"])).map(drop)
}
