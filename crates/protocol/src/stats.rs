//! What a cgroup counts, as a message.

use crate::agent::{CpuStats, InterfaceStats, IoStats, MemoryStats, PidsStats, StatsResponse};
use kata_cgroups::Stats;
use protobuf::MessageField;

/// The counters as an answer of `Stats`, which the guest gives for its containers and the
/// host for the processes of a sandbox.
pub fn response(used: Stats, interfaces: Vec<InterfaceStats>) -> StatsResponse {
    StatsResponse {
        cpu: MessageField::some(CpuStats {
            usage_usec: used.cpu.usage_usec,
            user_usec: used.cpu.user_usec,
            system_usec: used.cpu.system_usec,
            periods: used.cpu.periods,
            throttled_periods: used.cpu.throttled_periods,
            throttled_usec: used.cpu.throttled_usec,
            ..CpuStats::default()
        }),
        memory: MessageField::some(MemoryStats {
            usage: used.memory.usage,
            limit: used.memory.limit,
            peak: used.memory.peak,
            swap_usage: used.memory.swap_usage,
            swap_limit: used.memory.swap_limit,
            failures: used.memory.failures,
            oom_kills: used.memory.oom_kills,
            stat: used.memory.stat.into_iter().collect(),
            ..MemoryStats::default()
        }),
        pids: MessageField::some(PidsStats {
            current: used.pids.current,
            limit: used.pids.limit,
            ..PidsStats::default()
        }),
        io: used
            .io
            .into_iter()
            .map(|io| IoStats {
                major: io.major,
                minor: io.minor,
                read_bytes: io.read_bytes,
                write_bytes: io.write_bytes,
                read_ops: io.read_ops,
                write_ops: io.write_ops,
                ..IoStats::default()
            })
            .collect(),
        interfaces,
        ..StatsResponse::default()
    }
}
