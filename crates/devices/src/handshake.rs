//! The one thing the jailed side says: that it is ready, or why not. Then the line is closed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// Longest message.
const MAX_MESSAGE: u64 = 2048;
const READY: &str = "ready";

/// What the server heard.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    Ready,
    /// It could not set itself up.
    Failed(String),
    /// It ended without a word.
    Nothing,
}

/// Says that the share can be served.
///
/// The line is written to as a file: there is no `send` in this process any more.
pub(crate) fn send_ready(line: OwnedFd) -> io::Result<()> {
    File::from(line).write_all(READY.as_bytes())
}

/// Says why it cannot.
pub(crate) fn send_failure(line: OwnedFd, cause: &str) -> io::Result<()> {
    File::from(line).write_all(format!("failed: {cause}").as_bytes())
}

/// Waits for the message; the line's own time limit holds.
pub(crate) fn receive(line: &UnixStream) -> io::Result<Message> {
    let mut bytes = Vec::new();
    line.take(MAX_MESSAGE).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match &*text {
        READY => Message::Ready,
        "" => Message::Nothing,
        other => Message::Failed(other.strip_prefix("failed: ").unwrap_or(other).to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_arrives_as_what_it_is() {
        let (a, b) = UnixStream::pair().unwrap();
        send_ready(a.into()).unwrap();
        assert_eq!(receive(&b).unwrap(), Message::Ready);

        let (a, b) = UnixStream::pair().unwrap();
        send_failure(a.into(), "no tmpfs").unwrap();
        assert_eq!(receive(&b).unwrap(), Message::Failed("no tmpfs".to_owned()));

        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert_eq!(receive(&b).unwrap(), Message::Nothing);
    }

    #[test]
    fn a_message_without_end_is_cut_off() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[b'x'; 5000]).unwrap();
        assert!(matches!(receive(&b).unwrap(), Message::Failed(text) if text.len() == 2048));
    }
}
