//! Carrying the guest's DNS questions to a resolver on the namespace's own loopback.
//!
//! Docker's embedded resolver listens on 127.0.0.11 *inside* the container's network
//! namespace, where the guest is not. So the guest's agent listens on that address in the
//! guest, and each message travels over a stream, as `u32` big-endian id, `u16` big-endian
//! length, message; the answer comes back with the same id.
//!
//! The guest may send anything: what is no question is dropped, the questions under way
//! and the answers waiting for a slow guest are bounded, and both are dropped beyond
//! that, as a network would.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::{Netns, NetworkError};

const PORT: u16 = 53;
/// A DNS message's header.
const HEADER: usize = 12;
/// Longest DNS message.
const MESSAGE: usize = u16::MAX as usize;
/// Longest question passed on.
const QUESTION: usize = 4096;
/// Questions under way at once.
const PENDING: usize = 256;
/// Of them, those asked again by TCP.
const BY_TCP: usize = 16;
/// Answers that wait for the guest to read them.
const WAITING: usize = 64;
/// After this the guest has asked again.
const PATIENCE: Duration = Duration::from_secs(15);

/// The first nameserver of a `resolv.conf` that is a loopback address, which means one in
/// the container's network namespace.
pub fn loopback_nameserver(resolv_conf: &str) -> Option<IpAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with([' ', '\t']))
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .find(IpAddr::is_loopback)
}

/// Answers the questions that come over `stream` by asking `resolver` inside `netns`, until
/// the stream ends.
///
/// # Errors
/// When the namespace cannot be entered, or the stream breaks.
pub async fn serve_dns(
    netns: &Netns,
    resolver: IpAddr,
    stream: impl AsyncRead + AsyncWrite,
) -> Result<(), NetworkError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (questions, asked) = mpsc::channel(1);
    let (answers, mut answered) = mpsc::channel::<Frame>(WAITING);
    let read = async {
        while let Some(frame) = Frame::read(&mut reader).await? {
            if frame.is_question() && questions.send(frame).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let write = async {
        while let Some(frame) = answered.recv().await {
            frame.write(&mut writer).await?;
        }
        Ok(())
    };
    let relay = Relay::new(netns, resolver, answers)?;
    tokio::select! {
        result = read => result.map_err(NetworkError::DnsStream),
        result = write => result.map_err(NetworkError::DnsStream),
        result = relay.run(asked) => result,
    }
}

/// One message on the stream.
#[derive(Debug)]
struct Frame {
    id: u32,
    message: Vec<u8>,
}

impl Frame {
    /// None at the stream's end.
    async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let id = match stream.read_u32().await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            id => id?,
        };
        let mut message = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut message).await?;
        Ok(Some(Self { id, message }))
    }

    async fn write(&self, stream: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(6 + self.message.len());
        bytes.extend_from_slice(&self.id.to_be_bytes());
        // No message is longer: each was read by a 16-bit length or into such a buffer.
        bytes.extend_from_slice(&(self.message.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&self.message);
        stream.write_all(&bytes).await?;
        stream.flush().await
    }

    fn is_question(&self) -> bool {
        const RESPONSE: u8 = 0x80;
        (HEADER..=QUESTION).contains(&self.message.len()) && self.message[2] & RESPONSE == 0
    }
}

/// What the guest writes on the DNS stream: how many questions are in it. For the fuzz target.
#[cfg(fuzzing)]
pub async fn fuzz_questions(mut bytes: &[u8]) -> usize {
    let mut questions = 0;
    while let Ok(Some(frame)) = Frame::read(&mut bytes).await {
        questions += usize::from(frame.is_question());
    }
    questions
}

/// A question that the resolver has not answered yet.
struct Pending {
    frame: u32,
    id: [u8; 2],
    question: Vec<u8>,
    since: Instant,
}

struct Relay<'a> {
    netns: &'a Netns,
    server: SocketAddr,
    socket: tokio::net::UdpSocket,
    answers: mpsc::Sender<Frame>,
    pending: HashMap<u16, Pending>,
    next: u16,
    by_tcp: JoinSet<Option<Frame>>,
}

