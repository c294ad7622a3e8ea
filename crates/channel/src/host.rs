//! The host's end: opens streams.

use std::sync::Arc;

use async_trait::async_trait;
use kata_protocol::StreamHeader;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;

use crate::mux::{self, Mux};
use crate::vsock::VsockChannel;
use crate::{ChannelError, CloseReason, Stream};

/// A way to open streams to the agent; one implementation per carrier.
#[async_trait]
pub trait Channel: Send + Sync {
    /// Opens a stream and sends its header with the first bytes behind it, as one piece. May
    /// return before the guest has booted; what is written then waits for it.
    ///
    /// # Errors
    /// When the channel is over or full.
    async fn open(&self, header: &StreamHeader, first: &[u8]) -> Result<Stream, ChannelError>;

    /// Waits for the end of the channel.
    async fn closed(&self) -> CloseReason;
}

/// The host's end of the channel of one sandbox. Clones share it; it closes with the last.
#[derive(Clone)]
pub struct HostChannel {
    carrier: Arc<dyn Channel>,
}

impl HostChannel {
    /// Over the socket that is the host's end of the virtio-serial port. Needs a tokio runtime.
    #[must_use]
    pub fn serial(socket: UnixStream) -> Self {
        Self::multiplexed(socket)
    }

    /// Over any connection, multiplexed.
    pub fn multiplexed(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self { carrier: Arc::new(mux::client(io)) }
    }

    /// Over vsock, to the guest with this context id.
    #[must_use]
    pub fn vsock(cid: u32) -> Self {
        Self { carrier: Arc::new(VsockChannel::new(cid)) }
    }

    /// See [`Channel::open`]; nothing is sent behind the header.
    ///
    /// # Errors
    /// When the channel is over or full.
    pub async fn open(&self, header: &StreamHeader) -> Result<Stream, ChannelError> {
        self.open_with(header, &[]).await
    }

    /// See [`Channel::open`].
    ///
    /// # Errors
    /// When the channel is over or full.
    pub async fn open_with(
        &self,
        header: &StreamHeader,
        first: &[u8],
    ) -> Result<Stream, ChannelError> {
        self.carrier.open(header, first).await
    }

    /// See [`Channel::closed`].
    pub async fn closed(&self) -> CloseReason {
        self.carrier.closed().await
    }
}

#[async_trait]
impl Channel for Mux {
    async fn open(&self, header: &StreamHeader, first: &[u8]) -> Result<Stream, ChannelError> {
        let mut stream = Mux::open(self).await?;
        send_first(&mut stream, header, first).await?;
        Ok(stream)
    }

    async fn closed(&self) -> CloseReason {
        Mux::closed(self).await
    }
}

pub(crate) async fn send_first(
    stream: &mut Stream,
    header: &StreamHeader,
    first: &[u8],
) -> Result<(), ChannelError> {
    let mut bytes = header.encode();
    bytes.extend_from_slice(first);
    stream
        .write_all(&bytes)
        .await
        .map_err(|error| ChannelError::Header(header.kind, Arc::new(error)))
}
