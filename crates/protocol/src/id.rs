//! Ids of sandboxes, containers and processes.

use std::fmt;
use std::str::FromStr;

/// An id that may name a directory, a cgroup or a stream: 1 to 128 characters out of
/// `[A-Za-z0-9_+.-]`, not starting with a dot or a dash. The same alphabet as runc's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(String);

/// Longest id, bytes.
pub(crate) const MAX: usize = 128;

/// Why a text is no [`Id`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidId {
    /// Nothing was given.
    #[error("an id must not be empty")]
    Empty,
    /// More than 128 characters.
    #[error("id of {0} characters is too long: at most {MAX} are allowed")]
    TooLong(usize),
    /// A character outside the alphabet, or a bad first one.
    #[error("id {0:?} is invalid: use letters, digits and _+.- and start with a letter or digit")]
    Character(String),
}

impl Id {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.is_empty() {
            return Err(InvalidId::Empty);
        }
        if text.len() > MAX {
            return Err(InvalidId::TooLong(text.len()));
        }
        let good = |c: char| c.is_ascii_alphanumeric() || "_+.-".contains(c);
        if !text.chars().all(good) || text.starts_with(['.', '-']) {
            return Err(InvalidId::Character(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Id {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docker_ids_are_accepted() {
        assert!("0123456789abcdef".repeat(4).parse::<Id>().is_ok());
        assert!("a_b+c.d-e".parse::<Id>().is_ok());
    }

    #[test]
    fn anything_that_could_leave_a_directory_is_refused() {
        for text in ["", ".", "..", ".a", "a/b", "a\0b", "ä", "-x", "a b"] {
            assert!(text.parse::<Id>().is_err(), "{text:?} was accepted");
        }
        assert_eq!("x".repeat(129).parse::<Id>(), Err(InvalidId::TooLong(129)));
    }
}
