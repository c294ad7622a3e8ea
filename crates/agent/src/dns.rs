//! Docker's embedded resolver, as the guest sees it.
//!
//! Containers on a user-defined network ask 127.0.0.11, which on the host listens inside
//! the container's network namespace, where the guest is not. So the agent listens on
//! that address here and passes each message over a stream to the host: `u32` big-endian
//! id, `u16` big-endian length, message; the answer comes back with the same id.
//!
//! Port 53 stays free for containers that serve DNS on all addresses: the agent listens on
//! another port, to which what is sent to that one is redirected.
//!
//! Bounded in every direction; beyond its bounds it drops, as a network would.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kata_cgroups::{Hierarchy, Redirect};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::network::loopback_up;

const PORT: u16 = 53;
/// A DNS message's header.
const HEADER: usize = 12;
/// Questions that wait for their answer.
const PENDING: usize = 512;
/// Connections at once.
const CONNECTIONS: usize = 32;
/// Questions that wait to be sent to the host.
const WAITING: usize = 64;
/// After this nobody waits for the answer any more, or for a question on a connection.
const PATIENCE: Duration = Duration::from_secs(15);

/// How often a port is looked for that is free for UDP and TCP.
const PORTS: usize = 16;

/// Answers DNS on port 53 of `listen`, a loopback address, by the host at the other end of
/// `stream`, until the stream ends.
///
/// # Errors
/// When the port cannot be had, or the stream breaks.
pub async fn relay(listen: IpAddr, stream: impl AsyncRead + AsyncWrite) -> io::Result<()> {
    if !listen.is_loopback() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "DNS is relayed on loopback only"));
    }
    loopback_up().map_err(io::Error::other)?;
    let Place { udp, tcp, redirect } = Place::find(listen).await?;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (questions, mut to_host) = mpsc::channel(WAITING);
    let (answers, from_host) = mpsc::channel(1);
    let read = async {
        while let Some(frame) = read_frame(&mut reader).await? {
            if answers.send(frame).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let write = async {
        while let Some(frame) = to_host.recv().await {
            write_frame(&mut writer, frame).await?;
        }
        Ok(())
    };
    let relay = Relay { questions, pending: HashMap::new(), next: 0 };
    let result = tokio::select! {
        result = read => result,
        result = write => result,
        result = relay.run(udp, tcp, from_host) => result,
    };
    drop(redirect);
    result
}

/// Where the relay listens.
struct Place {
    udp: UdpSocket,
    tcp: TcpListener,
    /// None: on port 53 itself.
    redirect: Option<Redirect>,
}

impl Place {
    async fn find(listen: IpAddr) -> io::Result<Self> {
        match Self::aside(listen).await {
            Ok(place) => Ok(place),
            Err(error) => {
                let error = kata_protocol::chain(&*error);
                tracing::warn!(error, "the DNS relay takes port 53 from the containers");
                let udp = UdpSocket::bind((listen, PORT)).await?;
                let tcp = TcpListener::bind((listen, PORT)).await?;
                Ok(Self { udp, tcp, redirect: None })
            }
        }
    }

    async fn aside(listen: IpAddr) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let (udp, tcp) = same_port(listen).await?;
        let (to, port) = (SocketAddr::new(listen, PORT), udp.local_addr()?.port());
        let redirect = Redirect::install(&Hierarchy::detect()?, to, port, &udp)?;
        Ok(Self { udp, tcp, redirect: Some(redirect) })
    }
}

async fn same_port(listen: IpAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut last = io::ErrorKind::AddrInUse.into();
    for _ in 0..PORTS {
        let udp = UdpSocket::bind((listen, 0)).await?;
        match TcpListener::bind((listen, udp.local_addr()?.port())).await {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// An id and a message.
type Frame = (u32, Vec<u8>);

/// None at the stream's end.
async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let id = match stream.read_u32().await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        id => id?,
    };
    let mut message = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut message).await?;
    Ok(Some((id, message)))
}

async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), frame: Frame) -> io::Result<()> {
    let (id, message) = frame;
    let mut bytes = Vec::with_capacity(6 + message.len());
    bytes.extend_from_slice(&id.to_be_bytes());
    bytes.extend_from_slice(&(message.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&message);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// A question from a TCP connection, and where its answer goes.
type Asked = (Vec<u8>, oneshot::Sender<Vec<u8>>);

/// Who waits for an answer.
enum Asker {
    /// Takes at most so many bytes.
    Udp(SocketAddr, usize),
    Tcp(oneshot::Sender<Vec<u8>>),
}

struct Relay {
    questions: mpsc::Sender<Frame>,
    pending: HashMap<u32, (Asker, Instant)>,
    next: u32,
}

impl Relay {
    async fn run(
        mut self,
        udp: UdpSocket,
        tcp: TcpListener,
        mut from_host: mpsc::Receiver<Frame>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; usize::from(u16::MAX)];
        let (asks, mut by_tcp) = mpsc::channel::<Asked>(1);
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                Ok((length, from)) = udp.recv_from(&mut buffer) => {
                    let question = &buffer[..length];
                    self.ask(question.to_vec(), Asker::Udp(from, udp_limit(question)));
                }
                Ok((stream, _)) = tcp.accept(), if connections.len() < CONNECTIONS => {
                    connections.spawn(connection(stream, asks.clone()));
                }
                Some(_) = connections.join_next() => {}
                Some((question, answer)) = by_tcp.recv() => self.ask(question, Asker::Tcp(answer)),
                frame = from_host.recv() => match frame {
                    Some((id, message)) => self.answer(id, message, &udp).await,
                    None => return Ok(()),
                },
            }
        }
    }

    fn ask(&mut self, question: Vec<u8>, asker: Asker) {
        if question.len() < HEADER {
            return;
        }
        if self.pending.len() >= PENDING {
            self.pending.retain(|_, (_, since)| since.elapsed() < PATIENCE);
        }
        if self.pending.len() >= PENDING {
            return;
        }
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        if self.questions.try_send((id, question)).is_ok() {
            self.pending.insert(id, (asker, Instant::now()));
        }
    }

    async fn answer(&mut self, id: u32, message: Vec<u8>, udp: &UdpSocket) {
        match self.pending.remove(&id) {
            Some((Asker::Udp(to, limit), _)) => {
                // An asker who is gone wants no answer.
                let _ = udp.send_to(&fitted(message, limit), to).await;
            }
            Some((Asker::Tcp(answer), _)) => drop(answer.send(message)),
            None => {}
        }
    }
}

