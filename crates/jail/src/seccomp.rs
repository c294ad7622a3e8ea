//! System call filters of our own processes.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde::{Deserialize, Serialize};

/// The system calls that a process may make (and its threads to come).
///
/// Data, not code, so that it travels with the [`crate::Jail`]. QEMU is not filtered by
/// this but by its own `-sandbox`, which knows what the build at hand needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seccomp {
    /// Numbers of the calls (`libc::SYS_…`) of this architecture.
    pub allow: Vec<i64>,
    /// What another call does.
    pub otherwise: Violation,
}

/// What happens on a call that is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Violation {
    /// The process is killed.
    Kill,
    /// The call fails with this error number.
    Errno(u32),
    /// The call is made and logged by the kernel: to find out what is needed.
    Log,
}

impl Seccomp {
    pub(crate) fn compile(&self) -> Result<BpfProgram, seccompiler::Error> {
        let otherwise = match self.otherwise {
            Violation::Kill => SeccompAction::KillProcess,
            Violation::Errno(number) => SeccompAction::Errno(number),
            Violation::Log => SeccompAction::Log,
        };
        let rules: BTreeMap<i64, Vec<_>> =
            self.allow.iter().map(|call| (*call, Vec::new())).collect();
        let architecture =
            std::env::consts::ARCH.try_into().map_err(seccompiler::Error::Backend)?;
        let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, architecture)
            .map_err(seccompiler::Error::Backend)?;
        filter.try_into().map_err(seccompiler::Error::Backend)
    }
}
