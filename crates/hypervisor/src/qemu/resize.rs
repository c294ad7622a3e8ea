//! A machine grows while it runs: memory by DIMMs, virtual CPUs by ACPI's hotplug.
//!
//! QEMU puts in what is asked for, and tells when the guest's kernel has taken it. Nothing is
//! taken out again: a kernel seldom can give memory back.
//!
//! A machine without ACPI can be given nothing. It has addresses for all the memory that it may
//! come to from the start; the kernel is told to keep off what is too much, and grows when the
//! agent tells it to use some. Behind those addresses there is nothing as long as they are not to
//! be used ([`Qemu::confine`]), so that a guest never has more than it was given.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::broadcast::Receiver;

use super::{COMMAND, Qemu, UNPLUG};
use crate::Size;
use crate::config::{Accelerator, Machine, VmConfig};
use crate::error::{HypervisorError, host};
use crate::qemu::qmp::{Command, Event};

/// Linux takes memory in blocks of so many MiB, at addresses that are a multiple of it.
const BLOCK: u32 = 128;
/// Most memory of an emulated machine, MiB: its processor has 40 address bits, and QEMU
/// keeps a GiB of addresses free for each slot beside what is asked for.
const TCG_MOST: u32 = 512 << 10;
/// Slots that a machine of QEMU may have.
const SLOTS: u32 = 256;
/// Of them those that a fork with a device by vhost-user may use: its monitor has to be able to
/// tell of all memory at once, in eight pieces, of which four are there from the start at most.
const SLOTS_TOLD_AT_ONCE: u32 = 4;
/// Most memory that is kept back, MiB. QEMU's own tables for it are a 10,000th of it, and it
/// fills them when it starts.
const KEPT_BACK_MOST: u32 = 32 << 10;
/// Where a microvm's memory goes on above the addresses of its devices: the size of the hole,
/// MiB, and where it begins (QEMU's `hw/i386/microvm.c`).
const HOLE: u32 = 1024;
const BELOW_HOLE: u32 = 3072;

/// How a machine gets more memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    /// Not at all.
    Fixed,
    /// In slots: those in use, and all.
    Dimms { used: u32, slots: u32 },
    /// It is there, and kept back.
    KeptBack,
}

/// How large a machine is, and may become.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub now: Size,
    most: Size,
    memory: Memory,
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
        let (way, memory) = if !config.grows() {
            (Memory::Fixed, now.memory_mib)
        } else if config.is_bare() {
            let most = now.memory_mib.saturating_add(KEPT_BACK_MOST);
            (Memory::KeptBack, memory.min(most))
        } else {
            let told_at_once = config.is_fork() && config.shares_memory();
            let most = if told_at_once { SLOTS_TOLD_AT_ONCE } else { SLOTS };
            (Memory::Dimms { used: 0, slots: config.memory_slots.min(most) }, memory)
        };
        let grows = memory >= now.memory_mib.saturating_add(BLOCK);
        Self {
            now,
            most: Size {
                memory_mib: if grows { memory } else { now.memory_mib },
                vcpus: if pluggable { vcpus.max(now.vcpus) } else { now.vcpus },
            },
            memory: if grows { way } else { Memory::Fixed },
            shared: config.shares_memory(),
        }
    }

    /// All the memory that the machine has from the start, MiB.
    pub(super) fn memory_mib(&self) -> u32 {
        match self.memory {
            Memory::KeptBack => self.most.memory_mib,
            Memory::Fixed | Memory::Dimms { .. } => self.now.memory_mib,
        }
    }

    /// Whether the guest has to be told to use what is added.
    pub(super) fn keeps_back(&self) -> bool {
        self.memory == Memory::KeptBack
    }

    /// QEMU's `-m`.
    pub(super) fn memory_option(&self) -> String {
        let size = self.memory_mib();
        match self.memory {
            Memory::Fixed | Memory::KeptBack => format!("{size}M"),
            Memory::Dimms { slots, .. } => {
                format!("{size}M,slots={slots},maxmem={}M", self.most.memory_mib)
            }
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
        let now = self.now.memory_mib;
        let first = match self.memory {
            Memory::Dimms { used, slots } if used < slots => now,
            // A block of which the kernel uses a part cannot be added.
            Memory::KeptBack => now.next_multiple_of(BLOCK),
            Memory::Fixed | Memory::Dimms { .. } => return 0,
        };
        let most = self.most.memory_mib.saturating_sub(first) / BLOCK * BLOCK;
        wanted.saturating_sub(now).next_multiple_of(BLOCK).min(most)
    }
}

