//! The host's one binary: `kata-runtime`, `containerd-shim-kata-v2`, `kata-ctl`,
//! `kata-monitor`, chosen by the name it is called by; and the processes that it starts of
//! itself, chosen by their role.
//!
//! Start with [`runtime`] (the OCI command line), [`stand_in`] (the process whose pid an
//! engine knows) or [`ctl`] (containers without an engine).

mod calls;
mod console;
mod ctl;
mod factory;
mod flags;
mod foreground;
mod image;
mod log;
mod record;
mod runtime;
mod signal;
mod stand_in;
mod time;

use kata_jail::role::{self, Invocation, Role};
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let code = match role::current() {
        Ok(Some(invocation)) => play(&invocation),
        Ok(None) => command_line(),
        Err(error) => {
            eprintln!("kata-runtime: {error}");
            1
        }
    };
    // Exit codes are bytes; a role's are by construction.
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn play(invocation: &Invocation) -> i32 {
    let result = match invocation.role {
        Role::StandIn => return stand_in::main(&invocation.args),
        Role::SandboxServer => kata_shim::server::main(&invocation.args),
        Role::Devices => kata_devices::main(&invocation.args),
        Role::Factory => factory::role(&invocation.args),
        Role::Stem => factory::stem_role(&invocation.args),
        Role::Spare => kata_shim::server::spare_main(&invocation.args),
        Role::JailExec => return kata_jail::exec::main(&invocation.args),
        Role::KvmSelfTest => return kata_hypervisor::accelerator::self_test_main(),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}: {error:#}", invocation.role);
            1
        }
    }
}

fn command_line() -> i32 {
    reset_sigpipe();
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name.starts_with("containerd-shim-kata") {
        return kata_shim::shim_main();
    }
    let words: Vec<String> = match words.map(OsString::into_string).collect() {
        Ok(words) => words,
        Err(word) => {
            eprintln!("{name}: argument {word:?} is not UTF-8");
            return 1;
        }
    };
    match name.as_str() {
        "kata-ctl" => i32::from(ctl::main(&words)),
        "kata-monitor" => {
            eprintln!("kata-monitor: not supported yet: ask kata-runtime events for statistics");
            1
        }
        // Whatever a daemon.json calls us.
        _ => i32::from(runtime::main(&words)),
    }
}

/// Ends us quietly when nobody reads our output any more; Rust's start-up code ignores it.
fn reset_sigpipe() {
    // SAFETY: setting the default action touches no memory of ours.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
