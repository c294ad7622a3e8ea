//! QEMU as the monitor.
//!
//! `args.rs` makes the command line, `cage.rs` the jail, `qmp.rs` speaks to it, `watch.rs`
//! learns how it ended; here they come together.

mod ahead;
mod args;
mod cage;
mod ends;
mod plug;
mod qmp;
mod resize;
mod stem;
mod template;
mod version;
mod watch;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kata_jail::{Child, Launch};
use kata_pager::Pager;
use tokio::net::UnixStream;
use tokio::sync::broadcast;

pub use cage::find_firmware;
pub use qmp::QmpError;
#[cfg(fuzzing)]
pub(crate) use qmp::fuzz as fuzz_qmp;
pub(crate) use resize::first_memory;
pub use stem::Stem;
pub use template::Parking;

use crate::config::{Accelerator, ChannelKind, Machine, Share, VmConfig};
use crate::console::Console;
use crate::error::{HypervisorError, host};
use crate::exit::{Exited, VmExit};
use crate::qemu::args::{CommandLine, Inherited, LateShare, Numbers, Origin};
use crate::qemu::ends::{Ends, TheirEnds};
use crate::qemu::qmp::{BlockdevDel, Command, Cont, DeviceDel};
use crate::qemu::qmp::{Event, NetdevDel, Qmp, QmpCapabilities, Quit, RemoveFd, Stop};
use crate::qemu::resize::Room;
use crate::qemu::stem::Ordered;
use crate::qemu::watch::Watch;
use crate::snapshot::Start;
use crate::{Capabilities, Device, DeviceId, Hypervisor, Size, Snapshot};

/// How long QEMU may take for a command. It answers within milliseconds; a host under
/// load may keep it from running for a while.
const COMMAND: Duration = Duration::from_secs(10);
/// How long a guest may take to let go of a device, or to take one in.
const UNPLUG: Duration = Duration::from_secs(10);
/// How long QEMU has to end by itself when it is told to.
const QUIT: Duration = Duration::from_millis(15);
/// How long the kernel has to end it when it did not.
const KILL: Duration = Duration::from_secs(10);
/// How long after QEMU closed its control socket it must have ended, for that to be the cause.
const CAUSE: Duration = Duration::from_millis(500);

/// How the C library of a monitor that translates code allocates, so that a fork copies few pages
/// of it. All threads from one heap: what is free in a heap of the translating thread's own lies
/// spread over it, and a fork takes that into use. And what is freed is free at once, by no cache
/// or list of small chunks: when those are merged, one after the other, each page is written to.
const COMPACT_HEAP: (&str, &str) = (
    "GLIBC_TUNABLES",
    "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
);

/// A machine run by QEMU.
#[derive(Debug)]
pub struct Qemu {
    /// Until it is started.
    config: Option<VmConfig>,
    machine: Machine,
    accelerator: Accelerator,
    shared_memory: bool,
    room: Room,
    vsock_cid: Option<u32>,
    console: Console,
    watch: Watch,
    running: Option<Running>,
    /// The memory that a template is to leave.
    template: Option<OwnedFd>,
    /// The memory of a clone that has its own.
    memory: Option<OwnedFd>,
    /// The memory of a machine that keeps some of it back.
    kept_back: Option<OwnedFd>,
    /// A fork that was ordered.
    ordered: Option<Ordered>,
    milestones: Vec<(&'static str, Instant)>,
}

/// QEMU's process and what belongs to it.
#[derive(Debug)]
struct Running {
    child: Arc<Child>,
    qmp: Qmp,
    /// Whether it takes commands.
    up: tokio::sync::watch::Receiver<bool>,
    agent: Option<UnixStream>,
    /// What is plugged, by the number of the root port.
    ports: Vec<Option<Plugged>>,
    plugged: u32,
    /// Whether the host's kernel may move packets.
    vhost_net: bool,
    /// What a fork of it would need, if its memory is its own.
    numbers: Numbers,
    /// What copies its memory when it is touched.
    pager: Option<Arc<Pager>>,
}

/// A plugged device, and what it leaves on the host's side.
#[derive(Debug)]
struct Plugged {
    id: DeviceId,
    backend: Backend,
}

#[derive(Clone, Copy, Debug)]
enum Backend {
    Tap,
    /// It stays as long as the machine.
    Share,
    Disk {
        fdset: u32,
    },
}

impl Running {
    /// A free root port, and a number that no device had before.
    fn reserve(&mut self) -> Result<(usize, u32), HypervisorError> {
        let port = self.ports.iter().position(Option::is_none).ok_or(HypervisorError::NoPort)?;
        self.plugged += 1;
        Ok((port, self.plugged))
    }

