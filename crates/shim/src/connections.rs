//! The connections of a server, counted: whether somebody uses it beside the caller, and
//! whether everybody has gone.

use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Listener;

/// Counts the connections of one listener.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connections(watch::Sender<usize>);

impl Connections {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there are none, at most so long.
    pub(crate) async fn gone(&self, patience: Duration) {
        let mut count = self.0.subscribe();
        // Who is still there then has nothing to wait for.
        let _ = tokio::time::timeout(patience, count.wait_for(|count| *count == 0)).await;
    }

    /// A listener whose connections are counted here.
    pub(crate) fn listener(&self, listener: UnixListener) -> io::Result<Listener> {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let state = (listener, self.0.clone());
        let connections = futures::stream::unfold(state, |(listener, count)| async move {
            let accepted = listener.accept().await;
            if accepted.is_err() {
                // Out of descriptors, most likely: ttrpc asks again at once.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let counted = accepted.map(|(stream, _)| Counted::new(stream, count.clone()));
            Some((counted, (listener, count)))
        });
        Ok(Listener::new(connections))
    }
}

struct Counted {
    stream: UnixStream,
    count: watch::Sender<usize>,
}

impl Counted {
    fn new(stream: UnixStream, count: watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self { stream, count }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.send_modify(|count| *count = count.saturating_sub(1));
    }
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
