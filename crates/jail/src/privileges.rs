//! Gives up what the jailed process must not have.

use std::io;

use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid};

use crate::jail::{Jail, JailError, step};

/// `capset` version with 64 bits of capabilities.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilityWord {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Limits, capabilities, user and groups, no new privileges; in the order that works.
pub(crate) fn drop(jail: &Jail) -> Result<(), JailError> {
    if jail.nofile > 0 {
        setrlimit(Resource::RLIMIT_NOFILE, jail.nofile, jail.nofile)
            .map_err(step("limit the number of descriptors"))?;
    }
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;

    let kept = jail.capabilities.iter().fold(0u64, |set, capability| set | 1 << *capability as u64);
    limit_bounding_set(kept).map_err(step("limit the bounding set"))?;
    prctl(libc::PR_SET_KEEPCAPS, 1, 0).map_err(step("keep capabilities"))?;
    let groups: Vec<Gid> = jail.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(jail.uid), Gid::from_raw(jail.gid));
    nix::unistd::setgroups(&groups).map_err(step("set the groups"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(step("set the group"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(step("set the user"))?;
    set_capabilities(kept).map_err(step("set the capabilities"))?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).map_err(step("forbid new privileges"))
}

fn limit_bounding_set(kept: u64) -> io::Result<()> {
    for capability in (0..64).filter(|bit| kept & (1 << bit) == 0) {
        match prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            // The first number that the kernel does not know: that was all.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// Exactly these capabilities, kept across exec too (the ambient set).
fn set_capabilities(kept: u64) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)?;
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, pid: 0 };
    let word = |bits: u64| CapabilityWord {
        effective: bits as u32,
        permitted: bits as u32,
        inheritable: bits as u32,
    };
    let words = [word(kept), word(kept >> 32)];
    // SAFETY: header and data are the kernel's structures of this version.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    for capability in (0..64).filter(|bit| kept & (1 << bit) != 0) {
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, capability)?;
    }
    Ok(())
}

/// A `prctl` that takes numbers only.
pub(crate) fn prctl(option: libc::c_int, first: u64, second: u64) -> io::Result<()> {
    // SAFETY: the options that we use take numbers, no pointers.
    let result = unsafe { libc::prctl(option, first, second, 0u64, 0u64) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
