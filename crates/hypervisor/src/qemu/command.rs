//! QEMU's command line: a description of the machine, and nothing else.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::HypervisorError;
use crate::config::{Accelerator, ChannelKind, Machine, Nic, Share, VmConfig};
use crate::error::host;
use crate::kernel_params;

/// Numbers at which QEMU finds what it inherits.
const QMP_FD: i32 = 10;
const CONSOLE_FD: i32 = 11;
const AGENT_FD: i32 = 12;
const SHARE_FD: i32 = 13;
const FIRST_NIC_FD: i32 = 20;

/// Name of the virtio-serial port that carries the channel (kata-protocol's SERIAL_PORT).
const AGENT_PORT: &str = "kata.agent.0";

/// Our ends of the sockets that QEMU has.
pub(super) struct Sockets {
    pub qmp: OwnedFd,
    pub console: OwnedFd,
    pub agent: Option<OwnedFd>,
}

/// A command line with what it refers to.
pub(super) struct Command {
    args: Vec<OsString>,
    pub fds: Vec<(OwnedFd, i32)>,
    machine: Machine,
    ports: u32,
}

impl Command {
    fn arg(&mut self, name: &str, value: impl Into<OsString>) {
        self.args.push(name.into());
        self.args.push(value.into());
    }

    /// A virtio device; the bus decides its full name.
    fn device(&mut self, kind: &str, options: &str) {
        let bus = match self.machine {
            Machine::Q35 => "pci",
            Machine::Microvm => "device",
        };
        let comma = if options.is_empty() { "" } else { "," };
        self.arg("-device", format!("{kind}-{bus}{comma}{options}"));
    }

    /// Passes a descriptor on, as a connected character device.
    fn socket(&mut self, id: &str, fd: OwnedFd, at: i32) {
        self.fds.push((fd, at));
        self.arg("-chardev", format!("socket,id={id},fd={at}"));
    }

    pub(super) fn into_args(self) -> (Vec<OsString>, Vec<(OwnedFd, i32)>, u32) {
        (self.args, self.fds, self.ports)
    }
}

/// Builds the command line; takes the descriptors out of `config`.
pub(super) fn build(
    config: &mut VmConfig,
    firmware: Option<&Path>,
    qemu_major: u32,
) -> Result<(Command, Sockets), HypervisorError> {
    let mut command = Command {
        args: Vec::new(),
        fds: Vec::new(),
        machine: config.machine,
        ports: if config.machine == Machine::Q35 { config.hotplug_ports } else { 0 },
    };
    command.arg("-name", format!("kata-{}", config.id));
    machine(&mut command, config, firmware, qemu_major);
    kernel(&mut command, config);
    let sockets = channels(&mut command, config)?;
    command.arg("-object", "rng-builtin,id=rng");
    command.device("virtio-rng", "rng=rng");
    if let Some(share) = config.share.take() {
        self::share(&mut command, share);
    }
    for (index, nic) in std::mem::take(&mut config.nics).into_iter().enumerate() {
        self::nic(&mut command, index, nic);
    }
    for port in 0..command.ports {
        command.arg("-device", format!("pcie-root-port,id=port{port},chassis={port},slot={port}"));
    }
    Ok((command, sockets))
}

