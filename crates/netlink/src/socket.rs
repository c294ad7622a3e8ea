//! The netlink socket: requests in one batch, whole dumps, and waiting for changes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::message::{Attributes, Message, Messages, Request, flags, text, u32_at};

/// Longest datagram the kernel makes of a dump.
const DATAGRAM: usize = 32 << 10;
/// Requests sent at once: their errors must fit into the socket's receive buffer.
const BATCH: usize = 128;
/// How often a dump that was disturbed by a change is begun again.
const DUMPS: usize = 8;

/// Why the kernel could not be asked, or would not do it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket, or it failed.
    #[error("cannot {0} by netlink")]
    Socket(&'static str, #[source] io::Error),
    /// The kernel's refusal of one request.
    #[error("cannot {what}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What the kernel says beside the error number; may be empty.
        detail: String,
        /// The error number.
        #[source]
        source: io::Error,
    },
    /// The tables changed all the time while they were read.
    #[error("cannot {0}: it changes all the time")]
    Unstable(&'static str),
}

impl NetlinkError {
    /// The kernel's error number.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Socket(_, source) | Self::Refused { source, .. } => source.raw_os_error(),
            Self::Unstable(_) => None,
        }
    }
}

/// What to be told of ([`Watch`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Groups {
    /// Interfaces that come, go and change.
    Links,
    /// Interfaces, addresses and routes.
    All,
}

