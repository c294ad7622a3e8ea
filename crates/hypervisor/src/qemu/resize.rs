//! A machine grows while it runs: memory by DIMMs, virtual CPUs by ACPI's hotplug.
//!
//! QEMU puts in what is asked for, and tells when the guest's kernel has taken it. Nothing is
//! taken out again: a kernel seldom can give memory back.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::broadcast::Receiver;

use super::{COMMAND, Qemu, UNPLUG};
use crate::Size;
use crate::config::{Accelerator, Machine, Share, VmConfig};
use crate::error::HypervisorError;
use crate::qemu::qmp::{Command, Event};

/// Linux takes memory in blocks of so many MiB, at addresses that are a multiple of it.
const BLOCK: u32 = 128;
/// Most memory of an emulated machine, MiB: its processor has 40 address bits, and QEMU
/// keeps a GiB of addresses free for each slot beside what is asked for.
const TCG_MOST: u32 = 512 << 10;
/// Slots that a machine of QEMU may have.
const SLOTS: u32 = 256;

/// How large a machine is, and may become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub now: Size,
    most: Size,
    /// Slots for memory: those in use, and all.
    used: u32,
    slots: u32,
    /// The memory's other user has to see it.
    shared: bool,
}

impl Room {
    pub(super) fn new(config: &VmConfig) -> Self {
        let pluggable = config.machine == Machine::Q35;
        let now = Size { memory_mib: config.memory_mib, vcpus: config.vcpus };
        let memory = match config.accelerator {
            Accelerator::Kvm => config.max_memory_mib,
            Accelerator::Tcg => config.max_memory_mib.min(TCG_MOST),
        };
        let vcpus = match config.accelerator {
            Accelerator::Kvm => config.max_vcpus,
            // Linux does not take processors that come later from an emulator.
            Accelerator::Tcg => now.vcpus,
        };
        let slots = config.memory_slots.min(SLOTS);
        let grows = pluggable && slots > 0 && memory >= now.memory_mib.saturating_add(BLOCK);
        Self {
            now,
            most: Size {
                memory_mib: if grows { memory } else { now.memory_mib },
                vcpus: if pluggable { vcpus.max(now.vcpus) } else { now.vcpus },
            },
            used: 0,
            slots: if grows { slots } else { 0 },
            shared: matches!(config.share, Some(Share::VhostUserFs { .. })),
        }
    }

    /// QEMU's `-m`.
    pub(super) fn memory_option(&self) -> String {
        let Self { now, most, slots, .. } = self;
        match slots {
            0 => format!("{}M", now.memory_mib),
            _ => format!("{}M,slots={slots},maxmem={}M", now.memory_mib, most.memory_mib),
        }
    }

    /// QEMU's `-smp`.
    pub(super) fn cpu_option(&self, accelerator: Accelerator) -> String {
        match accelerator {
            Accelerator::Kvm => format!("{},maxcpus={}", self.now.vcpus, self.most.vcpus),
            Accelerator::Tcg => self.now.vcpus.to_string(),
        }
    }

    /// MiB to add for the machine to have `wanted`, or as near to it as it may come.
    fn missing(&self, wanted: u32) -> u32 {
        if self.used == self.slots {
            return 0;
        }
        let most = self.most.memory_mib.saturating_sub(self.now.memory_mib) / BLOCK * BLOCK;
        wanted.saturating_sub(self.now.memory_mib).next_multiple_of(BLOCK).min(most)
    }
}

/// Makes the memory of a DIMM.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ObjectAdd {
    qom_type: &'static str,
    id: String,
    size: u64,
    share: bool,
}

impl Command for ObjectAdd {
    const NAME: &'static str = "object-add";
    type Answer = Value;
}

/// Gives the memory of a DIMM up.
#[derive(Debug, Serialize)]
struct ObjectDel {
    id: String,
}

impl Command for ObjectDel {
    const NAME: &'static str = "object-del";
    type Answer = Value;
}

