//! containerd's cgroup metrics in the words of runc's `events`.

use anyhow::{Context, Result, bail};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// One reading.
#[derive(Debug)]
pub struct Stats {
    /// runc's `data`.
    pub data: Value,
    /// Processes killed for want of memory so far.
    pub oom_kills: u64,
}

/// Reads the answer of the Task API's `Stats`.
///
/// # Errors
/// When it is of a kind that we do not know.
pub fn read(any: &Any) -> Result<Stats> {
    let kind = any.type_url.rsplit('/').next().unwrap_or_default();
    match kind {
        "io.containerd.cgroups.v1.Metrics" => {
            Ok(from_v1(&v1::Metrics::parse_from_bytes(&any.value).context("bad v1 metrics")?))
        }
        "io.containerd.cgroups.v2.Metrics" => {
            Ok(from_v2(&v2::Metrics::parse_from_bytes(&any.value).context("bad v2 metrics")?))
        }
        other => bail!("statistics of an unknown kind {other:?}"),
    }
}

fn from_v1(metrics: &v1::Metrics) -> Stats {
    let (cpu, memory) = (&metrics.cpu, &metrics.memory);
    let entry =
        |entry: &v1::MemoryEntry| memory_entry(entry.limit, entry.usage, entry.max, entry.failcnt);
    let block = |entries: &[v1::BlkIOEntry]| -> Vec<Value> {
        entries.iter().map(|e| block_entry(e.major, e.minor, &e.op, e.value)).collect()
    };
    let network: Vec<Value> = metrics
        .network
        .iter()
        .map(|n| {
            interface(
                &n.name,
                [n.rx_bytes, n.rx_packets, n.rx_errors, n.rx_dropped],
                [n.tx_bytes, n.tx_packets, n.tx_errors, n.tx_dropped],
            )
        })
        .collect();
    let data = json!({
        "cpu": {
            "usage": {"total": cpu.usage.total, "percpu": cpu.usage.per_cpu,
                      "kernel": cpu.usage.kernel, "user": cpu.usage.user},
            "throttling": throttling(cpu.throttling.periods, cpu.throttling.throttled_periods,
                                     cpu.throttling.throttled_time)
        },
        "cpuset": {},
        "memory": {
            "cache": memory.total_cache,
            "usage": entry(&memory.usage),
            "swap": entry(&memory.swap),
            "kernel": entry(&memory.kernel),
            "kernelTCP": entry(&memory.kernel_tcp),
            "raw": {"cache": memory.cache, "rss": memory.rss, "mapped_file": memory.mapped_file,
                    "total_inactive_file": memory.total_inactive_file,
                    "inactive_file": memory.inactive_file, "active_file": memory.active_file,
                    "inactive_anon": memory.inactive_anon, "active_anon": memory.active_anon}
        },
        "pids": pids(metrics.pids.current, metrics.pids.limit),
        "blkio": {
            "ioServiceBytesRecursive": block(&metrics.blkio.io_service_bytes_recursive),
            "ioServicedRecursive": block(&metrics.blkio.io_serviced_recursive)
        },
        "hugetlb": {}, "intel_rdt": {}, "network_interfaces": network
    });
    Stats { data, oom_kills: metrics.memory_oom_control.oom_kill }
}

