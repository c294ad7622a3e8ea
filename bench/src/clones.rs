//! The same figures for machines that are cloned from a template instead of booted.

use std::process::Command;

use anyhow::Result;
use kata_e2e::assets::CTL;
use kata_e2e::command;
use kata_e2e::docker::{Docker, IMAGE};

use crate::report::Report;
use crate::{THEIRS, in_turn, memory, stages, timed};

/// How clones share their files, the runtime of the harness that does so, and how long one may
/// take from the start of its monitor to the agent's answer, ms.
const WAYS: [(&str, &str, f64); 2] =
    [("virtio-fs", "kata-template", 180.0), ("9p", "kata-template-9p", 110.0)];

/// Templates are made beforehand, and forgotten afterwards.
pub fn measure(docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    for (share, runtime, bound) in WAYS {
        eprintln!("bench: clones that share by {share}, {runs} runs");
        let config = docker.arena.work.join(format!("{runtime}.toml"));
        command::ok(Command::new(CTL).arg("--config").arg(&config).args(["factory", "init"]))?;
        let line = |runtime: &str| format!("run --rm --runtime {runtime} {IMAGE} true");
        let [ours, theirs] = in_turn(runs, |which| {
            timed(docker, &line(if which == THEIRS { THEIRS } else { runtime }))
        })?;
        let what = format!("docker run --rm busybox true, cloned ({share})");
        report.compare(&what, &ours, &theirs, (share == "virtio-fs").then_some(1.6));
        let what = format!("VM exec to agent ready, cloned ({share})");
        stages::measure(docker, &format!("--runtime {runtime}"), &what, bound, runs, report)?;
        memory::measure(
            docker,
            &format!("--runtime {runtime}"),
            &format!("clone ({share})"),
            report,
        )?;
        command::ok(Command::new(CTL).args(["factory", "destroy"]))?;
    }
    Ok(())
}
