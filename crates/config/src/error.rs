//! What can be wrong with a configuration.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// In a file; line and column count from 1.
    File {
        /// The file.
        path: PathBuf,
        /// Line.
        line: usize,
        /// Column, in characters.
        column: usize,
    },
    /// In an annotation.
    Annotation(String),
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Annotation(name) => write!(f, "annotation {name}"),
        }
    }
}

/// Why there is no usable configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file that was named, or a drop-in, cannot be read.
    #[error("cannot read configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Not TOML.
    #[error("{at}: {message}")]
    Syntax {
        /// Where.
        at: Position,
        /// What the parser said.
        message: String,
    },
    /// A value of the wrong kind, or out of bounds.
    #[error("{at}: {key} must be {expects}, not {found}")]
    Value {
        /// Where.
        at: Position,
        /// Which key.
        key: String,
        /// What it takes.
        expects: String,
        /// What it is.
        found: String,
    },
    /// A setting that cannot be given and must not be ignored.
    #[error("{at}: {key} is not supported: {why}")]
    Refused {
        /// Where.
        at: Position,
        /// Which key.
        key: String,
        /// What it would mean, and the way out.
        why: String,
    },
    /// Two settings that exclude each other.
    #[error("{keys} exclude each other: {problem}")]
    Conflict {
        /// Which.
        keys: &'static str,
        /// Why, and the way out.
        problem: String,
    },
    /// An annotation that is not allowed.
    #[error("annotation {name} {problem}")]
    Annotation {
        /// Its full name.
        name: String,
        /// Why not, and the way out.
        problem: String,
    },
    /// A file that every sandbox needs is not there.
    #[error("{what} {} does not exist: {hint}", path.display())]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
}