fn from_v2(metrics: &v2::Metrics) -> Stats {
    let (cpu, memory) = (&metrics.cpu, &metrics.memory);
    let mut bytes = Vec::new();
    let mut operations = Vec::new();
    for e in &metrics.io.usage {
        bytes.push(block_entry(e.major, e.minor, "Read", e.rbytes));
        bytes.push(block_entry(e.major, e.minor, "Write", e.wbytes));
        operations.push(block_entry(e.major, e.minor, "Read", e.rios));
        operations.push(block_entry(e.major, e.minor, "Write", e.wios));
    }
    let network: Vec<Value> = metrics
        .network
        .iter()
        .map(|n| {
            interface(
                &n.name,
                [n.rx_bytes, n.rx_packets, n.rx_errors, n.rx_dropped],
                [n.tx_bytes, n.tx_packets, n.tx_errors, n.tx_dropped],
            )
        })
        .collect();
    let data = json!({
        "cpu": {
            "usage": {"total": nanoseconds(cpu.usage_usec), "kernel": nanoseconds(cpu.system_usec),
                      "user": nanoseconds(cpu.user_usec)},
            "throttling": throttling(cpu.nr_periods, cpu.nr_throttled,
                                     nanoseconds(cpu.throttled_usec))
        },
        "cpuset": {},
        "memory": {
            "cache": memory.file,
            "usage": memory_entry(memory.usage_limit, memory.usage, memory.max_usage,
                                  metrics.memory_events.max),
            "swap": memory_entry(memory.swap_limit, memory.swap_usage, memory.swap_max_usage, 0),
            "kernel": memory_entry(0, 0, 0, 0),
            "kernelTCP": memory_entry(0, 0, 0, 0),
            "raw": {"anon": memory.anon, "file": memory.file, "slab": memory.slab,
                    "sock": memory.sock, "shmem": memory.shmem, "file_mapped": memory.file_mapped,
                    "file_dirty": memory.file_dirty, "inactive_anon": memory.inactive_anon,
                    "active_anon": memory.active_anon, "inactive_file": memory.inactive_file,
                    "active_file": memory.active_file, "pgfault": memory.pgfault,
                    "pgmajfault": memory.pgmajfault}
        },
        "pids": pids(metrics.pids.current, metrics.pids.limit),
        "blkio": {"ioServiceBytesRecursive": bytes, "ioServicedRecursive": operations},
        "hugetlb": {}, "intel_rdt": {}, "network_interfaces": network
    });
    Stats { data, oom_kills: metrics.memory_events.oom_kill }
}

fn nanoseconds(microseconds: u64) -> u64 {
    microseconds.saturating_mul(1000)
}

fn memory_entry(limit: u64, usage: u64, max: u64, failures: u64) -> Value {
    json!({"limit": limit, "usage": usage, "max": max, "failcnt": failures})
}

fn throttling(periods: u64, throttled: u64, time: u64) -> Value {
    json!({"periods": periods, "throttledPeriods": throttled, "throttledTime": time})
}

fn pids(current: u64, limit: u64) -> Value {
    json!({"current": current, "limit": limit})
}

fn block_entry(major: u64, minor: u64, operation: &str, value: u64) -> Value {
    json!({"major": major, "minor": minor, "op": operation, "value": value})
}

fn interface(name: &str, rx: [u64; 4], tx: [u64; 4]) -> Value {
    json!({"Name": name, "RxBytes": rx[0], "RxPackets": rx[1], "RxErrors": rx[2],
           "RxDropped": rx[3], "TxBytes": tx[0], "TxPackets": tx[1], "TxErrors": tx[2],
           "TxDropped": tx[3]})
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::MessageField;

    #[test]
    fn both_kinds_of_metrics_give_runcs_words() {
        let metrics = v1::Metrics {
            cpu: MessageField::some(v1::CPUStat {
                usage: MessageField::some(v1::CPUUsage { total: 7, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let any = Any {
            type_url: "io.containerd.cgroups.v1.Metrics".into(),
            value: metrics.write_to_bytes().unwrap(),
            ..Default::default()
        };
        assert_eq!(read(&any).unwrap().data["cpu"]["usage"]["total"], 7);

        let metrics = v2::Metrics {
            memory: MessageField::some(v2::MemoryStat { usage: 9, ..Default::default() }),
            memory_events: MessageField::some(v2::MemoryEvents {
                oom_kill: 2,
                ..Default::default()
            }),
            ..Default::default()
        };
        let any = Any {
            type_url: "types.containerd.io/io.containerd.cgroups.v2.Metrics".into(),
            value: metrics.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let stats = read(&any).unwrap();
        assert_eq!(stats.data["memory"]["usage"]["usage"], 9);
        assert_eq!(stats.oom_kills, 2);
    }

    #[test]
    fn unknown_metrics_are_refused() {
        assert!(read(&Any::default()).is_err());
    }
}
