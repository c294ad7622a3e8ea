//! QEMU's command line, and the descriptors that go with it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;

use crate::config::{Accelerator, ChannelKind, Machine, Nic, Share, VmConfig};
use crate::kernel_params;
use crate::qemu::cage::SHARE;
use crate::qemu::resize::Room;

/// The first descriptor number given to QEMU.
const FIRST_FD: RawFd = 10;
/// The name under which the agent's end of the serial channel appears in the guest.
const SERIAL_PORT: &str = "kata.agent.0";
/// Ports of the serial device: the console's and the agent's. Each has two queues.
const PORTS: u32 = 2;
/// Where the host's kernel moves packets for guests.
const VHOST_NET: &str = "/dev/vhost-net";
/// QEMU's own filter: it starts nothing, gains nothing, changes no limits.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// Where QEMU sees the files that it loads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Paths {
    pub qemu: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub firmware: Option<PathBuf>,
}

/// What QEMU inherits beside the devices of its configuration.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The other ends of our sockets.
    pub qmp: OwnedFd,
    pub console: OwnedFd,
    pub agent: Option<OwnedFd>,
    pub origin: Origin,
}

/// Where a machine's memory comes from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// It boots, on this memory or its own.
    Boot(Option<OwnedFd>),
    /// It boots, and what it writes goes to this file.
    Template(OwnedFd),
    /// It goes on with what is in this file, when it is told the rest.
    Clone(OwnedFd, MemoryMapping),
}

/// What becomes of what the guest writes to its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryMapping {
    /// It goes to the file.
    Shared,
    /// It stays in the monitor.
    Private,
}

/// A share that is plugged into a clone, once it is there.
#[derive(Debug)]
pub(crate) struct LateShare {
    pub tag: String,
    pub queue_size: u32,
}

/// The connection of a share, as the monitor knows it.
pub(crate) const SHARE_SOCKET: &str = "share";
/// The port on which the agent speaks, as the monitor knows it.
pub(crate) const AGENT_PORT: &str = "agent-port";

/// What QEMU is started with.
#[derive(Debug)]
pub(crate) struct CommandLine {
    pub args: Vec<OsString>,
    pub fds: Vec<(OwnedFd, RawFd)>,
    pub late_share: Option<LateShare>,
    pub numbers: Numbers,
    is_clone: bool,
}

/// Under which numbers QEMU has what a fork of it needs of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbers {
    pub qmp: RawFd,
    pub console: RawFd,
    pub agent: Option<RawFd>,
    pub taps: Vec<RawFd>,
    pub share: Option<RawFd>,
}

impl CommandLine {
    /// Takes the descriptors out of `config`.
    pub(crate) fn new(
        config: &mut VmConfig,
        paths: &Paths,
        inherited: Inherited,
        qemu_major: u32,
    ) -> Self {
        let Inherited { qmp, console, agent, origin } = inherited;
        let is_clone = matches!(origin, Origin::Clone(..));
        let mut line = Self {
            args: Vec::new(),
            fds: Vec::new(),
            late_share: None,
            numbers: Numbers::default(),
            is_clone,
        };
        line.machine(config, origin, qemu_major);
        line.kernel(config, paths, qemu_major);
        line.sockets(config, qmp, console, agent);
        let ports = if config.machine == Machine::Q35 { config.hotplug_ports } else { 0 };
        for index in 0..ports {
            line.option("-device", root_port(index));
        }
        for (index, nic) in std::mem::take(&mut config.nics).into_iter().enumerate() {
            line.nic(config, index, nic);
        }
        if let Some(share) = config.share.take() {
            line.share(config.machine, share);
        }
        line
    }

