//! Capabilities of the calling thread, behind the interface of the crate `capng`.
//!
//! virtiofsd drops and regains capabilities around requests by way of `capng`, which is the
//! C library libcap-ng. This takes its place (`[patch.crates-io]` in the workspace), with
//! just what virtiofsd as a library calls, for three reasons:
//!
//! - libcap-ng remembers the sets it last applied. When the kernel changes them meanwhile, as
//!   it does on each change of the effective user, virtiofsd acts on what is no longer true:
//!   a guest older than Linux 6.3 kept its set-user-ID bits when a user wrote to a file.
//!   Here the sets are always read from the kernel.
//! - It runs code at the start of every process of ours, and calls that the devices
//!   process's system call filter would have to allow.
//! - Nothing in C has to be installed to build, and the binary is static without more ado.

use std::cell::Cell;

use bitflags::bitflags;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// The number of a capability.
pub type Capability = u32;

/// Names by number, without `CAP_`.
#[rustfmt::skip]
const NAMES: [&str; 41] = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID",
    "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW",
    "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD",
    "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
    "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
];

/// Why capabilities could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel did not tell them.
    #[error("cannot read the thread's capabilities")]
    GetProcessCapabilities(#[source] rustix::io::Errno),
    /// The kernel did not take them.
    #[error("cannot set the thread's capabilities")]
    ApplyCapabilities(#[source] rustix::io::Errno),
    /// No capability has this name.
    #[error("there is no capability {0}")]
    GetCapabilityId(String),
    /// The bounding set is not changed by this crate.
    #[error("the bounding set cannot be changed here: the jail does that")]
    BoundingSet,
}

/// Our result.
pub type Result<T> = std::result::Result<T, Error>;

bitflags! {
    /// Which of a thread's sets.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Type: u32 {
        /// What counts now.
        const EFFECTIVE = 1;
        /// What may be made effective.
        const PERMITTED = 2;
        /// What may pass an exec.
        const INHERITABLE = 4;
    }
}

bitflags! {
    /// What a call is about.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Set: u32 {
        /// The sets of the thread.
        const CAPS = 16;
        /// The bounding set.
        const BOUNDS = 32;
        /// Both.
        const BOTH = Self::CAPS.bits() | Self::BOUNDS.bits();
    }
}

/// What to do with a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Take it out of a set.
    DROP,
    /// Put it into a set.
    ADD,
}

/// A change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CUpdate {
    /// What to do.
    pub action: Action,
    /// In which sets.
    pub cap_type: Type,
    /// With which capability.
    pub capability: Capability,
}

thread_local! {
    /// Changes that were asked for and not yet applied.
    static WANTED: Cell<Option<CapabilitySets>> = const { Cell::new(None) };
}

fn current() -> Result<CapabilitySets> {
    capabilities(None).map_err(Error::GetProcessCapabilities)
}

/// Forgets changes that were not applied.
pub fn get_caps_process() -> Result<()> {
    WANTED.set(None);
    current().map(drop)
}

/// Empties all sets, once applied.
pub fn clear(_set: Set) {
    let empty = CapabilitySet::empty();
    let sets = CapabilitySets { effective: empty, permitted: empty, inheritable: empty };
    WANTED.set(Some(sets));
}

/// Notes changes; [`apply`] makes them.
pub fn update(updates: Vec<CUpdate>) -> Result<()> {
    let mut sets = WANTED.get().map_or_else(current, Ok)?;
    for change in updates {
        let bit = bit(change.capability);
        let CapabilitySets { effective, permitted, inheritable } = &mut sets;
        for (which, set) in [
            (Type::EFFECTIVE, effective),
            (Type::PERMITTED, permitted),
            (Type::INHERITABLE, inheritable),
        ] {
            if change.cap_type.contains(which) {
                set.set(bit, change.action == Action::ADD);
            }
        }
    }
    WANTED.set(Some(sets));
    Ok(())
}

