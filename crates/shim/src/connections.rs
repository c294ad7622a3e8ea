//! The connections of a server, counted: whether somebody uses it beside the caller.

use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use ttrpc::asynchronous::transport::Listener;

/// Counts the connections of one listener.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(Arc<()>);

impl Connections {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        // Each connection holds one, the listener one, and so do we.
        Arc::strong_count(&self.0).saturating_sub(2)
    }

    /// A listener whose connections are counted here.
    pub(crate) fn listener(&self, listener: UnixListener) -> io::Result<Listener> {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let state = (listener, Arc::clone(&self.0));
        let connections = futures::stream::unfold(state, |(listener, count)| async move {
            let accepted = listener.accept().await;
            if accepted.is_err() {
                // Out of descriptors, most likely: ttrpc asks again at once.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            let counted =
                accepted.map(|(stream, _)| Counted { stream, _count: Arc::clone(&count) });
            Some((counted, (listener, count)))
        });
        Ok(Listener::new(connections))
    }
}

struct Counted {
    stream: UnixStream,
    _count: Arc<()>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
