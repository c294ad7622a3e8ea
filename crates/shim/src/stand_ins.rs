//! The server's end of `attach.sock`: takes the engine's descriptors from stand-ins,
//! passes their signals on, and tells them how their process ended.

use crate::attach::{HELLO_FDS, Hello, MAX_PACKET, ToServer, ToStandIn};
use anyhow::{Context, bail, ensure};
use kata_protocol::{Id, chain};
use kata_sandbox::{EngineStreams, ProcessRef, Sandbox, Stdio, watch_fd};
use nix::cmsg_space;
use nix::sys::socket::{self, ControlMessageOwned, MsgFlags};
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};

/// How long `create` and `exec` wait for the stand-in that their caller has started already.
const PATIENCE: Duration = Duration::from_secs(10);

/// Packets that a stand-in may send before its process is there.
const EARLY: usize = 64;

/// Stand-ins that said hello and whose process is not there yet.
#[derive(Default)]
pub(crate) struct StandIns {
    waiting: Mutex<HashMap<ProcessRef, StandIn>>,
    arrived: Notify,
}

/// A stand-in and what the engine gave it.
pub(crate) struct StandIn {
    /// Its pid, as the kernel tells it.
    pub pid: i32,
    /// The process's streams.
    pub stdio: Stdio,
    bound: oneshot::Sender<Result<(), String>>,
}

impl StandIn {
    /// Parts it: pid, streams, and the means to tell it how `create` went.
    pub(crate) fn into_parts(self) -> (i32, Stdio, oneshot::Sender<Result<(), String>>) {
        (self.pid, self.stdio, self.bound)
    }
}

