//! Connections that come from the host to the loopback that the containers share.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use kata_channel::Stream;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The port comes with the stream; a connection on the loopback is made at once or never.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects a stream to the port that it names, until either side ends.
pub fn accept(mut stream: Stream) {
    tokio::spawn(async move {
        // A stream that is dropped is reset, which the host takes for a refused connection.
        let connected = timeout(PATIENCE, connect(&mut stream)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(mut socket) => {
                if let Err(error) = tokio::io::copy_bidirectional(&mut stream, &mut socket).await {
                    tracing::debug!(%error, "a forwarded connection broke");
                }
            }
            Err(error) => tracing::debug!(%error, "a connection is not forwarded"),
        }
    });
}

async fn connect(stream: &mut Stream) -> io::Result<TcpStream> {
    let port = stream.read_u16().await?;
    match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await
        }
        connected => connected,
    }
}
