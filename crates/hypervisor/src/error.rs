//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;

use kata_fork::ForkError;
use kata_jail::LaunchError;

use crate::exit::VmExit;
use crate::qemu::QmpError;

/// Why something could not be done with a machine.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The machine needs a file that cannot be used.
    #[error("cannot use {what} {path:?}; check the configuration")]
    File {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration asks for what cannot be.
    #[error("{0}")]
    Config(&'static str),
    /// As many devices are plugged as fit.
    #[error("no root port is free for another device")]
    NoPort,
    /// The guest's kernel has refused a processor or memory.
    #[error("the guest's kernel did not take what was added")]
    Declined,
    /// The monitor's process could not be started.
    #[error("cannot start the virtual machine monitor")]
    Launch(#[from] LaunchError),
    /// The monitor's process could not be forked.
    #[error("cannot fork the virtual machine monitor")]
    Fork(#[from] ForkError),
    /// The host refused something that the machine needs.
    #[error("cannot {step} for the virtual machine")]
    Host {
        /// What was attempted.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The machine is not started yet, or was started already.
    #[error("the virtual machine is {0}")]
    State(&'static str),
    /// The machine ended, or had ended.
    #[error("the virtual machine ended: {0}")]
    Exited(VmExit),
    /// The monitor refused, or did not answer.
    #[error("cannot {step}")]
    Monitor {
        /// What was attempted.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: QmpError,
    },
}

/// Makes the error of a step on the host.
pub(crate) fn host<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> HypervisorError {
    move |source| HypervisorError::Host { step, source: source.into() }
}
