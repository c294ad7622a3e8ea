//! OCI resources, which speak cgroup v1, in cgroup v2's files.
//!
//! Conversions are those of runc, so that a container gets the same from either.

use crate::{CgroupError, file};
use kata_oci::{BlockIo, Cpu, DeviceWeight, Memory, Resources};
use std::path::Path;

/// One value to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// File in the cgroup's directory.
    pub file: String,
    /// What to write.
    pub value: String,
    /// Something is limited by it: it must not get lost when the file is missing.
    pub required: bool,
}

impl Setting {
    fn new(file: impl Into<String>, value: impl ToString) -> Self {
        Self { file: file.into(), value: value.to_string(), required: true }
    }

    /// A value that limits nothing, so that a missing file does not matter.
    fn optional(file: impl Into<String>, value: impl ToString) -> Self {
        Self { required: false, ..Self::new(file, value) }
    }

    /// A number, or the lack of a limit.
    fn limit(file: impl Into<String>, value: Option<u64>) -> Self {
        match value {
            Some(value) => Self::new(file, value),
            None => Self::optional(file, "max"),
        }
    }
}

/// Writes the resources into a cgroup.
pub(crate) fn apply(dir: &Path, resources: &Resources) -> Result<(), CgroupError> {
    let read = |name: &str| file::read_optional(&dir.join(name)).ok().flatten();
    check_memory_use(resources, &read)?;
    let settings = settings(resources, &read)?;
    for setting in &settings {
        write(dir, setting)?;
    }
    Ok(())
}

/// Writes one setting, line by line: these files take one line a write.
pub(crate) fn write(dir: &Path, setting: &Setting) -> Result<(), CgroupError> {
    let path = dir.join(&setting.file);
    for line in setting.value.lines() {
        let Err(error) = file::write(&path, line) else { continue };
        if path.exists() || !dir.exists() {
            return Err(error);
        }
        if setting.required {
            let controller = setting.file.split('.').next().unwrap_or_default();
            return Err(CgroupError::Unsupported {
                file: setting.file.clone(),
                value: setting.value.clone(),
                controller: controller.to_owned(),
                place: dir.display().to_string(),
            });
        }
        tracing::debug!(file = setting.file, "cgroup file not there; nothing was limited by it");
        return Ok(());
    }
    Ok(())
}

type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What is to be written, in order. `read` gives what a file of the cgroup says now.
pub(crate) fn settings(resources: &Resources, read: Read) -> Result<Vec<Setting>, CgroupError> {
    let mut out = Vec::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, read, &mut out)?;
    }
    if let Some(memory) = &resources.memory {
        memory_settings(memory, read, &mut out)?;
    }
    if let Some(pids) = &resources.pids {
        out.push(Setting::limit("pids.max", u64::try_from(pids.limit).ok().filter(|&n| n > 0)));
    }
    if let Some(io) = &resources.block_io {
        io_settings(io, read, &mut out)?;
    }
    for pages in &resources.hugepage_limits {
        let size = page_size(&pages.page_size)?;
        out.push(Setting::new(format!("hugetlb.{size}.max"), pages.limit));
        out.push(Setting::optional(format!("hugetlb.{size}.rsvd.max"), pages.limit));
    }
    for (name, value) in &resources.unified {
        if name.contains('/') || !name.contains('.') || name.starts_with("cgroup.") {
            return Err(CgroupError::invalid(
                "unified",
                format!("names {name:?}, which is no file of a controller (like memory.high)"),
            ));
        }
        out.push(Setting::new(name, value));
    }
    Ok(out)
}

/// cgroup v1 shares (2 to 262144) as a v2 weight (1 to 10000); 0 is unset.
pub(crate) fn shares_to_weight(shares: u64) -> Option<u64> {
    (shares != 0).then(|| 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142)
}

/// cgroup v1 block weight (10 to 1000) as a v2 weight (1 to 10000); 0 is unset.
pub(crate) fn blkio_to_io_weight(weight: u16) -> Option<u64> {
    (weight != 0).then(|| 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9999 / 990)
}

