//! vsock: one connection per stream.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kata_protocol::{StreamHeader, VSOCK_PORT, limits};
use tokio::io::AsyncReadExt as _;
use tokio::sync::Semaphore;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::host::{Channel, send_header};
use crate::{ChannelError, CloseReason, Stream};

/// Between two attempts while the guest does not listen yet. The kernel has no event for it.
const RETRY: Duration = Duration::from_millis(3);

pub(crate) struct VsockChannel {
    cid: u32,
    streams: Arc<Semaphore>,
}

impl VsockChannel {
    pub(crate) fn new(cid: u32) -> Self {
        Self { cid, streams: Arc::new(Semaphore::new(limits::STREAMS)) }
    }

    async fn connect(&self) -> Result<VsockStream, ChannelError> {
        loop {
            match VsockStream::connect(VsockAddr::new(self.cid, VSOCK_PORT)).await {
                Ok(stream) => return Ok(stream),
                Err(error) if not_yet(&error) => tokio::time::sleep(RETRY).await,
                Err(error) => {
                    return Err(ChannelError::Connect(self.cid, VSOCK_PORT, Arc::new(error)));
                }
            }
        }
    }
}

/// The guest has not booted so far. The caller watches the virtual machine and gives up.
fn not_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::TimedOut | io::ErrorKind::ConnectionRefused
    ) || error.raw_os_error() == Some(libc::ENODEV)
}

#[async_trait]
impl Channel for VsockChannel {
    async fn open(&self, header: &StreamHeader) -> Result<Stream, ChannelError> {
        let permit = Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| ChannelError::TooManyStreams(limits::STREAMS))?;
        let mut stream = Stream::vsock(self.connect().await?, permit);
        send_header(&mut stream, header).await?;
        Ok(stream)
    }

    /// A connection of its own, on which nothing is said, ends with the guest.
    async fn closed(&self) -> CloseReason {
        let mut life_line = match self.open(&StreamHeader::rpc()).await {
            Ok(stream) => stream,
            Err(error) => return CloseReason::Io(error.to_string()),
        };
        match life_line.read(&mut [0; 1]).await {
            Ok(0) => CloseReason::Ended,
            Ok(_) => CloseReason::Protocol("the guest spoke first".to_owned()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => CloseReason::Ended,
            Err(error) => CloseReason::Io(error.to_string()),
        }
    }
}
