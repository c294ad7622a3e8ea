//! Laying out requests, and reading what the kernel answers.

/// Length of a message's header.
pub(crate) const HEADER: usize = 16;

/// Flags of a request, beside `NLM_F_REQUEST` which every one has.
pub mod flags {
    /// The object must be new.
    pub const NEW: u16 = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    /// The object is made, or changed if it is there.
    pub const SET: u16 = (libc::NLM_F_CREATE | libc::NLM_F_REPLACE) as u16;
    /// The object is made, beside others like it.
    pub const APPEND: u16 = (libc::NLM_F_CREATE | libc::NLM_F_APPEND) as u16;
    /// The object must be there.
    pub const NONE: u16 = 0;
    pub(crate) const DUMP: u16 = libc::NLM_F_DUMP as u16;
}

/// One rtnetlink message to the kernel.
#[derive(Clone, Debug)]
pub struct Request {
    pub(crate) bytes: Vec<u8>,
    pub(crate) what: &'static str,
    pub(crate) lenient: bool,
}

impl Request {
    /// A message of type `kind` (`RTM_…`) with its fixed part. `what` names it in errors,
    /// as in "add an address".
    pub fn new(what: &'static str, kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        let mut request = Self { bytes, what, lenient: false };
        request.pad();
        request
    }

    /// Its failure is no error: what it undoes may be gone already.
    pub fn lenient(mut self) -> Self {
        self.lenient = true;
        self
    }

    /// Adds an attribute.
    pub fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (value.len() + 4) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
        self
    }

    /// Adds an attribute of four bytes.
    pub fn attr_u32(self, kind: u16, value: u32) -> Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// Adds a text attribute, ended by a zero byte.
    pub fn attr_text(self, kind: u16, value: &str) -> Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds an attribute that holds the attributes `build` adds.
    pub fn nested(mut self, kind: u16, build: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self = build(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self
    }

    /// Fills in what is only known when it is sent.
    pub(crate) fn seal(&mut self, sequence: u32, acknowledge: bool) {
        let length = self.bytes.len() as u32;
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        if acknowledge {
            self.bytes[6] |= libc::NLM_F_ACK as u8;
        }
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A message from the kernel.
pub(crate) struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub body: &'a [u8],
}

/// The messages in one datagram.
pub(crate) struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32_at(self.0, 0)? as usize;
        let message = Message {
            kind: u16_at(self.0, 4)?,
            flags: u16_at(self.0, 6)?,
            sequence: u32_at(self.0, 8)?,
            body: self.0.get(HEADER..length)?,
        };
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    }
}

/// The attributes in a message's tail, or in a nested attribute: type and value.
#[derive(Clone, Debug)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes laid out in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16_at(self.0, 0)?);
        // The two top bits say "nested" and "network order".
        let kind = u16_at(self.0, 2)? & 0x3fff;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, value))
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A text attribute without its zero byte.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn attributes_come_back_as_they_were_laid_out(
            values in proptest::collection::vec((1u16..0x3fff, proptest::collection::vec(any::<u8>(), 0..40)), 0..10)
        ) {
            let request = values.iter().fold(
                Request::new("test", 1, 0, &[]),
                |request, (kind, value)| request.attr(*kind, value),
            );
            let read: Vec<_> = Attributes::new(&request.bytes[HEADER..])
                .map(|(kind, value)| (kind, value.to_vec()))
                .collect();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            for message in Messages(&bytes) {
                let _ = Attributes::new(message.body).count();
            }
            let _ = Attributes::new(&bytes).count();
        }
    }

    #[test]
    fn nested_attributes_know_their_length() {
        let request =
            Request::new("test", 1, 0, &[]).nested(7, |r| r.attr_u32(1, 5).attr_text(2, "ab"));
        let outer: Vec<_> = Attributes::new(&request.bytes[HEADER..]).collect();
        assert_eq!(outer.len(), 1);
        let inner: Vec<_> = Attributes::new(outer[0].1).collect();
        assert_eq!(inner, [(1, &5u32.to_ne_bytes()[..]), (2, &b"ab\0"[..])]);
    }
}
