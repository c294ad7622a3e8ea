//! The guest's counters as the metrics that containerd's clients read: of cgroup v1 or v2,
//! as the host's own containers have them. The OCI command line always gets v1's.

use containerd_shim_protos::cgroups::metrics::{
    CPUStat, CPUUsage, MemoryEntry, MemoryOomControl, MemoryStat, Metrics, NetworkStat, PidsStat,
    Throttle,
};
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use kata_protocol::agent::{self, StatsResponse};

const V1: &str = "io.containerd.cgroups.v1.Metrics";
const V2: &str = "io.containerd.cgroups.v2.Metrics";
const NANOS_PER_MICRO: u64 = 1000;

/// What `Stats` answers.
pub(crate) fn to_any(stats: &StatsResponse, unified: bool) -> Any {
    let (kind, bytes) = match unified {
        true => (V2, unified_metrics(stats).write_to_bytes()),
        false => (V1, metrics(stats).write_to_bytes()),
    };
    // Serialising to memory fails only when there is none.
    Any { type_url: kind.to_owned(), value: bytes.unwrap_or_default(), ..Default::default() }
}

/// Whether this host has cgroup v2 alone.
pub(crate) fn host_is_unified() -> bool {
    use kata_cgroups::Hierarchy;
    matches!(Hierarchy::detect(), Ok(Hierarchy::V2 { .. }))
}

fn unified_metrics(stats: &StatsResponse) -> v2::Metrics {
    let (cpu, memory) = (stats.cpu.get_or_default(), stats.memory.get_or_default());
    let pids = stats.pids.get_or_default();
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: pids.current,
            limit: pids.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.periods,
            nr_throttled: cpu.throttled_periods,
            throttled_usec: cpu.throttled_usec,
            ..Default::default()
        }),
        memory: MessageField::some(unified_memory(memory)),
        memory_events: MessageField::some(v2::MemoryEvents {
            max: memory.failures,
            oom_kill: memory.oom_kills,
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat {
            usage: stats.io.iter().map(unified_io).collect(),
            ..Default::default()
        }),
        network: stats
            .interfaces
            .iter()
            .map(|interface| v2::NetworkStat {
                name: interface.name.clone(),
                rx_bytes: interface.rx_bytes,
                rx_packets: interface.rx_packets,
                rx_errors: interface.rx_errors,
                rx_dropped: interface.rx_dropped,
                tx_bytes: interface.tx_bytes,
                tx_packets: interface.tx_packets,
                tx_errors: interface.tx_errors,
                tx_dropped: interface.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

fn unified_memory(memory: &agent::MemoryStats) -> v2::MemoryStat {
    let stat = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    v2::MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        usage: memory.usage,
        usage_limit: memory.limit,
        max_usage: memory.peak,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        ..Default::default()
    }
}

fn unified_io(io: &agent::IoStats) -> v2::IOEntry {
    v2::IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.read_bytes,
        wbytes: io.write_bytes,
        rios: io.read_ops,
        wios: io.write_ops,
        ..Default::default()
    }
}

fn metrics(stats: &StatsResponse) -> Metrics {
    let cpu = stats.cpu.get_or_default();
    let memory = stats.memory.get_or_default();
    let pids = stats.pids.get_or_default();
    let nanos = |micros: u64| micros.saturating_mul(NANOS_PER_MICRO);
    let stat = |name: &str| memory.stat.get(name).copied().unwrap_or_default();
    Metrics {
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total: nanos(cpu.usage_usec),
                user: nanos(cpu.user_usec),
                kernel: nanos(cpu.system_usec),
                ..Default::default()
            }),
            throttling: MessageField::some(Throttle {
                periods: cpu.periods,
                throttled_periods: cpu.throttled_periods,
                throttled_time: nanos(cpu.throttled_usec),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            cache: stat("file"),
            rss: stat("anon"),
            mapped_file: stat("file_mapped"),
            pg_fault: stat("pgfault"),
            pg_maj_fault: stat("pgmajfault"),
            inactive_file: stat("inactive_file"),
            total_inactive_file: stat("inactive_file"),
            active_file: stat("active_file"),
            total_active_file: stat("active_file"),
            usage: MessageField::some(MemoryEntry {
                usage: memory.usage,
                max: memory.peak,
                limit: memory.limit,
                failcnt: memory.failures,
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(MemoryOomControl {
            oom_kill: memory.oom_kills,
            ..Default::default()
        }),
        pids: MessageField::some(PidsStat {
            current: pids.current,
            limit: pids.limit,
            ..Default::default()
        }),
        network: stats
            .interfaces
            .iter()
            .map(|interface| NetworkStat {
                name: interface.name.clone(),
                rx_bytes: interface.rx_bytes,
                rx_packets: interface.rx_packets,
                rx_errors: interface.rx_errors,
                rx_dropped: interface.rx_dropped,
                tx_bytes: interface.tx_bytes,
                tx_packets: interface.tx_packets,
                tx_errors: interface.tx_errors,
                tx_dropped: interface.tx_dropped,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_protocol::agent::MemoryStats;

    #[test]
    fn kills_for_want_of_memory_are_counted() {
        let memory = MemoryStats { oom_kills: 3, ..Default::default() };
        let stats = StatsResponse { memory: MessageField::some(memory), ..Default::default() };
        let metrics = Metrics::parse_from_bytes(&to_any(&stats, false).value).unwrap();
        assert_eq!(metrics.memory_oom_control.oom_kill, 3);
    }

    #[test]
    fn both_kinds_tell_the_same() {
        let stats = StatsResponse {
            cpu: MessageField::some(agent::CpuStats { usage_usec: 7, ..Default::default() }),
            memory: MessageField::some(agent::MemoryStats {
                usage: 4096,
                stat: [("inactive_file".to_owned(), 5)].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let (old, new) = (to_any(&stats, false), to_any(&stats, true));
        assert_eq!((old.type_url.as_str(), new.type_url.as_str()), (V1, V2));
        let old = Metrics::parse_from_bytes(&old.value).unwrap();
        let new = v2::Metrics::parse_from_bytes(&new.value).unwrap();
        assert_eq!(old.cpu.usage.total, 7000);
        assert_eq!(new.cpu.usage_usec, 7);
        assert_eq!((old.memory.usage.usage, new.memory.usage), (4096, 4096));
        assert_eq!((old.memory.inactive_file, new.memory.inactive_file), (5, 5));
    }
}
