//! The guest's counters as the metrics that containerd's clients read (cgroup v1's type,
//! which every client of the Task API understands).

use containerd_shim_protos::cgroups::metrics::{
    CPUStat, CPUUsage, MemoryEntry, MemoryOomControl, MemoryStat, Metrics, NetworkStat, PidsStat,
    Throttle,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use kata_protocol::agent::StatsResponse;

const TYPE_URL: &str = "io.containerd.cgroups.v1.Metrics";
const NANOS_PER_MICRO: u64 = 1000;

/// What `Stats` answers.
pub(crate) fn to_any(stats: &StatsResponse) -> Any {
    let metrics = metrics(stats);
    Any {
        type_url: TYPE_URL.to_owned(),
        // Serialising to memory fails only when there is none.
        value: metrics.write_to_bytes().unwrap_or_default(),
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
        let metrics = Metrics::parse_from_bytes(&to_any(&stats).value).unwrap();
        assert_eq!(metrics.memory_oom_control.oom_kill, 3);
    }
}