    fn machine(&mut self, config: &VmConfig, origin: Origin, qemu_major: u32) {
        self.option("-name", name(&config.id));
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            self.args.push(flag.into());
        }
        self.option("-display", "none");
        let filter = if config.filter.is_empty() { SANDBOX } else { &config.filter };
        self.option("-sandbox", filter);
        let mut machine = match config.machine {
            Machine::Q35 => "q35,sata=off,smbus=off,smm=off,vmport=off,i8042=off,graphics=off",
            // Without its clock the kernel polls for one, for two seconds.
            Machine::Microvm => "microvm,pic=off,pit=off,rtc=on,isa-serial=off",
        }
        .to_owned();
        if config.is_bare() {
            machine.push_str(",acpi=off");
        }
        let room = Room::new(config);
        let size = room.memory_mib();
        let mut file = |file, share| {
            let file = self.fd(file);
            Some(format!("file,mem-path=/proc/self/fd/{file},share={share}"))
        };
        let backend = match origin {
            Origin::Boot(Some(memory))
            | Origin::Template(memory)
            | Origin::Clone(memory, MemoryMapping::Shared) => file(memory, "on"),
            Origin::Clone(memory, MemoryMapping::Private) => file(memory, "off"),
            // The process behind the share reads and writes the guest's memory.
            Origin::Boot(None) if config.shares_memory() => Some("memfd,share=on".to_owned()),
            Origin::Boot(None) => None,
        };
        if let Some(backend) = backend {
            machine.push_str(",memory-backend=memory");
            self.option("-object", format!("memory-backend-{backend},id=memory,size={size}M"));
        }
        if config.machine == Machine::Microvm {
            // What it would be is from before virtio was a standard.
            self.option("-global", "virtio-mmio.force-legacy=false");
        }
        machine.push_str(",dump-guest-core=off");
        push_options(&mut machine, &config.machine_options);
        self.option("-machine", machine);
        self.option("-accel", config.accelerator.as_str());
        let mut cpu = cpu(config.accelerator, qemu_major).to_owned();
        push_options(&mut cpu, &config.cpu_options);
        self.option("-cpu", cpu);
        self.option("-m", room.memory_option());
        self.option("-smp", room.cpu_option(config.accelerator));
    }

    fn kernel(&mut self, config: &VmConfig, paths: &Paths, qemu_major: u32) {
        if let Some(firmware) = &paths.firmware {
            self.option("-bios", firmware);
        }
        if self.is_clone {
            // The kernel is in the memory. The machine waits for the state of its devices.
            self.option("-incoming", "defer");
            self.args.push("-S".into());
            return;
        }
        self.option("-kernel", &paths.kernel);
        self.option("-initrd", &paths.initrd);
        self.option("-append", kernel_params::command_line(config, qemu_major));
    }

    fn sockets(
        &mut self,
        config: &mut VmConfig,
        qmp: OwnedFd,
        console: OwnedFd,
        agent: Option<OwnedFd>,
    ) {
        let machine = config.machine;
        self.numbers.qmp = self.socket("qmp", qmp);
        self.option("-mon", "chardev=qmp,mode=control");
        let serial = format!("id=serial,max_ports={PORTS}");
        self.option("-device", virtio(machine, "virtio-serial", &serial));
        self.numbers.console = self.socket("console", console);
        self.option("-device", "virtconsole,chardev=console");
        if let Some(agent) = agent {
            self.numbers.agent = Some(self.socket("agent", agent));
            // Behind the console: the agent knows the device (`kata_protocol::SERIAL_DEVICE`).
            let port = format!("id={AGENT_PORT},chardev=agent,nr=1,name={SERIAL_PORT}");
            self.option("-device", format!("virtserialport,{port}"));
        }
        if let ChannelKind::Vsock(vsock) = std::mem::take(&mut config.channel) {
            let cid = vsock.cid();
            let fd = self.fd(vsock.device);
            let properties = format!("vhostfd={fd},guest-cid={cid}");
            self.option("-device", virtio(machine, "vhost-vsock", &properties));
        }
        match &config.entropy {
            Some(device) => {
                let mut source = OsString::from("rng-random,id=rng,filename=");
                source.push(device);
                self.option("-object", source);
            }
            None => self.option("-object", "rng-builtin,id=rng"),
        }
        self.option("-device", virtio(machine, "virtio-rng", "rng=rng"));
    }

    fn nic(&mut self, config: &VmConfig, index: usize, nic: Nic) {
        let machine = config.machine;
        let fd = self.fd(nic.tap);
        self.numbers.taps.push(fd);
        let mut netdev = format!("tap,id=net{index},fd={fd}");
        if let Some(device) = vhost_net(config.vhost_net) {
            netdev.push_str(&format!(",vhost=on,vhostfd={}", self.fd(device)));
        }
        self.option("-netdev", netdev);
        // A tap filters no VLANs, so there is nothing to be gained by a filter behind it.
        let mut properties = format!("netdev=net{index},mac={},ctrl_vlan=off", nic.mac);
        if machine == Machine::Q35 {
            // Nobody boots from the network.
            properties.push_str(",romfile=");
        }
        self.option("-device", virtio(machine, "virtio-net", &properties));
    }

    fn share(&mut self, machine: Machine, share: Share) {
        match share {
            Share::VhostUserFs { socket, tag, queue_size } => {
                self.numbers.share = Some(self.socket(SHARE_SOCKET, socket));
                if self.is_clone {
                    // The state of such a device cannot be saved, so its template had none.
                    self.late_share = Some(LateShare { tag, queue_size });
                    return;
                }
                let properties =
                    format!("chardev={SHARE_SOCKET},tag={tag},queue-size={queue_size}");
                self.option("-device", virtio(machine, "vhost-user-fs", &properties));
            }
            Share::NineP { tag } => {
                // Files of several file systems are below it, whose numbers must stay apart.
                let local = "local,id=share,security_model=passthrough,multidevs=remap";
                self.option("-fsdev", format!("{local},path={SHARE}"));
                let properties = format!("fsdev=share,mount_tag={tag}");
                self.option("-device", virtio(machine, "virtio-9p", &properties));
            }
        }
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.args.push(name.into());
        self.args.push(value.into());
    }

    fn socket(&mut self, id: &str, fd: OwnedFd) -> RawFd {
        let fd = self.fd(fd);
        self.option("-chardev", format!("socket,id={id},fd={fd}"));
        fd
    }

    fn fd(&mut self, fd: OwnedFd) -> RawFd {
        let at = FIRST_FD + self.fds.len() as RawFd;
        self.fds.push((fd, at));
        at
    }
}

