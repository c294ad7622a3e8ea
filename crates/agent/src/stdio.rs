//! Input and output of one process: pipes or a terminal on one side, streams on the other.
//!
//! The order of output and exit: bytes are counted as they are read, and when the process
//! has ended, what is still in its pipe is counted too ([`Stdio::settle`]). `Wait` answers
//! with these numbers, and the host delivers so many bytes before it tells of the exit.
//! Nothing waits for a stream that is not read, nor for children that keep a pipe open.
//!
//! All of this runs on one thread: between a read and its count nothing else runs.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kata_channel::{FdIo, Stream};
use kata_protocol::agent;
use kata_protocol::{Id, StreamHeader, StreamKind};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::container::ProcessIo;
use crate::streams::Streams;

/// What is read and written at once.
const BUFFER: usize = 64 << 10;
/// Size of output pipes: fewer changes between writer and agent than with the usual 64 KiB.
const PIPE: usize = 256 << 10;
/// Most that a terminal can hold for us when its process ends; the kernel's limit is lower.
const TERMINAL: usize = 256 << 10;

/// The agent's ends of the pipes.
#[derive(Debug, Default)]
pub struct Ends {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// Makes the pipes that the request asks for; with a terminal there are none.
///
/// # Errors
/// When there are too many open files.
pub fn pipes(wanted: &agent::Stdio) -> io::Result<(ProcessIo, Ends)> {
    let mut io = ProcessIo::default();
    let mut ends = Ends::default();
    if wanted.terminal {
        return Ok((io, ends));
    }
    if wanted.stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (io.stdin, ends.stdin) = (Some(read), Some(write));
    }
    if wanted.stdout {
        let (read, write) = output_pipe()?;
        (io.stdout, ends.stdout) = (Some(write), Some(read));
    }
    if wanted.stderr {
        let (read, write) = output_pipe()?;
        (io.stderr, ends.stderr) = (Some(write), Some(read));
    }
    Ok((io, ends))
}

fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Only speed depends on it.
    let _ = fcntl_setpipe_size(&read, PIPE);
    Ok((read, write))
}

/// The relays of one process. Dropping it closes its pipes and streams.
#[derive(Debug, Default)]
pub struct Stdio {
    terminal: Option<Arc<FdIo>>,
    stdout: Option<Arc<Output>>,
    stderr: Option<Arc<Output>>,
    stdin: Option<AbortHandle>,
    relays: Vec<AbortHandle>,
}

impl Stdio {
    /// Starts the relays. Streams are taken when they come.
    ///
    /// # Errors
    /// When a pipe cannot be watched.
    pub fn start(
        streams: &Arc<Streams>,
        container: &Id,
        exec: Option<&Id>,
        ends: Ends,
        terminal: Option<OwnedFd>,
    ) -> io::Result<Self> {
        let mut stdio = Self::default();
        let header = |kind| StreamHeader::process(kind, container.clone(), exec.cloned());
        if let Some(master) = terminal {
            let master = Arc::new(FdIo::new(master)?);
            stdio.stdin(streams, header(StreamKind::Stdin), Arc::clone(&master));
            let output = Output::new(Arc::clone(&master), Source::Terminal);
            stdio.stdout = Some(stdio.output(streams, header(StreamKind::Stdout), output));
            stdio.terminal = Some(master);
            return Ok(stdio);
        }
        if let Some(fd) = ends.stdin {
            stdio.stdin(streams, header(StreamKind::Stdin), Arc::new(FdIo::new(fd)?));
        }
        if let Some(fd) = ends.stdout {
            let output = Output::new(Arc::new(FdIo::new(fd)?), Source::Pipe);
            stdio.stdout = Some(stdio.output(streams, header(StreamKind::Stdout), output));
        }
        if let Some(fd) = ends.stderr {
            let output = Output::new(Arc::new(FdIo::new(fd)?), Source::Pipe);
            stdio.stderr = Some(stdio.output(streams, header(StreamKind::Stderr), output));
        }
        Ok(stdio)
    }

    fn stdin(&mut self, streams: &Arc<Streams>, header: StreamHeader, fd: Arc<FdIo>) {
        let streams = Arc::clone(streams);
        let task = tokio::spawn(async move {
            if let Some(stream) = streams.wanted(header).await {
                relay_in(stream, &fd).await;
            }
        });
        self.stdin = Some(task.abort_handle());
    }

