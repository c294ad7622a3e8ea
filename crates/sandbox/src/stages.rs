//! When each step of a start was done: `stages.json` in the sandbox's directory.

use crate::SandboxDir;
use crate::process::lock;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::io;
use std::sync::Mutex;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A running clock with marks.
pub(crate) struct Stages {
    start: Instant,
    /// When it was started, nanoseconds since 1970.
    began_ns: u64,
    marks: Mutex<Vec<Mark>>,
}

/// The end of one step of a start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// What was done.
    pub stage: Cow<'static, str>,
    /// Milliseconds since the server began with the sandbox.
    pub ms: f64,
    /// When it was done, nanoseconds since 1970.
    pub at_ns: u64,
}

/// The marks of a sandbox that was started.
///
/// # Errors
/// There is no such sandbox, or nothing was started in it yet.
pub fn read(dir: &SandboxDir) -> io::Result<Vec<Mark>> {
    Ok(serde_json::from_slice(&std::fs::read(dir.stages())?)?)
}

impl Stages {
    pub(crate) fn start() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let began_ns = now.as_nanos().try_into().unwrap_or(u64::MAX);
        Self { start: Instant::now(), began_ns, marks: Mutex::default() }
    }

    pub(crate) fn mark(&self, stage: &'static str) {
        self.mark_at(stage, Instant::now());
    }

    /// A step that was done a while ago, and after those marked so far.
    pub(crate) fn mark_at(&self, stage: &'static str, at: Instant) {
        let since = at.saturating_duration_since(self.start);
        let ms = since.as_secs_f64() * 1e3;
        tracing::debug!(stage, ms, "stage");
        let at_ns = self.began_ns.saturating_add(since.as_nanos().try_into().unwrap_or(u64::MAX));
        lock(&self.marks).push(Mark { stage: stage.into(), ms, at_ns });
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
