//! What a cgroup has used.

use crate::{Cgroup, CgroupError, file};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Stands for "no limit" in every limit.
pub const NO_LIMIT: u64 = u64::MAX;

/// Use and limits of a cgroup, in v2's units.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct Stats {
    /// CPU time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Tasks.
    pub pids: PidsStats,
    /// Block devices.
    pub io: Vec<IoStats>,
    /// Huge pages.
    pub hugetlb: Vec<HugetlbStats>,
}

/// CPU time, microseconds.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct CpuStats {
    /// In all.
    pub usage_usec: u64,
    /// In user mode.
    pub user_usec: u64,
    /// In the kernel.
    pub system_usec: u64,
    /// Periods of the quota that had something to run.
    pub periods: u64,
    /// Periods in which the quota was used up.
    pub throttled_periods: u64,
    /// Time waited for a new period.
    pub throttled_usec: u64,
}

/// Memory, bytes.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct MemoryStats {
    /// In use.
    pub usage: u64,
    /// At most; [`NO_LIMIT`] for none.
    pub limit: u64,
    /// Most ever in use; 0 where the kernel does not count it.
    pub peak: u64,
    /// Swap in use.
    pub swap_usage: u64,
    /// Swap at most; [`NO_LIMIT`] for none.
    pub swap_limit: u64,
    /// Times the limit was hit.
    pub failures: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// `memory.stat` as it stands.
    pub stat: BTreeMap<String, u64>,
}

/// Tasks.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct PidsStats {
    /// Now.
    pub current: u64,
    /// At most; [`NO_LIMIT`] for none.
    pub limit: u64,
}

/// One block device.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct IoStats {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub read_ops: u64,
    /// Writes.
    pub write_ops: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct HugetlbStats {
    /// `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes in use.
    pub usage: u64,
    /// Most ever; 0 where the kernel does not count it.
    pub peak: u64,
    /// Times the limit was hit.
    pub failures: u64,
}

/// Files of one cgroup directory; what is not there reads as nothing.
struct Files<'a>(Option<&'a Path>);

impl Files<'_> {
    fn text(&self, name: &str) -> Result<String, CgroupError> {
        match self.0 {
            Some(dir) => Ok(file::read_optional(&dir.join(name))?.unwrap_or_default()),
            None => Ok(String::new()),
        }
    }

    fn number(&self, name: &str) -> Result<u64, CgroupError> {
        Ok(file::number(&self.text(name)?).unwrap_or(0))
    }

    fn limit(&self, name: &str) -> Result<u64, CgroupError> {
        Ok(file::number(&self.text(name)?).unwrap_or(NO_LIMIT))
    }

    fn keyed(&self, name: &str) -> Result<BTreeMap<String, u64>, CgroupError> {
        Ok(file::flat_keyed(&self.text(name)?))
    }
}

fn take(map: &BTreeMap<String, u64>, key: &str) -> u64 {
    map.get(key).copied().unwrap_or(0)
}

/// Reads a v2 cgroup.
pub(crate) fn v2(dir: &Path) -> Result<Stats, CgroupError> {
    file::read(&dir.join("cgroup.controllers"))?;
    let files = Files(Some(dir));
    let cpu = files.keyed("cpu.stat")?;
    let events = files.keyed("memory.events")?;
    Ok(Stats {
        cpu: CpuStats {
            usage_usec: take(&cpu, "usage_usec"),
            user_usec: take(&cpu, "user_usec"),
            system_usec: take(&cpu, "system_usec"),
            periods: take(&cpu, "nr_periods"),
            throttled_periods: take(&cpu, "nr_throttled"),
            throttled_usec: take(&cpu, "throttled_usec"),
        },
        memory: MemoryStats {
            usage: files.number("memory.current")?,
            limit: files.limit("memory.max")?,
            peak: files.number("memory.peak")?,
            swap_usage: files.number("memory.swap.current")?,
            swap_limit: files.limit("memory.swap.max")?,
            failures: take(&events, "max"),
            oom_kills: take(&events, "oom_kill"),
            stat: files.keyed("memory.stat")?,
        },
        pids: PidsStats { current: files.number("pids.current")?, limit: files.limit("pids.max")? },
        io: io_v2(&files.text("io.stat")?),
        hugetlb: hugetlb(dir, |size| {
            let events = files.keyed(&format!("hugetlb.{size}.events"))?;
            Ok((files.number(&format!("hugetlb.{size}.current"))?, 0, take(&events, "max")))
        })?,
    })
}

fn io_v2(text: &str) -> Vec<IoStats> {
    text.lines()
        .filter_map(|line| {
            let (device, values) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let value = |key: &str| {
                values
                    .split_whitespace()
                    .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
                    .unwrap_or(0)
            };
            Some(IoStats {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                read_bytes: value("rbytes"),
                write_bytes: value("wbytes"),
                read_ops: value("rios"),
                write_ops: value("wios"),
            })
        })
        .collect()
}

