//! The state of a container, as `state` prints it and hooks read it (runtime.md, "State").

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Made; its process has not run.
    Created,
    /// Its process runs.
    Running,
    /// Its process has ended.
    Stopped,
    /// Frozen.
    Paused,
}

/// The state object.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the specification.
    pub oci_version: String,
    /// The container.
    pub id: String,
    /// Where it is.
    pub status: Status,
    /// The host process that stands for it; 0 when stopped.
    pub pid: i32,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// From `config.json`.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}
