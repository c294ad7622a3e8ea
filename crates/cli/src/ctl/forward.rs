//! Published ports: what comes to them on the host is carried to the container's address.

use super::{Protocol, Publish, datagrams};
use anyhow::{Context, Result};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Pause after a failed accept, so that a lack of descriptors does not become a busy loop.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens on all ports; they are served for as long as the runtime lives.
pub async fn start(ports: &[Publish], guest: Ipv4Addr) -> Result<()> {
    for port in ports {
        let failed = || format!("cannot listen on {}", port.host);
        let target = SocketAddr::from((guest, port.guest));
        match port.protocol {
            Protocol::Tcp => {
                let listener = TcpListener::bind(port.host).await.with_context(failed)?;
                tokio::spawn(accept(listener, target));
            }
            Protocol::Udp => {
                let socket = UdpSocket::bind(port.host).await.with_context(failed)?;
                tokio::spawn(datagrams::carry(socket, target));
            }
        }
    }
    Ok(())
}

async fn accept(listener: TcpListener, target: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(carry(client, target));
            }
            Err(error) => {
                tracing::debug!("cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn carry(mut client: TcpStream, target: SocketAddr) {
    match TcpStream::connect(target).await {
        Ok(mut server) => {
            // Either side may break off; both are closed then.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
        Err(error) => tracing::debug!("cannot connect to {target}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn tcp(host: SocketAddr, guest: u16) -> Publish {
        Publish { protocol: Protocol::Tcp, host, guest }
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_the_end_is_passed_on() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let guest = server.local_addr().unwrap().port();
        let probe = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = probe.local_addr().unwrap();
        drop(probe);
        start(&[tcp(host, guest)], Ipv4Addr::LOCALHOST).await.unwrap();
        let mut client = TcpStream::connect(host).await.unwrap();
        client.write_all(b"ping").await.unwrap();
        client.shutdown().await.unwrap();
        let (mut inner, _) = server.accept().await.unwrap();
        let mut text = String::new();
        inner.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "ping");
        inner.write_all(b"pong").await.unwrap();
        drop(inner);
        text.clear();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "pong");
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = taken.local_addr().unwrap();
        let error = start(&[tcp(host, 1)], Ipv4Addr::LOCALHOST).await.unwrap_err();
        assert!(error.to_string().contains(&host.to_string()), "{error}");
    }
}
