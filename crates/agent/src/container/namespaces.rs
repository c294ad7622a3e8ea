//! Namespaces: joined, made, and the child that lives in them.

use super::failure::{Context, Step};
use super::wire::{Channel, Config, ToAgent};
use crate::fork::{self, Parent};
use kata_oci::{IdMapping, Linux, NamespaceKind};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};
use std::fs::{self, File};
use std::io;
use std::os::fd::BorrowedFd;

/// `CLONE_NEWTIME`, which the bindings lack.
const NEW_TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// The flag of a kind.
fn flag(kind: NamespaceKind) -> CloneFlags {
    match kind {
        NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
        NamespaceKind::Network => CloneFlags::CLONE_NEWNET,
        NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
        NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        NamespaceKind::Time => NEW_TIME,
    }
}

/// The flags of all namespaces a container has of its own or joins.
///
/// The network is the guest's, shared by all its containers: the host knows nothing of
/// namespaces in here. Mounts and the view of the cgroups are always the container's own.
fn all(linux: &Linux) -> CloneFlags {
    linux
        .namespaces
        .iter()
        .map(|namespace| flag(namespace.kind))
        .filter(|flag| *flag != CloneFlags::CLONE_NEWNET)
        .fold(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP, |sum, flag| sum | flag)
}

/// Whether the container has a user namespace.
pub(super) fn has_user(linux: &Linux) -> bool {
    linux.namespace(NamespaceKind::User).is_some()
}

/// Makes and joins the namespaces of a new container. Where a child has to be made for
/// that, the caller ends here and the child returns.
pub(super) fn build(config: &Config, channel: &Channel) -> Step {
    let linux = config.spec.linux();
    let mut wanted = all(&linux);
    // Opened before any is joined: the paths are the guest's.
    let mut joined = Vec::new();
    for namespace in linux.namespaces.iter().filter(|n| n.kind != NamespaceKind::Network) {
        if let Some(path) = &namespace.path {
            let file = File::open(path).context(|| {
                format!("open the {:?} namespace {}", namespace.kind, path.display())
            })?;
            joined.push((namespace.kind, file));
            wanted.remove(flag(namespace.kind));
        }
    }
    joined.sort_by_key(|(kind, _)| *kind != NamespaceKind::User);
    for (kind, file) in &joined {
        setns(file, flag(*kind)).context(|| format!("join the {kind:?} namespace"))?;
    }
    if wanted.contains(CloneFlags::CLONE_NEWUSER) {
        unshare(CloneFlags::CLONE_NEWUSER).context(|| "make a user namespace")?;
        wanted.remove(CloneFlags::CLONE_NEWUSER);
        let asked = channel.send(&ToAgent::Map, &[]).and_then(|()| channel.wait_for_go());
        asked.context(|| "have the id maps written")?;
    }
    if has_user(&linux) {
        become_root()?;
    }
    unshare(wanted).context(|| "make namespaces")?;
    set_clocks(&linux)?;
    if all(&linux).intersects(CloneFlags::CLONE_NEWPID | NEW_TIME) { fork(channel) } else { Ok(()) }
}

/// Joins the namespaces of the container whose init `target` is.
pub(super) fn join(config: &Config, target: BorrowedFd<'_>, channel: &Channel) -> Step {
    let linux = config.spec.linux();
    let flags = all(&linux);
    setns(target, flags).context(|| "join the container's namespaces")?;
    if has_user(&linux) {
        become_root()?;
    }
    if flags.intersects(CloneFlags::CLONE_NEWPID | NEW_TIME) { fork(channel) } else { Ok(()) }
}

/// The clocks of a new time namespace can be set only while nobody is in it: this process
/// is not, its children will be.
fn set_clocks(linux: &Linux) -> Step {
    for (clock, offset) in &linux.time_offsets {
        let line = format!("{clock} {} {}\n", offset.secs, offset.nanosecs);
        fs::write("/proc/self/timens_offsets", line)
            .context(|| format!("set the {clock} clock of linux.timeOffsets"))?;
    }
    Ok(())
}

/// Root of the user namespace, so that what is made belongs to somebody in it.
fn become_root() -> Step {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context(|| "become group 0 of the user namespace")?;
    setresuid(uid, uid, uid).context(|| "become user 0 of the user namespace")
}

/// A pid namespace begins with a child. It becomes the agent's, not ours, and goes on
/// when the agent knows it; this process ends.
fn fork(channel: &Channel) -> Step {
    // SAFETY: an init has one thread.
    let pid = unsafe { fork::fork(Parent::Its) };
    match pid.context(|| "make the container's first process")? {
        None => channel.wait_for_go().context(|| "wait for the agent"),
        Some(pid) => {
            channel.send(&ToAgent::Forked(pid), &[]).context(|| "tell the agent of the child")?;
            // SAFETY: ends this process without running destructors that the child shares.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Writes the id maps of a process's user namespace; called by the agent.
pub(super) fn write_maps(pid: i32, linux: &Linux) -> Step {
    let text = |maps: &[IdMapping]| -> String {
        maps.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect()
    };
    for (file, maps) in [("gid_map", &linux.gid_mappings), ("uid_map", &linux.uid_mappings)] {
        fs::write(format!("/proc/{pid}/{file}"), text(maps))
            .context(|| format!("write the {file} of the container"))?;
    }
    Ok(())
}

/// Joins a session keyring of the container's own, where the kernel has keyrings.
pub(super) fn join_keyring(id: &str, channel: &Channel) {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let Ok(name) = std::ffi::CString::new(format!("_ses.{id}")) else { return };
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let keyring = unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) };
    if keyring < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ENOSYS) {
            channel.log(format!("no session keyring of the container's own: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_oci::Namespace;

    #[test]
    fn network_is_never_made_and_mounts_always() {
        let linux = Linux {
            namespaces: vec![Namespace { kind: NamespaceKind::Network, path: None }],
            ..Linux::default()
        };
        assert_eq!(all(&linux), CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP);
    }
}
