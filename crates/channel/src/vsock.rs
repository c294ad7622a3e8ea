//! vsock: one connection per stream.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kata_protocol::{StreamHeader, VSOCK_PORT, limits};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_vsock::{VsockAddr, VsockStream};

use crate::host::{Channel, send_first};
use crate::{ChannelError, CloseReason, Stream};

/// Between two attempts while the guest does not listen yet. The kernel has no event for it.
const RETRY: Duration = Duration::from_millis(3);

/// What is kept of what is written before the guest is there; requests are short.
const EARLY: usize = 64 << 10;

pub(crate) struct VsockChannel {
    cid: u32,
    streams: Arc<Semaphore>,
    /// The guest has taken a connection.
    up: Arc<AtomicBool>,
    /// Closed with the channel.
    alive: watch::Sender<()>,
}

impl VsockChannel {
    pub(crate) fn new(cid: u32) -> Self {
        Self {
            cid,
            streams: Arc::new(Semaphore::new(limits::STREAMS)),
            up: Arc::default(),
            alive: watch::Sender::new(()),
        }
    }

    /// A stream that can be written to at once, and is connected when the guest is there.
    fn open_early(
        &self,
        header: StreamHeader,
        first: Vec<u8>,
        permit: OwnedSemaphorePermit,
    ) -> Stream {
        let (ours, mut theirs) = tokio::io::duplex(EARLY);
        let (cid, up, mut alive) = (self.cid, Arc::clone(&self.up), self.alive.subscribe());
        tokio::spawn(async move {
            let connected = tokio::select! {
                connected = connect(cid, &header, &first, permit) => connected,
                _ = alive.changed() => return,
            };
            match connected {
                Ok(mut stream) => {
                    up.store(true, Ordering::Relaxed);
                    // However it ends: whoever holds the other end sees that it did.
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut theirs).await;
                }
                Err(error) => {
                    tracing::warn!(error = %kata_protocol::chain(&error), "no channel to the guest");
                }
            }
        });
        Stream::early(ours)
    }
}

async fn connect(
    cid: u32,
    header: &StreamHeader,
    first: &[u8],
    permit: OwnedSemaphorePermit,
) -> Result<Stream, ChannelError> {
    let connection = loop {
        match VsockStream::connect(VsockAddr::new(cid, VSOCK_PORT)).await {
            Ok(connection) => break connection,
            Err(error) if not_yet(&error) => tokio::time::sleep(RETRY).await,
            Err(error) => return Err(ChannelError::Connect(cid, VSOCK_PORT, Arc::new(error))),
        }
    };
    let mut stream = Stream::vsock(connection, permit);
    send_first(&mut stream, header, first).await?;
    Ok(stream)
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
    async fn open(&self, header: &StreamHeader, first: &[u8]) -> Result<Stream, ChannelError> {
        let permit = Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| ChannelError::TooManyStreams(limits::STREAMS))?;
        if !self.up.load(Ordering::Relaxed) {
            return Ok(self.open_early(header.clone(), first.to_vec(), permit));
        }
        connect(self.cid, header, first, permit).await
    }

    /// A connection of its own, on which nothing is said, ends with the guest.
    async fn closed(&self) -> CloseReason {
        let mut life_line = match self.open(&StreamHeader::rpc(), &[]).await {
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
