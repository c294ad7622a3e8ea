//! The log FIFO of a bundle, which containerd copies into its own log.

use rustix::fs::{Mode, OFlags};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// Writes to the FIFO, and never waits: while containerd is away, what does not fit is lost
/// (the sandbox's own log file has it all).
#[derive(Clone, Debug)]
pub(crate) struct LogPipe(Option<Arc<OwnedFd>>);

impl LogPipe {
    /// Opens the FIFO; for reading, too, so that neither opening nor writing depends on
    /// containerd being there. Without one there is nothing to write to.
    pub(crate) fn open(path: &Path) -> Self {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fifo = rustix::fs::open(path, flags, Mode::empty()).ok().filter(|fd| {
            rustix::fs::fstat(fd).is_ok_and(|stat| {
                rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo
            })
        });
        Self(fifo.map(Arc::new))
    }
}

impl Write for LogPipe {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(fifo) = &self.0 {
            // A line is shorter than what a FIFO takes as one piece, or is lost.
            let _ = rustix::io::write(fifo, line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, mknodat};

    #[test]
    fn a_full_pipe_loses_lines_instead_of_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let mut log = LogPipe::open(&path);
        for _ in 0..100 {
            log.write_all(&[b'x'; 4096]).unwrap();
        }
    }

    #[test]
    fn without_a_fifo_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        LogPipe::open(&path).write_all(b"line").unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "").unwrap();
        LogPipe::open(&path).write_all(b"line").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
