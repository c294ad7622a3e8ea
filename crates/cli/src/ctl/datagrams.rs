//! Published UDP ports: datagrams carried to the container's address, and its answers back
//! to whoever asked.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// Largest datagram.
const LARGEST: usize = 64 << 10;
/// Clients that are remembered at a time.
const CLIENTS: usize = 1024;
/// How long a client is remembered that got no answer, as connection tracking does it.
const IDLE: Duration = Duration::from_secs(180);
/// Pause after a failure of the socket, so that it does not become a busy loop.
const PAUSE: Duration = Duration::from_millis(10);

/// One client: the socket that stands for it towards the container.
struct Client {
    socket: Arc<UdpSocket>,
    answers: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.answers.abort();
    }
}

/// Carries what arrives at `host` to `target`, for as long as the runtime lives.
pub async fn carry(host: UdpSocket, target: SocketAddr) {
    let host = Arc::new(host);
    let mut clients: HashMap<SocketAddr, Client> = HashMap::new();
    let mut datagram = vec![0; LARGEST];
    loop {
        let (length, from) = match host.recv_from(&mut datagram).await {
            Ok(received) => received,
            Err(error) => {
                // An answer that could not be delivered shows here, too.
                tracing::debug!("cannot receive a datagram: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        clients.retain(|_, client| !client.answers.is_finished());
        if !clients.contains_key(&from) {
            if clients.len() >= CLIENTS {
                tracing::debug!(%from, "too many clients: a datagram is dropped");
                continue;
            }
            match client(&host, from, target).await {
                Ok(client) => drop(clients.insert(from, client)),
                Err(error) => tracing::debug!(%from, "cannot reach {target}: {error}"),
            }
        }
        if let Some(client) = clients.get(&from)
            && let Err(error) = client.socket.send(&datagram[..length]).await
        {
            tracing::debug!(%from, "cannot pass a datagram on to {target}: {error}");
        }
    }
}

async fn client(
    host: &Arc<UdpSocket>,
    from: SocketAddr,
    target: SocketAddr,
) -> std::io::Result<Client> {
    let socket = Arc::new(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?);
    socket.connect(target).await?;
    let (inner, host) = (Arc::clone(&socket), Arc::clone(host));
    let answers = tokio::spawn(async move {
        let mut datagram = vec![0; LARGEST];
        while let Ok(received) = tokio::time::timeout(IDLE, inner.recv(&mut datagram)).await {
            match received {
                Ok(length) => drop(host.send_to(&datagram[..length], from).await),
                // Nobody listens yet; that may change.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    });
    Ok(Client { socket, answers })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn socket() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").await.unwrap()
    }

    #[tokio::test]
    async fn each_client_gets_its_own_answers() {
        let (server, host) = (socket().await, socket().await);
        let at = host.local_addr().unwrap();
        tokio::spawn(carry(host, server.local_addr().unwrap()));
        tokio::spawn(async move {
            let mut datagram = [0; 64];
            while let Ok((length, from)) = server.recv_from(&mut datagram).await {
                let answer = [b"re: ", &datagram[..length]].concat();
                server.send_to(&answer, from).await.unwrap();
            }
        });
        let (one, two) = (socket().await, socket().await);
        for round in 0..3 {
            for (client, text) in [(&one, format!("one {round}")), (&two, format!("two {round}"))] {
                client.send_to(text.as_bytes(), at).await.unwrap();
                let mut answer = [0; 64];
                let (length, from) = client.recv_from(&mut answer).await.unwrap();
                assert_eq!((&answer[..length], from), (format!("re: {text}").as_bytes(), at));
            }
        }
    }
}
