//! The channel between the sandbox server and the agent: many byte streams, all opened by
//! the host, each starting with a [`StreamHeader`](kata_protocol::StreamHeader) that says what it is for.
//!
//! Two carriers. On a **virtio-serial** port (a connected socket on the host) the streams are
//! multiplexed by yamux with a window per stream, so that a reader that stops stops only its
//! own stream, and memory on both sides is bounded. On **vsock** each stream is a connection.
//!
//! Start at [`HostChannel`] (the host's end; [`HostChannel::call`] makes a call of the agent) and
//! [`Acceptor`] (the guest's). [`FdIo`] makes any
//! pollable descriptor an async stream without tokio's trap of giving up after a short read.
//!
//! The host does not trust the guest: streams that the guest opens are reset, windows and the
//! number of streams are bounded, and a broken protocol ends the channel with a reason.

mod accept;
mod call;
mod fd_io;
mod host;
mod mux;
mod port;
mod stream;
mod vsock;
mod wire;

pub use accept::Acceptor;
pub use call::CallError;
pub use fd_io::{FdIo, read_terminal};
pub use host::{Channel, HostChannel};
pub use port::{PortError, SerialPort};
pub use stream::Stream;

use std::io;

use kata_protocol::InvalidHeader;

/// Why a stream cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChannelError {
    /// The channel is over.
    #[error("agent channel is closed: {0}")]
    Closed(CloseReason),
    /// The limit of open streams is reached.
    #[error("agent channel carries {0} streams already; close some first")]
    TooManyStreams(usize),
    /// The header, or what goes with it, could not be sent.
    #[error("cannot open a {0:?} stream")]
    Header(kata_protocol::StreamKind, #[source] std::sync::Arc<io::Error>),
    /// No connection over vsock.
    #[error("cannot connect to the agent at vsock {0}:{1}")]
    Connect(u32, u32, #[source] std::sync::Arc<io::Error>),
}

/// Why a channel ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The other side closed the connection: the virtual machine or its peer is gone.
    #[error("the other side closed the connection")]
    Ended,
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// The other side does not speak the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// This side let go of the channel.
    #[error("the channel was dropped")]
    Dropped,
}

/// Why an incoming stream was turned away.
#[derive(Debug, thiserror::Error)]
enum HeaderError {
    #[error("no complete stream header came in time")]
    Late,
    #[error("stream ended within its header")]
    Cut,
    #[error("stream header is invalid")]
    Invalid(#[from] InvalidHeader),
    #[error("cannot read the stream header")]
    Io(#[from] io::Error),
}

impl From<ChannelError> for io::Error {
    fn from(error: ChannelError) -> Self {
        io::Error::other(error)
    }
}
