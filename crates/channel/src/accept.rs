//! The guest's end: takes the streams that the host opens.

use std::sync::Arc;
use std::time::Duration;

use kata_protocol::{StreamHeader, limits};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_vsock::VsockListener;

use crate::mux::{self, Held, wait_closed};
use crate::{CloseReason, HeaderError, Stream};

/// A stream whose header has not come by then is reset.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// Takes streams from the host and reads their headers, each in its own time.
pub struct Acceptor {
    ready: mpsc::Receiver<(StreamHeader, Stream)>,
    closed: watch::Receiver<Option<CloseReason>>,
    /// The connection, if there is one that carries all streams.
    held: Option<Held>,
}

impl Acceptor {
    /// Over one connection that carries all streams. Needs a tokio runtime.
    pub fn multiplexed(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let mut incoming = mux::server(io);
        let (closed, held) = (incoming.closed.clone(), Some(incoming.held.clone()));
        let (sender, ready) = mpsc::channel(16);
        let streams = Arc::new(Semaphore::new(limits::STREAMS));
        tokio::spawn(async move {
            drop(incoming.held);
            while let Some(stream) = incoming.streams.recv().await {
                let Ok(permit) = Arc::clone(&streams).try_acquire_owned() else {
                    tracing::warn!(limit = limits::STREAMS, "too many streams: one was reset");
                    continue;
                };
                tokio::spawn(greet(Stream::mux(stream, permit), sender.clone()));
            }
        });
        Self { ready, closed, held }
    }

    /// Over vsock: each connection is a stream.
    #[must_use]
    pub fn vsock(listener: VsockListener) -> Self {
        let (sender, ready) = mpsc::channel(16);
        let (reason, closed) = watch::channel(None);
        tokio::spawn(async move {
            let why = accept_vsock(listener, sender).await;
            reason.send_replace(Some(why));
        });
        Self { ready, closed, held: None }
    }

    /// Lets go of the connection with all its streams, and returns when what carries it is closed.
    pub async fn close(self) {
        if let Self { held: Some(held), closed, .. } = self {
            drop(held);
            wait_closed(closed).await;
        }
    }

    /// The next stream.
    ///
    /// # Errors
    /// Why there will be none any more.
    pub async fn accept(&mut self) -> Result<(StreamHeader, Stream), CloseReason> {
        match self.ready.recv().await {
            Some(stream) => Ok(stream),
            None => Err(wait_closed(self.closed.clone()).await),
        }
    }
}

async fn accept_vsock(
    listener: VsockListener,
    sender: mpsc::Sender<(StreamHeader, Stream)>,
) -> CloseReason {
    let streams = Arc::new(Semaphore::new(limits::STREAMS));
    loop {
        let permit: OwnedSemaphorePermit = match Arc::clone(&streams).acquire_owned().await {
            Ok(permit) => permit,
            Err(_) => return CloseReason::Dropped,
        };
        match listener.accept().await {
            Ok((stream, address)) if address.cid() == libc::VMADDR_CID_HOST => {
                tokio::spawn(greet(Stream::vsock(stream, permit), sender.clone()));
            }
            Ok((_, address)) => {
                tracing::warn!(cid = address.cid(), "refused a connection not from the host");
            }
            Err(error) if is_passing(&error) => tokio::time::sleep(Duration::from_millis(50)).await,
            Err(error) => return CloseReason::Io(error.to_string()),
        }
    }
}

/// Errors of `accept` that are about one connection or will go away.
fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ECONNABORTED | libc::EINTR)
    )
}

/// Reads the header and passes the stream on, or drops (resets) it.
async fn greet(mut stream: Stream, sender: mpsc::Sender<(StreamHeader, Stream)>) {
    let read = tokio::time::timeout(HEADER_TIME, stream.read_header()).await;
    let header = match read.unwrap_or(Err(HeaderError::Late)) {
        Ok(header) => header,
        Err(error) => {
            tracing::warn!(%error, "a stream was refused");
            return;
        }
    };
    if stream.acknowledge().await.is_ok() {
        // The acceptor may be gone; then so is the stream.
        let _ = sender.send((header, stream)).await;
    }
}