/// Where the memory ends that the kernel is to begin with, MiB; none: it uses all there is.
pub(crate) fn first_memory(config: &VmConfig) -> Option<u32> {
    let hole = if config.memory_mib > BELOW_HOLE { HOLE } else { 0 };
    Room::new(config).keeps_back().then_some(config.memory_mib + hole)
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
        match self.room.memory {
            Memory::KeptBack => {
                self.room.now.memory_mib += missing;
                self.confine()?;
            }
            Memory::Dimms { used, slots } if missing > 0 => {
                // The slot is taken whatever the guest makes of it.
                self.room.memory = Memory::Dimms { used: used + 1, slots };
                self.add_memory(missing, used).await?;
            }
            Memory::Fixed | Memory::Dimms { .. } => {}
        }
        let vcpus = wanted.vcpus.min(self.room.most.vcpus);
        if vcpus > self.room.now.vcpus {
            self.add_vcpus((vcpus - self.room.now.vcpus) as usize).await?;
        }
        Ok(())
    }

    /// Makes the file that is the machine's memory as long as what the guest is to use, in whole
    /// blocks. Its kernel keeps off the rest because it was told to; one that was taken over
    /// would find nothing there: the monitor ends when it touches it.
    pub(super) fn confine(&self) -> Result<(), HypervisorError> {
        let Some(memory) = &self.kept_back else { return Ok(()) };
        let length = u64::from(self.room.now.memory_mib.next_multiple_of(BLOCK)) << 20;
        rustix::fs::ftruncate(memory, length)
            .map_err(std::io::Error::from)
            .map_err(host("keep memory back from the guest"))
    }

    async fn add_memory(&mut self, mib: u32, number: u32) -> Result<(), HypervisorError> {
        const STEP: &str = "add memory";
        self.up().await?;
        self.complete().await?;
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
    use crate::config::Share;
    use crate::qemu::sample_config;
    use crate::{ForkMemory, Start, StemMemory};
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
        full.memory = Memory::Dimms { used: 10, slots: 10 };
        assert_eq!(full.missing(4096), 0);
        let fork = room(|config| {
            let [whole, lively, socket] =
                [(); 3].map(|()| std::fs::File::open("/dev/null").unwrap().into());
            let from = StemMemory::from_fds([whole, lively]);
            config.start = Start::Fork { from, memory: ForkMemory::Touched };
            config.share = Some(Share::VhostUserFs { socket, tag: "t".into(), queue_size: 64 });
        });
        assert_eq!(fork.memory, Memory::Dimms { used: 0, slots: 4 });
        let none = room(|config| config.memory_slots = 0);
        assert_eq!((none.missing(4096), none.memory_option().as_str()), (0, "2048M"));
    }

    #[test]
    fn a_microvm_with_acpi_and_a_machine_at_its_most_stay_as_they_are() {
        let microvm = room(|config| {
            (config.machine, config.accelerator) = (Machine::Microvm, Accelerator::Kvm);
        });
        let most = room(|config| config.max_memory_mib = 2048);
        for room in [microvm, most] {
            assert_eq!((room.missing(4096), room.memory_option().as_str()), (0, "2048M"));
        }
    }

    #[test]
    fn a_machine_without_acpi_has_its_memory_from_the_start() {
        let bare = |memory, most| {
            room(|config| {
                config.machine = Machine::Microvm;
                (config.memory_mib, config.max_memory_mib) = (memory, most);
            })
        };
        let room = bare(2000, 8192);
        assert_eq!((room.memory_option().as_str(), room.now.memory_mib), ("8192M", 2000));
        // Of the sixteenth block a part is in use.
        let added = [2000, 2001, 2129, u32::MAX].map(|wanted| room.missing(wanted));
        assert_eq!(added, [0, 128, 256, 8192 - 2048]);
        assert_eq!(bare(2048, 2 << 20).memory_option(), format!("{}M", 2048 + (32 << 10)));
        assert!(!bare(2048, 2100).keeps_back());
    }

    #[test]
    fn the_kernel_is_told_where_its_first_memory_ends() {
        let end = |memory_mib| {
            let mut config = sample_config();
            (config.machine, config.memory_mib) = (Machine::Microvm, memory_mib);
            first_memory(&config)
        };
        assert_eq!(end(2048), Some(2048));
        assert_eq!(end(3072), Some(3072));
        assert_eq!(end(4096), Some(5120));
        assert_eq!(end(8192), None);
        assert_eq!(first_memory(&sample_config()), None);
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