/// Sizes are found by the names of the files.
fn hugetlb(
    dir: &Path,
    read: impl Fn(&str) -> Result<(u64, u64, u64), CgroupError>,
) -> Result<Vec<HugetlbStats>, CgroupError> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(Vec::new()) };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut sizes: Vec<String> = names
        .filter_map(|name| {
            let (size, last) = name.strip_prefix("hugetlb.")?.split_once('.')?;
            matches!(last, "current" | "usage_in_bytes").then(|| size.to_owned())
        })
        .collect();
    sizes.sort();
    sizes
        .into_iter()
        .map(|page_size| {
            let (usage, peak, failures) = read(&page_size)?;
            Ok(HugetlbStats { page_size, usage, peak, failures })
        })
        .collect()
}

/// Reads a v1 cgroup, each controller from its tree.
pub(crate) fn v1(cgroup: &Cgroup) -> Result<Stats, CgroupError> {
    if !cgroup.exists() {
        cgroup.pids()?;
    }
    let dirs: BTreeMap<_, _> = ["cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb"]
        .into_iter()
        .filter_map(|name| Some((name, cgroup.v1_directory(name)?)))
        .collect();
    let files = |name: &str| Files(dirs.get(name).map(|dir| dir.as_path()));
    Ok(Stats {
        cpu: cpu_v1(&files("cpu"), &files("cpuacct"))?,
        memory: memory_v1(&files("memory"))?,
        pids: PidsStats {
            current: files("pids").number("pids.current")?,
            limit: files("pids").limit("pids.max")?,
        },
        io: io_v1(&files("blkio"))?,
        hugetlb: match dirs.get("hugetlb") {
            None => Vec::new(),
            Some(dir) => hugetlb(dir, |size| {
                let files = Files(Some(dir));
                Ok((
                    files.number(&format!("hugetlb.{size}.usage_in_bytes"))?,
                    files.number(&format!("hugetlb.{size}.max_usage_in_bytes"))?,
                    files.number(&format!("hugetlb.{size}.failcnt"))?,
                ))
            })?,
        },
    })
}

fn cpu_v1(cpu: &Files, cpuacct: &Files) -> Result<CpuStats, CgroupError> {
    /// `cpuacct.stat` counts in USER_HZ, which is 100 on every architecture we run on.
    const USEC_PER_TICK: u64 = 10_000;
    let quota = cpu.keyed("cpu.stat")?;
    let ticks = cpuacct.keyed("cpuacct.stat")?;
    Ok(CpuStats {
        usage_usec: cpuacct.number("cpuacct.usage")? / 1000,
        user_usec: take(&ticks, "user").saturating_mul(USEC_PER_TICK),
        system_usec: take(&ticks, "system").saturating_mul(USEC_PER_TICK),
        periods: take(&quota, "nr_periods"),
        throttled_periods: take(&quota, "nr_throttled"),
        throttled_usec: take(&quota, "throttled_time") / 1000,
    })
}

fn memory_v1(files: &Files) -> Result<MemoryStats, CgroupError> {
    /// v1 says "no limit" with the largest number of whole pages.
    const LARGEST: u64 = i64::MAX as u64 & !0xffff;
    let limit = |n: u64| if n >= LARGEST { NO_LIMIT } else { n };
    let usage = files.number("memory.usage_in_bytes")?;
    let memory_limit = limit(files.limit("memory.limit_in_bytes")?);
    let both_limit = limit(files.limit("memory.memsw.limit_in_bytes")?);
    let both_usage = files.number("memory.memsw.usage_in_bytes")?;
    let oom = files.keyed("memory.oom_control")?;
    Ok(MemoryStats {
        usage,
        limit: memory_limit,
        peak: files.number("memory.max_usage_in_bytes")?,
        swap_usage: both_usage.saturating_sub(usage),
        swap_limit: match both_limit {
            NO_LIMIT => NO_LIMIT,
            both => both.saturating_sub(memory_limit),
        },
        failures: files.number("memory.failcnt")?,
        oom_kills: take(&oom, "oom_kill"),
        stat: files.keyed("memory.stat")?,
    })
}

/// `major:minor operation number` lines, in two files.
fn io_v1(files: &Files) -> Result<Vec<IoStats>, CgroupError> {
    let mut devices: BTreeMap<(u64, u64), IoStats> = BTreeMap::new();
    let bytes = files.text("blkio.throttle.io_service_bytes_recursive")?;
    let operations = files.text("blkio.throttle.io_serviced_recursive")?;
    for (text, is_bytes) in [(&bytes, true), (&operations, false)] {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(device), Some(kind), Some(Ok(number))) =
                (words.next(), words.next(), words.next().map(str::parse::<u64>))
            else {
                continue;
            };
            let Some((major, minor)) = device
                .split_once(':')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
            else {
                continue;
            };
            let entry = devices.entry((major, minor)).or_default();
            (entry.major, entry.minor) = (major, minor);
            match (kind, is_bytes) {
                ("Read", true) => entry.read_bytes = number,
                ("Write", true) => entry.write_bytes = number,
                ("Read", false) => entry.read_ops = number,
                ("Write", false) => entry.write_ops = number,
                _ => {}
            }
        }
    }
    Ok(devices.into_values().collect())
}

#[cfg(test)]
#[path = "stats_tests.rs"]
mod tests;