    /// The root port of the share, which stays as long as the machine, and the share's name.
    fn reserve_for_share(&mut self) -> Result<(usize, String), HypervisorError> {
        let (port, number) = self.reserve()?;
        let id = format!("plugged{number}");
        self.ports[port] = Some(Plugged { id: DeviceId(id.clone()), backend: Backend::Share });
        Ok((port, id))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nobody could reach it any more.
        let _ = self.child.kill(libc::SIGKILL);
    }
}

impl Qemu {
    /// A machine to be started.
    pub fn new(config: VmConfig) -> Self {
        Self {
            machine: config.machine,
            accelerator: config.accelerator,
            shared_memory: config.shares_memory(),
            room: Room::new(&config),
            vsock_cid: match &config.channel {
                ChannelKind::Vsock(vsock) => Some(vsock.cid()),
                ChannelKind::Serial => None,
            },
            config: Some(config),
            console: Console::default(),
            watch: Watch::new(),
            running: None,
            template: None,
            memory: None,
            kept_back: None,
            ordered: None,
            milestones: Vec::new(),
        }
    }

    /// What was done on the way to here, and when, for who wants to know where time goes.
    pub fn milestones(&self) -> &[(&'static str, Instant)] {
        &self.milestones
    }

    fn reached(&mut self, milestone: &'static str) {
        self.milestones.push((milestone, Instant::now()));
    }

    /// The pid of QEMU, once it is started; else 0.
    pub fn pid(&self) -> i32 {
        self.running.as_ref().map_or(0, |running| running.child.pid())
    }

    /// QEMU's process, in its jail: to mount something into its root, for 9p.
    ///
    /// # Errors
    /// When it is not started, or ended before it came up.
    pub async fn process(&mut self) -> Result<Arc<Child>, HypervisorError> {
        // It answers only when it is itself, in its jail.
        self.up().await?;
        Ok(Arc::clone(&self.running()?.child))
    }

    fn running(&mut self) -> Result<&mut Running, HypervisorError> {
        self.running.as_mut().ok_or(HypervisorError::State("not started"))
    }

    /// Waits until QEMU takes commands.
    async fn up(&mut self) -> Result<(), HypervisorError> {
        if self.running()?.up.wait_for(|up| *up).await.is_ok() {
            return Ok(());
        }
        let refused = Err(QmpError::Closed(QmpCapabilities::NAME));
        self.explain("begin to talk with qemu", refused).await
    }

    /// Asks QEMU; if it ended meanwhile, that is the error.
    async fn ask<C: Command>(
        &mut self,
        step: &'static str,
        command: &C,
    ) -> Result<C::Answer, HypervisorError> {
        self.up().await?;
        let answer = self.running()?.qmp.call(command, COMMAND).await;
        self.explain(step, answer).await
    }

    async fn explain<T>(
        &self,
        step: &'static str,
        answer: Result<T, QmpError>,
    ) -> Result<T, HypervisorError> {
        let source = match answer {
            Ok(answer) => return Ok(answer),
            Err(source) => source,
        };
        if matches!(source, QmpError::Closed(_) | QmpError::Send(..))
            && let Ok(exit) = tokio::time::timeout(CAUSE, self.exited().wait()).await
        {
            return Err(HypervisorError::Exited(exit));
        }
        Err(HypervisorError::Monitor { step, source })
    }

    /// Waits for what follows a command: `of` gives it for the event that brings it.
    async fn hears<T>(
        &self,
        step: &'static str,
        command: &'static str,
        deadline: Duration,
        mut events: broadcast::Receiver<Event>,
        mut of: impl FnMut(&Event) -> Option<T>,
    ) -> Result<T, HypervisorError> {
        let heard = async {
            loop {
                match events.recv().await {
                    Ok(event) => match of(&event) {
                        Some(found) => return Ok(found),
                        None => continue,
                    },
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(_) => return Err(QmpError::Closed(command)),
                }
            }
        };
        let mut exited = self.exited();
        let late = QmpError::Deadline { command, deadline };
        tokio::select! {
            heard = tokio::time::timeout(deadline, heard) => heard
                .unwrap_or(Err(late))
                .map_err(|source| HypervisorError::Monitor { step, source }),
            exit = exited.wait() => Err(HypervisorError::Exited(exit)),
        }
    }

    /// Spawns QEMU and whatever follows it. Gives what is to be plugged when it is there.
    fn launch(
        &mut self,
        mut config: VmConfig,
        origin: Origin,
        major: u32,
    ) -> Result<Option<LateShare>, HypervisorError> {
        let on_host = cage::paths(&config)?;
        let (jail, in_jail) = cage::build(&config, &on_host, !matches!(origin, Origin::Boot(None)));
        let paths = if config.jail { &in_jail } else { &on_host };

        let (ends, theirs) = Ends::new(&config.channel)?;
        let TheirEnds { qmp, console, agent, stderr } = theirs;
        let inherited = Inherited { qmp, console, agent, origin };
        let ports = if self.machine == Machine::Q35 { config.hotplug_ports } else { 0 };
        let vhost_net = config.vhost_net;
        let line = CommandLine::new(&mut config, paths, inherited, major);

        let mut launch = Launch::program(&paths.qemu, line.args).stderr(stderr).die_with_parent();
        if self.accelerator == Accelerator::Tcg {
            let (key, value) = COMPACT_HEAP;
            launch = launch.env(key, value);
        }
        for (fd, at) in line.fds {
            launch = launch.fd(fd, at);
        }
        if config.jail {
            if let Some(netns) = config.netns.take() {
                launch = launch.fd(netns, cage::NETNS_FD);
            }
            launch = launch.jail(jail);
        }
        let child = Arc::new(launch.spawn()?);
        tracing::debug!(id = config.id, pid = child.pid(), "qemu started");
        let (is_up, up) = tokio::sync::watch::channel(false);
        let ports = Ports { count: ports, vhost_net, numbers: line.numbers };
        let qmp = self.follow(child, ends, up, ports)?;
        tokio::spawn(async move {
            if qmp.call(&QmpCapabilities {}, COMMAND).await.is_ok() {
                is_up.send_replace(true);
            }
        });
        Ok(line.late_share)
    }

    /// Listens to a monitor until it ends.
    fn follow(
        &mut self,
        child: Arc<Child>,
        ends: Ends,
        up: tokio::sync::watch::Receiver<bool>,
        ports: Ports,
    ) -> Result<Qmp, HypervisorError> {
        let Ports { count, vhost_net, numbers } = ports;
        let (qmp, reader) = Qmp::new(ends.qmp);
        self.running = Some(Running {
            child: Arc::clone(&child),
            qmp: qmp.clone(),
            up,
            agent: ends.agent,
            ports: (0..count).map(|_| None).collect(),
            plugged: 0,
            vhost_net,
            numbers,
            pager: None,
        });
        let console = self.console.clone();
        self.watch.start(child, &qmp, reader, ends.console, ends.stderr, console)?;
        Ok(qmp)
    }
}

/// What is known of a monitor's devices.
struct Ports {
    count: u32,
    vhost_net: bool,
    numbers: Numbers,
}

/// Refuses what cannot be.
fn check(config: &VmConfig) -> Result<(), HypervisorError> {
    let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "_+.-".contains(c));
    let tag = match &config.share {
        Some(Share::VhostUserFs { tag, .. } | Share::NineP { tag }) => tag.as_str(),
        None => "none",
    };
    let wrong = if !plain(&config.id) || config.id.is_empty() {
        "a machine's id has only letters, digits and _+.-"
    } else if !plain(tag) || tag.is_empty() {
        "a share's tag has only letters, digits and _+.-"
    } else if config.vcpus == 0 {
        "a machine needs a virtual CPU"
    } else if config.memory_mib < 64 {
        "a machine needs at least 64 MiB of memory"
    } else if config.hotplug_ports > 64 {
        "more than 64 root ports do not fit a machine"
    } else if config.jail && (config.uid == 0 || config.uid == u32::MAX) {
        "a jailed monitor needs a user of its own, not root"
    } else if !config.jail && matches!(config.share, Some(Share::NineP { .. })) {
        "9p is served from the jail's own root: without a jail there is none"
    } else {
        return Ok(());
    };
    Err(HypervisorError::Config(wrong))
}

#[async_trait]
impl Hypervisor for Qemu {
    async fn start(&mut self) -> Result<(), HypervisorError> {
        let mut config = self.config.take().ok_or(HypervisorError::State("started already"))?;
        check(&config)?;
        let major = version::major(&config.qemu).await?;
        match std::mem::take(&mut config.start) {
            Start::Boot => {
                let memory = ahead::memory(&config).map_err(host("make memory"))?;
                if let Some(memory) = memory.as_ref().filter(|_| self.room.keeps_back()) {
                    let kept = memory.try_clone().map_err(host("share memory"))?;
                    self.kept_back = Some(kept);
                }
                self.launch(config, Origin::Boot(memory), major).map(drop)
            }
            Start::Template => self.start_template(config, major),
            Start::Clone { snapshot, memory } => {
                self.start_clone(config, snapshot, memory, major).await
            }
            Start::Fork { .. } => Err(HypervisorError::State("forked, not started")),
        }
    }

