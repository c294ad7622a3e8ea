//! Port-forward: what an engine dials at the loopback of a pod's network namespace goes to
//! the guest's loopback.

use crate::machine::Machine;
use kata_network::{Loopback, Netns};
use kata_protocol::{StreamHeader, chain};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

/// Connections at once; further ones wait.
const CONNECTIONS: usize = 64;

/// Forwards for as long as the machine lives. A host that cannot do it says so in the log.
pub(crate) fn serve(machine: &Arc<Machine>, netns: &Netns) {
    let loopback = match Loopback::take(netns) {
        Ok(loopback) => loopback,
        Err(error) => {
            tracing::warn!(sandbox = %machine.sandbox(), error = %chain(&error),
                "ports cannot be forwarded to this pod");
            return;
        }
    };
    let machine = Arc::clone(machine);
    tokio::spawn(async move {
        tokio::select! {
            () = accept(&machine, &loopback) => {}
            _cause = machine.lost() => {}
        }
    });
}

async fn accept(machine: &Arc<Machine>, loopback: &Loopback) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(permit) = Arc::clone(&room).acquire_owned().await {
        let (socket, port) = match loopback.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(sandbox = %machine.sandbox(), %error, "cannot accept a connection");
                // Out of descriptors, most likely: give the others time to end.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let machine = Arc::clone(machine);
        tokio::spawn(async move {
            let carried = tokio::select! {
                carried = carry(&machine, socket, port) => carried,
                _cause = machine.lost() => Ok(()),
            };
            if let Err(error) = carried {
                tracing::debug!(sandbox = %machine.sandbox(), port, %error, "a forwarded connection broke");
            }
            drop(permit);
        });
    }
}

async fn carry(machine: &Machine, mut socket: TcpStream, port: u16) -> io::Result<()> {
    let opened = machine.channel().open(&StreamHeader::forward()).await;
    let mut stream = opened.map_err(io::Error::other)?;
    stream.write_u16(port).await?;
    stream.flush().await?;
    tokio::io::copy_bidirectional(&mut socket, &mut stream).await.map(drop)
}
