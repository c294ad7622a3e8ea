//! Which devices a cgroup may use.
//!
//! cgroup v2 has no file for it: a small eBPF program is attached to the cgroup
//! ([`install`]). Rules follow the specification: the last one that matches wins, and what
//! none matches is denied. As with runc, a few devices that every container needs are
//! allowed after all others.

use crate::bpf::{self, Hook, Instruction};
use crate::device_program::program;
use crate::{CgroupError, file};
use kata_oci::DeviceRule;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Programs of the last containers, the newest at the end. Most often the next one has one of
/// them: for the kernel to check one is the work of milliseconds where the processor is emulated.
/// One that a cgroup has already cannot be attached to it again, so only new cgroups get it.
static LAST: Mutex<Vec<(Vec<Instruction>, OwnedFd)>> = Mutex::new(Vec::new());
/// How many of them are kept: engines differ in their lists, but one sandbox sees few.
const KEPT: usize = 4;

/// More rules than any engine sends; the program stays far below the kernel's bound.
const MAX_RULES: usize = 1024;

/// Kind of a device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Char,
    Block,
}

/// `rwm`, as the kernel counts them for programs.
pub(crate) const MKNOD: u32 = 1;
pub(crate) const READ: u32 = 2;
pub(crate) const WRITE: u32 = 4;
pub(crate) const ALL: u32 = MKNOD | READ | WRITE;

/// A checked rule; `None` is any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub allow: bool,
    pub kind: Option<Kind>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub access: u32,
}

impl Rule {
    const fn allow(kind: Kind, major: Option<u32>, minor: Option<u32>, access: u32) -> Self {
        Self { allow: true, kind: Some(kind), major, minor, access }
    }

    /// Whether it speaks of all that the other one speaks of.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        fn all<T: PartialEq>(ours: Option<T>, theirs: Option<T>) -> bool {
            ours.is_none() || ours == theirs
        }
        all(self.kind, other.kind)
            && all(self.major, other.major)
            && all(self.minor, other.minor)
            && self.access & other.access == other.access
    }

    /// Whether there is anything that both speak of.
    pub(crate) fn meets(&self, other: &Self) -> bool {
        fn some<T: PartialEq>(ours: Option<T>, theirs: Option<T>) -> bool {
            ours.is_none() || theirs.is_none() || ours == theirs
        }
        some(self.kind, other.kind)
            && some(self.major, other.major)
            && some(self.minor, other.minor)
            && self.access & other.access != 0
    }

    /// Decides for everything: no rule before it is ever looked at.
    pub(crate) fn is_final(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// What every container may do, whatever its list says: make nodes, and use null, zero,
/// full, random, urandom, tty, ptmx and its terminals, and tun, as runc and crun have it.
const ALWAYS: [Rule; 11] = [
    Rule::allow(Kind::Char, None, None, MKNOD),
    Rule::allow(Kind::Block, None, None, MKNOD),
    Rule::allow(Kind::Char, Some(1), Some(3), ALL),
    Rule::allow(Kind::Char, Some(1), Some(8), ALL),
    Rule::allow(Kind::Char, Some(1), Some(7), ALL),
    Rule::allow(Kind::Char, Some(5), Some(0), ALL),
    Rule::allow(Kind::Char, Some(1), Some(5), ALL),
    Rule::allow(Kind::Char, Some(1), Some(9), ALL),
    Rule::allow(Kind::Char, Some(136), None, ALL),
    Rule::allow(Kind::Char, Some(5), Some(2), ALL),
    Rule::allow(Kind::Char, Some(10), Some(200), ALL),
];

/// Checks the specification's rules and adds those that always hold.
pub(crate) fn rules(list: &[DeviceRule]) -> Result<Vec<Rule>, CgroupError> {
    if list.len() > MAX_RULES {
        return Err(CgroupError::invalid("devices", format!("has more than {MAX_RULES} rules")));
    }
    let mut rules = list.iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    rules.extend(ALWAYS);
    Ok(rules)
}

fn rule(rule: &DeviceRule) -> Result<Rule, CgroupError> {
    let invalid = |problem: String| Err(CgroupError::invalid("devices", problem));
    let kind = match rule.kind.as_deref() {
        None | Some("a" | "") => None,
        Some("c" | "u") => Some(Kind::Char),
        Some("b") => Some(Kind::Block),
        Some(other) => return invalid(format!("has the type {other:?}: say a, b or c")),
    };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value).map(Some).map_err(|_| value),
    };
    let (major, minor) = match (number(rule.major), number(rule.minor)) {
        (Ok(major), Ok(minor)) => (major, minor),
        (Err(bad), _) | (_, Err(bad)) => {
            return invalid(format!("has the device number {bad}: give one from 0, or -1 for any"));
        }
    };
    let mut access = 0;
    for letter in rule.access.as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => return invalid(format!("has the access {other:?}: say some of rwm")),
        };
    }
    // Docker writes the empty string for "all" in its first rule.
    let access = if access == 0 { ALL } else { access };
    Ok(Rule { allow: rule.allow, kind, major, minor, access })
}