/// Puts a DIMM or a processor in: neither is on a bus.
#[derive(Debug, Serialize)]
struct PutIn {
    driver: String,
    id: String,
    #[serde(flatten)]
    properties: Map<String, Value>,
}

impl Command for PutIn {
    const NAME: &'static str = "device_add";
    type Answer = Value;
}

/// Asks which processors there are and could be.
#[derive(Debug, Serialize)]
struct QueryHotpluggableCpus {}

impl Command for QueryHotpluggableCpus {
    const NAME: &'static str = "query-hotpluggable-cpus";
    type Answer = Vec<CpuPlace>;
}

/// A place for a processor.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct CpuPlace {
    #[serde(rename = "type")]
    kind: String,
    props: Map<String, Value>,
    /// The processor that is there.
    qom_path: Option<String>,
}

impl CpuPlace {
    /// Its order among all: the guest numbers its processors so.
    fn order(&self) -> Vec<u64> {
        ["socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id"]
            .iter()
            .map(|level| self.props.get(*level).and_then(Value::as_u64).unwrap_or(0))
            .collect()
    }
}

/// The free places, the lowest first.
fn free_places(mut places: Vec<CpuPlace>) -> Vec<CpuPlace> {
    places.retain(|place| place.qom_path.is_none());
    places.sort_by_key(CpuPlace::order);
    places
}

/// What the guest's kernel made of a device, if the event tells of this one.
fn verdict(event: &Event, id: &str) -> Option<Result<(), HypervisorError>> {
    // ACPI's words.
    const DONE: u64 = 0;
    const UNDERWAY: u64 = 0x80;
    let info = &event.data["info"];
    if event.name != "ACPI_DEVICE_OST" || info["device"] != id {
        return None;
    }
    match info["status"].as_u64() {
        Some(UNDERWAY) => None,
        Some(DONE) => Some(Ok(())),
        _ => Some(Err(HypervisorError::Declined)),
    }
}

impl Qemu {
    /// Adds memory and virtual CPUs until the machine has this size, or as near to it as it
    /// can come.
    pub(super) async fn grow(&mut self, wanted: Size) -> Result<(), HypervisorError> {
        let missing = self.room.missing(wanted.memory_mib);
        if missing > 0 {
            self.add_memory(missing).await?;
        }
        let vcpus = wanted.vcpus.min(self.room.most.vcpus);
        if vcpus > self.room.now.vcpus {
            self.add_vcpus((vcpus - self.room.now.vcpus) as usize).await?;
        }
        Ok(())
    }

    async fn add_memory(&mut self, mib: u32) -> Result<(), HypervisorError> {
        const STEP: &str = "add memory";
        self.up().await?;
        let number = self.room.used;
        let (memory, id) = (format!("memory{number}"), format!("dimm{number}"));
        let backend = ObjectAdd {
            qom_type: "memory-backend-memfd",
            id: memory.clone(),
            size: u64::from(mib) << 20,
            share: self.room.shared,
        };
        self.ask(STEP, &backend).await?;
        let properties = Map::from_iter([("memdev".to_owned(), memory.clone().into())]);
        let dimm = PutIn { driver: "pc-dimm".to_owned(), id, properties };
        let events = self.running()?.qmp.events();
        if let Err(error) = self.ask(STEP, &dimm).await {
            let _ = self.running()?.qmp.call(&ObjectDel { id: memory }, COMMAND).await;
            return Err(error);
        }
        // The slot is taken whatever the guest makes of it.
        self.room.used += 1;
        self.taken(STEP, &dimm.id, events).await?;
        self.room.now.memory_mib += mib;
        Ok(())
    }

