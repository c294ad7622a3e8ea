//! Waiting for a device without polling.

use std::io;
use std::time::Duration;

use kata_channel::FdIo;
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::time::timeout;

/// Looks for something with `find` now and whenever the kernel reports a change to a device.
///
/// # Errors
/// `TimedOut` when it has not come within `limit`.
pub async fn wait_for<T>(limit: Duration, mut find: impl FnMut() -> Option<T>) -> io::Result<T> {
    if let Some(found) = find() {
        return Ok(found);
    }
    let events = FdIo::new(listen()?)?;
    let mut buffer = [0; 4096];
    timeout(limit, async {
        loop {
            // Looked at after the socket listens, so that nothing falls in between.
            if let Some(found) = find() {
                return Ok(found);
            }
            match events.read_some(&mut buffer).await {
                // Some events were lost: then just look again.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                result => drop(result?),
            }
        }
    })
    .await?
}

fn listen() -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let protocol = Some(KOBJECT_UEVENT);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, protocol)?;
    // Group 1 is the kernel's own events.
    bind(&socket, &SocketAddrNetlink::new(0, 1))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_there_is_found_at_once_and_what_never_comes_times_out() {
        assert_eq!(wait_for(Duration::ZERO, || Some(1)).await.unwrap(), 1);
        let error = wait_for(Duration::from_millis(10), || None::<()>).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