    async fn stop(&mut self) -> Result<VmExit, HypervisorError> {
        self.watch.expect_end();
        let running = self.running()?;
        let _ = running.qmp.call(&Quit {}, QUIT).await;
        let child = Arc::clone(&running.child);
        if let Ok(exit) = tokio::time::timeout(QUIT, self.exited().wait()).await {
            return Ok(exit);
        }
        let _ = child.kill(libc::SIGKILL);
        let exit = tokio::time::timeout(KILL, self.exited().wait()).await;
        exit.map_err(|late| host("end qemu")(std::io::Error::from(late)))
    }

    async fn pause(&mut self) -> Result<(), HypervisorError> {
        self.ask("pause the virtual machine", &Stop {}).await.map(drop)
    }

    async fn resume(&mut self) -> Result<(), HypervisorError> {
        self.ask("resume the virtual machine", &Cont {}).await.map(drop)
    }

    async fn save(&mut self) -> Result<Snapshot, HypervisorError> {
        self.save_template().await
    }

    async fn plug(&mut self, device: Device) -> Result<DeviceId, HypervisorError> {
        if self.machine == Machine::Microvm {
            return Err(HypervisorError::NoPort);
        }
        match device {
            Device::Nic(nic) => self.plug_nic(nic).await,
            Device::Disk(disk) => self.plug_disk(disk).await,
        }
    }

