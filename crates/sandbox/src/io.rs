//! A process's standard streams: between the engine's descriptors and the guest.
//!
//! What an engine gives may be a pipe, a terminal, a socket, a file or `/dev/null`. Pipes
//! and terminals are opened anew through `/proc/self/fd`, so that making them non-blocking
//! does not change the description that the engine shares. Output is counted: an exit is
//! reported only when as many bytes are delivered as the process had written.

use kata_channel::{HostChannel, Stream};
use kata_protocol::{Id, StreamHeader, StreamKind};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::SandboxError;

const BUFFER: usize = 64 << 10;

/// How often a reader is looked at that is taking what is left, and after how many looks at
/// the same amount it counts as one that does not.
const DRAIN_LOOK: Duration = Duration::from_millis(1);
const DRAIN_LOOKS: u32 = 200;

/// The descriptors that an engine gave for one process.
#[derive(Debug, Default)]
pub struct EngineStreams {
    /// What the process reads; none: it reads nothing.
    pub stdin: Option<OwnedFd>,
    /// Where its output goes; none: nowhere.
    pub stdout: Option<OwnedFd>,
    /// Where its errors go; none with a terminal, or nowhere.
    pub stderr: Option<OwnedFd>,
    /// Reading ends of the output, kept open as long as there is output: without another
    /// reader it waits for one, instead of being lost.
    pub held: Vec<OwnedFd>,
}

/// The running relays of one process.
pub(crate) struct Relay {
    stdout: Option<watch::Receiver<Delivered>>,
    stderr: Option<watch::Receiver<Delivered>>,
    held: Arc<Vec<OwnedFd>>,
    close_stdin: Arc<Notify>,
    input: Option<AbortHandle>,
}

/// How far an output stream has come.
#[derive(Clone, Copy, Debug, Default)]
struct Delivered {
    bytes: u64,
    ended: bool,
}

impl Relay {
    /// Opens the guest's end of each stream that the engine has, and starts to relay.
    pub(crate) async fn start(
        channel: &HostChannel,
        container: &Id,
        exec: Option<&Id>,
        streams: EngineStreams,
    ) -> Result<Self, SandboxError> {
        let open = |kind| {
            let header = StreamHeader::process(kind, container.clone(), exec.cloned());
            async move { channel.open(&header).await }
        };
        let close_stdin = Arc::new(Notify::new());
        let mut input = None;
        if let Some(fd) = streams.stdin {
            let stream = open(StreamKind::Stdin).await?;
            let source = End::reader(fd).map_err(SandboxError::io("read the engine's stdin"))?;
            let relay = tokio::spawn(relay_input(source, stream, Arc::clone(&close_stdin)));
            input = Some(relay.abort_handle());
        }
        let held = Arc::new(streams.held);
        let mut relays = [None, None];
        let outputs = [(streams.stdout, StreamKind::Stdout), (streams.stderr, StreamKind::Stderr)];
        for (slot, (fd, kind)) in relays.iter_mut().zip(outputs) {
            let Some(fd) = fd else { continue };
            let stream = open(kind).await?;
            let sink = End::writer(fd).map_err(SandboxError::io("write the engine's output"))?;
            let (progress, delivered) = watch::channel(Delivered::default());
            let held = Arc::clone(&held);
            tokio::spawn(async move {
                relay_output(stream, sink, progress).await;
                drop(held);
            });
            *slot = Some(delivered);
        }
        let [stdout, stderr] = relays;
        Ok(Self { stdout, stderr, held, close_stdin, input })
    }

    /// The process gets what is waiting in its input, and then end of file.
    pub(crate) fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// The process has ended: lets go of the engine's input. Of a terminal, the engine's side
    /// is told of the end only when nobody holds ours any more.
    pub(crate) fn end_input(&self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }

    /// Waits until so many bytes are with the engine, or the stream has ended; of FIFOs, until
    /// the engine has taken them, too.
    pub(crate) async fn delivered(&self, stdout: u64, stderr: u64) {
        for (relay, bytes) in [(&self.stdout, stdout), (&self.stderr, stderr)] {
            if let Some(relay) = relay {
                // An error means that the relay has ended, which is an end too.
                let _ = relay.clone().wait_for(|now| now.ended || now.bytes >= bytes).await;
            }
        }
        for fifo in self.held.iter() {
            drained(fifo).await;
        }
    }
}

async fn relay_input(mut source: End, mut stream: Stream, close: Arc<Notify>) {
    let mut buffer = vec![0; BUFFER];
    let mut closing = false;
    loop {
        let count = if closing {
            // What is there already still belongs to the process.
            source.read_now(&mut buffer).unwrap_or(0)
        } else {
            tokio::select! {
                count = source.read(&mut buffer) => count.unwrap_or(0),
                () = close.notified() => { closing = true; continue }
            }
        };
        if count == 0 || stream.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    let _ = stream.shutdown().await;
}

async fn relay_output(mut stream: Stream, mut sink: End, progress: watch::Sender<Delivered>) {
    let mut buffer = vec![0; BUFFER];
    let mut listening = true;
    while let Ok(count) = stream.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        // An engine that no longer listens does not stop the process.
        listening = listening && sink.write_all(&buffer[..count]).await.is_ok();
        progress.send_modify(|now| now.bytes += count as u64);
    }
    drop(sink);
    progress.send_modify(|now| now.ended = true);
}

