//! A program that takes a container's output (`binary://`): it reads the output at
//! descriptor 3 and the errors at 4, and closes 5 when it is ready.

use super::Owner;
use kata_jail::Launch;
use kata_sandbox::watch_fd;
use rustix::pipe::{PipeFlags, pipe_with};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// How long it may take to get ready; as containerd's own shims.
const PATIENCE: Duration = Duration::from_secs(10);
const STDOUT_FD: i32 = 3;
const STDERR_FD: i32 = 4;
const READY_FD: i32 = 5;

/// The writing ends for a container.
pub(crate) struct Output {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Starts the program, and waits until it is ready. It ends by itself when the output does.
pub(crate) async fn start(
    program: &Path,
    args: Vec<OsString>,
    owner: &Owner<'_>,
) -> io::Result<Output> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let ((out_read, stdout), (err_read, stderr)) = (pipe()?, pipe()?);
    let (ready, ready_write) = pipe_with(PipeFlags::CLOEXEC)?;
    let child = Launch::program(program, args)
        .fd(out_read, STDOUT_FD)
        .fd(err_read, STDERR_FD)
        .fd(ready_write, READY_FD)
        .env("CONTAINER_ID", owner.container.as_str())
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .directory(Path::new("/"))
        .spawn()
        .map_err(io::Error::other)?;
    rustix::io::ioctl_fionbio(&ready, true)?;
    let ready = watch_fd(ready)?;
    let told = async { ready.readable().await.map(drop) };
    if tokio::time::timeout(PATIENCE, told).await.is_err() {
        let _ = child.kill(libc::SIGKILL);
        let _ = child.wait().await;
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not get ready in ten seconds"));
    }
    let container = owner.container.clone();
    tokio::spawn(async move {
        let ended = child.wait().await;
        tracing::debug!(%container, ?ended, "the logging program has ended");
    });
    Ok(Output { stdout, stderr })
}
