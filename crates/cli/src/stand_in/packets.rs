//! The stand-in's end of `attach.sock`: one JSON object per packet.

use kata_protocol::Id;
use kata_sandbox::SandboxDir;
use kata_shim::attach::{Hello, MAX_PACKET, ToServer, ToStandIn};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send,
    sendmsg, socket,
};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

pub struct Packets(OwnedFd);

impl Packets {
    pub fn connect(sandbox: &Id) -> io::Result<Self> {
        let address = SandboxDir::of(sandbox).attach_socket()?;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(address.path())?)?;
        Ok(Self(fd))
    }

    /// Sends the hello with our standard input, output and error.
    pub fn send_hello(&self, hello: &Hello) -> io::Result<()> {
        let bytes = serde_json::to_vec(hello)?;
        let fds = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO];
        let control = [ControlMessage::ScmRights(&fds)];
        let data = [IoSlice::new(&bytes)];
        sendmsg::<()>(self.0.as_raw_fd(), &data, &control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    pub fn send(&self, message: &ToServer) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// The next message; `None` when the server closed.
    pub fn receive(&self) -> io::Result<Option<ToStandIn>> {
        let mut buffer = [0; MAX_PACKET];
        let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if length == 0 {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&buffer[..length])?))
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
