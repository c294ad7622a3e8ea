//! From nothing to a started container, step by step, as the sandbox server wrote it down.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kata_e2e::docker::Docker;
use serde::Deserialize;

use crate::report::{Distribution, Report};

#[derive(Deserialize)]
struct Mark {
    stage: String,
    ms: f64,
}

/// The last thing that is done before the VM's process is started.
const BEFORE_EXEC: &str = "share started";
/// The agent has answered.
pub const READY: &str = "agent ready";
/// It has mounted the share.
pub const MOUNTED: &str = "share mounted";

/// Starts containers with these options one after the other, each after `before`, and reads
/// their stages: how long it takes from VM exec until `end`, at most `bound` ms, is `what`.
pub fn measure(
    docker: &Docker,
    options: &str,
    (what, end, bound): (&str, &str, f64),
    runs: usize,
    report: &mut Report,
    before: impl Fn() -> Result<()>,
) -> Result<()> {
    eprintln!("bench: stages of {runs} starts");
    let mut order = Vec::new();
    let mut steps: HashMap<String, Vec<f64>> = HashMap::new();
    let mut to_end = Vec::new();
    for _ in 0..runs {
        before()?;
        let container = docker.sleeper(options)?;
        let id = docker.ok(&format!("inspect --format '{{{{.Id}}}}' {}", container.name))?;
        let file = Path::new("/run/kata-containers").join(&id).join("stages.json");
        let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        let marks: Vec<Mark> = serde_json::from_slice(&text)?;
        let at = |stage: &str| marks.iter().find(|mark| mark.stage == stage).map(|mark| mark.ms);
        // A spare is there from the beginning.
        to_end.extend(at(end).map(|end| end - at(BEFORE_EXEC).unwrap_or(0.0)));
        let mut last = 0.0;
        for mark in &marks {
            if !order.contains(&mark.stage) {
                order.push(mark.stage.clone());
            }
            steps.entry(mark.stage.clone()).or_default().push(mark.ms - last);
            last = mark.ms;
        }
    }
    report.time(what, Distribution::of(to_end), Some(bound));
    for stage in order {
        let times = steps.remove(&stage).unwrap_or_default();
        report.time(&format!("  step: {stage}"), Distribution::of(times), None);
    }
    Ok(())
}
