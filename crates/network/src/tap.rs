//! The VM's end of a NIC.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use kata_netlink::{Address, Link, LinkKind, Prefix, Route, Socket};
use rustix::fs::{Mode, OFlags};

use crate::{Netns, NetworkError};

/// Names of our taps start with it; by it they are told from an engine's interfaces.
pub const TAP_PREFIX: &str = "katatap";

/// Longest name of an interface.
const NAME: usize = libc::IFNAMSIZ - 1;

/// A tap in a container's network namespace, for QEMU's `-netdev tap,fd=…,vhost=off`:
/// single queue, with the virtio-net header (QEMU sets its length and the offloads).
///
/// Made by [`Tap::create`] it is gone when the last copy of its descriptor is closed, so
/// nothing is left when every process of ours is killed. To close that takes the kernel some
/// fifteen milliseconds, which [`Tap::create_idle`] spares.
#[derive(Debug)]
pub struct Tap {
    /// Frames, each after a virtio-net header.
    pub fd: OwnedFd,
    /// Number of the interface.
    pub index: u32,
    /// Name of the interface.
    pub name: String,
}

impl Tap {
    /// A tap to be joined to an interface now or later ([`crate::join()`]). `name` should
    /// be [`TAP_PREFIX`] and a number.
    ///
    /// # Errors
    /// When the name is invalid or taken, or there is no `/dev/net/tun`.
    pub fn create(netns: &Netns, name: &str) -> Result<Self, NetworkError> {
        check_name(name)?;
        let (fd, index) = netns
            .run(|| open_tun(name))?
            .map_err(|e| NetworkError::System("make a tap (is there a /dev/net/tun?)", e))?;
        Ok(Self { fd, index, name: name.to_owned() })
    }

    /// A tap that may never be used, in a namespace that is made for such ones: it goes with
    /// the namespace, in the kernel's own time, until it is moved to another one.
    ///
    /// # Errors
    /// Those of [`Tap::create`].
    pub fn create_idle(netns: &Netns, name: &str) -> Result<Self, NetworkError> {
        let tap = Self::create(netns, name)?;
        tap.outlive_descriptor(true)?;
        Ok(tap)
    }