    async fn unplug(&mut self, device: &DeviceId) -> Result<(), HypervisorError> {
        const STEP: &str = "unplug a device";
        let running = self.running()?;
        let mut ports = running.ports.iter().enumerate();
        let found = ports.find_map(|(number, port)| {
            port.as_ref().filter(|port| port.id == *device).map(|port| (number, port.backend))
        });
        let (port, backend) =
            found.ok_or(HypervisorError::Config("there is no such device to unplug"))?;
        let events = running.qmp.events();
        let id = device.0.clone();
        self.ask(STEP, &DeviceDel { id: id.clone() }).await?;
        let gone = |event: &Event| {
            (event.name == "DEVICE_DELETED" && event.data["device"] == id).then_some(())
        };
        self.hears(STEP, DeviceDel::NAME, UNPLUG, events, gone).await?;
        match backend {
            Backend::Share => {}
            Backend::Tap => drop(self.ask(STEP, &NetdevDel { id }).await?),
            Backend::Disk { fdset } => {
                self.ask(STEP, &BlockdevDel { node_name: id }).await?;
                self.ask(STEP, &RemoveFd { fdset_id: fdset }).await?;
            }
        }
        self.running()?.ports[port] = None;
        Ok(())
    }

    fn settle(&mut self) -> Result<(), HypervisorError> {
        self.confine()
    }

