//! A way in for the fuzz target (`fuzz/`), compiled for it only.

use crate::message::Messages;
use crate::{Address, Attributes, Link, Neighbour, Route};

/// Reads a datagram as each kind of answer; gives how many were understood.
pub fn datagram(bytes: &[u8]) -> usize {
    let mut understood = 0;
    for message in Messages(bytes) {
        let _ = (message.kind, message.flags, message.sequence);
        understood += usize::from(Link::read(message.body).is_some());
        understood += usize::from(Address::read(message.body).is_some());
        understood += usize::from(Route::read(message.body).is_some());
        understood += usize::from(Neighbour::read(message.body).is_some());
    }
    for (_, value) in Attributes::new(bytes) {
        understood += Attributes::new(value).count();
    }
    understood
}
