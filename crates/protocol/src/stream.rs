//! The first bytes of every stream: what it is for.
//!
//! Layout: magic `KS`, kind (1 byte), length of the container id (1), the id,
//! length of the exec id (1, 0 for the first process), the id.

use crate::id::{Id, InvalidId};

const MAGIC: [u8; 2] = *b"KS";

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StreamKind {
    /// One call of the agent, see [`call`](crate::call). Names no container.
    Rpc = 0,
    /// Bytes to a process (or its terminal); closing it closes the process's input.
    Stdin = 1,
    /// Bytes from a process (or its terminal); ends when every writer is gone.
    Stdout = 2,
    /// Bytes from a process's standard error.
    Stderr = 3,
    /// DNS messages: `u32` big-endian id, `u16` big-endian length, message; both ways. Names no container.
    Dns = 4,
    /// A connection to the guest's loopback: `u16` big-endian TCP port, then its bytes, both
    /// ways. Names no container.
    Forward = 5,
}

/// Opens a stream: sent by the host as the stream's first bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// What follows.
    pub kind: StreamKind,
    /// The container, where `kind` is of a process.
    pub container: Option<Id>,
    /// The exec, or none for the container's first process.
    pub exec: Option<Id>,
}

/// Why bytes are no [`StreamHeader`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidHeader {
    /// More bytes are needed; never an error by itself.
    #[error("stream header is cut short")]
    Incomplete,
    /// Not our protocol.
    #[error("stream does not start with the magic of a kata stream")]
    Magic,
    /// A kind we do not know.
    #[error("stream kind {0} is unknown")]
    Kind(u8),
    /// A bad id, or one too many or too few for the kind.
    #[error("stream header names a bad id")]
    Id(#[from] InvalidId),
    /// Ids do not fit the kind.
    #[error("stream of kind {0:?} names the wrong number of ids")]
    Shape(StreamKind),
    /// Not text.
    #[error("stream header holds an id that is not UTF-8")]
    Text,
}

impl StreamHeader {
    /// Longest encoded header, bytes.
    pub const MAX: usize = 2 + 1 + 2 * (1 + crate::id::MAX);

    /// The stream of one call.
    pub fn rpc() -> Self {
        Self { kind: StreamKind::Rpc, container: None, exec: None }
    }

    /// The DNS relay.
    pub fn dns() -> Self {
        Self { kind: StreamKind::Dns, container: None, exec: None }
    }

    /// A connection to the guest's loopback.
    pub fn forward() -> Self {
        Self { kind: StreamKind::Forward, container: None, exec: None }
    }

    /// A process's stream.
    pub fn process(kind: StreamKind, container: Id, exec: Option<Id>) -> Self {
        Self { kind, container: Some(container), exec }
    }

    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::MAX);
        bytes.extend(MAGIC);
        bytes.push(self.kind as u8);
        for id in [&self.container, &self.exec] {
            let text = id.as_ref().map_or("", Id::as_str);
            // An Id is at most 128 bytes long.
            bytes.push(text.len() as u8);
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    /// Reads a header from the start of `bytes`; returns it and how many bytes it took.
    ///
    /// # Errors
    /// [`InvalidHeader::Incomplete`] when more bytes are needed, else why it is none.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), InvalidHeader> {
        let mut rest = Rest(bytes);
        if rest.take(2)? != MAGIC {
            return Err(InvalidHeader::Magic);
        }
        let kind = match rest.take(1)?[0] {
            0 => StreamKind::Rpc,
            1 => StreamKind::Stdin,
            2 => StreamKind::Stdout,
            3 => StreamKind::Stderr,
            4 => StreamKind::Dns,
            5 => StreamKind::Forward,
            other => return Err(InvalidHeader::Kind(other)),
        };
        let container = rest.id()?;
        let exec = rest.id()?;
        let of_process = !matches!(kind, StreamKind::Rpc | StreamKind::Dns | StreamKind::Forward);
        if container.is_some() != of_process || (exec.is_some() && !of_process) {
            return Err(InvalidHeader::Shape(kind));
        }
        Ok((Self { kind, container, exec }, bytes.len() - rest.0.len()))
    }
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], InvalidHeader> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(InvalidHeader::Incomplete)?;
        self.0 = tail;
        Ok(head)
    }

    fn id(&mut self) -> Result<Option<Id>, InvalidHeader> {
        let length = usize::from(self.take(1)?[0]);
        if length == 0 {
            return Ok(None);
        }
        if length > crate::id::MAX {
            return Err(InvalidId::TooLong(length).into());
        }
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| InvalidHeader::Text)?;
        Ok(Some(text.parse()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rpc_header_names_no_container() {
        assert_eq!(
            StreamHeader::decode(b"KS\0\x01a\0"),
            Err(InvalidHeader::Shape(StreamKind::Rpc))
        );
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(cid in "[a-z0-9]{1,128}", eid in "([a-z0-9]{1,128})?", tail: Vec<u8>) {
            let exec = (!eid.is_empty()).then(|| eid.parse().unwrap());
            let header = StreamHeader::process(StreamKind::Stdout, cid.parse().unwrap(), exec);
            let mut bytes = header.encode();
            let length = bytes.len();
            bytes.extend(&tail);
            prop_assert!(length <= StreamHeader::MAX);
            prop_assert_eq!(StreamHeader::decode(&bytes), Ok((header, length)));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = StreamHeader::decode(&bytes);
        }

        #[test]
        fn a_cut_header_is_incomplete(cid in "[a-z0-9]{1,128}", cut in 0usize..100) {
            let bytes = StreamHeader::process(StreamKind::Stdin, cid.parse().unwrap(), None).encode();
            let cut = cut.min(bytes.len() - 1);
            prop_assert_eq!(StreamHeader::decode(&bytes[..cut]), Err(InvalidHeader::Incomplete));
        }
    }
}