fn machine(command: &mut Command, config: &VmConfig, firmware: Option<&Path>, qemu_major: u32) {
    let shared = matches!(config.share, Some(Share::VhostUserFs { .. }));
    let kind = match config.machine {
        Machine::Q35 => "q35,sata=off,smbus=off,smm=off,vmport=off,i8042=off",
        Machine::Microvm => "microvm,pic=off,pit=off",
    };
    command.arg("-machine", format!("{kind},memory-backend=memory"));
    let size = config.memory_mib;
    let share = if shared { "on" } else { "off" };
    command.arg("-object", format!("memory-backend-memfd,id=memory,size={size}M,share={share}"));
    command.arg("-m", format!("{size}M"));
    match config.accelerator {
        Accelerator::Kvm => {
            command.arg("-accel", "kvm");
            command.arg("-cpu", "host");
            command.arg("-smp", format!("{},maxcpus={}", config.vcpus, config.max_vcpus.max(config.vcpus)));
        }
        Accelerator::Tcg => {
            let threads = if config.vcpus > 1 { "multi" } else { "single" };
            command.arg("-accel", format!("tcg,thread={threads}"));
            command.arg("-cpu", tcg_cpu(qemu_major));
            command.arg("-smp", config.vcpus.to_string());
        }
    }
    for flag in ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"] {
        command.args.push(flag.into());
    }
    if let Some(firmware) = firmware {
        command.arg("-bios", firmware);
    }
    command.arg(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
}

/// The kernel's string functions use `rep stosb` where the processor says it is fast; TCG
/// says so and does it byte by byte. Older versions refuse names that they do not know.
fn tcg_cpu(qemu_major: u32) -> &'static str {
    if qemu_major >= 8 { "max,-erms,-fsrm,-fsrs,-fzrm,-fsrc" } else { "max,-erms,-fsrm" }
}

fn kernel(command: &mut Command, config: &VmConfig) {
    command.arg("-kernel", &config.kernel);
    command.arg("-initrd", &config.initrd);
    command.arg("-append", kernel_params::command_line(config));
}

fn channels(command: &mut Command, config: &VmConfig) -> Result<Sockets, HypervisorError> {
    let (qmp, theirs) = pair()?;
    command.socket("qmp", theirs, QMP_FD);
    command.arg("-mon", "chardev=qmp,mode=control");
    command.device("virtio-serial", "");
    let (console, theirs) = pair()?;
    command.socket("console", theirs, CONSOLE_FD);
    command.arg("-device", "virtconsole,chardev=console");
    let agent = match config.channel {
        ChannelKind::Serial => {
            let (ours, theirs) = pair()?;
            command.socket("agent", theirs, AGENT_FD);
            command.arg("-device", format!("virtserialport,chardev=agent,name={AGENT_PORT}"));
            Some(ours)
        }
        ChannelKind::Vsock { cid } => {
            command.device("vhost-vsock", &format!("guest-cid={cid}"));
            None
        }
    };
    Ok(Sockets { qmp, console, agent })
}

fn share(command: &mut Command, share: Share) {
    match share {
        Share::VhostUserFs { socket, tag } => {
            command.socket("share", socket, SHARE_FD);
            command.device("vhost-user-fs", &format!("chardev=share,tag={tag},queue-size=1024"));
        }
        Share::NineP { path, tag } => {
            command.arg(
                "-fsdev",
                format!("local,id=share,path={},security_model=passthrough,multidevs=remap", path.display()),
            );
            command.device("virtio-9p", &format!("fsdev=share,mount_tag={tag}"));
        }
    }
}

fn nic(command: &mut Command, index: usize, nic: Nic) {
    // There are at most 32 of them.
    let at = FIRST_NIC_FD + i32::try_from(index).unwrap_or(i32::MAX - FIRST_NIC_FD);
    command.fds.push((nic.tap, at));
    command.arg("-netdev", format!("tap,id=net{index},fd={at},vhost=off"));
    let rom = if command.machine == Machine::Q35 { ",romfile=" } else { "" };
    command.device("virtio-net", &format!("netdev=net{index},mac={}{rom}", nic.mac));
}

fn pair() -> Result<(OwnedFd, OwnedFd), HypervisorError> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(host("make a socket"))
}

/// The fastest firmware there is for a machine; QEMU's own choice when none is found.
pub fn find_firmware(machine: Machine) -> Option<PathBuf> {
    let names: &[&str] = match machine {
        Machine::Q35 => &["/usr/share/qemu/qboot.rom", "/usr/share/qboot/bios.bin"],
        Machine::Microvm => &[],
    };
    names.iter().map(PathBuf::from).find(|path| path.exists())
}
