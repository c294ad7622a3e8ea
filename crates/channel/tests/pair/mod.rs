//! Both ends over a socket pair.

use kata_channel::{Acceptor, HostChannel};
use tokio::net::UnixStream;

pub fn pair() -> (HostChannel, Acceptor) {
    let (host, guest) = UnixStream::pair().unwrap();
    (HostChannel::serial(host), Acceptor::multiplexed(guest))
}
