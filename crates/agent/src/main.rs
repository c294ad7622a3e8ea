//! The guest's only program: PID 1, or a container's init when called by that name.
//! `--serve-fd N` serves on an inherited socket and leaves the machine as it is, for tests.

use kata_agent::boot::{self, Settings};
use kata_agent::container;
use kata_agent::server::{Carrier, ServeError, serve};
use kata_agent::service::{Agent, Role};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

fn main() {
    let mut words = std::env::args();
    let name = words.next().unwrap_or_default();
    if name == container::INIT {
        container::init_main();
    }
    if std::process::id() == 1 {
        guest();
    }
    match (words.next().as_deref(), words.next().map(|number| number.parse::<RawFd>())) {
        (Some("--version"), _) => println!("kata-agent version {}", env!("CARGO_PKG_VERSION")),
        (Some("--serve-fd"), Some(Ok(fd))) => test(fd),
        _ => {
            eprintln!("kata-agent: it runs as PID 1 of a guest, or with --serve-fd N");
            std::process::exit(2);
        }
    }
}

/// Runs the guest; ends it when it cannot.
fn guest() -> ! {
    let init_ns = kata_agent::machine::boottime_ns();
    boot::power_off_on_panic();
    let settings = match boot::boot() {
        Ok(settings) => settings,
        Err(error) => boot::fail(&chain(&error)),
    };
    kata_agent::log::init(settings.debug);
    match run(Role::Guest, init_ns, carrier(settings)) {
        Ok(()) => boot::power_off(),
        Err(error) => boot::fail(&error),
    }
}

fn carrier(settings: Settings) -> Carrier {
    if settings.vsock { Carrier::Vsock } else { Carrier::Serial }
}

fn test(fd: RawFd) {
    kata_agent::log::init(std::env::var_os("KATA_LOG").is_some());
    // SAFETY: whoever names a descriptor on the command line gave it to us to own.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Err(error) = run(Role::Test, 0, Carrier::Socket(socket)) {
        eprintln!("kata-agent: {error}");
        std::process::exit(1);
    }
}

fn run(role: Role, init_ns: i64, carrier: Carrier) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the event loop: {error}"))?;
    runtime.block_on(async {
        let agent =
            Agent::new(role, init_ns).map_err(|error| format!("cannot watch children: {error}"))?;
        serve(agent, carrier).await.map_err(|error: ServeError| chain(&error))
    })
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    text
}
