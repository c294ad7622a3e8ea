//! Which part of the system a process of our multi-call binary plays.
//!
//! A role and its arguments come in the environment, never on the command line: the
//! command line belongs to what `ps` shows.

use std::fmt;
use std::str::FromStr;

use crate::LaunchError;

/// Environment variable that names the role.
pub(crate) const ROLE: &str = "_KATA_ROLE";
/// Environment variable with the role's arguments, JSON.
pub(crate) const ROLE_ARGS: &str = "_KATA_ROLE_ARGS";

/// A part that a process of ours plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The sandbox's server: one per VM.
    SandboxServer,
    /// The host process that stands for one container process.
    StandIn,
    /// Serves the guest's shared file systems.
    Devices,
    /// Enters a jail and becomes another program ([`crate::exec`]).
    JailExec,
    /// Keeps templates of VMs.
    Factory,
    /// A sandbox's server that has a VM already, and waits for the sandbox.
    Spare,
    /// Holds a VM that stands still, and forks it.
    Stem,
    /// Runs a tiny VM to see whether KVM is any good here.
    KvmSelfTest,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 8] = [
        Self::SandboxServer,
        Self::StandIn,
        Self::Devices,
        Self::JailExec,
        Self::Factory,
        Self::Spare,
        Self::Stem,
        Self::KvmSelfTest,
    ];

    /// The name in the environment.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SandboxServer => "sandbox-server",
            Self::StandIn => "stand-in",
            Self::Devices => "devices",
            Self::JailExec => "jail-exec",
            Self::Factory => "factory",
            Self::Spare => "spare",
            Self::Stem => "stem",
            Self::KvmSelfTest => "kvm-self-test",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = LaunchError;

    fn from_str(text: &str) -> Result<Self, LaunchError> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| LaunchError::UnknownRole(text.to_owned()))
    }
}

/// What this process was started to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// The part to play.
    pub role: Role,
    /// Its arguments, JSON.
    pub args: String,
}

/// Reads the role from the environment and removes it there; `None` for an ordinary start.
///
/// Must be called first thing in `main`, before there is a second thread.
///
/// # Errors
/// When a role is named that this binary does not have, or its arguments are not text.
pub fn current() -> Result<Option<Invocation>, LaunchError> {
    let Some(name) = std::env::var_os(ROLE) else { return Ok(None) };
    let args = std::env::var_os(ROLE_ARGS).unwrap_or_default();
    // SAFETY: the only thread of this process is here, as documented.
    unsafe {
        std::env::remove_var(ROLE);
        std::env::remove_var(ROLE_ARGS);
    }
    let role: Role = name.to_string_lossy().parse()?;
    let args = args.into_string().map_err(|_| LaunchError::RoleArguments(role))?;
    // The kernel named the process after "/proc/self/exe"; this name is for people.
    if let Ok(name) = std::ffi::CString::new(role.as_str()) {
        let _ = nix::sys::prctl::set_name(&name);
    }
    Ok(Some(Invocation { role, args }))
}

/// Lets a test binary play roles: runs the given `fn(Invocation) -> i32` before `main` when
/// the process was started by [`crate::Launch::role`], and exits with what it returns.
/// For tests of crates that start roles; products dispatch in `main`.
#[macro_export]
macro_rules! roles_before_main {
    ($handler:path) => {
        #[used]
        #[unsafe(link_section = ".init_array")]
        static ROLES_BEFORE_MAIN: extern "C" fn() = {
            extern "C" fn run() {
                match $crate::role::current() {
                    Ok(None) => {}
                    Ok(Some(invocation)) => ::std::process::exit($handler(invocation)),
                    Err(_) => ::std::process::exit(126),
                }
            }
            run
        };
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_is_known_by_its_own_name() {
        for role in Role::ALL {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
            assert!(role.as_str().len() < 16, "{role} does not fit the kernel's process name");
        }
        assert!("sandbox".parse::<Role>().is_err());
    }
}
