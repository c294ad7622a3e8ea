//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address, written `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

/// A text that is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no Ethernet address: write six hexadecimal bytes as in 02:00:00:00:00:01")]
pub struct InvalidMac(String);

impl Mac {
    /// The address of these bytes, in the order they are sent.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The bytes, in the order they are sent.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether an interface may have it: not a group's address, not all zero.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// From a netlink attribute; none unless it has six bytes.
    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac(text.chars().take(32).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() || text.contains('+') {
            return Err(invalid());
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_that_are_no_address_are_refused() {
        for text in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "02:00:00:00:00:g1", "2:0:0:0:0:1"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text:?} was taken");
        }
        assert!("+2:00:00:00:00:01".parse::<Mac>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_shown_is_parsed(bytes: [u8; 6]) {
            let mac = Mac::new(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }
    }
}
