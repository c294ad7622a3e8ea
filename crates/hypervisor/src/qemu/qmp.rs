//! QEMU's machine protocol: one JSON object per line, both ways.
//!
//! Answers find their question by id; events go to whoever listens. QEMU is not quite
//! trusted (a guest may have taken it over): lines are bounded, and what is not understood
//! is ignored.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot};

/// Longest line that is read, bytes.
const LONGEST_LINE: u64 = 1 << 20;
/// How long QEMU may take to answer. It answers in milliseconds unless it hangs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a command failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum QmpError {
    /// QEMU refused; its own words.
    #[error("qemu refused: {0}")]
    Refused(String),
    /// The connection is over: QEMU has ended.
    #[error("qemu has ended")]
    Closed,
    /// No answer in time.
    #[error("qemu did not answer within {} s", PATIENCE.as_secs())]
    Late,
    /// The command could not be written.
    #[error("cannot write to qemu: {0}")]
    Write(String),
}

/// Something that QEMU tells unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub name: String,
    pub data: Value,
}

/// One line from QEMU.
#[derive(Debug, Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

type Answer = Result<Value, QmpError>;
type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

/// A connection to a monitor.
pub(crate) struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    /// Questions without answer yet; none when the connection is over.
    pending: Pending,
    next: AtomicU64,
    events: broadcast::Sender<Event>,
}

impl Qmp {
    /// Takes over a connected socket. QEMU's greeting is waited for by nobody: it reads the
    /// commands that were sent before it.
    pub(crate) fn new(socket: UnixStream) -> Self {
        let (reader, writer) = socket.into_split();
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let events = broadcast::Sender::new(64);
        tokio::spawn(follow(reader, Arc::clone(&pending), events.clone()));
        Self { writer: tokio::sync::Mutex::new(writer), pending, next: AtomicU64::new(1), events }
    }

    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Executes a command.
    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Answer {
        self.execute_with(command, arguments, None).await
    }

    /// Executes a command that takes a descriptor along (`getfd`).
    pub(crate) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Answer {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut question = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            question["arguments"] = arguments;
        }
        let (sender, answer) = oneshot::channel();
        match lock(&self.pending).as_mut() {
            Some(pending) => pending.insert(id, sender),
            None => return Err(QmpError::Closed),
        };
        tracing::trace!(%question, "qmp");
        self.write(format!("{question}\r\n").as_bytes(), fd)
            .await
            .map_err(|error| QmpError::Write(error.to_string()))?;
        let answer = tokio::time::timeout(PATIENCE, answer).await.map_err(|_| QmpError::Late)?;
        answer.unwrap_or(Err(QmpError::Closed))
    }

    async fn write(&self, mut bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let writer = self.writer.lock().await;
        let stream: &UnixStream = writer.as_ref();
        while !bytes.is_empty() {
            stream.writable().await?;
            let written = stream.try_io(Interest::WRITABLE, || {
                let fds: Vec<i32> = fd.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&fds)];
                let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                let slices = [IoSlice::new(bytes)];
                Ok(sendmsg::<()>(stream.as_raw_fd(), &slices, control, flags, None)?)
            });
            match written {
                Ok(count) => {
                    bytes = &bytes[count..];
                    fd = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn follow(reader: OwnedReadHalf, pending: Pending, events: broadcast::Sender<Event>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(LONGEST_LINE).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(count) if count > 0) || line.len() as u64 >= LONGEST_LINE {
            break;
        }
        take_line(&line, &pending, &events);
    }
    if let Some(pending) = lock(&pending).take() {
        for sender in pending.into_values() {
            let _ = sender.send(Err(QmpError::Closed));
        }
    }
}

fn take_line(line: &[u8], pending: &Pending, events: &broadcast::Sender<Event>) {
    let Ok(line) = serde_json::from_slice::<Line>(line) else { return };
    if let Some(name) = line.event {
        tracing::debug!(name, "qemu event");
        let _ = events.send(Event { name, data: line.data });
        return;
    }
    let Some(sender) = line.id.and_then(|id| lock(pending).as_mut()?.remove(&id)) else { return };
    let answer = match line.error {
        Some(refusal) => Err(QmpError::Refused(refusal.desc)),
        None => Ok(line.value.unwrap_or_default()),
    };
    let _ = sender.send(answer);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use tokio::io::AsyncWriteExt;

    async fn answered(reply: &'static str) -> Answer {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        let qemu = async move {
            let mut theirs = BufReader::new(theirs);
            let mut line = String::new();
            theirs.read_line(&mut line).await.unwrap();
            theirs.write_all(reply.as_bytes()).await.unwrap();
            theirs
        };
        let (answer, _qemu) = tokio::join!(qmp.execute("x", Value::Null), qemu);
        answer
    }

    #[tokio::test]
    async fn answer_finds_its_question_behind_greeting_and_events() {
        let reply = "{\"QMP\":{}}\r\n{\"event\":\"STOP\"}\r\nnoise\r\n{\"return\":{},\"id\":99}\r\n\
                     {\"return\":{\"a\":1},\"id\":1}\r\n";
        assert_eq!(answered(reply).await, Ok(json!({"a": 1})));
    }

    #[tokio::test]
    async fn refusal_is_told_in_qemus_words() {
        let reply = "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no such bus\"},\"id\":1}\r\n";
        assert_eq!(answered(reply).await, Err(QmpError::Refused("no such bus".into())));
    }

    #[tokio::test]
    async fn the_end_of_qemu_ends_a_command_at_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        drop(theirs);
        assert!(qmp.execute("x", Value::Null).await.is_err());
    }

    #[tokio::test]
    async fn a_descriptor_goes_along() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(ours);
        let file = tempfile::tempfile().unwrap();
        let sent = qmp.execute_with("getfd", json!({"fdname": "x"}), Some(file.as_fd()));
        let receive = async {
            theirs.readable().await.unwrap();
            let mut bytes = [0; 256];
            let mut space = nix::cmsg_space!([i32; 1]);
            let mut slices = [io::IoSliceMut::new(&mut bytes)];
            let message = nix::sys::socket::recvmsg::<()>(
                theirs.as_raw_fd(),
                &mut slices,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )
            .unwrap();
            message.cmsgs().unwrap().count()
        };
        tokio::select! {
            _ = sent => panic!("nobody answered"),
            count = receive => assert_eq!(count, 1),
        }
    }

    proptest! {
        #[test]
        fn any_line_is_taken_or_ignored(line: Vec<u8>) {
            let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
            take_line(&line, &pending, &broadcast::Sender::new(4));
        }
    }
}
