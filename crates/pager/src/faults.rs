//! What the kernel tells of page faults: userfaultfd(2) and `linux/userfaultfd.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::c_ulong;

/// Root's way to page faults that happen in the kernel as well.
const DEVICE: &str = "/dev/userfaultfd";
/// Of that device the request that makes a descriptor (`USERFAULTFD_IOC_NEW`), whose argument are
/// flags such as `O_CLOEXEC`.
pub const NEW: c_ulong = 0xaa00;
/// `UFFD_USER_MODE_ONLY`, a flag of userfaultfd(2): what every process may ask for.
pub const USER_MODE_ONLY: i32 = 1;

/// Version of the interface, which is settled first (`UFFD_API`).
const VERSION: u64 = 0xaa;
/// Requests: `UFFDIO_API`, `UFFDIO_REGISTER`, `UFFDIO_WAKE`, `UFFDIO_COPY`.
const API: c_ulong = 0xc018_aa3f;
const REGISTER: c_ulong = 0xc020_aa00;
const WAKE: c_ulong = 0x8010_aa02;
const COPY: c_ulong = 0xc028_aa03;
/// What a process asks for its faults once it has them.
pub const REQUESTS: [c_ulong; 3] = [REGISTER, WAKE, COPY];
/// Features: missing pages of a memfd; pages of one that are watched for writes
/// (`UFFD_FEATURE_MISSING_SHMEM`, `…_PAGEFAULT_FLAG_WP` with `…_WP_HUGETLBFS_SHMEM`).
const MISSING_SHMEM: u64 = 1 << 5;
const WRITES_SHMEM: u64 = 1 << 0 | 1 << 12;
/// What is registered: `UFFDIO_REGISTER_MODE_MISSING` and `…_WP`.
const MODE_MISSING: u64 = 1 << 0;
const MODE_WRITES: u64 = 1 << 1;
/// An event that is a page fault (`UFFD_EVENT_PAGEFAULT`), and bytes of any.
const PAGE_FAULT: u8 = 0x12;
const MESSAGE: usize = 32;
/// Events that are read at once.
const BATCH: usize = 16;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// The page faults of one process, in what is registered of its memory.
#[derive(Debug)]
pub struct Faults(OwnedFd);

/// What became of a page that was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handed {
    /// It is there, and who waited goes on.
    Copied,
    /// Another process that shares it was first.
    Found,
    /// For now there is no memory, or the process is changing what it has mapped.
    Later,
    /// The process has nothing there any more.
    Unmapped,
    /// It has ended.
    Ended,
}

/// Whether pages can be copied when they are touched: the kernel would tell this process.
pub fn is_available() -> bool {
    Faults::of_self().is_ok()
}

/// The device.
///
/// # Errors
/// It is not there, or not for this process.
pub fn device() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(DEVICE)?.into())
}

impl Faults {
    /// Those of this process. Who reads them waits until there are some.
    ///
    /// # Errors
    /// The device is not there, or not for this process.
    pub fn of_self() -> io::Result<Self> {
        let device = device()?;
        // SAFETY: a request whose argument is a number; it makes a descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW as _, libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it, for us.
        Self::of_another(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Of the process in whose name this descriptor was made, which nobody has used yet: its faults
    /// in the kernel are told of as well.
    ///
    /// # Errors
    /// The kernel cannot tell of pages of a memfd that are missing.
    pub fn of_another(made: OwnedFd) -> io::Result<Self> {
        let faults = Self(made);
        faults.agree(MISSING_SHMEM | WRITES_SHMEM)?;
        Ok(faults)
    }

    /// As [`Faults::of_another`], to watch pages for writes.
    ///
    /// # Errors
    /// The kernel cannot, for pages of a memfd: it is before Linux 5.19.
    pub fn watching(made: OwnedFd) -> io::Result<Self> {
        let faults = Self(made);
        faults.agree(WRITES_SHMEM)?;
        Ok(faults)
    }

    fn agree(&self, features: u64) -> io::Result<()> {
        // Version, what is wanted and is there, requests that may be made.
        let mut words = [VERSION, features, 0];
        self.request(API, &mut words)
    }

    /// From now on pages of a memfd that are missing here, and are touched, are told of. As by
    /// [`Faults::watch`], pages that are not missing are mapped when they are touched.
    ///
    /// # Errors
    /// Something else is mapped there.
    pub fn register(&self, start: u64, length: u64) -> io::Result<()> {
        self.request(REGISTER, &mut [start, length, MODE_MISSING | MODE_WRITES, 0])
    }

    /// Watches pages for writes. None is protected, so nothing is told; but who reads a page is not
    /// given those around it as well.
    ///
    /// # Errors
    /// Something else than a memfd is mapped there.
    pub fn watch(&self, start: u64, length: u64) -> io::Result<()> {
        self.request(REGISTER, &mut [start, length, MODE_WRITES, 0])
    }

    /// Addresses that were touched; none when there are none for now.
    pub(crate) fn read(&self) -> io::Result<Vec<u64>> {
        let mut bytes = [0; BATCH * MESSAGE];
        let read = match rustix::io::read(&self.0, &mut bytes[..]) {
            Ok(read) => read,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let messages = bytes[..read].as_chunks::<MESSAGE>().0.iter();
        let faults = messages.filter(|message| message[0] == PAGE_FAULT);
        // The event's kind and padding, flags, the address (`struct uffd_msg`).
        Ok(faults
            .map(|message| {
                let [_, _, address, _] = *message.as_chunks::<8>().0 else { return 0 };
                u64::from_ne_bytes(address)
            })
            .collect())
    }

    /// Puts a page in at this address, if there is none yet.
    pub(crate) fn hand_over(&self, address: u64, page: &[u8; PAGE]) -> io::Result<Handed> {
        let source = page.as_ptr() as u64;
        // To where, from where, bytes, no mode, what the kernel did.
        let mut words = [address, source, PAGE as u64, 0, 0];
        let failed = match self.request(COPY, &mut words) {
            Ok(()) => return Ok(Handed::Copied),
            Err(error) => error,
        };
        let handed = match failed.raw_os_error() {
            Some(libc::EEXIST) => Handed::Found,
            Some(libc::ENOMEM | libc::EAGAIN) => Handed::Later,
            Some(libc::ENOENT) => Handed::Unmapped,
            Some(libc::ESRCH | libc::ENOSPC) => Handed::Ended,
            _ => return Err(failed),
        };
        Ok(handed)
    }

    /// Lets go on who waits for the page at this address: it looks again.
    pub(crate) fn wake(&self, address: u64) -> io::Result<()> {
        match self.request(WAKE, &mut [address, PAGE as u64]) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            woken => woken,
        }
    }

    fn request<const N: usize>(&self, request: c_ulong, words: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: each of these requests reads and writes a structure of so many words, which
        // lives; addresses in it are of the process whose faults these are, or of a page of ours.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, words.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsFd for Faults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Faults {
    /// Of what another process of ours has agreed on.
    fn from(agreed: OwnedFd) -> Self {
        Self(agreed)
    }
}
