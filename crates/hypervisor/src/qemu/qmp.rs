//! QEMU's control socket.
//!
//! One task reads, and hands each answer to the call with its id; what nobody asked for is
//! an event. Descriptors go along by `SCM_RIGHTS`. Every call has a deadline, and ends at
//! once when QEMU does.
//!
//! QEMU counts as taken over by its guest: lines are bounded, and odd ones end the
//! connection instead of us.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, oneshot};
use tokio::task::JoinHandle;

/// Longest line taken from QEMU, bytes. Answers to our commands are far below.
const LINE: usize = 1 << 20;
/// Events kept for a listener that is slow.
const EVENTS: usize = 64;

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// QEMU closed the socket: it has ended, or is about to.
    #[error("qemu closed its control socket during {0:?}")]
    Closed(&'static str),
    /// QEMU did not answer.
    #[error("qemu did not answer {command:?} within {}", seconds(.deadline))]
    Deadline {
        /// The command.
        command: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// QEMU refused.
    #[error("qemu refused {command:?}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
    },
    /// QEMU's answer is not what this command's answer looks like.
    #[error("qemu's answer to {0:?} is not understood")]
    Answer(&'static str, #[source] serde_json::Error),
    /// The command could not be sent.
    #[error("cannot send {0:?} to qemu")]
    Send(&'static str, #[source] io::Error),
}

fn seconds(duration: &Duration) -> String {
    format!("{} s", duration.as_secs_f32())
}

/// A command, with its arguments as fields.
pub(crate) trait Command: Serialize {
    /// Its name.
    const NAME: &'static str;
    /// What it answers.
    type Answer: DeserializeOwned;
}

/// Makes commands whose answer is of no interest.
macro_rules! commands {
    ($($(#[$doc:meta])* $type:ident = $name:literal { $($field:ident: $kind:ty),* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub(crate) struct $type { $(
            pub $field: $kind,
        )* }
        impl Command for $type {
            const NAME: &'static str = $name;
            type Answer = Value;
        }
    )*};
}

commands! {
    /// Ends the negotiation.
    QmpCapabilities = "qmp_capabilities" {}
    /// Ends QEMU.
    Quit = "quit" {}
    /// Asks how it is.
    QueryStatus = "query-status" {}
    /// Stops the virtual CPUs.
    Stop = "stop" {}
    /// Lets them run.
    Cont = "cont" {}
    /// Names the descriptor that comes along.
    Getfd = "getfd" { fdname: String }
    /// Gives a named descriptor up.
    Closefd = "closefd" { fdname: String }
    /// Takes the descriptor that comes along into a set, under which files are opened.
    AddFd = "add-fd" { fdset_id: u32 }
    /// Gives a set of descriptors up.
    RemoveFd = "remove-fd" { fdset_id: u32 }
    /// Removes the host's side of a disk.
    BlockdevDel = "blockdev-del" { node_name: String }
    /// Removes the host's end of a network interface.
    NetdevDel = "netdev_del" { id: String }
    /// Chooses how machines are saved and restored.
    MigrateSetCapabilities = "migrate-set-capabilities" { capabilities: Value }
    /// Chooses what a restored machine does by itself.
    MigrateSetParameters = "migrate-set-parameters" { announce_rounds: u32 }
    /// Saves the machine.
    Migrate = "migrate" { uri: String }
    /// Restores it.
    MigrateIncoming = "migrate-incoming" { uri: String }
    /// Asks the guest to let go of a device.
    DeviceDel = "device_del" { id: String }
}

/// Makes the host's end of a network interface from a named tap.
#[derive(Debug, Serialize)]
pub(crate) struct NetdevAddTap {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub id: String,
    /// Name given by [`Getfd`].
    pub fd: String,
    /// Whether the host's kernel moves the packets.
    pub vhost: bool,
    /// Name of its device, given by [`Getfd`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhostfd: Option<String>,
}

impl Command for NetdevAddTap {
    const NAME: &'static str = "netdev_add";
    type Answer = Value;
}

/// Makes the host's side of a disk.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct BlockdevAdd {
    pub driver: &'static str,
    pub node_name: String,
    pub read_only: bool,
    /// What is below the format.
    pub file: Value,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Answer = Value;
}

/// Plugs a device.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceAdd {
    pub driver: &'static str,
    pub id: String,
    pub bus: String,
    #[serde(flatten)]
    pub properties: Map<String, Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Answer = Value;
}

/// Something that QEMU says unasked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub name: String,
    pub data: Value,
}

/// A line from QEMU.
#[derive(Debug, PartialEq)]
enum Message {
    Greeting,
    Answer { id: u64, answer: Result<Value, String> },
    Event(Event),
}

/// As QEMU writes it.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

/// Reads a line. `None` if it is nothing that QMP has.
fn parse(line: &[u8]) -> Option<Message> {
    let line: Line = serde_json::from_slice(line).ok()?;
    match line {
        Line { greeting: Some(_), .. } => Some(Message::Greeting),
        Line { event: Some(name), data, .. } => Some(Message::Event(Event { name, data })),
        Line { id: Some(id), error: Some(refusal), .. } => {
            let reason = crate::console::sanitise(&refusal.desc);
            Some(Message::Answer { id, answer: Err(reason) })
        }
        Line { id: Some(id), answer, .. } => {
            Some(Message::Answer { id, answer: Ok(answer.unwrap_or(Value::Null)) })
        }
        _ => None,
    }
}