/// Adds the administrator's options, which come last and so win.
fn push_options(text: &mut String, options: &str) {
    for option in options.split(',').map(str::trim).filter(|option| !option.is_empty()) {
        text.push(',');
        text.push_str(option);
    }
}

/// A device of virtio on the machine's bus.
fn virtio(machine: Machine, name: &str, properties: &str) -> String {
    match machine {
        // It never had a legacy form, so it has no such property either.
        Machine::Q35 if name == "vhost-user-fs" => format!("{name}-pci,{properties}"),
        Machine::Q35 => format!("{name}-pci,disable-legacy=on,{properties}"),
        Machine::Microvm => format!("{name}-device,{properties}"),
    }
}

/// The device by which the host's kernel moves a NIC's packets, if that is wanted and there.
pub(crate) fn vhost_net(wanted: bool) -> Option<OwnedFd> {
    let open = || File::options().read(true).write(true).open(VHOST_NET);
    match wanted.then(open)? {
        Ok(device) => Some(device.into()),
        Err(error) => {
            tracing::debug!(%error, "no {VHOST_NET}: the monitor moves the packets");
            None
        }
    }
}

/// What a machine is called where others see it.
pub(crate) fn name(id: &str) -> String {
    format!("sandbox-{id}")
}

/// Name of a root port, which is also the name of the bus behind it.
pub(crate) fn port_name(index: u32) -> String {
    format!("port{index}")
}

/// A root port for one device to be plugged. Eight of them share a slot of the root bus.
fn root_port(index: u32) -> String {
    let (slot, function) = (0x10 + index / 8, index % 8);
    let first = if function == 0 { ",multifunction=on" } else { "" };
    let name = port_name(index);
    format!("pcie-root-port,id={name},chassis={},addr={slot:#x}.{function}{first}", index + 1)
}

