//! `startContainer` hooks: programs of the container that run before its own.

use super::failure::{Context, Failure, Step};
use super::wire::Config;
use kata_oci::{Hook, State, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Most of a failed hook's complaint that is shown.
const MAX_COMPLAINT: u64 = 4096;

/// Runs the hooks in order; the first that fails is an error.
pub(super) fn run(config: &Config) -> Step {
    let spec = &config.spec;
    let Some(hooks) = spec.hooks.as_ref().filter(|hooks| !hooks.start_container.is_empty()) else {
        return Ok(());
    };
    let state = State {
        oci_version: spec.oci_version.clone(),
        id: config.id.clone(),
        status: Status::Created,
        pid: rustix::process::getpid().as_raw_nonzero().get(),
        bundle: config.bundle.clone(),
        annotations: spec.annotations.clone(),
    };
    let state = serde_json::to_vec(&state)
        .map_err(|error| Failure::setup(format!("write the state for hooks: {error}")))?;
    for (number, hook) in hooks.start_container.iter().enumerate() {
        run_one(hook, &state).map_err(|failure| {
            Failure::setup(format!("error running hook #{number}: {}", failure.text))
        })?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8]) -> Step {
    let shown = hook.path.display();
    // Files, not pipes: a hook that does not read, or says much, blocks nobody.
    let mut input = File::from(memory("state")?);
    input.write_all(state).and_then(|()| input.rewind()).context(|| "write the state for hooks")?;
    let mut said = File::from(memory("stderr")?);
    let output = said.try_clone().context(|| "make a file for the hook's errors")?;
    let mut command = Command::new(&hook.path);
    command.env_clear().stdin(input).stdout(Stdio::null()).stderr(output);
    if let Some((first, rest)) = hook.args.split_first() {
        command.arg0(first).args(rest);
    }
    for text in &hook.env {
        if let Some((name, value)) = text.split_once('=') {
            command.env(name, value);
        }
    }
    let mut child = command.spawn().context(|| format!("start {shown}"))?;
    if !ends_in_time(&child, hook.timeout)? {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Failure::setup(format!("{shown} ran into its timeout")));
    }
    let status = child.wait().context(|| format!("wait for {shown}"))?;
    if status.success() {
        return Ok(());
    }
    let mut complaint = Vec::new();
    said.rewind()
        .and_then(|()| said.take(MAX_COMPLAINT).read_to_end(&mut complaint))
        .context(|| format!("read what {shown} said"))?;
    let complaint = String::from_utf8_lossy(&complaint);
    Err(Failure::setup(format!("{shown}: {status}, stderr: {}", complaint.trim_end())))
}

fn memory(name: &str) -> Step<OwnedFd> {
    memfd_create(name, MemfdFlags::CLOEXEC).context(|| format!("make a file for the hook's {name}"))
}

fn ends_in_time(child: &Child, timeout: Option<u32>) -> Step<bool> {
    let Some(seconds) = timeout else { return Ok(true) };
    let pid = Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context(|| "watch the hook")?;
    let limit = Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
    loop {
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result.context(|| "wait for the hook")? > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<u32>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: vec!["sh".into(), "-c".into(), script.into()],
            env: vec!["X=1".into()],
            timeout,
        }
    }

    #[test]
    fn hook_reads_the_state_and_its_environment() {
        run_one(&hook("test \"$(cat)\" = state && test $X = 1", None), b"state").unwrap();
    }

    #[test]
    fn failed_hook_says_why() {
        let failure = run_one(&hook("echo why >&2; exit 3", Some(5)), b"").unwrap_err();
        assert!(failure.text.contains("exit status: 3, stderr: why"), "{}", failure.text);
    }

    #[test]
    fn hook_that_reads_nothing_and_says_much_blocks_nobody() {
        let script = "head -c 1000000 /dev/zero >&2; exit 1";
        let failure = run_one(&hook(script, Some(20)), &[b' '; 1 << 20]).unwrap_err();
        assert!(failure.text.contains("exit status: 1"));
    }

    #[test]
    fn slow_hook_is_ended() {
        let failure = run_one(&hook("exec sleep 60", Some(0)), b"").unwrap_err();
        assert!(failure.text.contains("timeout"), "{}", failure.text);
    }
}