    fn size(&self) -> Size {
        self.room.now
    }

    async fn resize(&mut self, wanted: Size) -> Result<(), HypervisorError> {
        self.grow(wanted).await
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            plug: self.machine == Machine::Q35,
            plug_vcpus: self.machine == Machine::Q35 && self.accelerator == Accelerator::Kvm,
            shared_memory: self.shared_memory,
            keeps_memory_back: self.room.keeps_back(),
        }
    }

    fn pids(&self) -> Vec<i32> {
        self.running.iter().map(|running| running.child.pid()).collect()
    }

    fn take_agent_socket(&mut self) -> Option<UnixStream> {
        self.running.as_mut().and_then(|running| running.agent.take())
    }

    fn vsock_cid(&self) -> Option<u32> {
        self.vsock_cid
    }

    fn console(&self) -> Console {
        self.console.clone()
    }

    fn exited(&self) -> Exited {
        self.watch.exited()
    }
}

/// A machine for tests of what is made from its description.
#[cfg(test)]
pub(crate) fn sample_config() -> VmConfig {
    VmConfig {
        id: "test".to_owned(),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        firmware: None,
        kernel: "/k/vmlinux".into(),
        kernel_kind: crate::KernelKind::Tuned,
        initrd: "/k/initrd".into(),
        quiet: true,
        kernel_params: Vec::new(),
        machine: Machine::Q35,
        machine_options: String::new(),
        cpu_options: String::new(),
        entropy: None,
        filter: String::new(),
        accelerator: Accelerator::Tcg,
        tsc_khz: 1_000_000,
        memory_mib: 2048,
        max_memory_mib: 8192,
        memory_slots: 10,
        vcpus: 1,
        max_vcpus: 4,
        nics: Vec::new(),
        vhost_net: false,
        hotplug_ports: 2,
        share: None,
        channel: ChannelKind::Serial,
        start: Start::Boot,
        jail: true,
        netns: None,
        uid: 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(check(&sample_config()).is_ok());
        let changes: [fn(&mut VmConfig); 9] = [
            |config| config.id = String::new(),
            |config| config.id = "a,debug-threads=on".to_owned(),
            |config| config.vcpus = 0,
            |config| config.memory_mib = 1,
            |config| config.hotplug_ports = 65,
            |config| config.uid = 0,
            |config| config.share = Some(Share::NineP { tag: "a,b".into() }),
            |config| config.share = Some(Share::NineP { tag: String::new() }),
            |config| {
                config.share = Some(Share::NineP { tag: "a".into() });
                config.jail = false;
            },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut config = sample_config();
            change(&mut config);
            assert!(check(&config).is_err(), "change {index} was accepted");
        }
    }

    #[tokio::test]
    async fn what_is_not_started_says_so() {
        let mut vm = Qemu::new(sample_config());
        assert!(matches!(vm.pause().await, Err(HypervisorError::State("not started"))));
        assert!(matches!(vm.stop().await, Err(HypervisorError::State("not started"))));
        assert_eq!((vm.pid(), vm.pids().len()), (0, 0));
        assert_eq!(vm.exited().now(), None);
        let exited = vm.exited();
        drop(vm);
        assert_eq!(exited.await.cause, "it was never started");
    }
}
