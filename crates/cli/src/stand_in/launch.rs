//! Starting a stand-in, and waiting for its process.

use super::root::Root;
use super::{Args, Netns, READY, READY_FD};
use crate::console::Pty;
use anyhow::{Context, Result, bail};
use kata_jail::{Child, Launch, Role};
use kata_oci::Namespace;
use kata_oci::NamespaceKind;
use kata_protocol::Id;
use kata_shim::attach::Hello;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

/// Longest command line given to a stand-in, bytes: beyond it `ps` shows a part.
const MAX_COMMAND: usize = 64 << 10;

/// For whom a stand-in is to stand, and with what.
pub struct Request<'a> {
    /// The sandbox whose server is to take it.
    pub sandbox: &'a Id,
    /// The container.
    pub container: &'a Id,
    /// The exec, or none for the container's first process.
    pub exec: Option<&'a Id>,
    /// The process's command line.
    pub command: &'a [String],
    /// Its network namespace.
    pub netns: Netns,
    /// What it has as its file system; none: the host's.
    pub root: Option<Root>,
    /// The terminal, if it has one; otherwise our own standard streams.
    pub terminal: Option<&'a Pty>,
}

impl Netns {
    /// What a container's specification asks for.
    pub fn of(namespaces: &[Namespace]) -> Self {
        match namespaces.iter().find(|n| n.kind == NamespaceKind::Network) {
            None => Self::Host,
            Some(Namespace { path: Some(path), .. }) if !path.as_os_str().is_empty() => {
                Self::Path(path.clone())
            }
            Some(_) => Self::New,
        }
    }
}

/// Starts a stand-in; returns when the server has taken its streams.
///
/// # Errors
/// With the stand-in's own words; it is gone then.
pub fn start(request: &Request<'_>) -> Result<Child> {
    let (ready, theirs) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    let args = Args {
        hello: hello(request),
        sandbox: request.sandbox.to_string(),
        netns: request.netns.clone(),
        root: request.root.clone(),
        name: name(request.command),
    };
    let [stdin, stdout, stderr] = streams(request.terminal).context("cannot copy the streams")?;
    let child = Launch::role(Role::StandIn, "kata-stand-in", &args)?
        .argv(argv(request.command))
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .fd(theirs, READY_FD)
        .new_session()
        .spawn()?;
    let mut answer = Vec::new();
    let read = File::from(ready).take(4096).read_to_end(&mut answer);
    if read.is_ok() && answer == READY {
        return Ok(child);
    }
    discard(&child);
    if answer.is_empty() {
        bail!("the process that stands for the container ended at once");
    }
    bail!("{}", String::from_utf8_lossy(&answer))
}

/// Ends a stand-in that is not needed after all.
pub fn discard(child: &Child) {
    // It may have ended by itself.
    let _ = child.kill(libc::SIGKILL);
}

/// The exit code of a process, as a shell counts.
pub fn code(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(libc::SIGKILL));
    // Both parts are below 256 by the kernel's encoding.
    u8::try_from(code).unwrap_or(u8::MAX)
}

fn hello(request: &Request<'_>) -> Hello {
    let (rows, columns) = request.terminal.and_then(Pty::size).unwrap_or_default();
    Hello {
        container: request.container.to_string(),
        exec: request.exec.map(Id::to_string).unwrap_or_default(),
        terminal: request.terminal.is_some(),
        rows,
        columns,
    }
}

fn streams(terminal: Option<&Pty>) -> io::Result<[OwnedFd; 3]> {
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    match terminal {
        Some(pty) => Ok([copy(pty.slave())?, copy(pty.slave())?, copy(pty.slave())?]),
        None => Ok([
            copy(io::stdin().as_fd())?,
            copy(io::stdout().as_fd())?,
            copy(io::stderr().as_fd())?,
        ]),
    }
}

/// The process's name as the kernel would have it.
fn name(command: &[String]) -> String {
    let path = command.first().map_or("", String::as_str);
    path.rsplit('/').next().unwrap_or(path).chars().filter(|c| *c != '\0').collect()
}

fn argv(command: &[String]) -> Vec<OsString> {
    let mut room = MAX_COMMAND;
    let fits = |word: &&String| {
        let enough = word.len() < room;
        room = room.saturating_sub(word.len() + 1);
        enough
    };
    let words: Vec<OsString> = command.iter().take_while(fits).map(OsString::from).collect();
    if words.is_empty() {
        vec![name(command).chars().take(64).collect::<String>().into()]
    } else {
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_the_programs() {
        assert_eq!(name(&["/usr/bin/sleep".into(), "1".into()]), "sleep");
        assert_eq!(name(&[]), "");
    }

    #[test]
    fn a_huge_command_line_is_shown_in_part() {
        let command = vec!["sh".to_owned(), "-c".to_owned(), "x".repeat(1 << 20)];
        assert_eq!(argv(&command), ["sh", "-c"]);
        assert_eq!(argv(&["x".repeat(1 << 20)])[0].len(), 64);
    }

    #[test]
    fn the_network_namespace_is_the_specifications() {
        let network = |path: Option<&str>| Namespace {
            kind: NamespaceKind::Network,
            path: path.map(Into::into),
        };
        assert_eq!(Netns::of(&[]), Netns::Host);
        assert_eq!(Netns::of(&[network(None)]), Netns::New);
        assert_eq!(Netns::of(&[network(Some(""))]), Netns::New);
        assert_eq!(Netns::of(&[network(Some("/run/netns/x"))]), Netns::Path("/run/netns/x".into()));
    }

    #[test]
    fn a_killed_process_counts_as_a_shell_does() {
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
        assert_eq!(code(ExitStatus::from_raw(7 << 8)), 7);
    }
}
