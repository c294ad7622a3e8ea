//! What a monitor speaks by: sockets and a pipe, whose other ends it has from the start.

use std::os::fd::OwnedFd;

use tokio::net::UnixStream;

use crate::config::ChannelKind;
use crate::error::{HypervisorError, host};

/// Our ends.
#[derive(Debug)]
pub(crate) struct Ends {
    pub qmp: UnixStream,
    pub console: UnixStream,
    pub agent: Option<UnixStream>,
    pub stderr: std::io::PipeReader,
}

/// The monitor's.
pub(crate) struct TheirEnds {
    pub qmp: OwnedFd,
    pub console: OwnedFd,
    pub agent: Option<OwnedFd>,
    pub stderr: OwnedFd,
}

impl Ends {
    /// For a monitor whose guest is reached by this channel.
    pub(crate) fn new(channel: &ChannelKind) -> Result<(Self, TheirEnds), HypervisorError> {
        let (qmp, qmp_theirs) = pair()?;
        let (console, console_theirs) = pair()?;
        let (agent, agent_theirs) = match channel {
            ChannelKind::Serial => pair().map(|(ours, theirs)| (Some(ours), Some(theirs)))?,
            ChannelKind::Vsock(_) => (None, None),
        };
        let (stderr, stderr_theirs) = std::io::pipe().map_err(host("make a pipe"))?;
        let theirs = TheirEnds {
            qmp: qmp_theirs,
            console: console_theirs,
            agent: agent_theirs,
            stderr: stderr_theirs.into(),
        };
        Ok((Self { qmp, console, agent, stderr }, theirs))
    }
}

/// A connected pair of sockets: ours, and what QEMU inherits.
fn pair() -> Result<(UnixStream, OwnedFd), HypervisorError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(host("make a socket"))?;
    ours.set_nonblocking(true).map_err(host("make a socket"))?;
    let ours = UnixStream::from_std(ours).map_err(host("watch a socket"))?;
    Ok((ours, theirs.into()))
}
