//! Streams that containerd names: FIFOs that its clients hold open, a file, or a program
//! that takes the output as a log.

mod logger;
mod uri;

use kata_protocol::Id;
use kata_sandbox::{EngineStreams, SandboxError, Stdio, StdioPaths};
use rustix::fs::{FileType, Mode, OFlags};
use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use uri::Uri;

/// Whose streams they are; a logger is told.
pub(crate) struct Owner<'a> {
    pub container: &'a Id,
    pub namespace: &'a str,
}

/// Opens what `paths` name. An empty path is a stream that nobody wants. The scheme of the
/// output counts for the errors, too, as in containerd's own shims.
pub(crate) async fn open(
    terminal: bool,
    paths: StdioPaths,
    owner: Owner<'_>,
) -> Result<Stdio, SandboxError> {
    let failed = |what: &str, path: &str| {
        let what = format!("{what} {path}");
        move |source| SandboxError::Io { what, source }
    };
    let mut streams = EngineStreams::default();
    if !paths.stdin.is_empty() {
        // Not waiting for a writer: containerd's client may come later.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open(paths.stdin.as_str(), flags, Mode::empty());
        let stdin = opened.map_err(io::Error::from);
        streams.stdin = Some(stdin.map_err(failed("open the engine's stream", &paths.stdin))?);
    }
    match Uri::parse(&paths.stdout)? {
        Uri::None | Uri::Fifo(_) => {
            let stderr = if terminal { "" } else { &paths.stderr };
            for (path, slot) in
                [(paths.stdout.as_str(), &mut streams.stdout), (stderr, &mut streams.stderr)]
            {
                let Uri::Fifo(path) = Uri::parse(path)? else { continue };
                let (sink, held) = open_output(&path)
                    .map_err(failed("open the engine's stream", &path.display().to_string()))?;
                *slot = Some(sink);
                streams.held.extend(held);
            }
        }
        Uri::File(path) => {
            let file =
                open_file(&path).map_err(failed("log to the file", &path.display().to_string()))?;
            let copy = file.try_clone().map_err(failed("log to the file", &paths.stdout))?;
            streams.stdout = Some(file);
            streams.stderr = (!terminal).then_some(copy);
        }
        Uri::Binary { program, args } => {
            let what = program.display().to_string();
            let output = logger::start(&program, args, &owner)
                .await
                .map_err(failed("start the logging program", &what))?;
            streams.stdout = Some(output.stdout);
            streams.stderr = (!terminal).then_some(output.stderr);
        }
    }
    Ok(Stdio { streams, terminal, paths, ..Stdio::default() })
}

/// Opens a FIFO to write to, and its other end beside it: while containerd restarts nobody
/// else reads, and what is written then is to wait and not to fail.
fn open_output(path: &Path) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    // For reading, too, so that opening never waits for the other end.
    let sink =
        rustix::fs::open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&sink)?.st_mode);
    if kind != FileType::Fifo {
        return Ok((sink, None));
    }
    let held = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok((sink, Some(rustix::fs::open(path, held, Mode::empty())?)))
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).create(dir)?;
    }
    Ok(OpenOptions::new().append(true).create(true).open(path)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn owner(container: &Id) -> Owner<'_> {
        Owner { container, namespace: "default" }
    }

    fn paths(stdout: &str) -> StdioPaths {
        StdioPaths { stdout: stdout.to_owned(), ..StdioPaths::default() }
    }

    #[tokio::test]
    async fn output_to_a_file_is_appended_for_both_streams() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("deep/a.log");
        let id = "c1".parse().unwrap();
        for _ in 0..2 {
            let uri = format!("file://{}", log.display());
            let stdio = open(false, paths(&uri), owner(&id)).await.unwrap();
            let streams = stdio.streams;
            std::fs::File::from(streams.stdout.unwrap()).write_all(b"out ").unwrap();
            std::fs::File::from(streams.stderr.unwrap()).write_all(b"err ").unwrap();
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "out err out err ");
    }

    #[tokio::test]
    async fn a_fifo_without_a_reader_takes_output_that_waits_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("out");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let id = "c1".parse().unwrap();
        let path = fifo.to_str().unwrap();
        let stdio = open(false, paths(path), owner(&id)).await.unwrap();
        assert!(stdio.streams.stdin.is_none() && stdio.streams.stderr.is_none());
        assert_eq!(stdio.streams.held.len(), 1);
        rustix::io::write(stdio.streams.stdout.as_ref().unwrap(), b"early").unwrap();
        let mut buffer = [0; 5];
        rustix::io::read(&stdio.streams.held[0], &mut buffer).unwrap();
        assert_eq!(&buffer, b"early");
    }

    #[tokio::test]
    async fn a_missing_fifo_and_an_unknown_scheme_are_named() {
        let id = "c1".parse().unwrap();
        for uri in ["/no/such/fifo", "npipe:///x", "binary:///no/such/logger"] {
            let error = open(false, paths(uri), owner(&id)).await.unwrap_err().to_string();
            let name = uri.rsplit("//").next().unwrap();
            assert!(error.contains(name), "{uri}: {error}");
        }
    }

    #[tokio::test]
    async fn a_logging_program_reads_both_streams_and_is_told_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("logger");
        let log = dir.path().join("log");
        let script = format!(
            "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_ID $CONTAINER_NAMESPACE $1 $2\" > {0}\n\
             cat <&3 >> {0}\ncat <&4 >> {0}\n",
            log.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let id = "c1".parse().unwrap();
        let uri = format!("binary://{}?key=a%20b", program.display());
        let stdio = open(false, paths(&uri), owner(&id)).await.unwrap();
        std::fs::File::from(stdio.streams.stdout.unwrap()).write_all(b"out\n").unwrap();
        std::fs::File::from(stdio.streams.stderr.unwrap()).write_all(b"err\n").unwrap();
        let expected = "c1 default key a b\nout\nerr\n";
        for _ in 0..500 {
            if std::fs::read_to_string(&log).is_ok_and(|text| text == expected) {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("{:?}", std::fs::read_to_string(&log));
    }
}
