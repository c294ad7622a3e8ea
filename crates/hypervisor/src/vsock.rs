//! A guest's vsock address, by the host's kernel (`/dev/vhost-vsock`).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// The host's vsock device.
pub const VHOST_VSOCK: &str = "/dev/vhost-vsock";
/// Addresses below are the hypervisor's, this host's and the like.
const FIRST_CID: u32 = 3;
/// So many addresses are tried. There are four billion, and few are taken.
const ATTEMPTS: u32 = 16;
/// `_IOW(0xaf, 0x60, u64)`
const VHOST_VSOCK_SET_GUEST_CID: libc::c_ulong = 0x4008_af60;

/// Whether guests can have vsock here.
///
/// # Errors
/// Why not.
pub fn vsock_available() -> io::Result<()> {
    open().map(drop)
}

fn open() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open(VHOST_VSOCK)?.into())
}

/// An address that no other guest of this host has, for as long as this is open.
#[derive(Debug)]
pub struct VsockDevice {
    pub(crate) device: OwnedFd,
    cid: u32,
}

impl VsockDevice {
    /// Claims an address.
    ///
    /// # Errors
    /// When the host has no vsock device (module `vhost_vsock`), or does not let us.
    pub fn claim() -> io::Result<Self> {
        let device = open()?;
        let mut taken = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..ATTEMPTS {
            let cid = random_cid()?;
            match set_cid(&device, cid) {
                Ok(()) => return Ok(Self { device, cid }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken = error,
                Err(error) => return Err(error),
            }
        }
        Err(taken)
    }

    /// The guest's address.
    pub fn cid(&self) -> u32 {
        self.cid
    }
}

fn random_cid() -> io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    // 32 ones stand for "any"; a CID of more than 31 bits is not for every tool.
    Ok((u32::from_ne_bytes(bytes) >> 1).max(FIRST_CID))
}

fn set_cid(device: &OwnedFd, cid: u32) -> io::Result<()> {
    let cid = u64::from(cid);
    // SAFETY: the descriptor is open, and the call reads one u64, which lives.
    let result =
        unsafe { libc::ioctl(device.as_raw_fd(), VHOST_VSOCK_SET_GUEST_CID, &raw const cid) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_guests_to_have() {
        for _ in 0..1000 {
            let cid = random_cid().unwrap();
            assert!((FIRST_CID..1 << 31).contains(&cid));
        }
    }

    #[test]
    fn two_guests_get_two_addresses_or_the_host_has_no_vsock() {
        match (VsockDevice::claim(), VsockDevice::claim()) {
            (Ok(one), Ok(two)) => assert_ne!(one.cid(), two.cid()),
            (one, _) => {
                assert!(!std::path::Path::new(VHOST_VSOCK).exists(), "{one:?}");
            }
        }
    }
}
