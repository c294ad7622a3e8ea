//! Messages between the agent and the init it started, over a socket pair.
//!
//! A frame is its length (`u32`, little-endian) and a message (postcard); file descriptors travel with
//! the length's first byte. The conversation:
//!
//! ```text
//! agent                          init
//! Config + fds ───────────────►
//!        ◄─────────────── Map        only with a user namespace of its own
//! Go ─────────────────────────►
//!        ◄─────────────── Forked     only with a pid or time namespace; from stage 1,
//! Go ─────────────────────────►      which then ends; its child goes on
//!        ◄─────────────── Log, Terminal + fd
//!        ◄─────────────── Ready
//! Go (= start) ───────────────►
//!        ◄─────────────── Executing
//!        ◄─────────────── (end of file: execve worked) or Failed
//! ```

use super::failure::Failure;
use super::seccomp::Filter;
use kata_oci::{Process, Spec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Longest frame from the agent: a specification, bounded by the agent's own messages.
const MAX_TO_INIT: usize = 16 << 20;
/// Longest frame from init.
const MAX_TO_AGENT: usize = 256 << 10;
/// Most descriptors of one frame.
const MAX_FDS: usize = 4;

/// What a descriptor that comes with [`Config`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FdRole {
    Stdin,
    Stdout,
    Stderr,
    /// pidfd of the container's init.
    Target,
}

/// Everything init needs.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    pub id: String,
    /// The bundle's directory on the host, as hooks are told.
    pub bundle: PathBuf,
    /// Join the container of [`FdRole::Target`] instead of building one.
    pub exec: bool,
    /// The container; without `process` and seccomp.
    pub spec: Spec,
    pub process: Process,
    pub filter: Option<Filter>,
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// What the frame's descriptors are, in order.
    pub fds: Vec<FdRole>,
}

/// From the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToInit {
    Config(Box<Config>),
    Go,
}

/// From init.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToAgent {
    /// I am in my user namespace: write my id maps.
    Map,
    /// My child of this pid goes on.
    Forked(i32),
    /// For the agent's log: something asked for could not be had.
    Log(String),
    /// The terminal's master comes with this.
    Terminal,
    /// Everything is done but the execve.
    Ready,
    /// The next call is execve.
    Executing,
    Failed(Failure),
}

fn frame<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    bytes = postcard::to_extend(message, bytes).map_err(io::Error::other)?;
    let length = u32::try_from(bytes.len() - 4).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

pub(super) fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors in one frame"));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

pub(super) fn receive_some(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(bytes)];
    let got = recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok(got.bytes)
}

fn length_of(header: [u8; 4], limit: usize) -> io::Result<usize> {
    let length = u32::from_le_bytes(header) as usize;
    if length > limit {
        return Err(io::Error::other(format!("frame of {length} bytes is too long")));
    }
    Ok(length)
}

/// Init's end; blocking.
pub(super) struct Channel(OwnedFd);

impl Channel {
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    pub fn send(&self, message: &ToAgent, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = frame(message)?;
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { fds } else { &[] };
            match send_some(self.0.as_fd(), &bytes[sent..], fds) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => sent += result?,
            }
        }
        Ok(())
    }

    /// A line for the agent's log. Losing one is no reason to fail.
    pub fn log(&self, text: impl Into<String>) {
        let _ = self.send(&ToAgent::Log(text.into()), &[]);
    }

    fn fill(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut got = 0;
        while got < bytes.len() {
            match receive_some(self.0.as_fd(), &mut bytes[got..], fds) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                result => got += result?,
            }
        }
        Ok(())
    }

    pub fn receive(&self) -> io::Result<(ToInit, Vec<OwnedFd>)> {
        let mut fds = Vec::new();
        let mut header = [0; 4];
        self.fill(&mut header, &mut fds)?;
        let mut body = vec![0; length_of(header, MAX_TO_INIT)?];
        self.fill(&mut body, &mut fds)?;
        Ok((decode(&body)?, fds))
    }

    /// Waits for the agent's word to go on.
    pub fn wait_for_go(&self) -> io::Result<()> {
        match self.receive()?.0 {
            ToInit::Go => Ok(()),
            ToInit::Config(_) => Err(io::Error::other("a second configuration came")),
        }
    }
}

/// The agent's end; asynchronous.
pub(super) struct AgentChannel(UnixStream);

impl AgentChannel {
    /// Takes one end of a socket pair.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let stream = std::os::unix::net::UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Ok(Self(UnixStream::from_std(stream)?))
    }

    pub async fn send(&self, message: &ToInit, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = frame(message)?;
        let mut sent = 0;
        while sent < bytes.len() {
            let fds = if sent == 0 { fds } else { &[] };
            let step = || send_some(self.0.as_fd(), &bytes[sent..], fds);
            sent += self.0.async_io(Interest::WRITABLE, step).await?;
        }
        Ok(())
    }

    /// Fills `bytes`; false when the other side closed before the first of them.
    async fn fill(&self, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
        let mut got = 0;
        while got < bytes.len() {
            let step = || receive_some(self.0.as_fd(), &mut bytes[got..], fds);
            match self.0.async_io(Interest::READABLE, step).await {
                Ok(0) if got == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // Init ended with unread bytes of ours: the same as having closed.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                result => got += result?,
            }
        }
        Ok(true)
    }

    /// The next message; `None` when init is gone or has become the program.
    pub async fn receive(&self) -> io::Result<Option<(ToAgent, Vec<OwnedFd>)>> {
        let mut fds = Vec::new();
        let mut header = [0; 4];
        if !self.fill(&mut header, &mut fds).await? {
            return Ok(None);
        }
        let mut body = vec![0; length_of(header, MAX_TO_AGENT)?];
        if !self.fill(&mut body, &mut fds).await? && !body.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some((decode(&body)?, fds)))
    }
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> io::Result<T> {
    postcard::from_bytes(body).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    #[tokio::test]
    async fn descriptors_travel_with_their_message() {
        let (a, b) = pair();
        let (agent, init) = (AgentChannel::new(a).unwrap(), Channel::new(b));
        let file = std::fs::File::open("/dev/null").unwrap();
        init.log("first");
        init.send(&ToAgent::Terminal, &[file.as_fd()]).unwrap();
        drop(init);
        let (message, fds) = agent.receive().await.unwrap().unwrap();
        assert!(matches!(message, ToAgent::Log(text) if text == "first") && fds.is_empty());
        let (message, fds) = agent.receive().await.unwrap().unwrap();
        assert!(matches!(message, ToAgent::Terminal) && fds.len() == 1);
        assert!(agent.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn oversized_frames_are_refused() {
        let (a, b) = pair();
        let agent = AgentChannel::new(a).unwrap();
        rustix::io::write(&b, &u32::MAX.to_le_bytes()).unwrap();
        assert!(agent.receive().await.is_err());
    }
}
