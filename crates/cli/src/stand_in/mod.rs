//! The stand-in: the host process that an engine takes for the container's process.
//!
//! It has the process's command line and lives in the container's network namespace; a
//! container's own one has its root file system and volumes as its own ([`root`]). It
//! hands its standard streams to the sandbox server, passes on every signal and window
//! size, and ends with the process's exit code. One thread, no runtime, next to no memory:
//! there is one per process. [`launch`] is its parent's side.

pub mod launch;
mod packets;
pub mod root;

use kata_shim::attach::{Hello, ToServer, ToStandIn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use packets::Packets;
use root::Root;
use rustix::termios::tcgetwinsize;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// Descriptor at which the stand-in tells its parent how its start went.
const READY_FD: RawFd = 3;

/// What the parent reads from [`READY_FD`] when all went well; anything else is an error.
const READY: &[u8] = b"ready";

/// Bytes of a page of memory.
const PAGE: usize = 4096;

/// Exit code when the sandbox is lost: as if killed by SIGKILL.
const LOST: i32 = 137;

/// Where the stand-in lives on the network.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Netns {
    /// Where its parent lives.
    Host,
    /// A new namespace.
    New,
    /// An existing one.
    Path(PathBuf),
}

/// Arguments of the role.
#[derive(Debug, Deserialize, Serialize)]
pub struct Args {
    /// For whom it stands.
    pub hello: Hello,
    /// The sandbox, whose server takes the hello.
    pub sandbox: String,
    /// Its network namespace.
    pub netns: Netns,
    /// What it has as its file system; none: the host's.
    pub root: Option<Root>,
    /// What `ps` shows as its name.
    pub name: String,
}

/// Why a stand-in could not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("cannot {0}: {1}")]
    Io(&'static str, #[source] io::Error),
    #[error("cannot join the network namespace {0}: {1}")]
    Netns(PathBuf, #[source] io::Error),
    #[error("the sandbox server ended before it took the container's input and output")]
    Lost,
    #[error("{0}")]
    Refused(String),
    #[error("arguments of the stand-in are unreadable: {0}")]
    Args(#[from] serde_json::Error),
}

fn during<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> StartError {
    move |error| StartError::Io(what, error.into())
}

/// Plays the role; returns the exit code.
pub fn main(args: &str) -> i32 {
    // SAFETY: the parent opened this descriptor for us alone, and nothing else owns it.
    let mut ready = File::from(unsafe { OwnedFd::from_raw_fd(READY_FD) });
    match start(args) {
        Ok((server, signals, terminal)) => {
            // The parent may have been killed; the container is started all the same.
            let _ = ready.write_all(READY);
            drop(ready);
            shed_code();
            serve(&server, &signals, terminal)
        }
        Err(error) => {
            // Nobody else can be told.
            let _ = ready.write_all(error.to_string().as_bytes());
            1
        }
    }
}

fn start(args: &str) -> Result<(Packets, SignalFd, bool), StartError> {
    let mut args: Args = serde_json::from_str(args)?;
    // From here on no signal is lost: they wait until the server can take them.
    let all = SigSet::all();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).map_err(during("block signals"))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&all, flags).map_err(during("watch signals"))?;

    if let Ok(name) = std::ffi::CString::new(args.name.as_bytes()) {
        let _ = nix::sys::prctl::set_name(&name);
    }
    std::env::set_current_dir("/").map_err(during("change to /"))?;
    enter_netns(&args.netns)?;
    let terminal = args.hello.terminal;
    if terminal {
        rustix::process::ioctl_tiocsctty(io::stdin())
            .map_err(during("take the terminal as controlling terminal"))?;
        // From here on we are told of changes; one that came before is seen only so.
        // A terminal whose size nobody has set has none to tell.
        let size = window_size(io::stdin().as_fd()).filter(|size| *size != (0, 0));
        if let Some((rows, columns)) = size {
            (args.hello.rows, args.hello.columns) = (rows, columns);
        }
    }
    let sandbox = args.sandbox.parse().map_err(|_| StartError::Lost)?;
    let server = Packets::connect(&sandbox).map_err(during("connect to the sandbox server"))?;
    server.send_hello(&args.hello).map_err(during("greet the sandbox server"))?;
    match server.receive().map_err(during("hear from the sandbox server"))? {
        Some(ToStandIn::Ready) => {}
        Some(ToStandIn::Error(text)) => return Err(StartError::Refused(text)),
        Some(ToStandIn::Exit(_)) | None => return Err(StartError::Lost),
    }
    let_go(terminal).map_err(during("let go of the standard streams"))?;
    if let Some(root) = &args.root {
        root.enter().map_err(during("make the container's root its own"))?;
    }
    Ok((server, signals, terminal))
}

fn enter_netns(netns: &Netns) -> Result<(), StartError> {
    match netns {
        Netns::Host => Ok(()),
        Netns::New => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(during("make a network namespace"))?;
            // As runc does; hooks may look for it. Without it the container works as well.
            let _ = loopback_up();
            Ok(())
        }
        Netns::Path(path) => {
            let fd = File::open(path).map_err(|error| StartError::Netns(path.clone(), error))?;
            setns(&fd, CloneFlags::CLONE_NEWNET)
                .map_err(|error| StartError::Netns(path.clone(), error.into()))
        }
    }
}

fn loopback_up() -> io::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Drops the standard streams, which are the server's now: their other ends see the end of
/// the output when the process ends, not when we do. A terminal stays, as standard input.
fn let_go(terminal: bool) -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    if !terminal {
        rustix::stdio::dup2_stdin(&null)?;
    }
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// Lets go of the pages of our program that starting has touched; the few that waiting needs
/// come back from the page cache. It halves what a stand-in costs.
fn shed_code() {
    unsafe extern "C" {
        /// First byte of the program, by the linker.
        static __executable_start: u8;
        /// First byte behind its code.
        static etext: u8;
    }
    // Only the addresses are used.
    let start = (&raw const __executable_start).addr() & !(PAGE - 1);
    let end = (&raw const etext).addr() & !(PAGE - 1);
    // SAFETY: what lies between is mapped from our program and never written: read-only data
    // and code, but not the relocated part, which comes behind. Dropped pages of such a
    // mapping are read again when touched.
    unsafe {
        libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
    }
}

/// Until the process ends: signals to the server, the exit code from it.
fn serve(server: &Packets, signals: &SignalFd, terminal: bool) -> i32 {
    loop {
        let mut ready = [
            PollFd::new(server.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return LOST,
        }
        let readable = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (from_server, from_kernel) = (readable(&ready[0]), readable(&ready[1]));
        if from_kernel {
            pass_on(server, signals, terminal);
            shed_code();
        }
        if from_server {
            match server.receive() {
                Ok(Some(ToStandIn::Exit(code))) => return i32::from(code),
                Ok(Some(ToStandIn::Ready)) => {}
                Ok(Some(ToStandIn::Error(_)) | None) | Err(_) => return LOST,
            }
        }
    }
}

fn pass_on(server: &Packets, signals: &SignalFd, terminal: bool) {
    while let Ok(Some(info)) = signals.read_signal() {
        let signal = info.ssi_signo as i32;
        let message = match window_size(io::stdin().as_fd()) {
            Some((rows, columns)) if terminal && signal == libc::SIGWINCH => {
                ToServer::Resize { rows, columns }
            }
            _ => ToServer::Signal(signal),
        };
        // A server that is gone is noticed by the next poll.
        let _ = server.send(&message);
    }
}

fn window_size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    tcgetwinsize(terminal).ok().map(|size| (size.ws_row, size.ws_col))
}
