//! Streams that containerd names by path: FIFOs that its client holds open.

use kata_sandbox::{EngineStreams, SandboxError, Stdio, StdioPaths};
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;

/// Opens what `paths` name. An empty path is a stream that nobody wants.
pub(crate) fn open(terminal: bool, paths: StdioPaths) -> Result<Stdio, SandboxError> {
    // Read-write, so that opening a FIFO never waits for its other end.
    let output = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let input = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let streams = EngineStreams {
        stdin: open_one(&paths.stdin, input)?,
        stdout: open_one(&paths.stdout, output)?,
        stderr: if terminal { None } else { open_one(&paths.stderr, output)? },
    };
    Ok(Stdio { streams, terminal, paths, ..Stdio::default() })
}

fn open_one(path: &str, flags: OFlags) -> Result<Option<OwnedFd>, SandboxError> {
    if path.is_empty() {
        return Ok(None);
    }
    if path.contains("://") {
        return Err(SandboxError::Unsupported("logging to a URI instead of a FIFO"));
    }
    rustix::fs::open(path, flags, Mode::empty()).map(Some).map_err(|error| SandboxError::Io {
        what: format!("open the engine's stream {path}"),
        source: error.into(),
    })
}
