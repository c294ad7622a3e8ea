//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

/// Why something could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No cgroup file system at all.
    #[error(
        "no cgroup file system is mounted: mount one, e.g. `mount -t cgroup2 none /sys/fs/cgroup`"
    )]
    NotMounted,
    /// The path in the specification cannot be used.
    #[error("cgroup path {path:?} {problem}")]
    Path {
        /// As it was given.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A limit was asked for that this kernel cannot hold.
    #[error(
        "{file} = {value} needs the {controller} cgroup controller, which {place} does not offer: \
         enable it there or leave the limit out"
    )]
    Unsupported {
        /// File that would hold the limit.
        file: String,
        /// What would be written.
        value: String,
        /// Controller it belongs to.
        controller: String,
        /// The cgroup.
        place: String,
    },
    /// A value in the resources makes no sense.
    #[error("resources: {field} {problem}")]
    Invalid {
        /// Where in the OCI resources.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The kernel refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: String,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The device filter could not be installed.
    #[error("cannot {action} the device filter of cgroup {}", path.display())]
    DeviceFilter {
        /// Load, attach, query or detach.
        action: &'static str,
        /// The cgroup's directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The processes did not stop in time.
    #[error("cgroup {} did not become {state} within {seconds} s", path.display())]
    Timeout {
        /// The cgroup's directory.
        path: PathBuf,
        /// Which state was waited for.
        state: &'static str,
        /// How long.
        seconds: u64,
    },
    /// Processes that cannot be killed keep it.
    #[error("cgroup {} cannot be removed: still used by processes {pids:?}", path.display())]
    Busy {
        /// The cgroup's directory.
        path: PathBuf,
        /// Who is in it.
        pids: Vec<i32>,
    },
}

impl CgroupError {
    pub(crate) fn io(action: impl Into<String>, path: &Path, source: io::Error) -> Self {
        Self::Io { action: action.into(), path: path.to_owned(), source }
    }

    pub(crate) fn invalid(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { field, problem: problem.into() }
    }

    /// The errno beneath, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } | Self::DeviceFilter { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
