//! When each step of a start was done: `stages.json` in the sandbox's directory.

use crate::SandboxDir;
use crate::process::lock;
use serde::Serialize;
use std::sync::Mutex;
use std::time::Instant;

/// A running clock with marks.
pub(crate) struct Stages {
    start: Instant,
    marks: Mutex<Vec<Mark>>,
}

#[derive(Clone, Debug, Serialize)]
struct Mark {
    /// What was done.
    stage: &'static str,
    /// Milliseconds since the server began with the sandbox.
    ms: f64,
}

impl Stages {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now(), marks: Mutex::default() }
    }

    pub(crate) fn mark(&self, stage: &'static str) {
        let ms = self.start.elapsed().as_secs_f64() * 1e3;
        tracing::debug!(stage, ms, "stage");
        lock(&self.marks).push(Mark { stage, ms });
    }

    /// Writes the marks where a benchmark or a curious person finds them.
    pub(crate) fn write(&self, dir: &SandboxDir) {
        let marks = lock(&self.marks).clone();
        let written = serde_json::to_vec(&marks)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(dir.stages(), text));
        if let Err(error) = written {
            tracing::debug!(%error, "cannot write the stages");
        }
    }
}
