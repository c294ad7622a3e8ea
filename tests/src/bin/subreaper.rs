//! `subreaper PIDFILE SCRIPT`: runs the script as an engine's shim would, then prints the
//! exit code of the process whose pid the script left in the file.

use std::process::{Command, ExitCode};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(file), Some(script)) = (args.next(), args.next()) else {
        eprintln!("usage: subreaper PIDFILE SCRIPT");
        return ExitCode::from(2);
    };
    match wait_for(&file, &script) {
        Ok(code) => {
            println!("{code}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("subreaper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn wait_for(file: &str, script: &str) -> anyhow::Result<i32> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let status = Command::new("sh").args(["-c", script]).status()?;
    anyhow::ensure!(status.success(), "the script ended with {status}");
    let pid: i32 = std::fs::read_to_string(file)?.trim().parse()?;
    match waitpid(Pid::from_raw(pid), None)? {
        WaitStatus::Exited(_, code) => Ok(code),
        WaitStatus::Signaled(_, signal, _) => Ok(128 + signal as i32),
        other => anyhow::bail!("unexpected {other:?}"),
    }
}