/// Waits until a FIFO is empty, or nobody is taking from it. Some containerds (1.6.20 of
/// Debian 12) close their end when they hear of an exit, with what they have not read yet.
/// There is no event for an empty pipe; most often it is empty at the first look.
async fn drained(fifo: &OwnedFd) {
    let mut last = u64::MAX;
    let mut looks = 0;
    while let Ok(left @ 1..) = rustix::io::ioctl_fionread(fifo) {
        looks = if left < last { 0 } else { looks + 1 };
        if looks == DRAIN_LOOKS {
            tracing::debug!(left, "nobody takes the rest of the output");
            return;
        }
        last = left;
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}

/// The engine's end of a stream.
enum End {
    /// Pipes and terminals, with a description of our own.
    Polled(AsyncFd<OwnedFd>),
    /// Sockets, asked not to wait call by call.
    Socket(AsyncFd<OwnedFd>),
    /// Files and devices that never make one wait.
    Plain(OwnedFd),
    /// Nobody is there.
    Gone,
}

impl End {
    fn reader(fd: OwnedFd) -> io::Result<Self> {
        Self::open(fd, OFlags::RDONLY)
    }

    fn writer(fd: OwnedFd) -> io::Result<Self> {
        Self::open(fd, OFlags::WRONLY)
    }

    fn open(fd: OwnedFd, access: OFlags) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
        let waits = kind == FileType::Fifo
            || (kind == FileType::CharacterDevice && rustix::termios::isatty(&fd));
        if kind == FileType::Socket {
            return Ok(Self::Socket(watch_fd(fd)?));
        }
        if !waits {
            return Ok(Self::Plain(fd));
        }
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(own) => Ok(Self::Polled(watch_fd(own)?)),
            // A pipe nobody reads any more, or a terminal that is hung up.
            Err(Errno::NXIO | Errno::IO) => Ok(Self::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what there is; 0 at the end, also of a terminal that was hung up.
    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Self::Polled(fd) => fd.readable().await?.try_io(|fd| read_pipe(fd, buffer)),
                Self::Socket(fd) => fd.readable().await?.try_io(|fd| receive(fd, buffer)),
                Self::Plain(_) | Self::Gone => return self.read_now(buffer),
            };
            if let Ok(result) = result {
                return result;
            }
        }
    }

    /// Reads without waiting; 0 when nothing is there.
    fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let result = match self {
            Self::Polled(fd) => read_pipe(fd, buffer),
            Self::Socket(fd) => receive(fd, buffer),
            Self::Plain(fd) => Ok(rustix::io::read(fd, buffer)?),
            Self::Gone => Ok(0),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            other => other,
        }
    }

    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = match self {
                Self::Polled(fd) => {
                    let mut ready = fd.writable().await?;
                    match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                        Ok(result) => result?,
                        Err(_would_block) => continue,
                    }
                }
                Self::Socket(fd) => {
                    use rustix::net::SendFlags;
                    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                    let mut ready = fd.writable().await?;
                    match ready.try_io(|fd| Ok(rustix::net::send(fd.get_ref(), bytes, flags)?)) {
                        Ok(result) => result?,
                        Err(_would_block) => continue,
                    }
                }
                Self::Plain(fd) => rustix::io::write(&*fd, bytes)?,
                Self::Gone => return Err(io::ErrorKind::BrokenPipe.into()),
            };
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

/// Lets the runtime wait for a descriptor that it owns from now on.
///
/// # Errors
/// The descriptor is of a kind that nobody can wait for.
pub fn watch_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same open descriptor until it is dropped, and that is
    // when the AsyncFd that owns it takes it out of the runtime.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

fn read_pipe(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    match rustix::io::read(fd.get_ref(), buffer) {
        Ok(count) => Ok(count),
        // How the slave side of a terminal says that its master is closed.
        Err(Errno::IO) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn receive(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::net::recv(fd.get_ref(), buffer, rustix::net::RecvFlags::DONTWAIT)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn engine_pipe_stays_blocking_for_its_other_owner() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut end = End::writer(write.try_clone().unwrap()).unwrap();
        end.write_all(b"abc").await.unwrap();
        assert!(!rustix::fs::fcntl_getfl(&write).unwrap().contains(OFlags::NONBLOCK));
        let mut buffer = [0; 3];
        rustix::io::read(&read, &mut buffer).unwrap();
        assert_eq!(&buffer, b"abc");
    }

    #[tokio::test]
    async fn write_to_a_closed_pipe_fails_instead_of_waiting() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(read);
        assert!(End::writer(write).unwrap().write_all(b"abc").await.is_err());
    }

    #[tokio::test]
    async fn output_is_drained_when_its_reader_has_it_or_there_is_none() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&write, &[0; 3000]).unwrap();
        let reader = read.try_clone().unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            for _ in 0..3 {
                std::thread::sleep(DRAIN_LOOK * DRAIN_LOOKS / 3);
                rustix::io::read(&reader, &mut [0; 1000]).unwrap();
            }
        });
        drained(&read).await;
        assert_eq!(rustix::io::ioctl_fionread(&read).unwrap(), 0);
        reading.await.unwrap();
        rustix::io::write(&write, b"nobody wants this").unwrap();
        drained(&read).await;
        assert!(rustix::io::ioctl_fionread(&read).unwrap() > 0);
    }

    #[tokio::test]
    async fn dev_null_is_at_its_end_at_once() {
        let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert_eq!(End::reader(fd).unwrap().read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn file_offset_is_kept_when_output_goes_to_a_file() {
        use std::io::{Read, Seek, Write};
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one").unwrap();
        let mut end = End::writer(file.try_clone().unwrap().into()).unwrap();
        end.write_all(b"two").await.unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "onetwo");
    }
}
