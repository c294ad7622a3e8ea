//! Packets with descriptors, over `SOCK_SEQPACKET`: what processes of ours hand each other.

use crate::io::watch_fd;
use nix::cmsg_space;
use nix::sys::socket::{self, ControlMessage, ControlMessageOwned, MsgFlags};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use tokio::io::unix::AsyncFd;

/// Most descriptors that come with one packet.
pub const MOST_FDS: usize = 16;
/// Longest packet, bytes.
const MAX_PACKET: usize = 64 << 10;

/// A connection with packets and descriptors.
#[derive(Debug)]
pub struct Packets(AsyncFd<OwnedFd>);

/// Where such connections arrive.
#[derive(Debug)]
pub struct PacketListener(AsyncFd<OwnedFd>);

impl PacketListener {
    /// Takes over a listening socket. Needs a tokio runtime.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&listener, true)?;
        Ok(Self(watch_fd(listener)?))
    }

    /// The next connection.
    ///
    /// # Errors
    /// Those of accept(2).
    pub async fn accept(&self) -> io::Result<Packets> {
        use rustix::net::SocketFlags;
        loop {
            let mut ready = self.0.readable().await?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let accepted = ready.try_io(|fd| Ok(rustix::net::accept_with(fd.get_ref(), flags)?));
            if let Ok(result) = accepted {
                return Packets::new(result?);
            }
        }
    }
}

impl Packets {
    /// Takes over a connected socket. Needs a tokio runtime.
    ///
    /// # Errors
    /// Those of the system.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(watch_fd(socket)?))
    }

    /// The next packet; none at the end.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(result) = ready.try_io(|fd| receive(fd.as_raw_fd())) {
                return result;
            }
        }
    }

    /// Sends a packet.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &control };
        loop {
            let mut ready = self.0.writable().await?;
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_EOR;
            let slices = [IoSlice::new(bytes)];
            let send = |fd: &AsyncFd<OwnedFd>| {
                Ok(socket::sendmsg::<()>(fd.as_raw_fd(), &slices, control, flags, None)?)
            };
            if let Ok(result) = ready.try_io(send) {
                return result.map(drop);
            }
        }
    }

    /// The pid of who is at the other end, as the kernel tells it.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub fn peer(&self) -> io::Result<i32> {
        Ok(socket::getsockopt(&self.0, socket::sockopt::PeerCredentials)?.pid())
    }
}

fn receive(fd: RawFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = cmsg_space!([RawFd; MOST_FDS]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn a_packet_arrives_whole_with_its_descriptors() {
        let (ours, theirs) = socket::socketpair(
            socket::AddressFamily::Unix,
            socket::SockType::SeqPacket,
            None,
            socket::SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let (ours, theirs) = (Packets::new(ours).unwrap(), Packets::new(theirs).unwrap());
        let null = std::fs::File::open("/dev/null").unwrap();
        ours.send(b"one", &[null.as_fd(), null.as_fd()]).await.unwrap();
        ours.send(b"two", &[]).await.unwrap();
        let (bytes, fds) = theirs.receive().await.unwrap().unwrap();
        assert_eq!((bytes.as_slice(), fds.len()), (&b"one"[..], 2));
        let (bytes, fds) = theirs.receive().await.unwrap().unwrap();
        assert_eq!((bytes.as_slice(), fds.len()), (&b"two"[..], 0));
        assert_eq!(theirs.peer().unwrap(), std::process::id().cast_signed());
        drop(ours);
        assert!(theirs.receive().await.unwrap().is_none());
    }
}
