//! Why a container could not be built: the text an engine shows its user.

use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::io;

/// What kind of failure, as far as the exit code of the engine depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FailureKind {
    /// The program does not exist.
    NotFound,
    /// The program exists and cannot be executed.
    NotExecutable,
    /// Anything before that.
    Setup,
}

/// A failure inside init, ready to travel to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Failure {
    pub kind: FailureKind,
    pub text: String,
}

impl Failure {
    /// A failure of the building itself.
    pub fn setup(text: impl Into<String>) -> Self {
        Self { kind: FailureKind::Setup, text: text.into() }
    }
}

/// Result of a step of init.
pub(super) type Step<T = ()> = Result<T, Failure>;

/// Adds what was attempted to an error of the system.
pub(super) trait Context<T> {
    /// `what` is put before the error's own text.
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Step<T>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Step<T> {
        self.map_err(|error| Failure::setup(format!("{}: {}", what(), reason(&error.into()))))
    }
}

/// The error's text as Go programs (and so runc and the engines that look for
/// such texts) write it: lower case, without the number.
pub(super) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_read_as_runc_words_them() {
        let error = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(reason(&error), "no such file or directory");
        let failed: Result<(), _> = Err(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(failed.context(|| "open x").unwrap_err().text, "open x: permission denied");
    }
}