    fn output(
        &mut self,
        streams: &Arc<Streams>,
        header: StreamHeader,
        output: Output,
    ) -> Arc<Output> {
        let output = Arc::new(output);
        let (streams, source) = (Arc::clone(streams), Arc::clone(&output));
        let task = tokio::spawn(async move {
            if let Some(stream) = streams.wanted(header).await {
                source.relay(stream).await;
            }
        });
        self.relays.push(task.abort_handle());
        output
    }

    /// The process has ended: takes no more input and says how many bytes it put on
    /// standard output and standard error in all.
    pub fn settle(&self) -> (u64, u64) {
        if let Some(stdin) = &self.stdin {
            stdin.abort();
        }
        let settle = |output: &Option<Arc<Output>>| output.as_ref().map_or(0, |o| o.settle());
        (settle(&self.stdout), settle(&self.stderr))
    }

    /// Sets the size of the terminal; false when there is none.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else { return Ok(false) };
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal, size)?;
        Ok(true)
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        for task in self.relays.iter().chain(&self.stdin) {
            task.abort();
        }
    }
}

/// Copies until the host ends its stream or the process takes no more. Then the pipe is
/// closed, or the stream reset: the host's next write says so.
async fn relay_in(mut stream: Stream, fd: &FdIo) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match stream.read(&mut buffer).await {
            Ok(count) if count > 0 => {
                if fd.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
            // A lost channel ends the input as well.
            _ => return,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Pipe,
    Terminal,
}

/// One output of a process.
#[derive(Debug)]
struct Output {
    /// None once there is no more, or the host does not want it.
    fd: Mutex<Option<Arc<FdIo>>>,
    source: Source,
    /// Read so far, with what is in `backlog`.
    count: AtomicU64,
    /// What a terminal held when its process ended.
    backlog: Mutex<Vec<u8>>,
    settled: Notify,
}

impl Output {
    fn new(fd: Arc<FdIo>, source: Source) -> Self {
        Self {
            fd: Mutex::new(Some(fd)),
            source,
            count: AtomicU64::new(0),
            backlog: Mutex::default(),
            settled: Notify::new(),
        }
    }

    fn fd(&self) -> MutexGuard<'_, Option<Arc<FdIo>>> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_backlog(&self) -> Vec<u8> {
        std::mem::take(&mut *self.backlog.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Copies until the last writer is gone, or the host takes no more: then the pipe is
    /// closed and the process learns it by `SIGPIPE`, as at a shell.
    async fn relay(&self, mut stream: Stream) {
        let copied = self.copy(&mut stream).await;
        self.fd().take();
        if copied.is_ok() {
            // The host has all; if it is gone, nobody is left to be told.
            let _ = stream.shutdown().await;
        }
    }

    async fn copy(&self, stream: &mut Stream) -> io::Result<()> {
        let Some(fd) = self.fd().clone() else { return Ok(()) };
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = tokio::select! {
                biased;
                () = self.settled.notified() => None,
                count = self.read(&fd, &mut buffer) => Some(count?),
            };
            match count {
                Some(0) => {
                    // What another user of the terminal writes from now on is not counted.
                    self.fd().take();
                    let rest = self.take_backlog();
                    return stream.write_all(&rest).await;
                }
                Some(count) => stream.write_all(&buffer[..count]).await?,
                None => {
                    let rest = self.take_backlog();
                    stream.write_all(&rest).await?;
                }
            }
        }
    }

    async fn read(&self, fd: &FdIo, buffer: &mut [u8]) -> io::Result<usize> {
        let count = fd.read_some(buffer).await?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// How much has been written, now that the process has ended.
    fn settle(&self) -> u64 {
        if let Some(fd) = self.fd().clone() {
            match self.source {
                Source::Pipe => {
                    let waiting = rustix::io::ioctl_fionread(fd.as_fd()).unwrap_or(0);
                    return self.count.load(Ordering::Relaxed) + waiting;
                }
                // A terminal does not tell how much it holds, part of it being on its way.
                Source::Terminal => self.drain(&fd),
            }
        }
        self.count.load(Ordering::Relaxed)
    }

    fn drain(&self, fd: &FdIo) {
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [0; 4096];
        while backlog.len() < TERMINAL {
            match fd.read_now(&mut buffer) {
                Ok(count) if count > 0 => {
                    self.count.fetch_add(count as u64, Ordering::Relaxed);
                    backlog.extend_from_slice(&buffer[..count]);
                }
                _ => break,
            }
        }
        self.settled.notify_one();
    }
}
