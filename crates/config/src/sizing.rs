//! How large a sandbox's VM is.
//!
//! It is decided before the VM starts:
//! * **Memory**: without a limit, `default_memory`. With one, the limit plus what the guest
//!   itself needs ([`OVERHEAD_MIB`] and a 64th of the limit, for the kernel's page tables of
//!   its memory), at least [`LEAST_MIB`]. A pod gets at least `default_memory` even so: the
//!   limit that a pod states says nothing of its containers without one.
//! * **vCPUs**: `default_vcpus`, or the CPU limit rounded up if that is more. A CPU limit
//!   alone changes neither the memory nor goes below the default; shares and cpusets change
//!   nothing.
//!
//! Both are capped by `default_maxmemory` and `default_maxvcpus`, and by what the host has.
//!
//! Limits that rise later, or come with a pod's further containers, make the VM grow by the
//! same rule ([`Sizing::for_containers`]); it never shrinks.

use crate::types::SandboxConfig;
use kata_oci::Resources;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// What the guest needs beside its containers, MiB.
pub const OVERHEAD_MIB: u64 = 128;
/// Least memory of a VM, MiB.
pub const LEAST_MIB: u64 = 256;
/// The guest's page descriptors take a 64th of its memory.
const PAGE_TABLES: u64 = 64;
const MIB: u64 = 1 << 20;

/// What a container or a pod may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Thousandths of a CPU.
    pub millicpus: Option<u64>,
    /// They are a whole pod's.
    pub pod: bool,
}

impl Limits {
    /// From the specification of a container that has its sandbox for itself.
    pub fn of_container(resources: Option<&Resources>) -> Self {
        let memory = resources.and_then(|r| r.memory.as_ref()).and_then(|m| m.limit);
        let cpu = resources.and_then(|r| r.cpu.as_ref());
        Self {
            memory: memory.and_then(positive),
            millicpus: cpu.and_then(|cpu| millicpus(cpu.quota?, cpu.period.unwrap_or(100_000))),
            pod: false,
        }
    }

    /// From the annotations that containerd puts on a pod's sandbox; `None` when there are
    /// none of them.
    pub fn of_pod(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let number = |name: &str| -> Option<i64> {
            annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?.trim().parse().ok()
        };
        let (memory, quota, period) = (number("memory"), number("cpu-quota"), number("cpu-period"));
        if memory.is_none() && quota.is_none() && period.is_none() {
            return None;
        }
        let period = period.and_then(positive).unwrap_or(100_000);
        Some(Self {
            memory: memory.and_then(positive),
            millicpus: quota.and_then(|quota| millicpus(quota, period)),
            pod: true,
        })
    }
}

fn positive(n: i64) -> Option<u64> {
    u64::try_from(n).ok().filter(|&n| n > 0)
}

fn millicpus(quota: i64, period: u64) -> Option<u64> {
    let product = u128::from(positive(quota)?) * 1000;
    let period = u128::from(if period == 0 { 100_000 } else { period });
    u64::try_from(product.div_ceil(period)).ok()
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// CPUs we may run on.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
}

impl Host {
    /// Of this machine.
    pub fn detect() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: no pointers; both return a number or -1.
        let (pages, size) =
            unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        let bytes = positive(pages).unwrap_or(0).saturating_mul(positive(size).unwrap_or(0));
        Self {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: u32::try_from(bytes / MIB).unwrap_or(u32::MAX),
        }
    }
}

/// The size of a VM, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// Memory, MiB; even, so that it divides into pages of any size we use.
    pub memory_mib: u32,
    /// Memory it may ever have, MiB.
    pub max_memory_mib: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// vCPUs it may ever have.
    pub max_vcpus: u32,
    /// Why the memory is so much.
    pub memory_reason: &'static str,
    /// Why the vCPUs are so many.
    pub vcpus_reason: &'static str,
}

impl fmt::Display for Sizing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory_mib, vcpus, memory_reason, vcpus_reason, .. } = self;
        write!(f, "{memory_mib} MiB ({memory_reason}), {vcpus} vCPUs ({vcpus_reason})")
    }
}

impl Sizing {
    /// Decides; see the rule at the top of this module.
    pub fn decide(config: &SandboxConfig, limits: Limits, host: Host) -> Self {
        let max_memory_mib = most_memory(config, host);
        let (memory_mib, memory_reason) = memory(config, limits, max_memory_mib);
        let hypervisor = &config.hypervisor;
        let host_cpus = host.cpus.max(1);
        let max_vcpus = match hypervisor.default_maxvcpus {
            0 => host_cpus,
            most => most.min(host_cpus),
        };
        let default = u32::try_from(hypervisor.default_vcpus).map_or(host_cpus, |n| n.max(1));
        let asked = limits.millicpus.map(whole_cpus);
        let (vcpus, reason) = match asked {
            Some(asked) if asked > default => (asked, "CPU limit, rounded up"),
            _ => (default, "default_vcpus"),
        };
        let (vcpus, vcpus_reason) =
            if vcpus > max_vcpus { (max_vcpus, "most that is allowed") } else { (vcpus, reason) };
        Self { memory_mib, max_memory_mib, vcpus, max_vcpus, memory_reason, vcpus_reason }
    }

    /// What containers of these limits need together, in MiB and vCPUs; what has no limit
    /// needs nothing of its own. Not capped.
    pub fn for_containers(limits: &[Limits]) -> (u32, u32) {
        let sum = |part: fn(&Limits) -> Option<u64>| {
            limits.iter().filter_map(part).reduce(u64::saturating_add)
        };
        let memory = sum(|limits| limits.memory).map_or(0, |bytes| {
            u32::try_from(with_overhead(bytes).next_multiple_of(2)).unwrap_or(u32::MAX)
        });
        (memory, sum(|limits| limits.millicpus).map_or(0, whole_cpus))
    }
}

fn whole_cpus(millicpus: u64) -> u32 {
    u32::try_from(millicpus.div_ceil(1000)).unwrap_or(u32::MAX)
}

/// MiB for a limit of so many bytes.
fn with_overhead(bytes: u64) -> u64 {
    let limit = bytes.div_ceil(MIB);
    limit.saturating_add(OVERHEAD_MIB).saturating_add(limit.div_ceil(PAGE_TABLES))
}

fn most_memory(config: &SandboxConfig, host: Host) -> u32 {
    let host = if host.memory_mib == 0 { u32::MAX } else { host.memory_mib };
    match config.hypervisor.default_maxmemory {
        0 => host,
        most => most.min(host),
    }
}

fn memory(config: &SandboxConfig, limits: Limits, most: u32) -> (u32, &'static str) {
    let default = u64::from(config.hypervisor.default_memory);
    let (wanted, reason) = match limits.memory {
        None => (default, "default_memory"),
        Some(bytes) => {
            let with_overhead = with_overhead(bytes);
            if limits.pod && default > with_overhead {
                (default, "default_memory, which is more than the pod's limit needs")
            } else {
                (with_overhead.max(LEAST_MIB), "memory limit plus the guest's own need")
            }
        }
    };
    let most = u64::from(most);
    // Rounded up before the cap, and down after it.
    let wanted = wanted.next_multiple_of(2);
    let (mib, reason) =
        if wanted > most { (most, "most that is allowed") } else { (wanted, reason) };
    (u32::try_from(mib & !1).unwrap_or(u32::MAX - 1), reason)
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