/// Puts the rules in force in a v2 cgroup, in place of what was there. The new program is
/// attached before the old ones go, and all attached must agree: there is no gap.
pub(crate) fn install(dir: &Path, rules: &[Rule]) -> Result<(), CgroupError> {
    let failed =
        |action| move |source| CgroupError::DeviceFilter { action, path: dir.to_owned(), source };
    let cgroup = File::open(dir).map_err(|source| CgroupError::io("open cgroup", dir, source))?;
    let old = bpf::attached(&cgroup, Hook::Device).map_err(failed("query"))?;
    let program = program(rules);
    if old.is_empty() {
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = match last.iter().position(|(same, _)| *same == program) {
            Some(index) => last.remove(index).1,
            None => bpf::load(&program, Hook::Device).map_err(failed("load"))?,
        };
        let attached = bpf::attach(&cgroup, &loaded, Hook::Device).map_err(failed("attach"));
        last.push((program, loaded));
        if last.len() > KEPT {
            last.remove(0);
        }
        return attached;
    }
    let program = bpf::load(&program, Hook::Device).map_err(failed("load"))?;
    bpf::attach(&cgroup, &program, Hook::Device).map_err(failed("attach"))?;
    for id in old {
        let result = bpf::by_id(id).and_then(|old| bpf::detach(&cgroup, &old, Hook::Device));
        match result {
            // Somebody else detached it in the meantime.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => result.map_err(failed("detach"))?,
        }
    }
    Ok(())
}

/// The rule in the form cgroup v1's `devices.allow` and `devices.deny` take.
pub(crate) fn v1_line(rule: &Rule) -> String {
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let kind = match rule.kind {
        None => 'a',
        Some(Kind::Char) => 'c',
        Some(Kind::Block) => 'b',
    };
    let letters = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')];
    let access: String =
        letters.iter().filter(|(bit, _)| rule.access & bit != 0).map(|(_, c)| c).collect();
    format!("{kind} {}:{} {access}", number(rule.major), number(rule.minor))
}

/// Writes the rules into a v1 devices cgroup.
pub(crate) fn install_v1(dir: &Path, rules: &[Rule]) -> Result<(), CgroupError> {
    file::write(&dir.join("devices.deny"), "a")?;
    for rule in rules {
        let name = if rule.allow { "devices.allow" } else { "devices.deny" };
        // The kernel takes only the bare letter for everything.
        let line = if rule.is_final() { "a".to_owned() } else { v1_line(rule) };
        file::write(&dir.join(name), &line)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Result<Vec<Rule>, CgroupError> {
        let resources = kata_oci::Resources::parse(format!(r#"{{"devices":{json}}}"#).as_bytes());
        rules(&resources.unwrap().devices)
    }

    #[test]
    fn an_engines_rules_are_understood() {
        let rules = spec(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"},
                {"allow":true,"type":"b","major":8,"minor":-1,"access":"r"}]"#,
        )
        .unwrap();
        assert!(rules[0].is_final() && !rules[0].allow);
        assert_eq!(v1_line(&rules[1]), "c 10:229 rw");
        assert_eq!(v1_line(&rules[2]), "b 8:* r");
        assert_eq!(rules.len(), 3 + ALWAYS.len());
    }

    #[test]
    fn lists_of_engines_come_to_few_programs() {
        let of = |json: &str| program(&spec(json).unwrap());
        let allow = |numbers: &[(i64, i64)]| {
            let rule = |(major, minor)| {
                format!(
                    r#",{{"allow":true,"type":"c","major":{major},"minor":{minor},"access":"rwm"}}"#
                )
            };
            numbers.iter().copied().map(rule).collect::<String>()
        };
        let deny = r#"{"allow":false,"access":"rwm"}"#;
        let fuse = r#",{"allow":false,"type":"c","major":10,"minor":229,"access":"rwm"}"#;
        let common = [(1, 5), (1, 3), (1, 9), (1, 8), (5, 0)];
        let docker = of(&format!("[{deny}{}{}{fuse}]", allow(&common), allow(&[(5, 1)])));
        let more = [(1, 7), (5, 1), (136, -1), (5, 2)];
        let containerd = of(&format!("[{deny}{}{}]", allow(&common), allow(&more)));
        assert_eq!(docker, containerd);
        let podman = of(&format!("[{deny}]"));
        assert_eq!(podman, of("[]"));
        assert_ne!(docker, podman);
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        for bad in [
            r#"[{"type":"x"}]"#,
            r#"[{"access":"rx"}]"#,
            r#"[{"major":-2}]"#,
            r#"[{"minor":4294967296}]"#,
        ] {
            assert!(spec(bad).is_err(), "{bad}");
        }
        let many = vec![DeviceRule::default(); MAX_RULES + 1];
        assert!(rules(&many).is_err());
    }
}
