//! What the containers of a pod share beyond the guest itself: mounts, and, when they ask
//! for it, a PID namespace.
//!
//! A PID namespace needs a first process. It is this program again, started as [`PAUSE`]:
//! one thread that sleeps, and whose zombies the kernel reaps.

use std::fs;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kata_oci::{NamespaceKind, Spec};
use kata_protocol::SHARED_PID_NAMESPACE;
use kata_protocol::agent::Storage;
use nix::sched::{CloneFlags, unshare};
use rustix::mount::UnmountFlags;

use crate::console;
use crate::error::AgentError;
use crate::fork::{self, Parent};
use crate::storage;

/// `argv[0]` that makes the agent's program the first process of the shared namespace.
pub const PAUSE: &str = "pause";

/// What the containers of a guest share.
#[derive(Debug, Default)]
pub struct Pod {
    state: tokio::sync::Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mounted: Vec<String>,
    pid_namespace: bool,
}

impl Pod {
    /// Mounts what is not mounted yet, to stay as long as the guest.
    ///
    /// # Errors
    /// The first storage that cannot be mounted.
    pub async fn mount(&self, storages: &[Storage]) -> Result<(), AgentError> {
        let mut state = self.state.lock().await;
        for storage in storages {
            if !state.mounted.contains(&storage.mount_point) {
                storage::mount(storage).await?.keep();
                state.mounted.push(storage.mount_point.clone());
            }
        }
        Ok(())
    }

    /// Unmounts it all. No container uses any of it.
    ///
    /// # Errors
    /// Something uses it; it stays mounted then, and what is not unmounted yet.
    pub async fn unmount(&self) -> Result<(), AgentError> {
        let mut state = self.state.lock().await;
        while let Some(target) = state.mounted.last() {
            rustix::mount::unmount(target.as_str(), UnmountFlags::empty())
                .map_err(|error| AgentError::System("unmount a share", error.into()))?;
            state.mounted.pop();
        }
        Ok(())
    }

    /// Makes the shared PID namespace if `spec` joins it and it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn prepare(&self, spec: &Spec) -> Result<(), AgentError> {
        if !shares_pids(spec) {
            return Ok(());
        }
        let mut state = self.state.lock().await;
        if !state.pid_namespace {
            // Takes as long as starting a small program.
            make_pid_namespace(Path::new(SHARED_PID_NAMESPACE))
                .map_err(|error| AgentError::System("make the pod's PID namespace", error))?;
            state.pid_namespace = true;
        }
        Ok(())
    }
}

/// Whether the container has the pod's PID namespace instead of one of its own: then its
/// first process is not the first of the namespace, and the kernel ends nothing with it.
pub fn shares_pids(spec: &Spec) -> bool {
    let linux = spec.linux();
    let path = linux.namespace(NamespaceKind::Pid).and_then(|namespace| namespace.path.as_deref());
    path == Some(Path::new(SHARED_PID_NAMESPACE))
}

/// Starts the namespace's first process and binds the namespace to `at`.
fn make_pid_namespace(at: &Path) -> io::Result<()> {
    let mut starter = Command::new("/proc/self/exe")
        .arg0(PAUSE)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut text = String::new();
    if let Some(mut said) = starter.stdout.take() {
        said.read_to_string(&mut text)?;
    }
    let pid: i32 = text.trim().parse().map_err(|_| io::Error::other("it did not come up"))?;
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::OpenOptions::new().write(true).create(true).truncate(false).open(at)?;
    Ok(rustix::mount::mount_bind(format!("/proc/{pid}/ns/pid"), at)?)
}

/// The part of [`PAUSE`]: leaves a child in a new PID namespace, says its pid, and ends.
///
/// To be called first thing in `main`, while the process has one thread.
pub fn pause_main() -> ! {
    let code = match pause() {
        Ok(()) => 0,
        Err(error) => {
            console::say(&format!("pause: {error}\n"));
            1
        }
    };
    std::process::exit(code)
}

fn pause() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWPID)?;
    // SAFETY: this process has one thread. The child becomes the agent's, as nobody waits for it
    // here.
    match unsafe { fork::fork(Parent::Its) }? {
        None => sleep(),
        Some(pid) => {
            println!("{pid}");
            Ok(())
        }
    }
}

/// Holds the namespace until the guest ends.
fn sleep() -> ! {
    // SAFETY: only descriptors and signal actions of this process change; it has one thread,
    // and nothing in it uses the descriptors any more.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        libc::signal(libc::SIGCHLD, libc::SIG_IGN);
        libc::setsid();
        loop {
            libc::pause();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_namespace_is_shared() {
        let spec = |path: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"/"}},
                   "linux":{{"namespaces":[{{"type":"pid"{path}}}]}}}}"#
            );
            Spec::parse(text.as_bytes()).unwrap()
        };
        assert!(shares_pids(&spec(&format!(r#","path":"{SHARED_PID_NAMESPACE}""#))));
        assert!(!shares_pids(&spec("")));
        assert!(!shares_pids(&spec(r#","path":"/proc/1/ns/pid""#)));
    }
}
