//! What can go wrong on the server's side.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;

/// An error of the share.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process could not be started.
    #[error("cannot start the devices process")]
    Launch(#[from] kata_jail::LaunchError),
    /// Its sockets could not be made.
    #[error("cannot make the sockets of the devices process in {dir}")]
    Socket {
        /// Directory of the vhost-user socket.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It could not set itself up, and said why.
    #[error("the devices process did not start: {0}")]
    Refused(String),
    /// It has ended.
    #[error("the process that serves the share has ended ({})", status(.0))]
    Died(Option<ExitStatus>),
    /// It did not become ready.
    #[error("the devices process was not ready within {0} seconds")]
    Silent(u64),
    /// The place in the share is not one.
    #[error("{} is no place in the share: use a relative path without '..'", .0.display())]
    Path(PathBuf),
    /// Something is attached there.
    #[error("cannot attach {} at {}: something is there", source_path.display(), at.display())]
    Occupied {
        /// What was to be attached.
        source_path: PathBuf,
        /// Where.
        at: PathBuf,
    },
    /// The host path could not be opened or cloned.
    #[error("cannot share {}", path.display())]
    Source {
        /// The host path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file system could not be mounted in the share.
    #[error("cannot mount {} ({kind}) at {} in the share", source_path.display(), at.display())]
    Mount {
        /// Its type.
        kind: String,
        /// What was to be mounted.
        source_path: PathBuf,
        /// Where.
        at: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It could not be put into the share.
    #[error("cannot attach {} at {} in the share", source_path.display(), at.display())]
    Attach {
        /// What was to be attached.
        source_path: PathBuf,
        /// Where.
        at: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It could not be taken out of the share.
    #[error("cannot detach {} from the share", at.display())]
    Detach {
        /// Where.
        at: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn status(status: &Option<ExitStatus>) -> String {
    status.map_or_else(|| "still ending".to_owned(), |s| s.to_string())
}
