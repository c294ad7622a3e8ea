//! yamux on one connection: the task that drives it and what its users hold.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use kata_protocol::limits;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use yamux::{Connection, ConnectionError, FrameDecodeError, Mode};

use crate::wire::Wire;
use crate::{ChannelError, CloseReason, Stream};

/// Receive window that all streams together may have beyond 256 KiB each.
const EXTRA_WINDOW: usize = 16 << 20;
/// Streams that yamux knows but nobody holds any more: their end is still to be sent.
const DYING_STREAMS: usize = 256;
/// Largest piece of a stream in one frame.
const FRAME: usize = 64 << 10;

/// A request of [`Mux::open`] to the driver.
pub(crate) type Open = oneshot::Sender<yamux::Stream>;

/// The users' side of a multiplexed connection.
pub(crate) struct Mux {
    opens: mpsc::Sender<Open>,
    closed: watch::Receiver<Option<CloseReason>>,
    streams: Arc<Semaphore>,
}

/// Streams that the other side opened.
pub(crate) struct Incoming {
    pub(crate) streams: mpsc::UnboundedReceiver<yamux::Stream>,
    pub(crate) closed: watch::Receiver<Option<CloseReason>>,
    pub(crate) held: Held,
}

/// As long as somebody has it the connection stays.
pub(crate) type Held = mpsc::Sender<Open>;

/// Starts the driver for the host's end.
pub(crate) fn client(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Mux {
    let (opens, requests) = mpsc::channel(16);
    let (reason, closed) = watch::channel(None);
    tokio::spawn(run(io, Mode::Client, requests, None, reason));
    Mux { opens, closed, streams: Arc::new(Semaphore::new(limits::STREAMS)) }
}

/// Starts the driver for the guest's end.
pub(crate) fn server(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Incoming {
    let (held, requests) = mpsc::channel(1);
    // Bounded by the number of streams that yamux lets be open.
    let (incoming, streams) = mpsc::unbounded_channel();
    let (reason, closed) = watch::channel(None);
    tokio::spawn(run(io, Mode::Server, requests, Some(incoming), reason));
    Incoming { streams, closed, held }
}

impl Mux {
    pub(crate) async fn open(&self) -> Result<Stream, ChannelError> {
        let permit = Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| ChannelError::TooManyStreams(limits::STREAMS))?;
        let (reply, stream) = oneshot::channel();
        if self.opens.send(reply).await.is_ok()
            && let Ok(stream) = stream.await
        {
            return Ok(Stream::mux(stream, permit));
        }
        Err(ChannelError::Closed(self.closed().await))
    }

    pub(crate) async fn closed(&self) -> CloseReason {
        wait_closed(self.closed.clone()).await
    }
}

pub(crate) async fn wait_closed(mut closed: watch::Receiver<Option<CloseReason>>) -> CloseReason {
    match closed.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or(CloseReason::Dropped),
        Err(_) => CloseReason::Dropped,
    }
}

async fn run<T>(
    io: T,
    mode: Mode,
    requests: mpsc::Receiver<Open>,
    incoming: Option<mpsc::UnboundedSender<yamux::Stream>>,
    reason: watch::Sender<Option<CloseReason>>,
) where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let wire = Wire::new(io);
    let connection = Connection::new(wire.clone(), config(), mode);
    let mut driver = Driver { connection, wire, requests, request: None, incoming };
    let why = poll_fn(|cx| driver.poll(cx)).await;
    tracing::debug!(reason = %why, "channel closed");
    // Streams must read an error, not wait, before anyone learns the reason.
    drop(driver);
    reason.send_replace(Some(why));
}

fn config() -> yamux::Config {
    let mut config = yamux::Config::default();
    let streams = limits::STREAMS + DYING_STREAMS;
    let windows = streams * yamux::DEFAULT_CREDIT as usize + EXTRA_WINDOW;
    config.set_max_connection_receive_window(None);
    config.set_max_num_streams(streams);
    config.set_max_connection_receive_window(Some(windows));
    config.set_split_send_size(FRAME);
    config
}

struct Driver<T: AsyncRead + AsyncWrite + Unpin> {
    connection: Connection<Wire<T>>,
    wire: Wire<T>,
    requests: mpsc::Receiver<Open>,
    request: Option<Open>,
    incoming: Option<mpsc::UnboundedSender<yamux::Stream>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        loop {
            self.wire.begin_round();
            loop {
                match self.connection.poll_next_inbound(cx) {
                    Poll::Ready(Some(Ok(stream))) => self.take(stream),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(self.explain(&error)),
                    Poll::Ready(None) => {
                        return Poll::Ready(self.explain(&ConnectionError::Closed));
                    }
                    Poll::Pending => break,
                }
            }
            match self.poll_open(cx) {
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(reason)) => return Poll::Ready(reason),
                Poll::Pending => {}
            }
            if self.wire.unblock() {
                continue;
            }
            return match self.wire.poll_drain(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(self.explain(&error.into())),
                _ => Poll::Pending,
            };
        }
    }

    /// Opens one stream that was asked for; ready when it did.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CloseReason>> {
        if self.request.is_none() {
            match self.requests.poll_recv(cx) {
                Poll::Ready(Some(request)) => self.request = Some(request),
                Poll::Ready(None) => return Poll::Ready(Err(CloseReason::Dropped)),
                Poll::Pending => return Poll::Pending,
            }
        }
        match self.connection.poll_new_outbound(cx) {
            Poll::Ready(Ok(stream)) => {
                if let Some(request) = self.request.take() {
                    // Who asked may have given up: then the stream is dropped unused.
                    let _ = request.send(stream);
                }
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.explain(&error))),
            Poll::Pending => Poll::Pending,
        }
    }

    /// A stream that the other side opened. The host takes none: dropping it resets it.
    fn take(&self, stream: yamux::Stream) {
        match &self.incoming {
            // Without an acceptor any more, the stream is dropped too.
            Some(incoming) => drop(incoming.send(stream)),
            None => tracing::warn!("the guest tried to open a stream: it was reset"),
        }
    }

    fn explain(&self, error: &ConnectionError) -> CloseReason {
        if let Some(failure) = self.wire.take_failure() {
            return match failure.kind() {
                std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => {
                    CloseReason::Ended
                }
                _ => CloseReason::Io(failure.to_string()),
            };
        }
        match error {
            ConnectionError::Closed => CloseReason::Ended,
            ConnectionError::Decode(FrameDecodeError::Io(error))
                if error.kind() == std::io::ErrorKind::UnexpectedEof =>
            {
                CloseReason::Ended
            }
            other => CloseReason::Protocol(other.to_string()),
        }
    }
}