/// Makes the noted changes, for the calling thread.
pub fn apply(set: Set) -> Result<()> {
    if set.contains(Set::BOUNDS) {
        return Err(Error::BoundingSet);
    }
    match WANTED.take() {
        Some(sets) => set_capabilities(None, sets).map_err(Error::ApplyCapabilities),
        None => Ok(()),
    }
}

/// Whether the thread has it, in each of these sets.
pub fn have_capability(which: Type, capability: Capability) -> bool {
    let Ok(sets) = WANTED.get().map_or_else(current, Ok) else { return false };
    let bit = bit(capability);
    (!which.contains(Type::EFFECTIVE) || sets.effective.contains(bit))
        && (!which.contains(Type::PERMITTED) || sets.permitted.contains(bit))
        && (!which.contains(Type::INHERITABLE) || sets.inheritable.contains(bit))
}

/// The number of a capability, by its name without `CAP_`.
pub fn name_to_capability(name: &str) -> Result<Capability> {
    (0..)
        .zip(NAMES)
        .find(|(_, known)| known.eq_ignore_ascii_case(name))
        .map(|(number, _)| number)
        .ok_or_else(|| Error::GetCapabilityId(name.to_owned()))
}

fn bit(capability: Capability) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1u64.checked_shl(capability).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// In a thread of its own, for the sets are the thread's.
    fn alone(test: impl FnOnce() + Send + 'static) {
        thread::spawn(test).join().unwrap();
    }

    fn change(action: Action, capability: Capability) -> Vec<CUpdate> {
        vec![CUpdate { action, cap_type: Type::EFFECTIVE, capability }]
    }

    #[test]
    fn names_have_the_kernels_numbers() {
        assert_eq!(name_to_capability("FSETID").unwrap(), 4);
        assert_eq!(name_to_capability("dac_override").unwrap(), 1);
        assert_eq!(name_to_capability("SETFCAP").unwrap(), 31);
        assert_eq!(name_to_capability("CHECKPOINT_RESTORE").unwrap(), 40);
        assert!(matches!(name_to_capability("CAP_KILL"), Err(Error::GetCapabilityId(_))));
    }

    #[test]
    fn a_capability_is_dropped_and_regained_for_this_thread_only() {
        let fsetid = name_to_capability("FSETID").unwrap();
        alone(move || {
            assert!(have_capability(Type::EFFECTIVE, fsetid), "this test needs root");
            update(change(Action::DROP, fsetid)).unwrap();
            apply(Set::CAPS).unwrap();
            let now = capabilities(None).unwrap();
            assert!(!now.effective.contains(CapabilitySet::FSETID));
            assert!(now.permitted.contains(CapabilitySet::FSETID));
            alone_has_it_not(fsetid);
            update(change(Action::ADD, fsetid)).unwrap();
            apply(Set::CAPS).unwrap();
            assert!(capabilities(None).unwrap().effective.contains(CapabilitySet::FSETID));
        });
        assert!(have_capability(Type::EFFECTIVE, fsetid));
    }

    /// A new thread inherits what this one has.
    fn alone_has_it_not(capability: Capability) {
        alone(move || assert!(!have_capability(Type::EFFECTIVE, capability)));
    }

    #[test]
    fn what_the_kernel_changed_meanwhile_is_seen() {
        let fsetid = name_to_capability("FSETID").unwrap();
        alone(move || {
            update(change(Action::DROP, fsetid)).unwrap();
            apply(Set::CAPS).unwrap();
            let mut sets = capabilities(None).unwrap();
            sets.effective |= CapabilitySet::FSETID;
            set_capabilities(None, sets).unwrap();
            assert!(have_capability(Type::EFFECTIVE, fsetid));
        });
    }

    #[test]
    fn the_bounding_set_is_refused_loudly() {
        alone(|| {
            clear(Set::BOTH);
            assert!(matches!(apply(Set::BOTH), Err(Error::BoundingSet)));
        });
    }
}