    fn outlive_descriptor(&self, outlive: bool) -> Result<(), NetworkError> {
        // SAFETY: the descriptor is open; TUNSETPERSIST takes a number and no pointer.
        let set = unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETPERSIST, libc::c_ulong::from(outlive))
        };
        match set {
            0 => Ok(()),
            _ => Err(NetworkError::System("make a tap stay", io::Error::last_os_error())),
        }
    }

    /// A macvtap on `link`, for [`crate::Model::Macvtap`]: nothing is left to be joined.
    /// Every frame for the link goes to it. It stays until [`crate::unjoin`] or the end
    /// of the namespace.
    ///
    /// # Errors
    /// When the kernel refuses it (a link can have only one), or its device cannot be
    /// opened.
    pub fn on_link(netns: &Netns, link: &Link, name: &str) -> Result<Self, NetworkError> {
        const IFLA_MACVLAN_MODE: u16 = 1;
        const PASSTHRU: u32 = 8;
        check_name(name)?;
        let mut socket = netns.socket()?;
        let request = Link::create(name, "macvtap", |r| r.attr_u32(IFLA_MACVLAN_MODE, PASSTHRU))
            .attr_u32(libc::IFLA_LINK, link.index);
        let made = request.attr_u32(libc::IFLA_MTU, link.mtu);
        socket.send(vec![made]).map_err(|e| netns.netlink(e))?;
        let opened = Self::open_macvtap(netns, &mut socket, name);
        if opened.is_err() {
            // Already failing: the first error is the one to tell.
            let _ = crate::join::delete_by_name(netns, &mut socket, name);
        }
        opened
    }

    /// A tap that looks like an engine's interface: up, with addresses, and for each the way to
    /// all others of its kind through a gateway. It is gone with its descriptor.
    ///
    /// # Errors
    /// Those of [`Tap::create`], or the kernel refuses addresses or routes.
    pub fn as_interface(
        netns: &Netns,
        name: &str,
        addresses: &[(Prefix, IpAddr)],
    ) -> Result<Self, NetworkError> {
        let tap = Self::create(netns, name)?;
        let mut requests = vec![Link::up(tap.index)];
        for (address, gateway) in addresses {
            let anybody: IpAddr = match gateway {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let route = Route {
                destination: Prefix { address: anybody, length: 0 },
                gateway: Some(*gateway),
                link: tap.index,
                source: None,
                scope: libc::RT_SCOPE_UNIVERSE,
                metric: 0,
                protocol: libc::RTPROT_STATIC,
                onlink: true,
                mtu: 0,
                several: false,
            };
            requests.extend([Address::add(tap.index, *address), route.add()]);
        }
        netns.socket()?.send(requests).map_err(|e| netns.netlink(e))?;
        Ok(tap)
    }

    /// Takes it to another namespace, with the name it has. Whoever has its descriptor goes on
    /// using it. It is gone with that from then on, also if it was made idle.
    ///
    /// # Errors
    /// When the name is taken there, or the kernel refuses.
    pub fn move_to(&mut self, from: &Netns, to: &Netns) -> Result<(), NetworkError> {
        // Before: nothing of it may be left there, whatever happens next.
        self.outlive_descriptor(false)?;
        let moved = Link::move_to(self.index, to.as_fd(), &self.name);
        from.socket()?.send(vec![moved]).map_err(|e| from.netlink(e))?;
        let find = || Ok(rustix::net::netdevice::name_to_index(inet_socket()?, &self.name)?);
        self.index = to.run(find)?.map_err(|e| NetworkError::System("find a moved tap", e))?;
        Ok(())
    }

    fn open_macvtap(netns: &Netns, socket: &mut Socket, name: &str) -> Result<Self, NetworkError> {
        let links = Link::all(socket).map_err(|e| netns.netlink(e))?;
        let link = links.into_iter().find(|link| link.name == name).ok_or_else(|| {
            NetworkError::NoLink { link: name.to_owned(), netns: netns.path().to_owned() }
        })?;
        let requests = vec![Link::no_own_addresses(link.index), Link::up(link.index)];
        socket.send(requests).map_err(|e| netns.netlink(e))?;
        let fd = netns
            .run(|| open_tap_device(name, link.index))?
            .map_err(|e| NetworkError::System("open the device of a macvtap", e))?;
        Ok(Self { fd, index: link.index, name: name.to_owned() })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether an interface is one of our taps.
pub(crate) fn is_ours(link: &Link) -> bool {
    link.name.starts_with(TAP_PREFIX) && matches!(link.kind, LinkKind::Tun | LinkKind::Macvtap)
}

pub(crate) fn check_name(name: &str) -> Result<(), NetworkError> {
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    let special = name == "." || name == "..";
    if name.is_empty() || name.len() > NAME || special || !name.bytes().all(good) {
        return Err(NetworkError::Name(name.to_owned()));
    }
    Ok(())
}

/// Opens `/dev/net/tun` in the calling thread's namespace and makes it the tap `name`.
fn open_tun(name: &str) -> io::Result<(OwnedFd, u32)> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    rustix::io::ioctl_fionbio(&file, true)?;
    configure_tun(&file, name)?;
    let index = rustix::net::netdevice::name_to_index(inet_socket()?, name)?;
    Ok((file.into(), index))
}

fn inet_socket() -> io::Result<OwnedFd> {
    let family = rustix::net::AddressFamily::INET;
    Ok(rustix::net::socket_with(
        family,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?)
}

fn configure_tun(file: &File, name: &str) -> io::Result<()> {
    // SAFETY: all zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(NAME)) {
        *target = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens the character device of a macvtap in the calling thread's namespace.
///
/// `/dev/tap<index>` is ambiguous between namespaces, so the device's number is read from
/// a sysfs of this namespace and the node made in a file system that nobody else sees.
fn open_tap_device(name: &str, index: u32) -> io::Result<OwnedFd> {
    let sysfs = private_mount("sysfs")?;
    let path = format!("class/net/{name}/tap{index}/dev");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&sysfs, path, flags, Mode::empty())?;
    let text = io::read_to_string(File::from(file))?;
    let numbers = text.trim().split_once(':').and_then(|(major, minor)| {
        Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
    });
    let device = numbers.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;

    let nodes = private_mount("tmpfs")?;
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(&nodes, "tap", kind, Mode::RUSR | Mode::WUSR, device)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::openat(&nodes, "tap", flags, Mode::empty())?;
    let mode: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: all zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = mode as libc::c_short;
    // SAFETY: the descriptor is open, and TUNSETIFF reads one ifreq.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// A file system that is mounted nowhere; it goes when the descriptor is closed.
fn private_mount(kind: &str) -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create};
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(rustix::mount::fsmount(&context, flags, MountAttrFlags::empty())?)
}
