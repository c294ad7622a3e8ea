//! QEMU as a hypervisor.
//!
//! The process is started jailed, with every socket it uses already connected; `command.rs`
//! says what the machine is, `qmp.rs` talks to it. One task waits for the process's end
//! and turns it into a [`VmExit`] with a cause.

mod command;
mod qmp;
mod version;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kata_jail::{Bind, Child, Jail, Launch};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::config::{Accelerator, ChannelKind, Nic, Share, VmConfig};
use crate::console::Console;
use crate::error::host;
use crate::exit::{Exited, VmExit};
use crate::{Capabilities, Device, DeviceId, Hypervisor, HypervisorError};

pub use command::find_firmware;
use qmp::Qmp;
pub use qmp::QmpError;

/// How long the guest may take to let go of a device.
const UNPLUG: Duration = Duration::from_secs(5);
/// How long the last words may take to arrive after the process has ended.
const LAST_WORDS: Duration = Duration::from_millis(50);
/// Lines of the console that go into an error.
const LAST_LINES: usize = 10;

/// A QEMU machine.
pub struct Qemu {
    config: VmConfig,
    capabilities: Capabilities,
    running: Option<Running>,
    console: Console,
    exit: watch::Sender<Option<VmExit>>,
    stopping: Arc<AtomicBool>,
    plugged: u32,
    free_ports: Vec<u32>,
}

struct Running {
    child: Arc<Child>,
    qmp: Qmp,
    agent: Option<UnixStream>,
}

impl Qemu {
    /// A machine that is not started yet.
    pub fn new(config: VmConfig) -> Self {
        let capabilities = Capabilities {
            plug: config.machine == crate::Machine::Q35 && config.hotplug_ports > 0,
            plug_vcpus: config.accelerator == Accelerator::Kvm,
            shared_memory: matches!(config.share, Some(Share::VhostUserFs { .. })),
        };
        Self {
            config,
            capabilities,
            running: None,
            console: Console::default(),
            exit: watch::Sender::new(None),
            stopping: Arc::default(),
            plugged: 0,
            free_ports: Vec::new(),
        }
    }

    fn running(&self) -> Result<&Running, HypervisorError> {
        self.running.as_ref().ok_or(HypervisorError::State("not started yet"))
    }

    async fn monitor(
        &self,
        step: &'static str,
        command: &str,
        arguments: Value,
    ) -> Result<Value, HypervisorError> {
        let answer = self.running()?.qmp.execute(command, arguments).await;
        answer.map_err(|source| HypervisorError::Monitor { step, source })
    }

    fn launch(&mut self) -> Result<Running, HypervisorError> {
        for (what, path) in
            [("qemu", &self.config.qemu), ("guest kernel", &self.config.kernel), ("guest initramfs", &self.config.initrd)]
        {
            std::fs::metadata(path).map_err(|source| HypervisorError::File {
                what,
                path: path.clone(),
                source,
            })?;
        }
        let firmware =
            self.config.firmware.clone().or_else(|| find_firmware(self.config.machine));
        let major = version::major(&self.config.qemu)?;
        let (command, sockets) = command::build(&mut self.config, firmware.as_deref(), major)?;
        let (args, fds, ports) = command.into_args();
        self.free_ports = (0..ports).rev().collect();

        let (words, stderr) = UnixStream::pair().map_err(host("make a socket"))?;
        let stderr = OwnedFd::from(stderr.into_std().map_err(host("make a socket"))?);
        rustix::io::ioctl_fionbio(&stderr, false).map_err(host("make a socket"))?;
        let mut launch = Launch::program(&self.config.qemu, args).stderr(stderr).die_with_parent();
        for (fd, at) in fds {
            launch = launch.fd(fd, at);
        }
        if self.config.jail {
            launch = launch.jail(jail(&self.config, firmware.as_deref()));
        }
        let child = Arc::new(launch.spawn()?);

        let said = Console::default();
        let readers = [
            tokio::spawn(self.console.clone().follow(stream(sockets.console)?)),
            tokio::spawn(said.clone().follow(words)),
        ];
        tokio::spawn(watch_exit(
            Arc::clone(&child),
            readers,
            self.console.clone(),
            said,
            Arc::clone(&self.stopping),
            self.exit.clone(),
        ));
        let agent = sockets.agent.map(stream).transpose()?;
        Ok(Running { child, qmp: Qmp::new(stream(sockets.qmp)?), agent })
    }