fn cpu_settings(cpu: &Cpu, read: Read, out: &mut Vec<Setting>) -> Result<(), CgroupError> {
    if let Some(idle) = cpu.idle {
        let is_idle = idle == 1;
        out.push(Setting { required: is_idle, ..Setting::new("cpu.idle", idle) });
    }
    // An idle cgroup has no weight, and refuses one.
    let stays_idle = || read("cpu.idle").is_some_and(|text| text.trim() == "1");
    let idle = cpu.idle.map_or_else(stays_idle, |idle| idle == 1);
    if let Some(weight) = cpu.shares.and_then(shares_to_weight).filter(|_| !idle) {
        out.push(Setting::new("cpu.weight", weight));
    }
    cpu_max(cpu, read, out);
    for (name, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            check_list(list)?;
            out.push(Setting::new(name, list));
        }
    }
    Ok(())
}

/// Quota, period and burst. The kernel wants burst <= quota at every moment, so a burst
/// that goes down is written before, one that goes up after.
fn cpu_max(cpu: &Cpu, read: Read, out: &mut Vec<Setting>) {
    let current = read("cpu.max").unwrap_or_default();
    let mut words = current.split_whitespace();
    let quota_now = words.next().unwrap_or("max").to_owned();
    let period_now = words.next().and_then(|p| p.parse().ok()).unwrap_or(100_000);
    let burst_now = read("cpu.max.burst").and_then(|text| file::number(&text)).unwrap_or(0);

    let burst = cpu.burst.map(|b| Setting { required: b > 0, ..Setting::new("cpu.max.burst", b) });
    let burst_first = cpu.burst.is_some_and(|burst| burst < burst_now);
    if burst_first {
        out.extend(burst.clone());
    }
    let period = cpu.period.filter(|&period| period != 0);
    if cpu.quota.is_some_and(|quota| quota != 0) || period.is_some() {
        let period = period.unwrap_or(period_now);
        let quota = match cpu.quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(quota) if quota < 0 => "max".to_owned(),
            _ => quota_now,
        };
        let required = quota != "max";
        out.push(Setting { required, ..Setting::new("cpu.max", format!("{quota} {period}")) });
    }
    if !burst_first {
        out.extend(burst);
    }
}

/// A list of CPUs or memory nodes: `0-3,5`.
fn check_list(list: &str) -> Result<(), CgroupError> {
    if list.len() <= 4096 && list.bytes().all(|b| b.is_ascii_digit() || b"-,:/ ".contains(&b)) {
        return Ok(());
    }
    let problem = format!("has the list {list:?}: write it like 0-3,5");
    Err(CgroupError::invalid("cpu", problem))
}

fn memory_settings(memory: &Memory, read: Read, out: &mut Vec<Setting>) -> Result<(), CgroupError> {
    let limit_now = || read("memory.max").and_then(|text| file::number(&text));
    if let Some(swap) = swap_max(memory, limit_now)? {
        // Without swap in the kernel there is nothing that could exceed the limit.
        out.push(Setting::optional(
            "memory.swap.max",
            swap.map_or("max".into(), |n| n.to_string()),
        ));
    }
    if let Some(limit) = memory.limit.filter(|&limit| limit != 0) {
        out.push(Setting::limit("memory.max", bytes("memory.limit", limit)?));
    }
    if let Some(low) = memory.reservation.filter(|&low| low != 0) {
        out.push(Setting::limit("memory.low", bytes("memory.reservation", low)?));
    }
    Ok(())
}

/// Bytes; -1 is no limit.
fn bytes(field: &'static str, value: i64) -> Result<Option<u64>, CgroupError> {
    match value {
        -1 => Ok(None),
        value => u64::try_from(value).map(Some).map_err(|_| {
            CgroupError::invalid(field, format!("is {value}: give bytes, or -1 for no limit"))
        }),
    }
}

