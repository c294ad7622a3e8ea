//! What a machine is made of.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::snapshot::{ForkMemory, Start};
use crate::vsock::VsockDevice;

/// The virtual hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Machine {
    /// PCI Express; devices can be plugged.
    #[default]
    Q35,
    /// No PCI: starts a little sooner, but nothing can be plugged.
    Microvm,
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor, by way of the kernel.
    Kvm,
    /// QEMU's binary translation.
    Tcg,
}

impl Accelerator {
    /// QEMU's name for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which accelerator the configuration wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcceleratorChoice {
    /// KVM if the self-test finds it good, else TCG.
    #[default]
    Auto,
    /// KVM, come what may.
    Kvm,
    /// TCG.
    Tcg,
}

/// Which kernel it is: they take different parameters. [`KernelKind::of`] tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelKind {
    /// Built from our configuration, with the boot-hints patch, 100 ticks a second.
    #[default]
    Tuned,
    /// The same for emulated machines that have one processor, and never another: it has nothing to
    /// keep several apart, and nothing against what real ones do wrong.
    Uniprocessor,
    /// A distribution's.
    Distro,
}

impl KernelKind {
    /// Whether it listens to the hints of our patch.
    pub fn is_tuned(self) -> bool {
        matches!(self, Self::Tuned | Self::Uniprocessor)
    }
}

/// How the agent is reached.
#[derive(Debug, Default)]
pub enum ChannelKind {
    /// One virtio-serial port; works everywhere.
    #[default]
    Serial,
    /// vsock by the host's kernel.
    Vsock(VsockDevice),
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

/// The text is no hardware address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no hardware address: six pairs of hexadecimal digits with colons are")]
pub struct InvalidMac(String);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let invalid = || InvalidMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or_else(invalid)?;
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| invalid())?;
        }
        if pairs.next().is_some() { Err(invalid()) } else { Ok(Self(bytes)) }
    }
}

/// A network interface of the guest.
#[derive(Debug)]
pub struct Nic {
    /// The host's end: an open tap.
    pub tap: OwnedFd,
    /// The guest's hardware address.
    pub mac: Mac,
}

/// A block device of the guest.
#[derive(Debug)]
pub struct Disk {
    /// A block device of the host or a file, opened for what the guest may do.
    pub file: OwnedFd,
    /// It is a file.
    pub is_file: bool,
    /// The guest may not write.
    pub readonly: bool,
    /// What the guest knows it by: 1 to 20 letters and digits.
    pub serial: String,
}

/// How the guest gets at host directories.
#[derive(Debug)]
pub enum Share {
    /// virtio-fs, served by a process at the other end of this socket.
    VhostUserFs {
        /// The connected vhost-user socket.
        socket: OwnedFd,
        /// The name by which the guest mounts it.
        tag: String,
        /// Length of its queues.
        queue_size: u32,
    },
    /// 9p, served by QEMU itself: slower, but needs no other process. The share is empty
    /// until something is mounted below `/share` in QEMU's jail ([`crate::Qemu::process`]).
    NineP {
        /// The name by which the guest mounts it.
        tag: String,
    },
}

/// A machine to start.
#[derive(Debug)]
pub struct VmConfig {
    /// Names the machine, in `ps` and logs: letters, digits and `_+.-`.
    pub id: String,
    /// The QEMU to run.
    pub qemu: PathBuf,
    /// Firmware; the fastest that is found ([`crate::find_firmware`]) if not given.
    pub firmware: Option<PathBuf>,
    /// The kernel: `vmlinux` with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// Which parameters the kernel takes.
    pub kernel_kind: KernelKind,
    /// The initial file system.
    pub initrd: PathBuf,
    /// Whether the kernel says on its console only what is amiss.
    pub quiet: bool,
    /// Kernel parameters after ours.
    pub kernel_params: Vec<String>,
    /// The virtual hardware.
    pub machine: Machine,
    /// Further options of QEMU's `-machine`, separated by commas.
    pub machine_options: String,
    /// Further options of QEMU's `-cpu`, separated by commas.
    pub cpu_options: String,
    /// A device of the host that the guest's random numbers come from; else its kernel.
    pub entropy: Option<PathBuf>,
    /// QEMU's own filter, options of its `-sandbox`; empty: the strictest that works.
    pub filter: String,
    /// What runs the guest, and the host's clock rate: the outcome of [`crate::accelerator::choose`].
    pub accelerator: Accelerator,
    /// Rate of the host's time stamp counter, kHz; 0 if unknown.
    pub tsc_khz: u64,
    /// Memory in MiB; taken from the host as the guest touches it.
    pub memory_mib: u32,
    /// Memory in MiB that may be reached by adding some while the machine runs.
    pub max_memory_mib: u32,
    /// How many times memory can be added (a machine without ACPI: any number of times); 0: never.
    pub memory_slots: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Virtual CPUs that may be reached by plugging (KVM only).
    pub max_vcpus: u32,
    /// Network interfaces that are there from the start.
    pub nics: Vec<Nic>,
    /// The host's kernel moves packets between guest and taps (`/dev/vhost-net`) where it can;
    /// else the monitor does.
    pub vhost_net: bool,
    /// Root ports kept free for devices plugged later (q35). Each costs start time.
    pub hotplug_ports: u32,
    /// Host directories.
    pub share: Option<Share>,
    /// The way to the agent.
    pub channel: ChannelKind,
    /// How it comes to life.
    pub start: Start,
    /// Whether the monitor is jailed. Only for finding faults.
    pub jail: bool,
    /// The network namespace in which the jailed monitor can be found by an engine that looks
    /// for the container's there; else it has an empty one.
    pub netns: Option<OwnedFd>,
    /// User and group of the jailed monitor.
    pub uid: u32,
}

impl VmConfig {
    /// Whether the machine has no ACPI and the kernel is told of its devices by its command
    /// line, which saves a sixth of an emulated boot. A distribution's kernel does not listen.
    pub(crate) fn is_bare(&self) -> bool {
        self.machine == Machine::Microvm
            && self.accelerator == Accelerator::Tcg
            && self.kernel_kind.is_tuned()
    }

    /// Whether another process reads and writes its memory: the one behind the share.
    pub(crate) fn shares_memory(&self) -> bool {
        matches!(self.share, Some(Share::VhostUserFs { .. }))
    }

    /// Whether it goes on where another one stands still.
    pub(crate) fn is_fork(&self) -> bool {
        matches!(self.start, Start::Fork { .. })
    }

    /// What it copies its memory from when it is touched, if it does: all who share its memory
    /// have to.
    pub fn touched(&self) -> Option<BorrowedFd<'_>> {
        match &self.start {
            Start::Fork { from, memory: ForkMemory::Touched } => Some(from.whole.as_fd()),
            _ => None,
        }
    }

    /// Whether memory may be added while it runs. A microvm with ACPI has no slots for it.
    pub(crate) fn grows(&self) -> bool {
        self.memory_slots > 0 && (self.machine == Machine::Q35 || self.is_bare())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_hardware_address_is_refused() {
        for text in
            ["", "1:2:3:4:5:6", "00:11:22:33:44", "00:11:22:33:44:55:66", "+0:11:22:33:44:55"]
        {
            assert!(text.parse::<Mac>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn an_address_is_read_as_it_was_written(bytes: [u8; 6]) {
            prop_assert_eq!(Mac(bytes).to_string().parse(), Ok(Mac(bytes)));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<Mac>();
        }
    }
}
