//! Starts our processes, and locks them up.
//!
//! [`Launch`] describes a process to start: one of our own [`role`]s (the same binary
//! again) or a program. What it inherits is exactly what is named: file descriptors at
//! given numbers, an environment, nothing else. [`Child`] is the running process, held by
//! its pidfd, so a signal never reaches a stranger that got the pid.
//!
//! [`Jail`] is where a process that talks to the guest lives: own namespaces, a root that
//! holds only what it needs, its own uid, no capabilities, no new privileges.
//! A program is jailed by way of the role `jail-exec` ([`exec`]); our own roles call
//! [`Jail::enter`] themselves once they are set up.
//!
//! Start reading at `launch.rs`; `spawn.rs` holds the only code between fork and exec.

mod child;
pub mod exec;
mod jail;
mod launch;
mod privileges;
pub mod role;
mod root;
mod seccomp;
mod spawn;

pub use child::Child;
pub use jail::{Bind, Capability, Jail, JailError, Network};
pub use launch::{Launch, LaunchError};
pub use role::Role;
pub use seccomp::{Seccomp, Violation};
