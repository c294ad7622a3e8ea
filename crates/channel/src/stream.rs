//! One byte stream of the channel.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::io::{AsyncRead as _, AsyncWrite as _};
use kata_protocol::StreamHeader;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio_vsock::VsockStream;

use crate::HeaderError;

/// A byte stream in both directions. Each direction closes on its own: `shutdown` ends the
/// writing side, and the other end reads the end of file.
///
/// Dropping it without `shutdown` resets it: the other end's writes fail and its reads end,
/// after what was written before.
pub struct Stream {
    carrier: Carrier,
    closed: bool,
    /// Counts against the channel's limit.
    _permit: Option<OwnedSemaphorePermit>,
}

enum Carrier {
    Mux(yamux::Stream),
    Vsock(VsockStream),
    /// One end of a pipe; what is at the other is connected later.
    Early(DuplexStream),
}

impl Stream {
    pub(crate) fn mux(stream: yamux::Stream, permit: OwnedSemaphorePermit) -> Self {
        Self { carrier: Carrier::Mux(stream), closed: false, _permit: Some(permit) }
    }

    pub(crate) fn vsock(stream: VsockStream, permit: OwnedSemaphorePermit) -> Self {
        Self { carrier: Carrier::Vsock(stream), closed: false, _permit: Some(permit) }
    }

    pub(crate) fn early(pipe: DuplexStream) -> Self {
        Self { carrier: Carrier::Early(pipe), closed: false, _permit: None }
    }

    /// Reads the header and nothing beyond it. The caller bounds the time.
    pub(crate) async fn read_header(&mut self) -> Result<StreamHeader, HeaderError> {
        let mut bytes = [0; StreamHeader::MAX];
        // Magic, kind, and the length of the first id.
        let mut filled = 0;
        let mut wanted = 4;
        loop {
            while filled < wanted {
                match self.read(&mut bytes[filled..wanted]).await? {
                    0 => return Err(HeaderError::Cut),
                    count => filled += count,
                }
            }
            match StreamHeader::decode(&bytes[..filled]) {
                Ok((header, _)) => return Ok(header),
                Err(kata_protocol::InvalidHeader::Incomplete) => {}
                Err(error) => return Err(error.into()),
            }
            wanted = header_length(&bytes[..filled]);
        }
    }

    /// Tells the other end at once that this stream was taken: yamux lets only so many be
    /// open that were not, and a process's input or idle output may stay silent for ever.
    pub(crate) async fn acknowledge(&mut self) -> io::Result<()> {
        if let Carrier::Mux(stream) = &mut self.carrier {
            std::future::poll_fn(|cx| Pin::new(&mut *stream).poll_write(cx, &[])).await?;
        }
        Ok(())
    }
}

/// How long a header is at least, as far as its first `bytes` tell. More than `bytes` when
/// they were incomplete.
fn header_length(bytes: &[u8]) -> usize {
    let container = 4 + usize::from(bytes[3]);
    match bytes.get(container) {
        None => container + 1,
        Some(exec) => container + 1 + usize::from(*exec),
    }
    .min(StreamHeader::MAX)
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.carrier {
            Carrier::Mux(stream) => write!(f, "Stream({})", stream.id()),
            Carrier::Vsock(_) | Carrier::Early(_) => f.write_str("Stream(vsock)"),
        }
    }
}

/// yamux says `WriteZero` when the other end is gone; pipes and sockets say this.
fn broken(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WriteZero => io::ErrorKind::BrokenPipe.into(),
        _ => error,
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let closed = self.closed;
        match &mut self.carrier {
            Carrier::Mux(stream) => {
                let unfilled = buf.initialize_unfilled();
                if unfilled.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                match ready!(Pin::new(&mut *stream).poll_read(cx, unfilled)) {
                    // An end that is no orderly one. After our own shutdown the two look
                    // alike; then who reads must count (as the exit of a process does).
                    Ok(0) if stream.is_closed() && !closed => {
                        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
                    }
                    Ok(count) => {
                        buf.advance(count);
                        Poll::Ready(Ok(()))
                    }
                    Err(error) => Poll::Ready(Err(broken(error))),
                }
            }
            Carrier::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
            Carrier::Early(pipe) => Pin::new(pipe).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        match &mut self.carrier {
            Carrier::Mux(_) if buf.is_empty() => Poll::Ready(Ok(0)),
            Carrier::Mux(stream) => Pin::new(stream).poll_write(cx, buf).map_err(broken),
            // Longer writes hang some vhost-user vsock devices for ever.
            Carrier::Vsock(stream) => {
                Pin::new(stream).poll_write(cx, &buf[..buf.len().min(32 << 10)])
            }
            Carrier::Early(pipe) => Pin::new(pipe).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.carrier {
            // The driver sends by itself; flushing would only wait for the queue to be empty.
            Carrier::Mux(_) => Poll::Ready(Ok(())),
            Carrier::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Carrier::Early(pipe) => Pin::new(pipe).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closed {
            return Poll::Ready(Ok(()));
        }
        let result = match &mut self.carrier {
            Carrier::Mux(stream) => ready!(Pin::new(stream).poll_close(cx)).map_err(broken),
            Carrier::Vsock(stream) => ready!(Pin::new(stream).poll_shutdown(cx)),
            Carrier::Early(pipe) => ready!(Pin::new(pipe).poll_shutdown(cx)),
        };
        self.closed = true;
        Poll::Ready(result)
    }
}