    async fn add_vcpus(&mut self, count: usize) -> Result<(), HypervisorError> {
        const STEP: &str = "add a virtual CPU";
        let places = free_places(self.ask(STEP, &QueryHotpluggableCpus {}).await?);
        for place in places.into_iter().take(count) {
            let id = format!("cpu{}", self.room.now.vcpus);
            let cpu = PutIn { driver: place.kind, id, properties: place.props };
            let events = self.running()?.qmp.events();
            self.ask(STEP, &cpu).await?;
            // Its place is taken whatever the guest makes of it.
            self.room.now.vcpus += 1;
            self.taken(STEP, &cpu.id, events).await?;
        }
        Ok(())
    }

    /// Waits until the guest's kernel has taken the device.
    async fn taken(
        &self,
        step: &'static str,
        id: &str,
        events: Receiver<Event>,
    ) -> Result<(), HypervisorError> {
        self.hears(step, PutIn::NAME, UNPLUG, events, |event| verdict(event, id)).await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::sample_config;
    use serde_json::json;

    fn room(change: impl FnOnce(&mut VmConfig)) -> Room {
        let mut config = sample_config();
        change(&mut config);
        Room::new(&config)
    }

    #[test]
    fn memory_is_added_in_blocks_and_never_beyond_the_most() {
        let room = room(|config| config.max_memory_mib = 3000);
        assert_eq!(room.memory_option(), "2048M,slots=10,maxmem=3000M");
        let added = [0, 2048, 2049, 2176, 2177, 2900, u32::MAX].map(|wanted| room.missing(wanted));
        assert_eq!(added, [0, 0, 128, 128, 256, 896, 896]);
    }

    #[test]
    fn without_a_free_slot_no_memory_is_added() {
        let mut full = room(|_| {});
        full.used = full.slots;
        assert_eq!(full.missing(4096), 0);
        let none = room(|config| config.memory_slots = 0);
        assert_eq!((none.missing(4096), none.memory_option().as_str()), (0, "2048M"));
    }

    #[test]
    fn a_microvm_and_a_machine_at_its_most_stay_as_they_are() {
        let microvm = room(|config| config.machine = Machine::Microvm);
        let most = room(|config| config.max_memory_mib = 2048);
        for room in [microvm, most] {
            assert_eq!((room.missing(4096), room.memory_option().as_str()), (0, "2048M"));
        }
    }

    #[test]
    fn processors_are_added_under_kvm_only() {
        assert_eq!(room(|_| {}).most.vcpus, 1);
        assert_eq!(room(|config| config.accelerator = Accelerator::Kvm).most.vcpus, 4);
    }

    #[test]
    fn the_lowest_free_place_comes_first() {
        let place = |core: u32, taken: bool| {
            let mut place = json!({
                "type": "host-x86_64-cpu", "vcpus-count": 1,
                "props": {"core-id": core, "thread-id": 0, "socket-id": 0},
            });
            if taken {
                place["qom-path"] = json!("/machine/unattached/device[0]");
            }
            place
        };
        let answer = json!([place(10, false), place(2, false), place(1, false), place(0, true)]);
        let places: Vec<CpuPlace> = serde_json::from_value(answer).unwrap();
        let cores: Vec<Value> =
            free_places(places).iter().map(|place| place.props["core-id"].clone()).collect();
        assert_eq!(cores, [json!(1), json!(2), json!(10)]);
    }

    #[test]
    fn only_the_guests_last_word_on_this_device_counts() {
        let event = |device: &str, status: u64| Event {
            name: "ACPI_DEVICE_OST".to_owned(),
            data: json!({"info": {"device": device, "slot": "0", "source": 1, "status": status}}),
        };
        assert!(verdict(&event("dimm1", 0), "dimm0").is_none());
        assert!(verdict(&event("dimm0", 0x80), "dimm0").is_none());
        assert!(matches!(verdict(&event("dimm0", 0), "dimm0"), Some(Ok(()))));
        assert!(matches!(
            verdict(&event("dimm0", 1), "dimm0"),
            Some(Err(HypervisorError::Declined))
        ));
        let other = Event { name: "RESUME".to_owned(), data: Value::Null };
        assert!(verdict(&other, "dimm0").is_none());
    }
}
