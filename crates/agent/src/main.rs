//! `kata-agent`: `/init` of the guest.
//!
//! Started as `zygote` it forks the inits of containers (see `container`); as PID 1 it is the
//! guest; with `--serve-fd N` it serves on an inherited socket and leaves the machine alone,
//! which is for tests.

#![no_main]

use std::ffi::{c_char, c_int};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use kata_agent::boot::{self, Settings};
use kata_agent::container::{self, Builder, Zygote};
use kata_agent::server::{Carrier, serve};
use kata_agent::service::{Agent, Role};
use kata_agent::{console, log, machine, pod};
use kata_protocol::chain;
use nix::sys::signal::{SigHandler, Signal, signal};

/// Succeeded, and not.
const SUCCESS: c_int = 0;
const FAILURE: c_int = 1;

/// What the C library calls. Before its own `main` Rust looks whether there are standard streams, and
/// prepares to explain an overflow of the stack: a hundredth of all that a guest runs until it answers.
// SAFETY: nothing else has this name in a program that has no `main` by Rust.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    // As in every program by Rust: who reads no longer is an error of who writes.
    // SAFETY: to ignore a signal installs no handler.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
    start()
}

fn start() -> c_int {
    let started = machine::boottime_ns();
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if name == container::ZYGOTE {
        console::say_panics();
        container::zygote_main();
    }
    if name == pod::PAUSE {
        console::say_panics();
        pod::pause_main();
    }
    machine::keep_memory();
    if std::process::id() == 1 {
        guest(started);
    }
    let first = arguments.next().unwrap_or_default();
    let second = arguments.next().and_then(|text| text.to_str()?.parse::<RawFd>().ok());
    match (first.to_str(), second) {
        (Some("--version"), _) => {
            println!("kata-agent version {}", env!("CARGO_PKG_VERSION"));
            SUCCESS
        }
        (Some("--serve-fd"), Some(fd)) if fd > 2 => test_server(fd, started),
        _ => {
            eprintln!("kata-agent runs as the first process of a virtual machine");
            eprintln!("usage: kata-agent --version | --serve-fd <inherited socket>");
            FAILURE
        }
    }
}

fn guest(started: i64) -> ! {
    boot::end_on_panic();
    let Settings { vsock, debug } = boot::boot().unwrap_or_else(|error| {
        // Where this fails nobody can be told.
        let _ = console::open_early();
        boot::fail(&chain(&error))
    });
    log::init(debug);
    tracing::debug!("the guest is up");
    let carrier = if vsock { Carrier::Vsock } else { Carrier::Serial };
    match run(Role::Guest, carrier, started) {
        Ok(()) => boot::fail("the channel to the host ended"),
        Err(error) => boot::fail(&error),
    }
}

fn test_server(fd: RawFd, started: i64) -> c_int {
    log::init(std::env::var_os("KATA_AGENT_DEBUG").is_some());
    if let Err(error) = rustix::process::set_child_subreaper(rustix::process::Pid::from_raw(1)) {
        eprintln!("cannot take over orphans: {error}");
        return FAILURE;
    }
    // SAFETY: the caller says that it is an inherited socket, and nothing else uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    match run(Role::Test, Carrier::Socket(socket), started) {
        Ok(()) => SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            FAILURE
        }
    }
}

fn run(role: Role, carrier: Carrier, started: i64) -> Result<(), String> {
    // SAFETY: there is one thread until the runtime below has more.
    let zygote = unsafe { Zygote::fork() }.map_err(|error| format!("cannot fork: {error}"))?;
    let builder = Builder::new(zygote);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(async {
        let agent =
            Agent::new(role, started, builder).map_err(|error| format!("cannot start: {error}"))?;
        serve(agent, carrier).await.map_err(|error| chain(&error))
    })
}