/// A line from anybody, for the fuzz target.
#[cfg(fuzzing)]
pub(crate) fn fuzz(line: &[u8]) {
    let _ = parse(line);
}

type Waiting = HashMap<u64, oneshot::Sender<Result<Value, String>>>;

/// The host's end of the control socket. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Qmp(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stream: UnixStream,
    /// Held while a command is written; one line must not mix with another.
    writing: tokio::sync::Mutex<()>,
    /// Calls that wait; `None` once QEMU is gone.
    waiting: Mutex<Option<Waiting>>,
    next: AtomicU64,
    events: broadcast::Sender<Event>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Qmp {
    /// Speaks QMP over this socket, whose other end QEMU has or is about to get. The
    /// negotiation is sent at once, and QEMU reads it when it is up.
    /// The task reads, and ends when QEMU closes its end, at the latest when it is killed.
    pub(crate) fn new(stream: UnixStream) -> (Self, JoinHandle<()>) {
        let qmp = Self(Arc::new(Shared {
            stream,
            writing: tokio::sync::Mutex::new(()),
            waiting: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(0),
            events: broadcast::Sender::new(EVENTS),
        }));
        let reader = tokio::spawn(read(Arc::clone(&qmp.0)));
        (qmp, reader)
    }

    /// What QEMU says unasked, from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Sends a command and waits for its answer.
    pub(crate) async fn call<C: Command>(
        &self,
        command: &C,
        deadline: Duration,
    ) -> Result<C::Answer, QmpError> {
        self.call_with_fd(command, None, deadline).await
    }

    /// As [`Self::call`], with a descriptor.
    pub(crate) async fn call_with_fd<C: Command>(
        &self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<C::Answer, QmpError> {
        let late = QmpError::Deadline { command: C::NAME, deadline };
        let answer = tokio::time::timeout(deadline, self.exchange(command, fd)).await;
        let answer = answer.unwrap_or(Err(late))?;
        serde_json::from_value(answer).map_err(|source| QmpError::Answer(C::NAME, source))
    }

    async fn exchange<C: Command>(
        &self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let shared = &self.0;
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let text = json!({ "execute": C::NAME, "arguments": command, "id": id }).to_string();
        let (sender, receiver) = oneshot::channel();
        match shared.waiting().as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(QmpError::Closed(C::NAME)),
        };
        // Whatever happens below, nobody waits for this id afterwards.
        let _forget = Forget(shared, id);
        {
            let _writing = shared.writing.lock().await;
            send(&shared.stream, text.as_bytes(), fd)
                .await
                .map_err(|source| QmpError::Send(C::NAME, source))?;
        }
        let answer = receiver.await.map_err(|_| QmpError::Closed(C::NAME))?;
        answer.map_err(|reason| QmpError::Refused { command: C::NAME, reason })
    }
}

/// A call that no longer waits.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.waiting().as_mut() {
            waiting.remove(&self.1);
        }
    }
}

/// Writes all of it; the descriptor goes with the first byte.
async fn send(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let fds = fd.map(|fd| [fd]);
                if let Some(fds) = &fds {
                    control.push(SendAncillaryMessage::ScmRights(fds));
                }
                let flags = SendFlags::NOSIGNAL;
                Ok(sendmsg(stream.as_fd(), &[IoSlice::new(bytes)], &mut control, flags)?)
            })
            .await?;
        bytes = &bytes[sent..];
        fd = None;
    }
    Ok(())
}

/// Reads until QEMU closes the socket or says what it may not.
async fn read(shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    loop {
        if shared.stream.readable().await.is_err() {
            break;
        }
        match shared.stream.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
            Ok(_) => {}
        }
        let mut start = 0;
        while let Some(length) = buffer[start..].iter().position(|byte| *byte == b'\n') {
            dispatch(&shared, &buffer[start..start + length]);
            start += length + 1;
        }
        buffer.drain(..start);
        if buffer.len() > LINE {
            tracing::warn!(
                limit = LINE,
                "qemu sent a line that is too long; not listening to it any more"
            );
            break;
        }
    }
    // Drops all senders: every call that waits ends.
    shared.waiting().take();
}

fn dispatch(shared: &Shared, line: &[u8]) {
    match parse(line) {
        Some(Message::Answer { id, answer }) => {
            let waiting = shared.waiting().as_mut().and_then(|waiting| waiting.remove(&id));
            if let Some(sender) = waiting {
                let _ = sender.send(answer);
            }
        }
        Some(Message::Event(event)) => {
            tracing::debug!(event = event.name, data = %event.data, "qemu");
            // Without a listener nobody wants to know.
            let _ = shared.events.send(event);
        }
        Some(Message::Greeting) => {}
        None => {
            tracing::debug!(line = %String::from_utf8_lossy(line).escape_debug(), "not understood")
        }
    }
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
