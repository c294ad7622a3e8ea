//! The connection below the multiplexer, with buffers in both directions.
//!
//! yamux writes a 12-byte header and its body apart, flushes after each frame and reads
//! headers byte-exactly. On a virtio-serial port each of these is an exit of the virtual
//! machine, so frames are gathered here and go out when the multiplexer has nothing more
//! to say ([`Wire::poll_drain`]).

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is read at once.
const READ_BUFFER: usize = 128 << 10;
/// Output gathered before the multiplexer has to wait.
const WRITE_BUFFER: usize = 128 << 10;
/// Room kept for output: what is gathered and the frame that goes over the limit.
const OUTPUT_KEPT: usize = 2 * WRITE_BUFFER;
/// Output taken beyond that so that the multiplexer keeps reading; see [`Wire::unblock`].
const WRITE_LIMIT: usize = 1 << 20;

/// Handle on the connection; the multiplexer and its driver share one.
pub(crate) struct Wire<T> {
    state: Arc<Mutex<State<T>>>,
}

struct State<T> {
    io: T,
    input: Vec<u8>,
    input_at: usize,
    input_end: usize,
    output: Vec<u8>,
    output_at: usize,
    output_limit: usize,
    read_polled: bool,
    write_blocked: bool,
    failure: Option<io::Error>,
}

impl<T> Clone for Wire<T> {
    fn clone(&self) -> Self {
        Self { state: Arc::clone(&self.state) }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Wire<T> {
    pub(crate) fn new(io: T) -> Self {
        let state = State {
            io,
            input: vec![0; READ_BUFFER],
            input_at: 0,
            input_end: 0,
            output: Vec::new(),
            output_at: 0,
            output_limit: WRITE_BUFFER,
            read_polled: false,
            write_blocked: false,
            failure: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was gathered.
    pub(crate) fn poll_drain(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state().poll_drain(cx)
    }

    /// Call before the multiplexer runs, to learn afterwards what it waited for.
    pub(crate) fn begin_round(&self) {
        let mut state = self.state();
        state.read_polled = false;
        state.write_blocked = false;
    }

    /// A multiplexer that cannot send its answer to a ping stops reading. With both sides in
    /// that state neither would ever go on. When the last round ended so, this gives it room
    /// and returns true: run it again. A peer that pings without reading gets no more than
    /// [`WRITE_LIMIT`].
    pub(crate) fn unblock(&self) -> bool {
        let mut state = self.state();
        let stuck = state.write_blocked && !state.read_polled;
        if stuck && state.output_limit < WRITE_LIMIT {
            state.output_limit += WRITE_BUFFER;
            return true;
        }
        false
    }

    /// The error that ended the connection, if it was one.
    pub(crate) fn take_failure(&self) -> Option<io::Error> {
        self.state().failure.take()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> State<T> {
    fn pending(&self) -> usize {
        self.output.len() - self.output_at
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.output_at < self.output.len() {
            let Self { io, output, output_at, .. } = self;
            match ready!(Pin::new(io).poll_write(cx, &output[*output_at..])) {
                Ok(0) => return Poll::Ready(Err(self.fail(io::ErrorKind::WriteZero.into()))),
                Ok(count) => *output_at += count,
                Err(error) => return Poll::Ready(Err(self.fail(error))),
            }
        }
        self.output.clear();
        // Kept at the size that one round needs: growing anew each time costs page faults.
        if self.output.capacity() > OUTPUT_KEPT {
            self.output.shrink_to(OUTPUT_KEPT);
        }
        self.output_at = 0;
        self.output_limit = WRITE_BUFFER;
        Poll::Ready(Ok(()))
    }

    fn fail(&mut self, error: io::Error) -> io::Error {
        let copy = match error.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => error.kind().into(),
        };
        self.failure = Some(error);
        copy
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buffer = ReadBuf::new(&mut self.input);
        match ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer)) {
            Ok(()) => {
                self.input_at = 0;
                self.input_end = buffer.filled().len();
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(self.fail(error))),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures::io::AsyncRead for Wire<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let state = &mut *self.state();
        state.read_polled = true;
        if state.input_at == state.input_end {
            ready!(state.poll_fill(cx))?;
        }
        let ready = &state.input[state.input_at..state.input_end];
        let count = ready.len().min(buf.len());
        buf[..count].copy_from_slice(&ready[..count]);
        state.input_at += count;
        Poll::Ready(Ok(count))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures::io::AsyncWrite for Wire<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let state = &mut *self.state();
        if state.pending() >= state.output_limit {
            if let Poll::Ready(Err(error)) = state.poll_drain(cx) {
                return Poll::Ready(Err(error));
            }
            if state.pending() >= state.output_limit {
                state.write_blocked = true;
                return Poll::Pending;
            }
        }
        if state.output_at > WRITE_BUFFER {
            state.output.drain(..state.output_at);
            state.output_at = 0;
        }
        state.output.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    /// Does nothing: the driver sends with [`Wire::poll_drain`] when the round is over.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let state = &mut *self.state();
        ready!(state.poll_drain(cx))?;
        Pin::new(&mut state.io).poll_shutdown(cx)
    }
}
