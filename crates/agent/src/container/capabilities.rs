//! Capability sets: read from names, and put on.

use super::failure::{Context, Step};
use super::wire::Channel;
use kata_oci::Capabilities;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

/// Names without `CAP_`, each at its number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sets {
    bounding: CapabilitySet,
    ambient: CapabilitySet,
    other: CapabilitySets,
}

/// The number of a name such as `CAP_CHOWN`.
fn number(name: &str) -> Option<u32> {
    let name = name.strip_prefix("CAP_")?;
    NAMES.iter().position(|known| *known == name).and_then(|at| u32::try_from(at).ok())
}

fn one(number: u32) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1 << number)
}

/// A set from names; unknown ones go to `unknown`.
fn set(names: &[String], known: CapabilitySet, unknown: &mut Vec<String>) -> CapabilitySet {
    let mut set = CapabilitySet::empty();
    for name in names {
        match number(name).map(one).filter(|bit| known.contains(*bit)) {
            Some(bit) => set |= bit,
            None if unknown.contains(name) => {}
            None => unknown.push(name.clone()),
        }
    }
    set
}

/// What the running kernel knows.
fn of_kernel() -> CapabilitySet {
    (0..64)
        .map(one)
        .take_while(|bit| capability_is_in_bounding_set(*bit).is_ok())
        .fold(CapabilitySet::empty(), |sum, bit| sum | bit)
}

impl Sets {
    /// Reads the sets; names that the kernel does not know are left out with a line in
    /// the log, as runc does, so that a newer engine's list works.
    pub fn read(capabilities: Option<&Capabilities>, channel: &Channel) -> Self {
        let default = Capabilities::default();
        let mut unknown = Vec::new();
        let sets = Self::parse(capabilities.unwrap_or(&default), of_kernel(), &mut unknown);
        if !unknown.is_empty() {
            channel.log(format!("ignoring unknown or unavailable capabilities: {unknown:?}"));
        }
        sets
    }

    fn parse(names: &Capabilities, known: CapabilitySet, unknown: &mut Vec<String>) -> Self {
        let mut set = |names: &[String]| set(names, known, unknown);
        let other = CapabilitySets {
            effective: set(&names.effective),
            permitted: set(&names.permitted),
            inheritable: set(&names.inheritable),
        };
        // The kernel raises only what is permitted and inheritable; the rest is not an
        // error: runc's own default specification names it.
        let ambient = set(&names.ambient) & other.permitted & other.inheritable;
        Self { bounding: set(&names.bounding), ambient, other }
    }

    /// Drops what is not in the bounding set; to be done while still privileged.
    pub fn apply_bounding(&self) -> Step {
        for bit in of_kernel().iter().flat_map(|set| set.iter()) {
            if self.bounding.contains(bit) {
                continue;
            }
            // What is not there need not be dropped, and could not be without CAP_SETPCAP.
            if capability_is_in_bounding_set(bit).is_ok_and(|there| !there) {
                continue;
            }
            remove_capability_from_bounding_set(bit)
                .context(|| "drop a capability from the bounding set")?;
        }
        Ok(())
    }

    /// Puts on the other sets; the last privileged step.
    pub fn apply(&self) -> Step {
        set_capabilities(None, self.other).context(|| "set the capabilities")?;
        match clear_ambient_capability_set() {
            // A kernel without ambient capabilities.
            Err(Errno::INVAL) if self.ambient.is_empty() => return Ok(()),
            result => result.context(|| "clear the ambient capabilities")?,
        }
        for number in 0..64 {
            if self.ambient.contains(one(number)) {
                configure_capability_in_ambient_set(one(number), true)
                    .context(|| format!("raise ambient capability {number}"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_stand_at_their_kernel_numbers() {
        assert_eq!(number("CAP_CHOWN"), Some(0));
        assert_eq!(number("CAP_SYS_ADMIN").map(one), Some(CapabilitySet::SYS_ADMIN));
        assert_eq!(number("CAP_AUDIT_READ").map(one), Some(CapabilitySet::AUDIT_READ));
        assert_eq!(
            number("CAP_CHECKPOINT_RESTORE").map(one),
            Some(CapabilitySet::CHECKPOINT_RESTORE)
        );
        assert_eq!(number("CHOWN"), None);
        assert_eq!(number("CAP_TIME_TRAVEL"), None);
    }

    #[test]
    fn unknown_names_are_collected_once() {
        let names = Capabilities {
            bounding: vec!["CAP_KILL".into(), "CAP_NEW".into()],
            effective: vec!["CAP_NEW".into()],
            ..Capabilities::default()
        };
        let mut unknown = Vec::new();
        let sets = Sets::parse(&names, CapabilitySet::all(), &mut unknown);
        assert_eq!(unknown, ["CAP_NEW"]);
        assert_eq!(sets.bounding, CapabilitySet::KILL);
        assert!(sets.other.effective.is_empty());
    }

    #[test]
    fn what_the_kernel_lacks_is_left_out() {
        let names = Capabilities { permitted: vec!["CAP_BPF".into()], ..Capabilities::default() };
        let mut unknown = Vec::new();
        let sets = Sets::parse(&names, CapabilitySet::CHOWN, &mut unknown);
        assert_eq!((sets.other.permitted.is_empty(), unknown.len()), (true, 1));
    }

    proptest! {
        #[test]
        fn every_known_name_gives_its_bit(picks in prop::collection::vec(0u32..41, 0..41)) {
            let names: Vec<String> =
                picks.iter().map(|n| format!("CAP_{}", NAMES[*n as usize])).collect();
            let mut unknown = Vec::new();
            let bits = set(&names, CapabilitySet::all(), &mut unknown).bits();
            prop_assert!(unknown.is_empty());
            prop_assert_eq!(bits, picks.iter().fold(0u64, |sum, n| sum | 1 << n));
        }
    }
}
