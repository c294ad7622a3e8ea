//! Saving a machine, and going on from where it was saved.
//!
//! Memory is never carried over: the saved machine leaves its file, a clone maps that or a
//! copy of it. What is saved and restored by QEMU (`x-ignore-shared`) is the state of the
//! devices, some 200 KB, through a pipe: neither side opens anything.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use serde_json::{Map, json};
use tokio::sync::broadcast;

use super::args::{AGENT_PORT, LateShare, MemoryMapping, Origin, SHARE_SOCKET, port_name};
use super::qmp::{
    Command, DeviceAdd, Event, Getfd, Migrate, MigrateIncoming, MigrateSetCapabilities,
    MigrateSetParameters, QueryStatus, Stop,
};
use super::{COMMAND, Qemu};
use crate::Hypervisor;
use crate::config::VmConfig;
use crate::error::{HypervisorError, host};
use crate::snapshot::{self, CloneMemory, Copying, Snapshot};

/// How long saving or restoring the devices may take. It takes some twenty milliseconds.
const STATE: Duration = Duration::from_secs(10);
/// How long a guest may take to notice that its channel was closed.
const PARKING: Duration = Duration::from_secs(20);
/// Most that the devices' state may be, bytes.
const MOST_STATE: u64 = 16 << 20;
/// Under this name QEMU has the pipe.
const PIPE: &str = "snapshot";

/// The moment at which the agent has given up its closed channel and waits for another.
#[derive(Debug)]
pub struct Parking(broadcast::Receiver<Event>);

impl Qemu {
    /// To be taken while the agent answers and before the channel is closed, for
    /// [`Qemu::parked`].
    ///
    /// # Errors
    /// The machine is not started, or ended.
    pub async fn parking(&mut self) -> Result<Parking, HypervisorError> {
        // With its answer, all that QEMU said of the port so far has been heard.
        self.ask("look after the agent's channel", &QueryStatus {}).await?;
        Ok(Parking(self.running()?.qmp.events()))
    }

    /// Waits until the agent has closed its end of the channel, too, and opened it anew:
    /// from here on whoever connects meets an agent without memories of the one before.
    ///
    /// # Errors
    /// It does not, or the machine ended.
    pub async fn parked(&self, parking: Parking) -> Result<(), HypervisorError> {
        // QEMU tells of a port once a second at most, and then how it is: of "closed, opened"
        // it may tell only the second. Nothing else opens the port.
        let opened_anew = |event: &Event| {
            let ours = event.name == "VSERPORT_CHANGE" && event.data["id"] == AGENT_PORT;
            (ours && event.data["open"] == true).then_some(())
        };
        let step = "wait for the agent to give up its channel";
        self.hears(step, "VSERPORT_CHANGE", PARKING, parking.0, opened_anew).await
    }

    /// A machine on memory that it leaves behind.
    pub(super) fn start_template(
        &mut self,
        config: VmConfig,
        major: u32,
    ) -> Result<(), HypervisorError> {
        let memory = snapshot::guest_memory(config.memory_mib).map_err(host("make memory"))?;
        let theirs = memory.try_clone().map_err(host("share memory"))?;
        self.launch(config, Origin::Template(theirs), major)?;
        self.template = Some(memory);
        Ok(())
    }

    pub(super) async fn save_template(&mut self) -> Result<Snapshot, HypervisorError> {
        const STEP: &str = "save the virtual machine";
        let memory = self.template.take().ok_or(HypervisorError::State("no template"))?;
        self.ask(STEP, &Stop {}).await?;
        let (reader, writer) = std::io::pipe().map_err(host("make a pipe"))?;
        let state = tokio::task::spawn_blocking(move || {
            let mut state = Vec::new();
            reader.take(MOST_STATE).read_to_end(&mut state).map(|_| state)
        });
        self.migrate(STEP, writer.into(), &Migrate { uri: format!("fd:{PIPE}") }).await?;
        let state = state.await.map_err(host("read the saved devices"))?;
        let state = state.map_err(host("read the saved devices"))?;
        // As long as it has the memory mapped, that cannot be sealed.
        self.stop().await?;
        let sealed = tokio::task::spawn_blocking(move || Snapshot::seal(memory, &state)).await;
        sealed.map_err(host("seal the saved memory"))?.map_err(host("seal the saved memory"))
    }

