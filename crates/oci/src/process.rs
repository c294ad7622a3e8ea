//! `process`: what runs in a container, and as whom.

use crate::SpecError;
use serde::{Deserialize, Serialize};

/// A process to run: the container's first, or one of an exec.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Give it a terminal.
    pub terminal: bool,
    /// First size of the terminal.
    pub console_size: Option<ConsoleSize>,
    /// As whom.
    pub user: User,
    /// `argv`.
    pub args: Vec<String>,
    /// `KEY=value`.
    pub env: Vec<String>,
    /// Absolute directory to start in.
    pub cwd: String,
    /// Capability sets; absent means none.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privileges: bool,
    /// AppArmor profile.
    pub apparmor_profile: Option<String>,
    /// `oom_score_adj`.
    pub oom_score_adj: Option<i32>,
    /// SELinux label.
    pub selinux_label: Option<String>,
    /// `ioprio_set(2)`.
    pub io_priority: Option<IoPriority>,
    /// `sched_setattr(2)`.
    pub scheduler: Option<Scheduler>,
}

/// Size of a terminal, in characters.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// As whom a process runs: numbers only, names are the engine's matter.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
}

/// Capability sets, by name (`CAP_CHOWN`).
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: Vec<String>,
    /// Effective set.
    pub effective: Vec<String>,
    /// Inheritable set.
    pub inheritable: Vec<String>,
    /// Permitted set.
    pub permitted: Vec<String>,
    /// Ambient set.
    pub ambient: Vec<String>,
}

/// One resource limit.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Rlimit {
    /// `RLIMIT_NOFILE` and so on.
    #[serde(rename = "type")]
    pub kind: String,
    /// Hard limit.
    pub hard: u64,
    /// Soft limit.
    pub soft: u64,
}

/// I/O priority.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_RT`, `_BE` or `_IDLE`.
    pub class: String,
    /// Within the class.
    pub priority: i32,
}

/// Scheduling policy and its parameters.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Scheduler {
    /// `SCHED_OTHER` and so on.
    pub policy: String,
    /// Nice value.
    pub nice: i32,
    /// Static priority.
    pub priority: i32,
    /// `SCHED_FLAG_*`.
    pub flags: Vec<String>,
    /// Nanoseconds, `SCHED_DEADLINE`.
    pub runtime: u64,
    /// Nanoseconds, `SCHED_DEADLINE`.
    pub deadline: u64,
    /// Nanoseconds, `SCHED_DEADLINE`.
    pub period: u64,
}

impl Process {
    /// Reads and checks a process object, as `exec --process` gives it.
    ///
    /// # Errors
    /// [`SpecError`] names the field and the way out.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        let process: Self = crate::from_slice(bytes)?;
        process.check()?;
        Ok(process)
    }

    pub(crate) fn check(&self) -> Result<(), SpecError> {
        let invalid =
            |field, problem: &str| Err(SpecError::Invalid { field, problem: problem.to_owned() });
        if self.args.is_empty() || self.args.first().is_some_and(String::is_empty) {
            return invalid("process.args", "is empty: name the program to run");
        }
        if !self.cwd.starts_with('/') {
            return invalid("process.cwd", "must be an absolute path");
        }
        if self.args.iter().chain(&self.env).any(|text| text.contains('\0')) {
            return invalid("process", "has a NUL byte in args or env");
        }
        Ok(())
    }
}
