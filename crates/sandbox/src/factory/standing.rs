//! Stems, as the factory has them.

use super::pool::LINE_FD;
use super::recipe::Recipe;
use super::spare;
use super::wire::FromSpare;
use crate::packets::Packets;
use crate::{SandboxDir, SandboxError, cleanup};
use kata_hypervisor::StemMemory;
use kata_jail::{Child, Launch, Role};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// A process that holds a stem. It is told that no more forks are wanted by this being dropped.
pub(super) struct Standing {
    child: Arc<Child>,
    line: Packets,
    memory: StemMemory,
}

impl Standing {
    /// Makes one, of a template that exists; returns when it stands.
    pub(super) async fn make(recipe: &Recipe) -> Result<Self, SandboxError> {
        let (child, line) = launch(recipe, Role::Stem, "kata-stem").map_err(failed)?;
        let child = Arc::new(child);
        let ends = Arc::clone(&child);
        tokio::spawn(async move { ends.wait().await });
        let ready = line.receive().await.map_err(failed)?;
        let ready = ready.and_then(|(said, fds)| {
            let said = serde_json::from_slice(&said).ok()?;
            let memory = <[OwnedFd; 2]>::try_from(fds).ok()?;
            matches!(said, FromSpare::Ready).then(|| StemMemory::from_fds(memory))
        });
        match ready {
            Some(memory) => Ok(Self { child, line, memory }),
            None => {
                // One that was killed could not undo what it had begun.
                let _ = child.wait().await;
                cleanup(&SandboxDir::of(&spare::name(child.pid().unsigned_abs())?))?;
                Err(SandboxError::Factory("it ended; what it said is above".to_owned()))
            }
        }
    }

    /// Whether it may still be asked.
    pub(super) fn stands(&self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// A line by which one fork can be asked for.
    pub(super) async fn line(&self) -> io::Result<OwnedFd> {
        let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
        let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
        self.line.send(b"fork", &[theirs.as_fd()]).await?;
        Ok(ours)
    }

    /// The memory of the machine that stands still.
    pub(super) fn memory(&self) -> &StemMemory {
        &self.memory
    }
}

fn failed(error: io::Error) -> SandboxError {
    SandboxError::io("make a machine that stands still")(error)
}

/// Starts a process in one of the roles that make a machine of a recipe, with a line to it.
pub(super) fn launch(recipe: &Recipe, role: Role, title: &str) -> io::Result<(Child, Packets)> {
    let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None)?;
    let launch = Launch::role(role, title, recipe)
        .map_err(io::Error::other)?
        .fd(theirs, LINE_FD)
        .stderr(io::stderr().as_fd().try_clone_to_owned()?)
        .directory(Path::new("/"))
        .new_session();
    let child = launch.spawn().map_err(io::Error::other)?;
    Ok((child, Packets::new(ours)?))
}