/// Under TCG, string instructions that a real processor does fast are slow loops, which
/// Linux prefers wherever they are announced.
fn cpu(accelerator: Accelerator, qemu_major: u32) -> &'static str {
    match (accelerator, qemu_major) {
        (Accelerator::Kvm, _) => "host",
        (Accelerator::Tcg, 8..) => "max,-erms,-fsrm,-fsrs,-fzrm,-fsrc",
        (Accelerator::Tcg, _) => "max,-erms,-fsrm",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Mac;
    use crate::qemu::sample_config;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    /// The command line of this machine, and the numbers of what QEMU inherits.
    fn line(config: VmConfig, qemu_major: u32) -> (Vec<String>, Vec<RawFd>) {
        line_of(config, Origin::Boot(None), qemu_major)
    }

    fn line_of(mut config: VmConfig, origin: Origin, qemu_major: u32) -> (Vec<String>, Vec<RawFd>) {
        let paths = Paths {
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            kernel: "/kernel".into(),
            initrd: "/initrd".into(),
            firmware: Some("/firmware".into()),
        };
        let inherited = Inherited { qmp: null(), console: null(), agent: Some(null()), origin };
        let line = CommandLine::new(&mut config, &paths, inherited, qemu_major);
        let args = line.args.into_iter().map(|arg| arg.into_string().unwrap()).collect();
        (args, line.fds.into_iter().map(|(_, at)| at).collect())
    }

    fn value<'a>(args: &'a [String], name: &str) -> &'a str {
        &args[args.iter().position(|arg| arg == name).unwrap() + 1]
    }

    #[test]
    fn each_descriptor_is_inherited_once_and_named_once() {
        let mut config = sample_config();
        config.nics = (0..20).map(|n| Nic { tap: null(), mac: Mac([2, 0, 0, 0, 0, n]) }).collect();
        config.share =
            Some(Share::VhostUserFs { socket: null(), tag: "tag".to_owned(), queue_size: 1024 });
        let (args, fds) = line(config, 7);
        let mut named: Vec<RawFd> = args
            .iter()
            .flat_map(|arg| arg.split(','))
            .filter_map(|part| part.strip_prefix("fd=").and_then(|fd| fd.parse().ok()))
            .collect();
        named.sort();
        assert_eq!(named, fds);
        assert_eq!(fds.len(), 24);
    }

    #[test]
    fn memory_is_shared_only_with_a_process_that_needs_it() {
        let (args, _) = line(sample_config(), 7);
        assert!(!args.iter().any(|arg| arg.contains("memory-backend")));
        let mut config = sample_config();
        config.share =
            Some(Share::VhostUserFs { socket: null(), tag: "tag".to_owned(), queue_size: 1024 });
        let (args, _) = line(config, 7);
        assert!(args.contains(&"memory-backend-memfd,share=on,id=memory,size=2048M".to_owned()));
        assert!(value(&args, "-machine").contains("memory-backend=memory"));
    }

    #[test]
    fn a_clone_differs_from_its_template_only_in_what_it_does_not_load() {
        let share =
            Some(Share::VhostUserFs { socket: null(), tag: "t".to_owned(), queue_size: 64 });
        let (template, _) = line_of(sample_config(), Origin::Template(null()), 7);
        let config = VmConfig { share, ..sample_config() };
        let (clone, _) = line_of(config, Origin::Clone(null(), MemoryMapping::Shared), 7);
        let devices = |args: &[String]| -> Vec<String> {
            args.windows(2).filter(|w| w[0] == "-device").map(|w| w[1].clone()).collect()
        };
        assert_eq!(devices(&template), devices(&clone));
        assert!(!clone.iter().any(|arg| arg == "-kernel" || arg == "-initrd" || arg == "-append"));
        assert_eq!(value(&clone, "-incoming"), "defer");
        assert_eq!(value(&clone, "-object"), value(&template, "-object"));
    }

    #[test]
    fn an_old_qemu_is_not_given_names_that_it_does_not_know() {
        assert_eq!(value(&line(sample_config(), 7).0, "-cpu"), "max,-erms,-fsrm");
        assert_eq!(
            value(&line(sample_config(), 10).0, "-cpu"),
            "max,-erms,-fsrm,-fsrs,-fzrm,-fsrc"
        );
    }

    #[test]
    fn processors_are_plugged_under_kvm_only() {
        let mut config = sample_config();
        assert_eq!(value(&line(sample_config(), 7).0, "-smp"), "1");
        config.accelerator = Accelerator::Kvm;
        let (args, _) = line(config, 7);
        assert_eq!((value(&args, "-smp"), value(&args, "-cpu")), ("1,maxcpus=4", "host"));
    }

    #[test]
    fn a_microvm_has_no_pci() {
        let mut config = sample_config();
        config.machine = Machine::Microvm;
        config.nics = vec![Nic { tap: null(), mac: Mac([2; 6]) }];
        let (args, _) = line(config, 7);
        let devices = args.windows(2).filter(|pair| pair[0] == "-device");
        assert!(!devices.into_iter().any(|pair| pair[1].contains("pci")), "{args:?}");
    }

    #[test]
    fn a_microvm_has_acpi_where_the_kernel_needs_it() {
        let has_none = |change: fn(&mut VmConfig)| {
            let mut config = sample_config();
            config.machine = Machine::Microvm;
            change(&mut config);
            value(&line(config, 7).0, "-machine").contains("acpi=off")
        };
        assert!(has_none(|_| {}));
        assert!(!has_none(|config| config.kernel_kind = crate::KernelKind::Distro));
        assert!(!has_none(|config| config.accelerator = Accelerator::Kvm));
        assert!(!has_none(|config| config.machine = Machine::Q35));
    }

    #[test]
    fn the_administrators_options_come_last() {
        let mut config = sample_config();
        config.machine_options = "nvdimm=on, hpet=off".to_owned();
        config.cpu_options = "pmu=off".to_owned();
        config.filter = "on,spawn=deny".to_owned();
        config.entropy = Some("/dev/hwrng".into());
        let (args, _) = line(config, 7);
        assert!(value(&args, "-machine").ends_with(",dump-guest-core=off,nvdimm=on,hpet=off"));
        assert!(value(&args, "-cpu").ends_with(",pmu=off"));
        assert_eq!(value(&args, "-sandbox"), "on,spawn=deny");
        assert!(args.contains(&"rng-random,id=rng,filename=/dev/hwrng".to_owned()));
    }

    #[test]
    fn root_ports_have_distinct_places() {
        let ports: Vec<String> = (0..64).map(root_port).collect();
        let mut places: Vec<&str> =
            ports.iter().map(|port| port.split(',').nth(3).unwrap()).collect();
        places.sort();
        places.dedup();
        assert_eq!(places.len(), 64);
        assert_eq!(root_port(9), "pcie-root-port,id=port9,chassis=10,addr=0x11.1");
    }
}
