//! Role `jail-exec`: enters a jail and becomes another program.
//!
//! It is a process of its own because nothing of this is allowed between the fork and the
//! exec of a process with threads.

use std::ffi::{CString, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::jail::{Jail, JailError, step};
use crate::privileges::prctl;
use crate::root::ParentWatch;

/// Exit code when the program could not be started in its jail.
pub const FAILED: i32 = 125;

/// Arguments of the role.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JailedProgram {
    pub jail: Jail,
    /// The program's path, in the jail.
    pub program: PathBuf,
    pub argv: Vec<OsString>,
    /// Set when the program must die with this process.
    pub parent: Option<u32>,
}

/// Why the program was not started.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("its arguments are not those of this version")]
    Arguments(#[from] serde_json::Error),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("the process that started it is gone")]
    ParentGone,
    #[error("an argument holds a zero byte")]
    ZeroByte(#[from] std::ffi::NulError),
    #[error("cannot execute {program:?} in the jail")]
    Execute {
        program: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Plays the role. Returns only on failure: prints one line to standard error and gives
/// the exit code to end with.
pub fn main(args: &str) -> i32 {
    let Err(error) = run(args);
    let mut line = format!("jail-exec: {error}");
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        line.push_str(&format!(": {source}"));
        cause = source;
    }
    eprintln!("{line}");
    FAILED
}

fn run(args: &str) -> Result<std::convert::Infallible, ExecError> {
    let args: JailedProgram = serde_json::from_str(args)?;
    let program = CString::new(args.program.as_os_str().as_bytes())?;
    let c_string = |text: OsString| CString::new(text.into_vec());
    let argv: Vec<CString> = args.argv.into_iter().map(c_string).collect::<Result<_, _>>()?;
    let env: Vec<CString> = std::env::vars_os()
        .map(|(mut assignment, value)| {
            assignment.push("=");
            assignment.push(value);
            c_string(assignment)
        })
        .collect::<Result<_, _>>()?;
    let watch = match args.parent {
        Some(parent) => Some((ParentWatch::open().map_err(step("open /proc/self/stat"))?, parent)),
        None => None,
    };
    let mut gone = false;
    args.jail.enter_with(|| {
        if let Some((watch, parent)) = &watch {
            // Again: the signal was lost with the change of user. The check comes after,
            // so that a parent that died in between is noticed.
            let signal = libc::SIGKILL as u64;
            prctl(libc::PR_SET_PDEATHSIG, signal, 0).map_err(step("set parent-death signal"))?;
            gone = watch.parent().map_err(step("look for the parent"))? != *parent;
        }
        Ok(())
    })?;
    if gone {
        return Err(ExecError::ParentGone);
    }
    let Err(error) = nix::unistd::execve(&program, &argv, &env);
    Err(ExecError::Execute { program: args.program, source: error.into() })
}
