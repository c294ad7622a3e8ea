//! What the factory is asked, and what it answers: one JSON object per packet.

use super::recipe::Recipe;
use crate::RUN_DIR;
use kata_hypervisor::ForkMemory;
use kata_pager::Mapping;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A packet to the factory.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Request {
    /// The build of who asks.
    pub build: String,
    pub ask: Ask,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// The template of this key, if there is one; else let it be made.
    Fetch {
        key: String,
        recipe: Recipe,
        /// A fork of it is as good.
        forks: bool,
    },
    /// Make it now, and say when it is there.
    Make {
        recipe: Recipe,
    },
    /// The template of this key is of no use.
    Broken {
        key: String,
    },
    /// A spare sandbox server is to become the one of the sandbox that this describes. With it
    /// come the descriptors on which it is to serve.
    Take(Take),
    Status,
    /// Forget all, and end.
    Destroy,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The template comes along as two descriptors: memory and devices.
    Template,
    /// A machine stands still, of which forks can be had. With it come a line to its keeper
    /// and its memory as two descriptors.
    Stem,
    /// There is none so far.
    NotYet,
    /// A spare server is the sandbox's now.
    Taken,
    Status(Vec<TemplateStatus>),
    Done,
    /// The factory is of another build, and ends.
    OtherBuild,
    Failed(String),
}

/// What makes a spare server the server of a sandbox.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Take {
    /// Whose directory exists.
    pub sandbox: String,
    pub recipe: Recipe,
    /// Namespaces of who asks: paths mean the same only where they are the same.
    pub place: String,
    /// Arguments of the server, as it has them when it is started for a sandbox.
    pub args: String,
    /// How soon it is to go when memory is short: as it would have inherited it.
    pub oom_score_adj: i32,
}

/// What a spare server says to the factory.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromSpare {
    /// It has a machine and waits.
    Ready,
    /// It took the sandbox over.
    Taken,
}

/// What the keeper of a stem is asked, with the descriptors that belong to it.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Order {
    /// Name of the machine.
    pub id: String,
    pub memory: ForkMemory,
}

/// What the keeper of a stem says to who asked for a fork.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FromStem {
    /// There it is; its pidfd comes along, and its page faults where it copies what it touches.
    Forked {
        pid: i32,
        /// Of its memory, what is copied.
        pieces: Vec<Mapping>,
    },
    /// It ended, with this status as of wait(2).
    Ended(i32),
    Failed(String),
}

/// One template, as `factory status` shows it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TemplateStatus {
    /// A short name of what it is found by.
    pub name: String,
    /// `ready`, `being made`, or why it could not be made.
    pub state: String,
    /// MiB of its guests' memory.
    pub memory_mib: u32,
    /// Their virtual CPUs.
    pub vcpus: u32,
    /// Bytes of the host's memory that it takes.
    pub bytes: u64,
    /// Whether machines are forked from it.
    pub forks: bool,
    /// Clones and forks that were made of it.
    pub clones: u64,
    /// Clones that wait for a sandbox.
    pub spares: u32,
    /// How many should.
    pub spares_wanted: u32,
}

/// Where the factory listens. No sandbox's directory begins with a dot.
pub(super) fn socket_path() -> PathBuf {
    Path::new(RUN_DIR).join(".factory.sock")
}

/// Held by who starts a factory.
pub(super) fn lock_path() -> PathBuf {
    Path::new(RUN_DIR).join(".factory.lock")
}

/// What the factory says to people.
pub(super) fn log_path() -> PathBuf {
    Path::new(RUN_DIR).join(".factory.log")
}

/// Exists while there are spare servers: who starts a sandbox asks for one only then.
pub(super) fn spares_path() -> PathBuf {
    Path::new(RUN_DIR).join(".factory.spares")
}

/// The namespaces of this process that a path's meaning depends on.
pub(super) fn place() -> io::Result<String> {
    let name = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}"));
    let names = ["mnt", "user", "pid", "cgroup"].map(name);
    names.into_iter().map(|name| Ok(name?.display().to_string())).collect()
}

/// Tells this build of ours from any other.
pub(super) fn build() -> io::Result<String> {
    let own = std::fs::metadata("/proc/self/exe")?;
    let (changed, nanos) = (own.ctime(), own.ctime_nsec());
    Ok(format!("{} {}:{} {changed}.{nanos}", env!("CARGO_PKG_VERSION"), own.dev(), own.ino()))
}

fn socket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// A connection to the factory; none when there is no factory.
pub(super) fn connect() -> io::Result<Option<OwnedFd>> {
    let socket = socket()?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new(socket_path())?) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Listens where nobody listens any more. The caller holds the lock.
pub(super) fn listen() -> io::Result<OwnedFd> {
    const BACKLOG: i32 = 128;
    let (path, socket) = (socket_path(), socket()?);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
    // Between these two nobody can connect yet.
    rustix::fs::chmod(&path, rustix::fs::Mode::from_raw_mode(0o600))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}