    /// Starts QEMU on the snapshot's memory and lets it go on.
    pub(super) async fn start_clone(
        &mut self,
        config: VmConfig,
        snapshot: Snapshot,
        memory: CloneMemory,
        major: u32,
    ) -> Result<(), HypervisorError> {
        let (origin, copied) = match memory {
            CloneMemory::Private => {
                let memory =
                    snapshot.memory().try_clone_to_owned().map_err(host("share memory"))?;
                (Origin::Clone(memory, MemoryMapping::Private), None)
            }
            CloneMemory::Copied => {
                let memory =
                    snapshot::guest_memory(config.memory_mib).map_err(host("make memory"))?;
                let from = snapshot.memory().try_clone_to_owned().map_err(host("share memory"))?;
                let to = memory.try_clone().map_err(host("share memory"))?;
                self.memory = Some(memory.try_clone().map_err(host("share memory"))?);
                // While QEMU starts.
                let copy = Copying::begin(from, to);
                (Origin::Clone(memory, MemoryMapping::Shared), Some(copy))
            }
        };
        let state = snapshot.state().map_err(host("read the saved devices"))?;
        let share = self.launch(config, origin, major)?;
        self.reached("monitor started");
        self.up().await?;
        self.reached("monitor answers");
        if let Some(copied) = copied {
            copied.done().await?;
            self.reached("memory copied");
        }
        self.restore(state).await?;
        self.reached("devices restored");
        if let Some(share) = share {
            self.plug_share(share).await?;
            self.reached("share plugged");
        }
        self.resume().await
    }

    async fn restore(&mut self, state: Vec<u8>) -> Result<(), HypervisorError> {
        const STEP: &str = "restore the virtual machine";
        // A clone has nobody to tell that its NIC moved: the address is its template's. The
        // guest would be asked to as well, for a second, in which Linux 6.12 deadlocks when it
        // closes the NIC (virtnet_close waits for work that waits for the same lock).
        self.ask(STEP, &MigrateSetParameters { announce_rounds: 0 }).await?;
        let (reader, mut writer) = std::io::pipe().map_err(host("make a pipe"))?;
        let feed = tokio::task::spawn_blocking(move || writer.write_all(&state));
        self.migrate(STEP, reader.into(), &MigrateIncoming { uri: format!("fd:{PIPE}") }).await?;
        let fed: io::Result<()> = feed.await.map_err(host("hand over the saved devices"))?;
        fed.map_err(host("hand over the saved devices"))
    }

    /// Hands QEMU its end of the pipe, and waits until the machine is saved or restored.
    async fn migrate<C: Command>(
        &mut self,
        step: &'static str,
        pipe: OwnedFd,
        command: &C,
    ) -> Result<(), HypervisorError> {
        let on = |name| json!({ "capability": name, "state": true });
        let capabilities = json!([on("x-ignore-shared"), on("events")]);
        self.ask(step, &MigrateSetCapabilities { capabilities }).await?;
        let qmp = self.running()?.qmp.clone();
        let events = qmp.events();
        let name = Getfd { fdname: PIPE.to_owned() };
        let answer = qmp.call_with_fd(&name, Some(pipe.as_fd()), COMMAND).await;
        self.explain(step, answer).await?;
        drop(pipe);
        self.ask(step, command).await?;
        let status = |event: &Event| {
            let status = event.data["status"].as_str().filter(|_| event.name == "MIGRATION")?;
            ["completed", "failed"].contains(&status).then(|| status == "completed")
        };
        match self.hears(step, C::NAME, STATE, events, status).await? {
            true => Ok(()),
            false => Err(HypervisorError::State("not of the kind that was saved")),
        }
    }

    /// The share's connection is there from the start; its device comes now.
    pub(super) async fn plug_share(&mut self, share: LateShare) -> Result<(), HypervisorError> {
        let (port, id) = self.running()?.reserve_for_share()?;
        let properties = Map::from_iter([
            ("chardev".to_owned(), json!(SHARE_SOCKET)),
            ("tag".to_owned(), json!(share.tag)),
            ("queue-size".to_owned(), json!(share.queue_size)),
        ]);
        let bus = port_name(port as u32);
        let device = DeviceAdd { driver: "vhost-user-fs-pci", id, bus, properties };
        self.ask("plug the share", &device).await.map(drop)
    }
}
