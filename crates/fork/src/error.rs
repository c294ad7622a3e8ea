//! What can go wrong.

use std::io;

/// Why a process was not frozen or not forked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// A step failed.
    #[error("cannot {step} of process {pid}")]
    Step {
        /// What was attempted.
        step: &'static str,
        /// On which process or thread.
        pid: i32,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The process ended on the way.
    #[error("process {0} ended while it was worked on")]
    Ended(i32),
    /// It has something that two processes cannot have.
    #[error("process {pid} cannot be forked: {what}")]
    Unfit {
        /// The process.
        pid: i32,
        /// What it has.
        what: String,
    },
}

/// Makes the error of a step.
pub(crate) fn step<E: Into<io::Error>>(
    step: &'static str,
    pid: i32,
) -> impl FnOnce(E) -> ForkError {
    move |source| ForkError::Step { step, pid, source: source.into() }
}
