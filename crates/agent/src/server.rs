//! Serves the agent's calls and streams on whatever carries the channel.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kata_channel::{Acceptor, CloseReason, PortError, SerialPort};
use kata_protocol::{SERIAL_DEVICE, SERIAL_PORT, StreamKind, VSOCK_PORT};
use tokio::net::UnixStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::service::Agent;
use crate::{forward, service, uevent};

/// How long the virtio-serial port may take to show up.
const PORT_TIME: Duration = Duration::from_secs(10);

/// What carries the channel.
#[derive(Debug)]
pub enum Carrier {
    /// The virtio-serial port. The host may close it and connect anew.
    Serial,
    /// vsock connections.
    Vsock,
    /// A connected socket, for tests.
    Socket(OwnedFd),
}

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// No vsock.
    #[error("cannot listen on vsock port {VSOCK_PORT}")]
    Vsock(#[source] io::Error),
    /// The given socket is none.
    #[error("cannot use the inherited socket")]
    Socket(#[source] io::Error),
}

/// Serves until the channel ends; a virtio-serial port never does.
///
/// # Errors
/// When there is no channel to serve on.
pub async fn serve(agent: Arc<Agent>, carrier: Carrier) -> Result<(), ServeError> {
    match carrier {
        Carrier::Serial => loop {
            let port = port().await?;
            tracing::debug!("virtio-serial port is open");
            let connection = port.connection().await?;
            tracing::debug!("the host has its end of the port open");
            let reason = session(&agent, Acceptor::multiplexed(connection)).await;
            match reason {
                // The host has said that it would leave.
                CloseReason::Dropped => tracing::debug!("channel left"),
                reason => tracing::info!(%reason, "channel closed"),
            }
        },
        Carrier::Vsock => {
            let address = VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT);
            let listener = VsockListener::bind(address).map_err(ServeError::Vsock)?;
            let reason = session(&agent, Acceptor::vsock(listener)).await;
            tracing::error!(%reason, "channel closed");
        }
        Carrier::Socket(socket) => {
            let socket = std::os::unix::net::UnixStream::from(socket);
            let socket = socket
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(socket))
                .map_err(ServeError::Socket)?;
            let reason = session(&agent, Acceptor::multiplexed(socket)).await;
            tracing::debug!(%reason, "channel closed");
        }
    }
    Ok(())
}

/// Hands the streams of one connection to where they belong.
async fn session(agent: &Arc<Agent>, mut acceptor: Acceptor) -> CloseReason {
    let reason = loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            () = agent.left.notified() => {
                acceptor.close().await;
                break CloseReason::Dropped;
            }
        };
        let (header, stream) = match accepted {
            Ok(accepted) => accepted,
            Err(reason) => break reason,
        };
        tracing::debug!(kind = ?header.kind, "stream accepted");
        match header.kind {
            // Done to the end, also when the channel is lost on the way.
            StreamKind::Rpc => drop(tokio::spawn(service::serve(Arc::clone(agent), stream))),
            StreamKind::Dns => agent.networking.dns_stream(stream),
            StreamKind::Forward => forward::accept(stream),
            StreamKind::Stdin | StreamKind::Stdout | StreamKind::Stderr => {
                agent.streams.arrived(header, stream);
            }
        }
    };
    agent.streams.channel_lost();
    agent.networking.channel_lost();
    reason
}

/// The port's device may be there before its name, and both after us.
async fn port() -> Result<SerialPort, PortError> {
    let mut last = None;
    let open = || SerialPort::open(Path::new(SERIAL_DEVICE), SERIAL_PORT);
    let found = uevent::wait_for(PORT_TIME, || match open() {
        Ok(port) => Some(port),
        Err(error) => {
            last = Some(error);
            None
        }
    })
    .await;
    found.map_err(|_| last.unwrap_or_else(|| PortError::Missing(SERIAL_PORT.to_owned())))
}
