//! The server's end of `attach.sock`: takes the engine's descriptors from stand-ins,
//! passes their signals on, and tells them how their process ended.

use crate::attach::{HELLO_FDS, Hello, ToServer, ToStandIn};
use anyhow::{Context, bail, ensure};
use kata_protocol::{Id, chain};
use kata_sandbox::packets::{PacketListener, Packets};
use kata_sandbox::{EngineStreams, ProcessRef, Sandbox, Stdio};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
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
        let listener = match PacketListener::new(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(sandbox = %sandbox.id(), %error, "cannot listen for stand-ins");
                return;
            }
        };
        loop {
            match listener.accept().await {
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

    async fn converse(&self, connection: Packets, sandbox: &Arc<Sandbox>) -> anyhow::Result<()> {
        let (process, mut bound) = match self.welcome(&connection).await {
            Ok(welcomed) => welcomed,
            Err(error) => {
                let _ = tell(&connection, &ToStandIn::Error(format!("{error:#}"))).await;
                return Err(error);
            }
        };
        tell(&connection, &ToStandIn::Ready).await?;
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
            tell(&connection, &ToStandIn::Error(message)).await?;
            return Ok(());
        }
        for bytes in early {
            obey(&bytes, &process, sandbox).await?;
        }
        stand(&connection, &process, sandbox).await
    }

    async fn welcome(
        &self,
        connection: &Packets,
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
    connection: &Packets,
    process: &ProcessRef,
    sandbox: &Arc<Sandbox>,
) -> anyhow::Result<()> {
    let ended = sandbox.wait(process);
    tokio::pin!(ended);
    loop {
        let packet = tokio::select! {
            exit = &mut ended => {
                tell(connection, &ToStandIn::Exit(exit?.code)).await?;
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

async fn tell(connection: &Packets, message: &ToStandIn) -> io::Result<()> {
    connection.send(&serde_json::to_vec(message)?, &[]).await
}

pub(crate) fn nonblocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}
