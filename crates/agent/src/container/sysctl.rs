//! Kernel parameters.

use super::failure::{Context, Failure, Step};
use kata_oci::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::write;
use std::os::fd::BorrowedFd;

/// Those of namespaces; the rest are the machine's.
const ALLOWED: [&str; 3] = ["kernel/", "net/", "fs/mqueue/"];

/// Writes the specification's parameters through the guest's own `/proc`.
pub(super) fn apply(spec: &Spec, proc: BorrowedFd<'_>) -> Step {
    for (name, value) in &spec.linux().sysctl {
        let path = path(name);
        if !ALLOWED.iter().any(|prefix| path.starts_with(prefix)) {
            return Err(Failure::setup(format!(
                "sysctl {name:?} is not in a separate kernel namespace"
            )));
        }
        let what = || format!("set sysctl {name} to {value:?}");
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file =
            openat2(proc, format!("sys/{path}"), flags, Mode::empty(), resolve).context(what)?;
        write(&file, value.as_bytes()).context(what)?;
    }
    Ok(())
}

/// The file of a name: dots separate, unless the first separator is a slash; then dots
/// belong to names (`net/ipv4/conf/eth0.1/forwarding`).
fn path(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name.to_owned(),
        _ => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_write_a_name_give_its_file() {
        assert_eq!(path("net.ipv4.ip_forward"), "net/ipv4/ip_forward");
        assert_eq!(path("net.ipv4.conf.eth0/1.forwarding"), "net/ipv4/conf/eth0.1/forwarding");
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), "net/ipv4/conf/eth0.1/forwarding");
    }
}