impl<'a> Relay<'a> {
    fn new(
        netns: &'a Netns,
        resolver: IpAddr,
        answers: mpsc::Sender<Frame>,
    ) -> Result<Self, NetworkError> {
        let server = SocketAddr::new(resolver, PORT);
        let connect = || {
            let any: IpAddr = match resolver {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(server)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let error = |e| NetworkError::System("open a socket to the container's resolver", e);
        let socket = netns.run(connect)?.map_err(error)?;
        Ok(Self {
            netns,
            server,
            socket: tokio::net::UdpSocket::from_std(socket).map_err(error)?,
            answers,
            pending: HashMap::new(),
            next: 0,
            by_tcp: JoinSet::new(),
        })
    }

    async fn run(mut self, mut asked: mpsc::Receiver<Frame>) -> Result<(), NetworkError> {
        let mut buffer = vec![0; MESSAGE];
        loop {
            tokio::select! {
                frame = asked.recv() => match frame {
                    Some(frame) => self.ask(frame).await,
                    None => return Ok(()),
                },
                result = self.socket.recv(&mut buffer) => match result {
                    Ok(length) => self.answer(&buffer[..length])?,
                    // As an ICMP answer to a question that was sent: nobody listens.
                    Err(error) => debug!(%error, "the container's resolver did not answer"),
                },
                Some(done) = self.by_tcp.join_next() => {
                    if let Ok(Some(frame)) = done {
                        self.give(frame);
                    }
                }
            }
        }
    }

    /// Sends a question on, under an id of our own: the guest may use one id twice.
    async fn ask(&mut self, frame: Frame) {
        if self.pending.len() >= PENDING {
            self.pending.retain(|_, pending| pending.since.elapsed() < PATIENCE);
        }
        if self.pending.len() >= PENDING {
            debug!("too many DNS questions are under way: one is dropped");
            return;
        }
        while self.pending.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let ours = self.next;
        self.next = self.next.wrapping_add(1);
        let mut question = frame.message;
        let id = [question[0], question[1]];
        question[..2].copy_from_slice(&ours.to_be_bytes());
        if let Err(error) = self.socket.send(&question).await {
            debug!(%error, "a DNS question could not be sent to the container's resolver");
            return;
        }
        let pending = Pending { frame: frame.id, id, question, since: Instant::now() };
        self.pending.insert(ours, pending);
    }

    fn answer(&mut self, answer: &[u8]) -> Result<(), NetworkError> {
        const TRUNCATED: u8 = 0x02;
        if answer.len() < HEADER {
            return Ok(());
        }
        let ours = u16::from_be_bytes([answer[0], answer[1]]);
        let Some(pending) = self.pending.remove(&ours) else { return Ok(()) };
        let mut frame = Frame { id: pending.frame, message: answer.to_vec() };
        frame.message[..2].copy_from_slice(&pending.id);
        if answer[2] & TRUNCATED != 0 && self.by_tcp.len() < BY_TCP {
            let socket = self.tcp_socket()?;
            let server = self.server;
            self.by_tcp.spawn(async move {
                let whole = timeout(PATIENCE, ask_by_tcp(socket, server, &pending)).await;
                match whole {
                    Ok(Ok(message)) => frame.message = message,
                    // The cut answer is better than none.
                    Ok(Err(error)) => debug!(%error, "the container's resolver failed by TCP"),
                    Err(_) => debug!("the container's resolver did not answer by TCP"),
                }
                Some(frame)
            });
            return Ok(());
        }
        self.give(frame);
        Ok(())
    }

    fn give(&self, frame: Frame) {
        if self.answers.try_send(frame).is_err() {
            debug!("the guest does not read its DNS answers: one is dropped");
        }
    }

    fn tcp_socket(&self) -> Result<tokio::net::TcpSocket, NetworkError> {
        let open = || match self.server {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4(),
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6(),
        };
        let error = |e| NetworkError::System("open a socket to the container's resolver", e);
        self.netns.run(open)?.map_err(error)
    }
}

async fn ask_by_tcp(
    socket: tokio::net::TcpSocket,
    server: SocketAddr,
    pending: &Pending,
) -> io::Result<Vec<u8>> {
    let mut stream = socket.connect(server).await?;
    let mut bytes = Vec::with_capacity(2 + pending.question.len());
    bytes.extend_from_slice(&(pending.question.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&pending.question);
    stream.write_all(&bytes).await?;
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    if message.len() < HEADER || message[..2] != pending.question[..2] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    message[..2].copy_from_slice(&pending.id);
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loopback_nameserver_is_relayed() {
        let docker = "search example.org\nnameserver 127.0.0.11\noptions ndots:0\n";
        assert_eq!(loopback_nameserver(docker), Some(Ipv4Addr::new(127, 0, 0, 11).into()));
        assert_eq!(loopback_nameserver("nameserver\t::1\n"), Some(Ipv6Addr::LOCALHOST.into()));
        assert_eq!(loopback_nameserver("nameserver 8.8.8.8\n"), None);
        assert_eq!(loopback_nameserver("#nameserver 127.0.0.1\nnameservers 127.0.0.1"), None);
        assert_eq!(
            loopback_nameserver("nameserver 8.8.8.8\nnameserver 127.0.0.1 # local\n"),
            Some(Ipv4Addr::LOCALHOST.into())
        );
    }

    #[test]
    fn what_is_no_question_is_dropped() {
        let frame = |message: &[u8]| Frame { id: 1, message: message.to_vec() };
        assert!(frame(&[0; 12]).is_question());
        assert!(!frame(&[0; 11]).is_question());
        assert!(!frame(&[0xff; 12]).is_question());
        assert!(!frame(&[0; 4097]).is_question());
    }
}
