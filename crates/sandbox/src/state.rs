//! What a sandbox created on the host, written down before it is created.
//!
//! `delete --force` and the shim's `delete` action undo a sandbox from this file alone,
//! whatever has become of its processes. A process cannot be written down before it has
//! a pid; until it is, it dies with the server that started it (`PR_SET_PDEATHSIG`).

use crate::{SandboxDir, SandboxError};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Something on the host that outlives a crash of ours.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Resource {
    /// A process, named so that its pid cannot be mistaken for a later one's.
    Process {
        /// Host pid.
        pid: i32,
        /// Field 22 of `/proc/<pid>/stat`, clock ticks since boot.
        start_time: u64,
        /// What it is, for messages.
        role: String,
    },
    /// A unix socket outside of the sandbox's directory.
    Socket {
        /// `/run/containerd/s/<hash>`
        path: PathBuf,
    },
    /// A cgroup, relative to the hierarchies' roots.
    Cgroup {
        /// `/docker/<id>`
        path: String,
    },
}

/// Role of the virtual machine's process in the state file.
pub const MACHINE_ROLE: &str = "virtual machine";
/// Role of the sandbox's server there.
pub(crate) const SERVER_ROLE: &str = "sandbox server";

impl Resource {
    /// A living process; none if it has ended.
    pub fn process(pid: i32, role: &str) -> Option<Self> {
        Some(Self::Process { pid, start_time: start_time(pid)?, role: role.to_owned() })
    }
}

/// The state file of one sandbox.
#[derive(Debug)]
pub struct StateFile {
    dir: SandboxDir,
    resources: Vec<Resource>,
}

impl StateFile {
    /// The file of the sandbox as it is; an empty one if there is none yet.
    pub fn open(dir: SandboxDir) -> Self {
        let resources = read(&dir);
        Self { dir, resources }
    }

    /// Writes `resource` down. Returns once it is in the file.
    ///
    /// # Errors
    /// The file cannot be written; the resource must then not be created.
    pub fn record(&mut self, resource: Resource) -> Result<(), SandboxError> {
        if self.resources.contains(&resource) {
            return Ok(());
        }
        self.resources.push(resource);
        self.write().map_err(|source| SandboxError::State { path: self.dir.state(), source })
    }

    /// Writes a process down; nothing to do when it has ended already.
    ///
    /// # Errors
    /// See [`StateFile::record`].
    pub fn record_process(&mut self, pid: i32, role: &str) -> Result<(), SandboxError> {
        Resource::process(pid, role).map_or(Ok(()), |resource| self.record(resource))
    }

    /// A process has ended and was reaped. The file follows with the next record: a pid
    /// that is gone does no harm in it.
    pub(crate) fn forget_process(&mut self, gone: i32) {
        self.resources.retain(|r| !matches!(r, Resource::Process { pid, .. } if *pid == gone));
    }

    /// The cgroups that were written down.
    pub(crate) fn cgroups(&self) -> Vec<String> {
        let cgroup = |resource: &Resource| match resource {
            Resource::Cgroup { path } => Some(path.clone()),
            Resource::Process { .. } | Resource::Socket { .. } => None,
        };
        self.resources.iter().filter_map(cgroup).collect()
    }

    /// Removes the sockets that were written down.
    pub(crate) fn remove_sockets(&self) {
        self.resources.iter().for_each(remove_socket);
    }

    fn write(&self) -> io::Result<()> {
        let text = serde_json::to_vec(&self.resources)?;
        let path = self.dir.state();
        let new = path.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, path)
    }
}

/// Undoes a sandbox from its state file: ends its processes, removes its cgroups and its
/// directory. Fine when there is nothing left to undo.
///
/// # Errors
/// What could not be undone; the directory then stays, so that it can be tried again.
pub fn cleanup(dir: &SandboxDir) -> Result<(), SandboxError> {
    let resources = read(dir);
    for resource in &resources {
        if let Resource::Process { pid, start_time, role } = resource {
            end_process(*pid, *start_time, role)?;
        }
    }
    for resource in &resources {
        if let Resource::Cgroup { path } = resource {
            remove_cgroup(path)?;
        }
        remove_socket(resource);
    }
    dir.remove().map_err(|source| SandboxError::State { path: dir.path().to_owned(), source })
}

/// The pid of the process of this role that a sandbox wrote down, living or not.
pub fn pid_of(dir: &SandboxDir, wanted: &str) -> Option<i32> {
    read(dir).iter().find_map(|resource| match resource {
        Resource::Process { pid, role, .. } if role == wanted => Some(*pid),
        _ => None,
    })
}

fn read(dir: &SandboxDir) -> Vec<Resource> {
    let Ok(text) = std::fs::read(dir.state()) else { return Vec::new() };
    serde_json::from_slice(&text).unwrap_or_else(|error| {
        tracing::warn!(path = %dir.state().display(), %error, "state file is damaged");
        Vec::new()
    })
}

fn remove_socket(resource: &Resource) {
    let Resource::Socket { path } = resource else { return };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove a socket");
        }
        _ => {}
    }
}

pub(crate) fn remove_cgroup(path: &str) -> Result<(), SandboxError> {
    let cgroup = |source| SandboxError::Cgroup { path: path.to_owned(), source };
    let hierarchy = kata_cgroups::Hierarchy::detect().map_err(cgroup)?;
    match kata_cgroups::Cgroup::open(&hierarchy, path) {
        Ok(found) => found.delete().map_err(cgroup),
        // Nothing of it is left.
        Err(_) => Ok(()),
    }
}

fn end_process(pid: i32, started: u64, role: &str) -> Result<(), SandboxError> {
    let Some(id) = rustix::process::Pid::from_raw(pid) else { return Ok(()) };
    let Ok(pidfd) = rustix::process::pidfd_open(id, rustix::process::PidfdFlags::empty()) else {
        return Ok(());
    };
    // Checked after the pidfd is open: it now names this very process, or another one.
    if start_time(pid) != Some(started) || id == rustix::process::getpid() {
        return Ok(());
    }
    let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    let gone = rustix::event::poll(
        &mut [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)],
        Some(&rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 }),
    );
    match gone {
        Ok(0) | Err(_) => {
            Err(SandboxError::Stuck { pid, role: role.to_owned(), waited: Duration::from_secs(5) })
        }
        Ok(_) => Ok(()),
    }
}

/// When a process started; none when there is none of this pid.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat =
        std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The second field is a name in parentheses that may hold anything.
    let fields = stat.rsplit_once(')')?.1;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_start_time_is_found_and_a_missing_process_has_none() {
        assert!(start_time(std::process::id() as i32).is_some());
        assert_eq!(start_time(i32::MAX), None);
    }

    #[test]
    fn a_later_process_with_the_same_pid_is_left_alone() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        end_process(pid, start_time(pid).unwrap() + 1, "other").unwrap();
        assert!(child.try_wait().unwrap().is_none());
        let started = start_time(pid).unwrap();
        let waiter = std::thread::spawn(move || child.wait().unwrap());
        end_process(pid, started, "ours").unwrap();
        assert!(!waiter.join().unwrap().success());
    }
}
