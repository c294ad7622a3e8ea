//! Network namespaces that vanish with the test, however it ends.
#![allow(clippy::unwrap_used, dead_code)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use kata_network::Netns;

/// A namespace with no name: it lives as long as the value.
pub fn netns() -> Netns {
    let make = || {
        // SAFETY: only this thread's network namespace is left, nothing else is shared less.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let file = File::open("/proc/thread-self/ns/net").unwrap();
        Netns::open(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd()))).unwrap()
    };
    let netns = std::thread::spawn(make).join().unwrap();
    run(&netns, "ip", "link set lo up");
    netns
}

/// Runs a program in a namespace; it must succeed.
pub fn run(netns: &Netns, program: &str, arguments: &str) {
    let words: Vec<&str> = arguments.split_whitespace().collect();
    let output = netns.run(|| Command::new(program).args(&words).output().unwrap()).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
}

/// Has `ip` do all lines, in one batch.
pub fn ip(netns: &Netns, lines: &str) {
    let spawn = || {
        let mut command = Command::new("ip");
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = netns.run(spawn).unwrap();
    let lines: Vec<&str> = lines.lines().map(str::trim).collect();
    child.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{lines:?}: {error}");
}

/// A pair of interfaces, `a` here and `b` there.
pub fn veth(here: &Netns, a: &str, there: &Netns, b: &str) {
    use std::os::fd::AsFd;
    let there = format!("/proc/{}/fd/{}", std::process::id(), there.as_fd().as_raw_fd());
    run(here, "ip", &format!("link add {a} type veth peer name {b} netns {there}"));
}