/// A route netlink socket. It stays in the network namespace it was opened in.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn open() -> Result<Self, NetlinkError> {
        Self::with(SocketFlags::CLOEXEC)
    }

    fn with(socket_flags: SocketFlags) -> Result<Self, NetlinkError> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            socket_flags,
            // NETLINK_ROUTE is the protocol 0.
            None,
        )
        .map_err(|e| NetlinkError::Socket("open a socket", e.into()))?;
        // Both only make errors better: short copies of requests, and a text.
        for option in [libc::NETLINK_CAP_ACK, libc::NETLINK_EXT_ACK] {
            set_option(&fd, option);
        }
        Ok(Self { fd, sequence: 0, buffer: vec![0; DATAGRAM] })
    }

    /// Sends requests together and returns when the kernel has done all of them, in
    /// order. One that fails does not keep the others from being done.
    ///
    /// # Errors
    /// The first refusal of a request that is not lenient.
    pub fn send(&mut self, mut requests: Vec<Request>) -> Result<(), NetlinkError> {
        let mut first = Ok(());
        for batch in requests.chunks_mut(BATCH) {
            let result = self.send_batch(batch);
            first = first.and(result);
        }
        first
    }

    fn send_batch(&mut self, batch: &mut [Request]) -> Result<(), NetlinkError> {
        let begin = self.sequence.wrapping_add(1);
        let count = batch.len();
        let mut bytes = Vec::with_capacity(count * 128);
        for (index, request) in batch.iter_mut().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            // The last answer tells that all are done; of the others only errors come.
            request.seal(self.sequence, index + 1 == count);
            bytes.extend_from_slice(&request.bytes);
        }
        self.transmit(&bytes)?;
        let mut first = Ok(());
        loop {
            let length = self.receive()?;
            for message in Messages(&self.buffer[..length]) {
                let index = message.sequence.wrapping_sub(begin) as usize;
                let Some(request) = batch.get(index) else { continue };
                if i32::from(message.kind) != libc::NLMSG_ERROR {
                    continue;
                }
                let result = answer(request.what, &message);
                if result.is_err() && !request.lenient && first.is_ok() {
                    first = result;
                }
                if index + 1 == count {
                    return first;
                }
            }
        }
    }

    /// Sends one request.
    ///
    /// # Errors
    /// As [`Socket::send`].
    pub fn send_one(&mut self, request: Request) -> Result<(), NetlinkError> {
        self.send(vec![request])
    }

    /// All objects that a dump request gives, as `read` decodes their messages' bodies.
    ///
    /// # Errors
    /// When the kernel refuses the dump, or the table never holds still.
    pub fn dump<T>(
        &mut self,
        mut request: Request,
        read: impl Fn(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMPS {
            self.sequence = self.sequence.wrapping_add(1);
            request.seal(self.sequence, false);
            let bytes = std::mem::take(&mut request.bytes);
            let sent = self.transmit(&bytes);
            request.bytes = bytes;
            sent?;
            if let Some(objects) = self.collect(request.what, &read)? {
                return Ok(objects);
            }
        }
        Err(NetlinkError::Unstable(request.what))
    }

    /// None when the dump was interrupted by a change.
    fn collect<T>(
        &mut self,
        what: &'static str,
        read: &impl Fn(u16, &[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NetlinkError> {
        let mut objects = Vec::new();
        let mut whole = true;
        loop {
            let length = self.receive()?;
            for message in Messages(&self.buffer[..length]) {
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= i32::from(message.flags) & libc::NLM_F_DUMP_INTR == 0;
                match i32::from(message.kind) {
                    libc::NLMSG_DONE => return Ok(whole.then_some(objects)),
                    libc::NLMSG_ERROR => answer(what, &message)?,
                    _ => objects.extend(read(message.kind, message.body)),
                }
            }
        }
    }

    fn transmit(&self, bytes: &[u8]) -> Result<(), NetlinkError> {
        rustix::io::retry_on_intr(|| rustix::net::send(&self.fd, bytes, SendFlags::empty()))
            .map(drop)
            .map_err(|e| NetlinkError::Socket("send a request", e.into()))
    }

    fn receive(&mut self) -> Result<usize, NetlinkError> {
        let (length, real) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC)
        })
        .map_err(|e| NetlinkError::Socket("receive an answer", e.into()))?;
        if real > length {
            let source = io::Error::from_raw_os_error(libc::EMSGSIZE);
            return Err(NetlinkError::Socket("receive an answer", source));
        }
        Ok(length)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set_option(fd: &OwnedFd, option: i32) {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open, and the value is a live int of the length given.
    unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

/// What an `NLMSG_ERROR` says: done, or why not.
fn answer(what: &'static str, message: &Message<'_>) -> Result<(), NetlinkError> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    const NLM_F_ACK_TLVS: u16 = 0x200;
    let number = u32_at(message.body, 0).map_or(-libc::EIO, |number| number as i32);
    if number == 0 {
        return Ok(());
    }
    let mut detail = String::new();
    if message.flags & NLM_F_ACK_TLVS != 0 {
        let tail = message.body.get(20..).unwrap_or(&[]);
        let found = Attributes::new(tail).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG);
        detail = found.map_or_else(String::new, |(_, value)| text(value));
    }
    let source = io::Error::from_raw_os_error(number.saturating_neg());
    Err(NetlinkError::Refused { what, detail, source })
}

/// Tells that something changed, without saying what: look again.
#[derive(Debug)]
pub struct Watch(AsyncFd<Socket>);

impl Watch {
    /// Begins to watch the network namespace of the calling thread; what changes from
    /// now on is noticed. Needs no runtime yet: give the socket to [`Watch::new`].
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn subscribe(groups: Groups) -> Result<Socket, NetlinkError> {
        let mut mask = libc::RTMGRP_LINK;
        if groups == Groups::All {
            mask |= libc::RTMGRP_IPV4_IFADDR
                | libc::RTMGRP_IPV6_IFADDR
                | libc::RTMGRP_IPV4_ROUTE
                | libc::RTMGRP_IPV6_ROUTE;
        }
        let socket = Socket::with(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        rustix::net::bind(&socket.fd, &SocketAddrNetlink::new(0, mask as u32))
            .map_err(|e| NetlinkError::Socket("subscribe to changes", e.into()))?;
        Ok(socket)
    }

    /// Waits on a subscribed socket; call it in a tokio runtime.
    ///
    /// # Errors
    /// When the runtime cannot watch the socket.
    pub fn new(socket: Socket) -> Result<Self, NetlinkError> {
        // SAFETY: the socket owns its descriptor and keeps it open, the same one, as long
        // as it lives, and it lives in the AsyncFd until that is dropped.
        unsafe { AsyncFd::register(socket) }
            .map(Self)
            .map_err(|e| NetlinkError::Socket("watch for changes", e.into()))
    }

    /// Returns when something changed since the last call. Safe to cancel.
    ///
    /// # Errors
    /// When the socket fails.
    pub async fn changed(&mut self) -> Result<(), NetlinkError> {
        self.0
            .async_io_mut(Interest::READABLE, |socket| {
                let mut any = false;
                loop {
                    match rustix::net::recv(&socket.fd, &mut socket.buffer[..], RecvFlags::TRUNC) {
                        // More than the buffer holds was lost: a change all the same.
                        Ok(_) | Err(rustix::io::Errno::NOBUFS) => any = true,
                        Err(rustix::io::Errno::INTR) => {}
                        Err(rustix::io::Errno::AGAIN) if any => return Ok(()),
                        Err(e) => return Err(e.into()),
                    }
                }
            })
            .await
            .map_err(|e| NetlinkError::Socket("watch for changes", e))
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A dump request of `kind` for every family.
pub(crate) fn dump_request(what: &'static str, kind: u16, fixed: &[u8]) -> Request {
    Request::new(what, kind, flags::DUMP, fixed)
}
