//! Measures what `SPECIFICATION.md` promises: `make bench`, or `kata-bench [short|load|sysbench] [runs]`.
//!
//! Ours and runc take turns, so that a noisy machine disturbs both alike; figures are
//! medians, and promises are ratios wherever the machine would decide an absolute one.

mod burst;
mod clones;
mod load;
mod memory;
mod plot;
mod pods;
mod report;
mod stages;
mod stdio;
mod sysbench;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use kata_e2e::arena::{self, Arena};
use kata_e2e::assets;
use kata_e2e::command;
use kata_e2e::docker::{Docker, IMAGE, RUNSC};
use kata_e2e::oci::Oci;
use report::{Distribution, Report};

const OURS: &str = "kata-runtime";
const THEIRS: &str = "runc";

fn main() -> ExitCode {
    arena::enter(&assets::scratch(), |arena| match measure(arena) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:?}");
            ExitCode::FAILURE
        }
    })
}

fn measure(arena: &Arena) -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut named = |name: &str| {
        let named = arguments.first().is_some_and(|first| first == name);
        if named {
            arguments.remove(0);
        }
        named
    };
    let (short, only_load, only_sysbench) = (named("short"), named("load"), named("sysbench"));
    let runs = match arguments.first() {
        Some(text) => text.parse().with_context(|| format!("{text} is no number of runs"))?,
        None if short || only_sysbench => 3,
        None => 15,
    };
    assets::install()?;
    let probe = assets::beside("kata-e2e-probe")?;
    let mut report = Report::new(runs)?;
    if only_sysbench || only_load {
        let docker = Docker::start(arena, OURS, &probe)?;
        if only_sysbench {
            sysbench::measure(arena, &docker, runs, &mut report)?;
        } else {
            load::measure(&docker, &mut report)?;
            burst::measure(&docker, OURS, "cold", &mut report)?;
        }
        return report.finish();
    }
    {
        let docker = Docker::start(arena, OURS, &probe)?;
        docker_run(&docker, runs, &mut report)?;
        let what = "VM exec to agent ready, cold";
        stages::measure(&docker, "", (what, stages::READY, 750.0), runs, &mut report, || Ok(()))?;
        docker_exec(&docker, runs, &mut report)?;
        memory::measure(&docker, "", "container", &mut report)?;
        clones::measure(&docker, runs, short, &mut report)?;
        clones::measure_spares(&docker, runs, &mut report)?;
        if !short {
            memory::by_number(&docker, "", "container", memory::NUMBERS, None, &mut report)?;
            stdio::measure(&docker, &mut report)?;
            load::measure(&docker, &mut report)?;
            burst::measure(&docker, OURS, "cold", &mut report)?;
        }
    }
    oci_exec(arena, &probe, runs, &mut report)?;
    if !short {
        pods::measure(arena, &probe, runs, &mut report)?;
    }
    report.finish()?;
    if short { Ok(()) } else { report.publish() }
}

fn timed(docker: &Docker, line: &str) -> Result<Duration> {
    Ok(docker.cmd(line)?.expect_code(0)?.elapsed)
}

fn docker_run(docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: docker run --rm {IMAGE} true, {runs} times each in turn");
    let line = |runtime: &str| format!("run --rm --runtime {runtime} {IMAGE} true");
    let [ours, theirs] = in_turn(runs, |runtime| timed(docker, &line(runtime)))?;
    report.compare("docker run --rm busybox true, cold", &ours, &theirs, Some(4.0));
    if docker.has_runsc() {
        let both = in_turn(runs, |which| {
            timed(docker, &line(if which == THEIRS { THEIRS } else { RUNSC }))
        });
        // Whether it runs on this host is not ours to see to.
        let [runsc, theirs] = match both {
            Ok(both) => both,
            Err(error) => {
                eprintln!("bench: no comparison with runsc: {error}");
                return Ok(());
            }
        };
        report.compare_runsc("docker run --rm busybox true, gVisor's runsc", &runsc, &theirs);
    }
    Ok(())
}

fn docker_exec(docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: docker exec true");
    let ours = docker.sleeper("")?;
    let theirs = docker.sleeper("--runtime runc")?;
    let [ours, theirs] = in_turn(runs * 3, |runtime| {
        let name = if runtime == OURS { &ours.name } else { &theirs.name };
        timed(docker, &format!("exec {name} true"))
    })?;
    report.compare("docker exec true, warm", &ours, &theirs, Some(2.0));
    Ok(())
}

/// The same without the engine, which is most of a `docker exec`.
fn oci_exec(
    arena: &Arena,
    probe: &std::path::Path,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    eprintln!("bench: exec true by the runtimes themselves");
    let ours = Oci::new(arena, OURS, probe)?;
    let theirs = Oci::new(arena, THEIRS, probe)?;
    let idle = "exec sleep 1000000";
    let (ours_bundle, theirs_bundle) = (ours.bundle(idle)?, theirs.bundle(idle)?);
    ours_bundle.start()?;
    theirs_bundle.start()?;
    let [ours, theirs] = in_turn(runs * 3, |runtime| {
        let bundle = if runtime == OURS { &ours_bundle } else { &theirs_bundle };
        let mut exec = bundle.oci.command(&format!("exec {} true", bundle.id));
        Ok(command::ok(&mut exec)?.elapsed)
    })?;
    report.compare("exec true by the runtime itself, warm", &ours, &theirs, Some(2.0));
    Ok(())
}

/// Runs both in turn, once unmeasured; returns ours and theirs.
fn in_turn(
    runs: usize,
    mut run: impl FnMut(&'static str) -> Result<Duration>,
) -> Result<[Distribution; 2]> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for n in 0..=runs {
        for (runtime, times) in [(OURS, &mut ours), (THEIRS, &mut theirs)] {
            let took = run(runtime)?;
            if n > 0 {
                times.push(took.as_secs_f64() * 1e3);
            }
        }
    }
    Ok([Distribution::of(ours), Distribution::of(theirs)])
}
