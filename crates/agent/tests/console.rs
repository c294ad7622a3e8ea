//! What the agent says reaches a console that it has as standard error without having it open.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};

/// What an agent says until its host has gone.
fn said_on(standard_error: Stdio) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let inherited = theirs.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kata-agent"));
    command.args(["--serve-fd", "9"]).env("KATA_AGENT_DEBUG", "1").stderr(standard_error);
    // SAFETY: dup2 may be called between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(inherited, 9) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let mut agent = command.spawn().unwrap();
    drop((ours, theirs));
    agent.wait().unwrap();
}

#[test]
fn what_is_said_reaches_a_console_that_is_not_open() {
    let console = tempfile::NamedTempFile::new().unwrap();
    let known = rustix::fs::open(console.path(), OFlags::PATH, Mode::empty()).unwrap();
    said_on(known.into());
    let closed = std::fs::read_to_string(console.path()).unwrap();
    said_on(File::create(console.path()).unwrap().into());
    let open = std::fs::read_to_string(console.path()).unwrap();
    let lines = |text: &str| {
        let words = text.lines().map(|line| line.split_once("] ").unwrap().1.to_owned());
        words.collect::<Vec<_>>()
    };
    assert_eq!(lines(&closed), lines(&open));
    assert!(closed.contains("kata-agent: debug: channel closed"), "{closed}");
}