/// v1 counts memory and swap together, v2 swap alone. `None` to leave it, `Some(None)` for
/// no limit.
fn swap_max(
    memory: &Memory,
    limit_now: impl Fn() -> Option<u64>,
) -> Result<Option<Option<u64>>, CgroupError> {
    let limit = memory.limit.filter(|&limit| limit != 0);
    let both = match (memory.swap.unwrap_or(0), limit) {
        // As in v1: no limit on memory and nothing said of swap is no limit on either.
        (0, Some(-1)) => return Ok(Some(None)),
        (0, _) => return Ok(None),
        (-1, _) => return Ok(Some(None)),
        (both, _) => u64::try_from(both).map_err(|_| {
            CgroupError::invalid("memory.swap", format!("is {both}: give bytes, or -1"))
        })?,
    };
    let limit = match limit {
        Some(limit) => bytes("memory.limit", limit)?,
        None => limit_now().filter(|&limit| limit != crate::NO_LIMIT),
    };
    match limit.map(|limit| both.checked_sub(limit)) {
        Some(Some(swap)) => Ok(Some(Some(swap))),
        Some(None) => Err(CgroupError::invalid(
            "memory.swap",
            "is below memory.limit: it counts memory and swap together",
        )),
        None => Err(CgroupError::invalid("memory.swap", "needs memory.limit: set both")),
    }
}

/// `checkBeforeUpdate`: refuse a limit below what is used.
fn check_memory_use(resources: &Resources, read: Read) -> Result<(), CgroupError> {
    let Some(memory) = resources.memory.as_ref().filter(|m| m.check_before_update == Some(true))
    else {
        return Ok(());
    };
    let used = read("memory.current").and_then(|text| file::number(&text)).unwrap_or(0);
    match memory.limit.map(u64::try_from) {
        Some(Ok(limit)) if limit != 0 && limit < used => Err(CgroupError::invalid(
            "memory.limit",
            format!("is {limit}, but {used} bytes are in use"),
        )),
        _ => Ok(()),
    }
}

fn io_settings(io: &BlockIo, read: Read, out: &mut Vec<Setting>) -> Result<(), CgroupError> {
    if let Some(weight) = io.weight.filter(|&weight| weight != 0) {
        // The BFQ scheduler has a scale of its own, which is v1's.
        if read("io.bfq.weight").is_some() {
            out.push(Setting::new("io.bfq.weight", weight));
        } else if let Some(weight) = blkio_to_io_weight(weight) {
            out.push(Setting::new("io.weight", weight));
        }
    }
    for device in &io.weight_device {
        check_device_weight(device)?;
        let Some(weight) = device.weight.filter(|&weight| weight != 0) else { continue };
        if read("io.bfq.weight").is_none() {
            return Err(CgroupError::invalid(
                "blockIO.weightDevice",
                "needs the BFQ I/O scheduler, which this kernel does not offer: leave it out",
            ));
        }
        let device = device_number(device.major, device.minor)?;
        out.push(Setting::new("io.bfq.weight", format!("{device} {weight}")));
    }
    let rates = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, throttles) in rates {
        for throttle in throttles {
            let device = device_number(throttle.major, throttle.minor)?;
            out.push(match throttle.rate {
                0 => Setting::optional("io.max", format!("{device} {key}=max")),
                rate => Setting::new("io.max", format!("{device} {key}={rate}")),
            });
        }
    }
    Ok(())
}

/// No I/O scheduler of today has weights for leaves.
pub(crate) fn check_device_weight(device: &DeviceWeight) -> Result<(), CgroupError> {
    match device.leaf_weight {
        None | Some(0) => Ok(()),
        Some(_) => Err(CgroupError::invalid(
            "blockIO.weightDevice",
            "has a leafWeight, which no I/O scheduler knows: leave it out",
        )),
    }
}

/// `major:minor`, both within what a device number holds.
pub(crate) fn device_number(major: i64, minor: i64) -> Result<String, CgroupError> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(format!("{major}:{minor}")),
        _ => Err(CgroupError::invalid("blockIO", "has a device number that is out of range")),
    }
}

/// `2MB`, `1GB`, `64KB`: it becomes part of a file name.
pub(crate) fn page_size(text: &str) -> Result<&str, CgroupError> {
    let digits = ["KB", "MB", "GB"].iter().find_map(|unit| text.strip_suffix(unit));
    let good = |d: &&str| !d.is_empty() && d.len() < 6 && d.bytes().all(|b| b.is_ascii_digit());
    digits.filter(good).map(|_| text).ok_or_else(|| {
        CgroupError::invalid(
            "hugepageLimits",
            format!("has the page size {text:?}: say 2MB or 1GB"),
        )
    })
}

#[cfg(test)]
#[path = "v2_tests.rs"]
mod tests;
