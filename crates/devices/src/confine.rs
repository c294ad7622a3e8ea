//! What the process keeps: an empty read-only root, and the capabilities of a file server.

use std::io;

use kata_jail::{Capability, Jail, JailError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files and directories that the guest may know at a time cost a descriptor each.
const WANTED_DESCRIPTORS: u64 = 1_000_000;

/// What a file server needs that acts for every user of the guest. Device nodes can be
/// made (images hold some) but not opened: everything attached is mounted `nodev`.
const CAPABILITIES: [Capability; 9] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Mknod,
    Capability::Setfcap,
];

/// Raises the limit of descriptors as far as it goes, and says how far that is.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/sys/fs/nr_open")?;
    let most: u64 = text.trim().parse().map_err(io::Error::other)?;
    let wanted = WANTED_DESCRIPTORS.min(most);
    let limit = |to| Rlimit { current: Some(to), maximum: Some(to) };
    match setrlimit(Resource::Nofile, limit(wanted)) {
        Ok(()) => Ok(wanted),
        // Root of a container may not go above the hard limit.
        Err(_) => {
            let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(wanted);
            setrlimit(Resource::Nofile, limit(hard))?;
            Ok(hard)
        }
    }
}

/// Enters the jail, all but the system call filter (see `seccomp.rs`, which looks at
/// arguments, too).
pub(crate) fn enter() -> Result<(), JailError> {
    let jail = Jail { capabilities: CAPABILITIES.to_vec(), ..Jail::default() };
    jail.enter()
}