    async fn plug_nic(&mut self, nic: Nic) -> Result<DeviceId, HypervisorError> {
        let port = self.free_ports.pop().ok_or(HypervisorError::Config(
            "no free port is left to plug a network interface: connect fewer networks",
        ))?;
        self.plugged += 1;
        let id = format!("nic{}", self.plugged);
        let plugged = self.plug_nic_at(&id, port, nic).await;
        if plugged.is_err() {
            self.free_ports.push(port);
        }
        plugged.map(|()| DeviceId(id))
    }

    async fn plug_nic_at(&self, id: &str, port: u32, nic: Nic) -> Result<(), HypervisorError> {
        const STEP: &str = "plug a network interface";
        let failed = |source| HypervisorError::Monitor { step: STEP, source };
        let qmp = &self.running()?.qmp;
        let name = format!("tap-{id}");
        qmp.execute_with("getfd", json!({"fdname": name}), Some(nic.tap.as_fd()))
            .await
            .map_err(failed)?;
        let netdev = format!("net-{id}");
        let tap = json!({"type": "tap", "id": netdev, "fd": name, "vhost": false});
        self.monitor(STEP, "netdev_add", tap).await?;
        let device = json!({"driver": "virtio-net-pci", "id": id, "netdev": netdev, "romfile": "",
            "mac": nic.mac.to_string(), "bus": format!("port{port}")});
        if let Err(error) = self.monitor(STEP, "device_add", device).await {
            let _ = self.monitor(STEP, "netdev_del", json!({"id": netdev})).await;
            return Err(error);
        }
        Ok(())
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    async fn start(&mut self) -> Result<(), HypervisorError> {
        if self.running.is_some() {
            return Err(HypervisorError::State("started already"));
        }
        let running = self.launch()?;
        self.running = Some(running);
        Ok(())
    }

    async fn stop(&mut self) -> Result<VmExit, HypervisorError> {
        self.stopping.store(true, Ordering::Relaxed);
        self.running()?.child.kill(libc::SIGKILL).map_err(host("end the monitor"))?;
        Ok(self.exited().wait().await)
    }

    async fn pause(&mut self) -> Result<(), HypervisorError> {
        self.negotiate().await?;
        self.monitor("pause the machine", "stop", Value::Null).await.map(|_| ())
    }

    async fn resume(&mut self) -> Result<(), HypervisorError> {
        self.negotiate().await?;
        self.monitor("resume the machine", "cont", Value::Null).await.map(|_| ())
    }

    async fn plug(&mut self, device: Device) -> Result<DeviceId, HypervisorError> {
        self.negotiate().await?;
        match device {
            Device::Nic(nic) => self.plug_nic(nic).await,
        }
    }

    async fn unplug(&mut self, device: &DeviceId) -> Result<(), HypervisorError> {
        const STEP: &str = "unplug a device";
        self.negotiate().await?;
        let mut events = self.running()?.qmp.events();
        self.monitor(STEP, "device_del", json!({"id": device.0})).await?;
        let deleted = async {
            while let Ok(event) = events.recv().await {
                if event.name == "DEVICE_DELETED" && event.data["device"] == device.0 {
                    return;
                }
            }
        };
        tokio::time::timeout(UNPLUG, deleted).await.map_err(|_| HypervisorError::Monitor {
            step: STEP,
            source: QmpError::Late,
        })?;
        self.monitor(STEP, "netdev_del", json!({"id": format!("net-{}", device.0)})).await?;
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn pids(&self) -> Vec<i32> {
        self.running.iter().map(|running| running.child.pid()).collect()
    }

    fn take_agent_socket(&mut self) -> Option<UnixStream> {
        self.running.as_mut()?.agent.take()
    }

    fn console(&self) -> Console {
        self.console.clone()
    }

    fn exited(&self) -> Exited {
        Exited(self.exit.subscribe())
    }
}

impl Qemu {
    /// Leaves QMP's negotiation mode. Asked before the first command, not at the start:
    /// most machines never need a command.
    async fn negotiate(&mut self) -> Result<(), HypervisorError> {
        match self.running()?.qmp.execute("qmp_capabilities", Value::Null).await {
            // It was negotiated before.
            Ok(_) | Err(QmpError::Refused(_)) => Ok(()),
            Err(source) => Err(HypervisorError::Monitor { step: "reach the monitor", source }),
        }
    }
}

/// What QEMU may see of the host: its own files and the guest's kernel.
fn jail(config: &VmConfig, firmware: Option<&Path>) -> Jail {
    let mut binds: Vec<Bind> = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"]
        .into_iter()
        .filter(|path| Path::new(path).exists())
        .map(Bind::same)
        .collect();
    let files = [Some(config.qemu.as_path()), Some(&config.kernel), Some(&config.initrd), firmware];
    for path in files.into_iter().flatten() {
        if !path.starts_with("/usr") {
            binds.push(Bind { source: path.to_owned(), target: path.to_owned(), readonly: true });
        }
    }
    let mut devices = vec![PathBuf::from("/dev/null"), PathBuf::from("/dev/urandom")];
    if config.accelerator == Accelerator::Kvm {
        devices.push("/dev/kvm".into());
    }
    if matches!(config.channel, ChannelKind::Vsock { .. }) {
        devices.push("/dev/vhost-vsock".into());
    }
    Jail { uid: config.uid, gid: config.uid, binds, devices, ..Jail::default() }
}

fn stream(fd: OwnedFd) -> Result<UnixStream, HypervisorError> {
    rustix::io::ioctl_fionbio(&fd, true).map_err(host("watch a socket"))?;
    UnixStream::from_std(fd.into()).map_err(host("watch a socket"))
}

async fn watch_exit(
    child: Arc<Child>,
    readers: [tokio::task::JoinHandle<()>; 2],
    console: Console,
    said: Console,
    stopping: Arc<AtomicBool>,
    exit: watch::Sender<Option<VmExit>>,
) {
    let status = child.wait().await.ok();
    for reader in readers {
        let _ = tokio::time::timeout(LAST_WORDS, reader).await;
    }
    let expected = stopping.load(Ordering::Relaxed);
    let panic = console.panic_line();
    let cause = cause(status, expected, panic.as_deref(), &said.last_lines(3));
    let console = console.last_lines(LAST_LINES);
    let ended = VmExit { status, expected, panicked: panic.is_some(), cause, console };
    tracing::debug!(cause = ended.cause, "the virtual machine ended");
    exit.send_replace(Some(ended));
}

fn cause(
    status: Option<ExitStatus>,
    expected: bool,
    panic: Option<&str>,
    said: &[String],
) -> String {
    if let Some(panic) = panic {
        return format!("the guest's kernel panicked: {panic}");
    }
    if expected {
        return "it was stopped".to_owned();
    }
    let said = if said.is_empty() { String::new() } else { format!(": {}", said.join("; ")) };
    match status.map(|status| (status.signal(), status.code())) {
        Some((Some(signal), _)) => format!("qemu was killed by signal {signal}{said}"),
        Some((_, Some(0))) => format!("the guest powered off{said}"),
        Some((_, Some(code))) => format!("qemu ended with code {code}{said}"),
        _ => format!("qemu ended{said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_names_the_signal_and_what_qemu_said() {
        let killed = Some(ExitStatus::from_raw(9));
        assert_eq!(cause(killed, false, None, &[]), "qemu was killed by signal 9");
        let failed = Some(ExitStatus::from_raw(1 << 8));
        let said = ["no such option".to_owned()];
        assert_eq!(cause(failed, false, None, &said), "qemu ended with code 1: no such option");
    }

    #[test]
    fn a_panic_is_the_cause_whatever_the_status() {
        let ok = Some(ExitStatus::from_raw(0));
        let cause = cause(ok, false, Some("Kernel panic - not syncing: x"), &[]);
        assert!(cause.contains("not syncing: x"), "{cause}");
    }
}
