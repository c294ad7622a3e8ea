//! An IP address with the length of its network: `10.0.0.2/16`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An address and how many of its leading bits name the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// The address; host bits may be set (an interface's address) or not (a route's).
    pub address: IpAddr,
    /// Bits of the network, at most 32 or 128.
    pub length: u8,
}

/// A text that is no address with a prefix length.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address with a prefix length: write it as in 10.0.0.2/16 or fd00::2/64")]
pub struct InvalidPrefix(String);

impl Prefix {
    /// The prefix, unless `length` is more than the address has bits.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (length <= bits).then_some(Self { address, length })
    }

    /// Last address of an IPv4 network, where there is one (`/31` and `/32` have none).
    pub fn broadcast(self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(address) if self.length < 31 => {
                Some(Ipv4Addr::from_bits(address.to_bits() | (u32::MAX >> self.length)))
            }
            _ => None,
        }
    }
}

/// The bytes of an address in network order.
pub(crate) fn octets(address: &IpAddr) -> Octets {
    match address {
        IpAddr::V4(v4) => Octets::V4(v4.octets()),
        IpAddr::V6(v6) => Octets::V6(v6.octets()),
    }
}

pub(crate) enum Octets {
    V4([u8; 4]),
    V6([u8; 16]),
}

impl AsRef<[u8]> for Octets {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::V4(bytes) => bytes,
            Self::V6(bytes) => bytes,
        }
    }
}

/// An address from a netlink attribute.
pub(crate) fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::V4(Ipv4Addr::from(v4)));
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| IpAddr::V6(Ipv6Addr::from(v6)))
}

/// `AF_INET` or `AF_INET6`.
pub(crate) fn family(address: &IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            if !length.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            Self::new(address.parse().ok()?, length.parse().ok()?)
        };
        parse().ok_or_else(|| InvalidPrefix(text.chars().take(64).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn broadcast_is_the_last_address_of_the_network() {
        let broadcast = |text: &str| text.parse::<Prefix>().unwrap().broadcast();
        assert_eq!(broadcast("172.17.0.2/16"), Some(Ipv4Addr::new(172, 17, 255, 255)));
        assert_eq!(broadcast("1.2.3.4/0"), Some(Ipv4Addr::BROADCAST));
        assert_eq!(broadcast("10.0.0.1/31"), None);
        assert_eq!(broadcast("fd00::1/64"), None);
    }

    #[test]
    fn a_length_beyond_the_address_is_refused() {
        for text in ["10.0.0.1/33", "::1/129", "10.0.0.1", "10.0.0.1/+8", "10.0.0.1/", "/8"] {
            assert!(text.parse::<Prefix>().is_err(), "{text:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn what_is_shown_is_parsed(address: IpAddr, length in 0u8..=128) {
            if let Some(prefix) = Prefix::new(address, length) {
                prop_assert_eq!(prefix.to_string().parse(), Ok(prefix));
            }
        }
    }
}
