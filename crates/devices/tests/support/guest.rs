//! A guest of the vhost-user-fs device: one virtqueue, FUSE requests by hand.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::Share;

/// How long a busy machine may take for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
pub const MEMORY: u64 = 1 << 20;
/// The device sees guest addresses; vhost-user messages carry the VMM's. Any base will do.
const VMM_BASE: u64 = 0x7000_0000;
const QUEUE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10000;
pub const REPLY: u64 = 0x40000;
const REPLY_SIZE: u32 = 0x10000;
/// The queue for requests; 0 is for those that must not wait.
const REQUESTS: usize = 1;

pub const ROOT: u64 = 1;

/// A guest's driver, after FUSE_INIT.
pub struct Guest {
    _frontend: Frontend,
    pub memory: File,
    kick: EventFd,
    call: EventFd,
    device: OwnedFd,
    sent: u16,
    /// Who makes the requests.
    pub uid: u32,
    pub gid: u32,
}

impl Guest {
    pub fn start(share: &mut Share) -> Self {
        let device = share.process.child().pidfd().try_clone_to_owned().unwrap();
        let stream = UnixStream::from(share.vmm.take().unwrap());
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.get_features().unwrap();
        frontend.set_features(1 << 32 | protocol).unwrap();
        let wanted = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(wanted).unwrap();

        let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: VMM_BASE,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        frontend.set_vring_num(REQUESTS, QUEUE).unwrap();
        frontend.set_vring_base(REQUESTS, 0).unwrap();
        let rings = VringConfigData {
            queue_max_size: QUEUE,
            queue_size: QUEUE,
            flags: 0,
            desc_table_addr: VMM_BASE + DESCRIPTORS,
            avail_ring_addr: VMM_BASE + AVAILABLE,
            used_ring_addr: VMM_BASE + USED,
            log_addr: None,
        };
        frontend.set_vring_addr(REQUESTS, &rings).unwrap();
        frontend.set_vring_call(REQUESTS, &call).unwrap();
        frontend.set_vring_kick(REQUESTS, &kick).unwrap();
        frontend.set_vring_enable(REQUESTS, true).unwrap();
        let (sent, uid, gid) = (0, 0, 0);
        let mut guest = Self { _frontend: frontend, memory, kick, call, device, sent, uid, gid };
        guest.init();
        guest
    }

    fn init(&mut self) {
        const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
        let mut body = Vec::new();
        for word in [7, 38, 65536, HANDLE_KILLPRIV_V2] {
            body.extend(u32::to_le_bytes(word));
        }
        body.resize(64, 0);
        self.call(26, 0, &body).unwrap();
    }

    /// Makes a request; the reply's body or the error number.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let mut request = Vec::new();
        request.extend((40 + body.len() as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(u64::from(self.sent).to_le_bytes());
        request.extend(node.to_le_bytes());
        for word in [self.uid, self.gid, 1, 0] {
            request.extend(word.to_le_bytes());
        }
        request.extend(body);
        let reply = self.raw(&request).expect("the device has ended");
        let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
        if error == 0 { Ok(reply[16..].to_vec()) } else { Err(-error) }
    }

    /// Sends bytes as they are; none when the device does not answer them.
    pub fn raw(&mut self, request: &[u8]) -> Option<Vec<u8>> {
        self.memory.write_all_at(request, REQUEST).unwrap();
        let descriptors = [(REQUEST, request.len() as u32, 1u16, 1u16), (REPLY, REPLY_SIZE, 2, 0)];
        self.chain(&descriptors)?;
        let mut size = [0; 4];
        self.memory.read_exact_at(&mut size, REPLY).unwrap();
        let mut reply = vec![0; u32::from_le_bytes(size).clamp(16, REPLY_SIZE) as usize];
        self.memory.read_exact_at(&mut reply, REPLY).unwrap();
        Some(reply)
    }

    /// Offers a chain of descriptors (address, length, flags, next) and waits for its end.
    pub fn chain(&mut self, descriptors: &[(u64, u32, u16, u16)]) -> Option<()> {
        let mut table = Vec::new();
        for (address, length, flags, next) in descriptors {
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        self.memory.write_all_at(&table, DESCRIPTORS).unwrap();
        let slot = AVAILABLE + 4 + 2 * u64::from(self.sent % QUEUE);
        self.memory.write_all_at(&0u16.to_le_bytes(), slot).unwrap();
        self.sent = self.sent.wrapping_add(1);
        self.memory.write_all_at(&self.sent.to_le_bytes(), AVAILABLE + 2).unwrap();
        self.kick.write(1).unwrap();
        self.wait()
    }

    fn wait(&self) -> Option<()> {
        let start = Instant::now();
        let mut ended = false;
        loop {
            let mut used = [0; 2];
            self.memory.read_exact_at(&mut used, USED + 2).unwrap();
            if u16::from_le_bytes(used) == self.sent {
                return Some(());
            }
            if ended || start.elapsed() > PATIENCE {
                return None;
            }
            // SAFETY: the descriptor is open as long as `self`.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            let mut fds = [
                PollFd::from_borrowed_fd(call, PollFlags::IN),
                PollFd::new(&self.device, PollFlags::IN),
            ];
            poll(&mut fds, Some(&Timespec::try_from(PATIENCE).unwrap())).unwrap();
            ended = !fds[1].revents().is_empty();
            // A call may be one that was made before; look again.
            if !fds[0].revents().is_empty() {
                self.call.read().unwrap();
            }
        }
    }

    /// The node of a name.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(1, parent, &c_bytes(name)).map(|reply| node(&reply))
    }

    /// The node of a path.
    pub fn walk(&mut self, path: &str) -> Result<u64, i32> {
        path.split('/').try_fold(ROOT, |parent, name| self.lookup(parent, name))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let mut body = words(&[0o755, 0]);
        body.extend(c_bytes(name));
        self.call(9, parent, &body).map(|reply| node(&reply))
    }

    /// A new open file: its node and handle.
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = (libc::O_CREAT | libc::O_RDWR) as u32;
        let mut body = words(&[flags, mode, 0, 0]);
        body.extend(c_bytes(name));
        let reply = self.call(35, parent, &body)?;
        Ok((node(&reply), u64::from_le_bytes(reply[128..136].try_into().unwrap())))
    }

    /// Opens a file: its handle.
    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.call(14, node, &words(&[flags as u32, 0]))?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    /// Writes; `kill` asks the host to drop set-id bits, as for a user without privileges.
    pub fn write(&mut self, node: u64, handle: u64, data: &[u8], kill: bool) -> Result<(), i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(words(&[data.len() as u32, if kill { 4 } else { 0 }]));
        body.resize(40, 0);
        body.extend(data);
        self.call(16, node, &body).map(drop)
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Result<u64, i32> {
        let mut body = words(&[mode, device, 0, 0]);
        body.extend(c_bytes(name));
        self.call(8, parent, &body).map(|reply| self::node(&reply))
    }

    pub fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let mut body = words(&[value.len() as u32, 0]);
        body.extend(c_bytes(name));
        body.extend(value);
        self.call(21, node, &body).map(drop)
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn c_bytes(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn node(reply: &[u8]) -> u64 {
    u64::from_le_bytes(reply[..8].try_into().unwrap())
}