impl StandIns {
    /// Takes stand-ins for as long as the server lives.
    pub(crate) async fn serve(self: Arc<Self>, listener: OwnedFd, sandbox: Arc<Sandbox>) {
        let listener = match nonblocking(listener).and_then(watch_fd) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(sandbox = %sandbox.id(), %error, "cannot listen for stand-ins");
                return;
            }
        };
        loop {
            match accept(&listener).await {
                Ok(connection) => {
                    let (this, sandbox) = (Arc::clone(&self), Arc::clone(&sandbox));
                    tokio::spawn(async move {
                        if let Err(error) = this.converse(connection, &sandbox).await {
                            tracing::warn!(sandbox = %sandbox.id(), "stand-in: {error:#}");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(sandbox = %sandbox.id(), %error, "cannot accept a stand-in");
                    // Out of descriptors, most likely: give the others time to end.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// The stand-in of `process`, which its caller started before it called us.
    pub(crate) async fn take(&self, process: &ProcessRef) -> anyhow::Result<StandIn> {
        let found = async {
            loop {
                let arrived = self.arrived.notified();
                if let Some(found) = self.lock().remove(process) {
                    return found;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(PATIENCE, found)
            .await
            .with_context(|| format!("no stand-in for container {} came", process.container))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ProcessRef, StandIn>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn converse(&self, connection: Connection, sandbox: &Arc<Sandbox>) -> anyhow::Result<()> {
        let (process, mut bound) = match self.welcome(&connection).await {
            Ok(welcomed) => welcomed,
            Err(error) => {
                let _ = connection.send(&ToStandIn::Error(format!("{error:#}"))).await;
                return Err(error);
            }
        };
        connection.send(&ToStandIn::Ready).await?;
        // Engines set a terminal's size, or signal, before the process is there.
        let mut early = Vec::new();
        let created = loop {
            tokio::select! {
                created = &mut bound => {
                    break created.unwrap_or_else(|_| Err("create was given up".to_owned()));
                }
                packet = connection.receive() => match packet {
                    Ok(Some((bytes, _))) if early.len() < EARLY => early.push(bytes),
                    _gone => {
                        self.lock().remove(&process);
                        return Ok(());
                    }
                },
            }
        };
        if let Err(message) = created {
            connection.send(&ToStandIn::Error(message)).await?;
            return Ok(());
        }
        for bytes in early {
            obey(&bytes, &process, sandbox).await?;
        }
        stand(&connection, &process, sandbox).await
    }

    async fn welcome(
        &self,
        connection: &Connection,
    ) -> anyhow::Result<(ProcessRef, oneshot::Receiver<Result<(), String>>)> {
        let (bytes, fds) = connection.receive().await?.context("it left without a word")?;
        let hello: Hello = serde_json::from_slice(&bytes).context("its hello is not JSON")?;
        ensure!(fds.len() == HELLO_FDS, "it gave {} descriptors, not {HELLO_FDS}", fds.len());
        let exec = (!hello.exec.is_empty()).then(|| hello.exec.parse::<Id>()).transpose()?;
        let process = ProcessRef { container: hello.container.parse()?, exec };
        let mut fds = fds.into_iter();
        let streams = EngineStreams {
            stdin: fds.next(),
            stdout: fds.next(),
            stderr: fds.next().filter(|_| !hello.terminal),
            held: Vec::new(),
        };
        let stdio = Stdio {
            streams,
            terminal: hello.terminal,
            rows: hello.rows,
            columns: hello.columns,
            ..Stdio::default()
        };
        let (bound, waits) = oneshot::channel();
        let stand_in = StandIn { pid: connection.peer()?, stdio, bound };
        if self.lock().insert(process.clone(), stand_in).is_some() {
            bail!("two stand-ins came for the same process");
        }
        self.arrived.notify_waiters();
        Ok((process, waits))
    }
}

/// From here on the process exists: its signals, its sizes, its end.
async fn stand(
    connection: &Connection,
    process: &ProcessRef,
    sandbox: &Arc<Sandbox>,
) -> anyhow::Result<()> {
    let ended = sandbox.wait(process);
    tokio::pin!(ended);
    loop {
        let packet = tokio::select! {
            exit = &mut ended => {
                connection.send(&ToStandIn::Exit(exit?.code)).await?;
                break;
            }
            packet = connection.receive() => packet,
        };
        let Ok(Some((bytes, _))) = packet else {
            // Whoever kills the stand-in means the process.
            const SIGKILL: u32 = 9;
            let _ = sandbox.kill(process, SIGKILL, false).await;
            let _ = ended.await;
            break;
        };
        obey(&bytes, process, sandbox).await?;
    }
    if process.exec.is_some() {
        // The OCI command line has no verb by which a caller could forget an exec.
        sandbox.delete(process).await?;
    }
    Ok(())
}

/// Does what a stand-in's packet says.
async fn obey(bytes: &[u8], process: &ProcessRef, sandbox: &Arc<Sandbox>) -> anyhow::Result<()> {
    let done = match serde_json::from_slice(bytes).context("its packet is not known")? {
        ToServer::Signal(signal) => sandbox.kill(process, signal.unsigned_abs(), false).await,
        ToServer::Resize { rows, columns } => {
            sandbox.resize(process, rows.into(), columns.into()).await
        }
    };
    if let Err(error) = done {
        tracing::debug!(sandbox = %sandbox.id(), error = %chain(&error), "a stand-in's wish failed");
    }
    Ok(())
}

/// A connection with packets and descriptors.
struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// The next packet; none at the end.
    async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|fd| receive(fd.as_raw_fd())) {
                return result;
            }
        }
    }

    async fn send(&self, message: &ToStandIn) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        loop {
            let mut ready = self.0.writable().await?;
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_EOR;
            let sent = ready.try_io(|fd| Ok(socket::send(fd.as_raw_fd(), &bytes, flags)?));
            if let Ok(result) = sent {
                return result.map(|_| ());
            }
        }
    }

    fn peer(&self) -> io::Result<i32> {
        Ok(socket::getsockopt(&self.0, socket::sockopt::PeerCredentials)?.pid())
    }
}

fn receive(fd: RawFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = cmsg_space!([RawFd; HELLO_FDS]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message =
        socket::recvmsg::<()>(fd, &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let count = message.bytes;
    if count == 0 {
        return Ok(None);
    }
    bytes.truncate(count);
    Ok(Some((bytes, fds)))
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<Connection> {
    use rustix::net::SocketFlags;
    loop {
        let mut ready = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accepted = ready.try_io(|fd| Ok(rustix::net::accept_with(fd.get_ref(), flags)?));
        if let Ok(result) = accepted {
            return Ok(Connection(watch_fd(result?)?));
        }
    }
}

pub(crate) fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}
