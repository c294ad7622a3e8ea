//! Any pollable descriptor as an async byte stream.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A pipe, terminal, character device or socket, read and written without blocking.
///
/// tokio's own types take a short read for "nothing more is there" and then wait for an edge
/// that a virtio-serial port never gives. Here readiness is cleared by `EAGAIN` alone.
///
/// The end of a terminal (`EIO` once its last user is gone) reads as end of file.
#[derive(Debug)]
pub struct FdIo {
    fd: AsyncFd<OwnedFd>,
}

impl FdIo {
    /// Takes a descriptor over and makes it non-blocking. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the descriptor is not one that can be polled, such as a regular file.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self { fd: register(fd)? })
    }

    /// Gives the descriptor back; it stays non-blocking.
    #[must_use]
    pub fn into_inner(self) -> OwnedFd {
        self.fd.into_inner()
    }

    /// Reads once, without waiting. `WouldBlock` when nothing is there.
    ///
    /// # Errors
    /// What `read` gives; `EIO` counts as the end.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(read_terminal(&self.fd, buffer)?)
    }

    /// Waits until there is something and reads it; 0 is the end.
    ///
    /// # Errors
    /// What `read` gives.
    pub async fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.fd.readable().await?;
            if let Ok(result) = guard.try_io(|_| self.read_now(buffer)) {
                return result;
            }
        }
    }

    /// Writes all of it, waiting where needed.
    ///
    /// # Errors
    /// What `write` gives; part may have been written then.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.fd.writable().await?;
            if let Ok(result) = guard.try_io(|_| self.write_now(&[IoSlice::new(bytes)])) {
                match result? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    count => bytes = &bytes[count..],
                }
            }
        }
        Ok(())
    }

    fn write_now(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            match rustix::io::writev(&self.fd, slices) {
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(io::Error::from),
            }
        }
    }
}

/// Reads once. `EIO`, how a terminal says that its other end is closed, counts as the end
/// (0) only when it is said twice: Linux looks for input first and for the closed end after,
/// and what is written and closed in between (`n_tty_read`) is there for the next read only.
///
/// # Errors
/// What `read` gives, without `EINTR`.
pub fn read_terminal(fd: impl AsFd, buffer: &mut [u8]) -> rustix::io::Result<usize> {
    use rustix::io::{Errno, read, retry_on_intr};
    let mut once = || retry_on_intr(|| read(&fd, &mut *buffer));
    match once() {
        Err(Errno::IO) => match once() {
            Err(Errno::IO) => Ok(0),
            other => other,
        },
        other => other,
    }
}

/// Puts a descriptor under tokio's eyes.
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open, and the same descriptor, as long as it exists.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

impl AsFd for FdIo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }
}

impl AsyncRead for FdIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.fd.poll_read_ready(cx))?;
            let unfilled = buf.initialize_unfilled();
            match guard.try_io(|_| self.read_now(unfilled)) {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for FdIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.fd.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|_| self.write_now(slices)) {
                return Poll::Ready(result);
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Closes the sending side of a socket; other descriptors close when dropped.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTSOCK | rustix::io::Errno::NOTCONN) => {
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
