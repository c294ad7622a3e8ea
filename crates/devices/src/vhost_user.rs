//! The vhost-user device, as a monitor sees it, and what is said to it in a monitor's place.
//!
//! A monitor says some things once to a device, when it meets it, and others each time its machine
//! goes on: features, memory, queues (QEMU's `docs/interop/vhost-user.rst`). A fork of a monitor
//! has said the first to the device of the machine that it was forked from. So its own device
//! hears them from the server ([`greet`]), before the fork has the connection.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Features;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtiofsd::vhost_user::VhostUserFsBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::Monitor;
use crate::kept_pages::KeptPages;
use crate::pages::Pages;

/// More than one queue, and an answer to what asks for one. Nothing else of what the library
/// offers is of use: it is for machines that move to other hosts.
const USUAL: Features = Features::MQ.union(Features::REPLY_ACK);
/// How long the device may take to answer; it does when it is in its jail.
const PATIENCE: Duration = Duration::from_secs(20);

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The device of a share.
pub(crate) struct Device {
    pub fs: VhostUserFsBackend<KeptPages>,
    pub monitor: Monitor,
    /// The machine's memory, if it is copied when it is touched.
    pub pages: Option<Arc<Pages>>,
}

impl Device {
    fn offered(monitor: Monitor) -> Features {
        match monitor {
            // It tells of each piece of memory once, of which there may be many.
            Monitor::Executed => USUAL | Features::CONFIGURE_MEM_SLOTS,
            // All of it has to be told again, to another device. That is eight pieces at most.
            Monitor::Forked => USUAL,
        }
    }
}

impl VhostUserBackend for Device {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        self.fs.num_queues()
    }

    fn max_queue_size(&self) -> usize {
        self.fs.max_queue_size()
    }

    fn features(&self) -> u64 {
        self.fs.features()
    }

    fn acked_features(&self, features: u64) {
        self.fs.acked_features(features);
    }

    fn protocol_features(&self) -> Features {
        Self::offered(self.monitor)
    }

    fn set_event_idx(&self, enabled: bool) {
        self.fs.set_event_idx(enabled);
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        if let Some(pages) = &self.pages
            && let Err(error) = pages.register(&memory.memory())
        {
            // The monitor would go on, and the guest wait for its share.
            log::error!("cannot be told of missing pages: {error}");
            std::process::exit(1);
        }
        self.fs.update_memory(memory)
    }

    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.fs.exit_event(thread)
    }

    fn handle_event(
        &self,
        event: u16,
        set: EventSet,
        queues: &[Self::Vring],
        thread: usize,
    ) -> io::Result<()> {
        self.fs.handle_event(event, set, queues, thread)
    }
}

/// Says to the device of a fork, by the fork's connection to it, what its monitor has said to
/// another one.
///
/// # Errors
/// The device does not answer within 20 seconds, has ended, or is another one.
pub fn greet(connection: BorrowedFd<'_>) -> io::Result<()> {
    let socket = UnixStream::from(connection.try_clone_to_owned()?);
    // Of the connection, not of this descriptor: the monitor is to wait as long as it likes.
    socket.set_read_timeout(Some(PATIENCE))?;
    let greeted = meet(socket.try_clone()?).map_err(io::Error::other);
    socket.set_read_timeout(None)?;
    greeted
}

/// In QEMU's order.
fn meet(socket: UnixStream) -> vhost::Result<()> {
    // It sends nothing that is for a queue.
    let mut device = Frontend::from_stream(socket, 0);
    device.get_features()?;
    device.get_protocol_features()?;
    device.set_protocol_features(Device::offered(Monitor::Forked))?;
    device.set_owner()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fork_is_offered_nothing_that_has_to_be_told_again() {
        assert!(!Device::offered(Monitor::Forked).contains(Features::CONFIGURE_MEM_SLOTS));
        assert!(!Device::offered(Monitor::Forked).contains(Features::BACKEND_REQ));
        assert!(Device::offered(Monitor::Executed).contains(Features::CONFIGURE_MEM_SLOTS));
    }

    #[test]
    fn who_does_not_answer_is_no_device() {
        use std::os::fd::AsFd;
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(greet(ours.as_fd()).is_err());
        assert_eq!(ours.read_timeout().unwrap(), None);
    }
}
