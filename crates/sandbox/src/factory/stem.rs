//! The process that holds a stem: a machine that stands still, of which sandboxes' are forked.
//!
//! It is the tracer of the machine's monitor, which its forks cannot outlive; so it stays until
//! the last of them has ended, also when the factory has gone and nobody can ask for another.
//! Each sandbox's server has a line to it. By that it gives its order and hears how the fork
//! ended; when a server goes, its fork is ended.

use super::client::failed;
use super::pool::LINE_FD;
use super::recipe::Recipe;
use super::spare::{self, Purpose, Rehearsed};
use super::wire::{FromSpare, FromStem, Order};
use crate::io::watch_fd;
use crate::packets::Packets;
use crate::{SandboxDir, SandboxError};
use kata_hypervisor::Stem;
use kata_protocol::chain;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::rc::Rc;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};

/// Neither the keeper nor what stands still goes when memory is short, for all forks would.
const OOM_SCORE: i32 = -999;

/// The role `stem`: makes a machine that stands still, and forks it until nobody wants more.
///
/// # Errors
/// It cannot be made, or has ended.
pub fn main(args: &str) -> Result<(), SandboxError> {
    let recipe: Recipe = serde_json::from_str(args).map_err(|error| {
        SandboxError::Factory(format!("what it wants is not readable: {error}"))
    })?;
    // SAFETY: who starts this role hands it this descriptor (standing::launch); this is the first
    // and only place that takes it.
    let line = unsafe { OwnedFd::from_raw_fd(LINE_FD) };
    // A fork shares pages until it writes to them. What it adds to is best in small ones: of the
    // large ones that monitors ask for, each would take two megabytes at its first byte.
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::warn!(%error, "a stem has large pages");
    }
    // One thread: only the tracer of a process may ask for anything of it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(SandboxError::io("start the runtime"))?;
    LocalSet::new().block_on(&runtime, async {
        let line = Packets::new(line).map_err(failed("use the line to the factory"))?;
        let (stem, _held) = make(recipe).await?;
        let ready = serde_json::to_vec(&FromSpare::Ready).unwrap_or_default();
        line.send(&ready, &stem.memory().fds()).await.map_err(failed("answer the factory"))?;
        serve(stem, line).await
    })
}

/// Makes the machine; gives what must stay as long as it, too.
async fn make(recipe: Recipe) -> Result<(Stem, impl Sized), SandboxError> {
    let id = spare::name(std::process::id())?;
    let dir = SandboxDir::create(&id).map_err(failed("make a stem's directory"))?;
    let stem =
        async { Rehearsed::prepare(&recipe, &id, &dir, Purpose::Stem).await?.stand_still().await };
    let stem = stem.await;
    // From here on all that there is goes with this process.
    let removed = dir.remove().map_err(failed("remove a stem's directory"));
    let stem = stem?;
    removed?;
    for pid in [std::process::id().cast_signed(), stem.0.pid()] {
        spare::set_oom_score(pid, OOM_SCORE);
    }
    Ok(stem)
}

async fn serve(stem: Stem, line: Packets) -> Result<(), SandboxError> {
    let stem = Rc::new(stem);
    let served = attend_all(&stem, &line).await;
    if let Ok(stem) = Rc::try_unwrap(stem) {
        stem.end().await;
    }
    served
}

/// Serves until no fork is wanted any more, and none is left.
async fn attend_all(stem: &Rc<Stem>, line: &Packets) -> Result<(), SandboxError> {
    let mut children = signal(SignalKind::child()).map_err(failed("watch a stem"))?;
    let mut forks = JoinSet::new();
    let mut wanted = true;
    while wanted || !forks.is_empty() {
        tokio::select! {
            packet = line.receive(), if wanted => match packet {
                Ok(Some((_, fds))) => {
                    for fd in fds {
                        forks.spawn_local(attend(Rc::clone(stem), fd));
                    }
                }
                Ok(None) | Err(_) => wanted = false,
            },
            Some(_) = forks.join_next() => {}
            _ = children.recv() => {
                if !stem.stands() {
                    return Err(SandboxError::Lost("the monitor that stood still".to_owned()));
                }
            }
        }
    }
    Ok(())
}

/// Serves one that wants a fork, until that has ended.
async fn attend(stem: Rc<Stem>, line: OwnedFd) {
    if let Err(error) = fork(&stem, line).await {
        tracing::warn!(%error, "a fork was not attended to its end");
    }
}

async fn fork(stem: &Stem, line: OwnedFd) -> io::Result<()> {
    let line = Packets::new(line)?;
    // Who asked for the template may have changed its mind.
    let Some((order, fds)) = line.receive().await? else { return Ok(()) };
    let Order { id, memory } = serde_json::from_slice(&order)?;
    let forked = match stem.fork(&id, memory, fds) {
        Ok(forked) => forked,
        Err(error) => {
            let why = chain(&error);
            tracing::warn!(sandbox = id, why, "cannot fork");
            return line.send(&serde_json::to_vec(&FromStem::Failed(why))?, &[]).await;
        }
    };
    // Its faults stay open here until it has ended: without their server it is to wait, not to go on.
    let touches = forked.touches.as_ref();
    let pieces = touches.map(|touches| touches.pieces.clone()).unwrap_or_default();
    let said = serde_json::to_vec(&FromStem::Forked { pid: forked.pid, pieces })?;
    let faults = touches.map(|touches| touches.faults.as_fd());
    let fds: Vec<_> = [Some(forked.pidfd.as_fd()), faults].into_iter().flatten().collect();
    let told = line.send(&said, &fds).await;
    let pidfd = forked.pidfd.try_clone()?;
    let ended = watch_fd(pidfd)?;
    if told.is_err() || hung_up(&line, &ended).await {
        let signal = rustix::process::Signal::KILL;
        // If it has just ended, that is as well.
        let _ = rustix::process::pidfd_send_signal(&forked.pidfd, signal);
        let _ = ended.readable().await?;
    }
    let status = stem.reap(&forked).map_err(io::Error::other)?;
    let status = status.map_or(libc::SIGKILL, ExitStatusExt::into_raw);
    // Nobody may want to know any more.
    let _ = line.send(&serde_json::to_vec(&FromStem::Ended(status))?, &[]).await;
    Ok(())
}

/// Waits until the fork has ended (false), or who asked for it has gone (true).
async fn hung_up(line: &Packets, ended: &AsyncFd<OwnedFd>) -> bool {
    tokio::select! {
        _ = ended.readable() => false,
        _ = line.receive() => true,
    }
}