/// Serves one TCP connection: questions and answers, each after its length, in turn.
async fn connection(mut stream: TcpStream, asks: mpsc::Sender<Asked>) {
    while let Ok(Some(())) = exchange(&mut stream, &asks).await {}
}

async fn exchange(stream: &mut TcpStream, asks: &mpsc::Sender<Asked>) -> io::Result<Option<()>> {
    let read = async {
        let mut question = vec![0; usize::from(stream.read_u16().await?)];
        stream.read_exact(&mut question).await?;
        io::Result::Ok(question)
    };
    let question = timeout(PATIENCE, read).await??;
    let (answer, answered) = oneshot::channel();
    if asks.send((question, answer)).await.is_err() {
        return Ok(None);
    }
    let Ok(message) = timeout(PATIENCE, answered).await? else { return Ok(None) };
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend_from_slice(&(message.len() as u16).to_be_bytes());
    bytes.extend_from_slice(&message);
    timeout(PATIENCE, stream.write_all(&bytes)).await??;
    Ok(Some(()))
}

/// Where the question section of a message with one question ends.
fn question_end(message: &[u8]) -> Option<usize> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            label @ 1..64 => at += 1 + usize::from(label),
            _ => return None,
        }
    }
    // The root label, type and class.
    (at + 5 <= message.len()).then_some(at + 5)
}

/// Longest answer that the asker takes by UDP: what its EDNS record says, or 512.
fn udp_limit(question: &[u8]) -> usize {
    const PLAIN: usize = 512;
    const ROOT_OPT: [u8; 3] = [0, 0, 41];
    let stated = || {
        let rest = question.get(question_end(question)?..)?;
        let no_records = question.get(6..10)? == [0; 4];
        if !no_records || rest.get(..3)? != ROOT_OPT {
            return None;
        }
        Some(usize::from(u16::from_be_bytes(rest.get(3..5)?.try_into().ok()?)))
    };
    stated().unwrap_or(PLAIN).max(PLAIN)
}

/// The message, or if it is too long its question alone, marked as cut: the asker will
/// come by TCP.
fn fitted(mut message: Vec<u8>, limit: usize) -> Vec<u8> {
    const TRUNCATED: u8 = 0x02;
    if message.len() <= limit || message.len() < HEADER {
        return message;
    }
    let end = question_end(&message).filter(|end| *end <= limit);
    if end.is_none() {
        message[4..6].fill(0);
    }
    message.truncate(end.unwrap_or(HEADER));
    message[6..HEADER].fill(0);
    message[2] |= TRUNCATED;
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A question for "a.b" of type A, with an EDNS record if `edns`.
    fn question(edns: Option<u16>) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns.is_some())];
        message.extend([1, b'a', 1, b'b', 0, 0, 1, 0, 1]);
        if let Some(size) = edns {
            message.extend([0, 0, 41]);
            message.extend(size.to_be_bytes());
            message.extend([0; 6]);
        }
        message
    }

    #[test]
    fn the_asker_says_how_much_it_takes() {
        assert_eq!(udp_limit(&question(None)), 512);
        assert_eq!(udp_limit(&question(Some(1232))), 1232);
        assert_eq!(udp_limit(&question(Some(100))), 512);
    }

    #[test]
    fn a_long_answer_is_cut_to_its_question() {
        let mut answer = question(None);
        answer[2] |= 0x80;
        answer[7] = 9;
        let whole = answer.len();
        answer.resize(2000, 0xaa);
        let cut = fitted(answer.clone(), 512);
        assert_eq!(cut.len(), whole);
        assert_eq!(cut[2] & 0x82, 0x82);
        assert_eq!(cut[6..12], [0; 6]);
        assert_eq!(fitted(answer.clone(), 2000), answer);
    }

    proptest! {
        #[test]
        fn any_message_is_fitted(message: Vec<u8>, limit in 512usize..2000) {
            let length = message.len();
            prop_assert!(fitted(message, limit).len() <= length.min(limit.max(12)));
        }

        #[test]
        fn any_question_has_a_limit(message: Vec<u8>) {
            prop_assert!(udp_limit(&message) >= 512);
        }
    }
}
