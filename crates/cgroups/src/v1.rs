//! OCI resources in cgroup v1's files, for hosts that have those.

use crate::v2::{Setting, check_device_weight, device_number, page_size};
use crate::{Cgroup, CgroupError, Hierarchy, file};
use kata_oci::{BlockIo, Cpu, Memory, Resources};
use std::path::Path;

/// A new cpuset is empty and takes no process: it starts as its parent is.
pub(crate) fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<(), CgroupError> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let mine = file::read_optional(&dir.join(name))?;
        if mine.is_some_and(|text| text.trim().is_empty()) {
            let theirs = file::read(&parent.join(name))?;
            file::write(&dir.join(name), theirs.trim())?;
        }
    }
    Ok(())
}

/// Writes the resources, each into its controller's tree.
pub(crate) fn apply(cgroup: &Cgroup, resources: &Resources) -> Result<(), CgroupError> {
    if !resources.unified.is_empty() {
        return Err(CgroupError::invalid(
            "unified",
            "needs cgroup v2, which this machine has not: say it in the other fields",
        ));
    }
    for setting in settings(cgroup, resources)? {
        write(cgroup, &setting)?;
    }
    Ok(())
}

fn write(cgroup: &Cgroup, setting: &Setting) -> Result<(), CgroupError> {
    let controller = setting.file.split('.').next().unwrap_or_default();
    let dir = cgroup.v1_directory(controller);
    match dir {
        Some(dir) => crate::v2::write(&dir, setting),
        None if setting.required => Err(CgroupError::Unsupported {
            file: setting.file.clone(),
            value: setting.value.clone(),
            controller: controller.to_owned(),
            place: match cgroup.hierarchy() {
                Hierarchy::V1 { .. } => "this machine's cgroup v1".to_owned(),
                Hierarchy::V2 { .. } => cgroup.path(),
            },
        }),
        None => Ok(()),
    }
}

fn setting(file: impl Into<String>, value: impl ToString, required: bool) -> Setting {
    Setting { file: file.into(), value: value.to_string(), required }
}

fn settings(cgroup: &Cgroup, resources: &Resources) -> Result<Vec<Setting>, CgroupError> {
    let mut out = Vec::new();
    if let Some(cpu) = &resources.cpu {
        cpu_settings(cpu, &mut out);
    }
    if let Some(memory) = &resources.memory {
        memory_settings(memory, memsw_now(cgroup), &mut out)?;
    }
    if let Some(pids) = &resources.pids {
        out.push(match pids.limit {
            limit if limit > 0 => setting("pids.max", limit, true),
            _ => setting("pids.max", "max", false),
        });
    }
    if let Some(io) = &resources.block_io {
        io_settings(io, &mut out)?;
    }
    for pages in &resources.hugepage_limits {
        let size = page_size(&pages.page_size)?;
        out.push(setting(format!("hugetlb.{size}.limit_in_bytes"), pages.limit, true));
    }
    Ok(out)
}

fn cpu_settings(cpu: &Cpu, out: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle {
        out.push(setting("cpu.idle", idle, idle != 0));
    }
    if let Some(shares) = cpu.shares.filter(|&n| n != 0 && cpu.idle != Some(1)) {
        out.push(setting("cpu.shares", shares, true));
    }
    if let Some(period) = cpu.period.filter(|&n| n != 0) {
        out.push(setting("cpu.cfs_period_us", period, true));
    }
    if let Some(quota) = cpu.quota.filter(|&n| n != 0) {
        out.push(setting("cpu.cfs_quota_us", quota, quota > 0));
    }
    if let Some(burst) = cpu.burst {
        out.push(setting("cpu.cfs_burst_us", burst, burst != 0));
    }
    for (name, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            out.push(setting(name, list, true));
        }
    }
}

/// The limit on memory and swap together that is in force; `None` when swap is not counted.
fn memsw_now(cgroup: &Cgroup) -> Option<u64> {
    let dir = cgroup.v1_directory("memory")?;
    let text = file::read_optional(&dir.join("memory.memsw.limit_in_bytes")).ok()??;
    text.trim().parse().ok()
}

/// The kernel wants limit <= limit with swap at every moment: what grows comes last.
fn memory_settings(
    memory: &Memory,
    memsw_now: Option<u64>,
    out: &mut Vec<Setting>,
) -> Result<(), CgroupError> {
    for (field, value) in [
        ("memory.limit", memory.limit),
        ("memory.swap", memory.swap),
        ("memory.reservation", memory.reservation),
    ] {
        if value.is_some_and(|value| value < -1) {
            return Err(CgroupError::invalid(field, "is negative: give bytes, or -1 for no limit"));
        }
    }
    let limit = memory.limit.filter(|&n| n != 0);
    let swap = match (limit, memory.swap.filter(|&n| n != 0)) {
        (Some(-1), None) => Some(-1),
        (_, swap) => swap,
    };
    let set_limit = limit.map(|n| setting("memory.limit_in_bytes", n, n > 0));
    // Without swap accounting nothing could exceed the limit.
    let set_swap = swap
        .filter(|_| memsw_now.is_some())
        .map(|n| setting("memory.memsw.limit_in_bytes", n, false));
    let as_bytes = |n: i64| u64::try_from(n).unwrap_or(u64::MAX);
    let swap_first = limit.is_some_and(|n| memsw_now.is_some_and(|now| as_bytes(n) > now));
    if swap_first {
        out.extend(set_swap.into_iter().chain(set_limit));
    } else {
        out.extend(set_limit.into_iter().chain(set_swap));
    }
    if let Some(low) = memory.reservation.filter(|&n| n != 0) {
        out.push(setting("memory.soft_limit_in_bytes", low, low > 0));
    }
    if let Some(swappiness) = memory.swappiness {
        if swappiness > 100 {
            return Err(CgroupError::invalid("memory.swappiness", "is above 100"));
        }
        out.push(setting("memory.swappiness", swappiness, false));
    }
    if memory.disable_oom_killer == Some(true) {
        out.push(setting("memory.oom_control", 1, true));
    }
    Ok(())
}

fn io_settings(io: &BlockIo, out: &mut Vec<Setting>) -> Result<(), CgroupError> {
    if let Some(weight) = io.weight.filter(|&n| n != 0) {
        // Only the CFQ and BFQ schedulers know weights; runc gives up as quietly.
        out.push(setting("blkio.weight", weight, false));
        out.push(setting("blkio.bfq.weight", weight, false));
    }
    for device in &io.weight_device {
        check_device_weight(device)?;
        let Some(weight) = device.weight.filter(|&n| n != 0) else { continue };
        let value = format!("{} {weight}", device_number(device.major, device.minor)?);
        out.push(setting("blkio.bfq.weight_device", value, false));
    }
    let rates = [
        ("read_bps", &io.throttle_read_bps_device),
        ("write_bps", &io.throttle_write_bps_device),
        ("read_iops", &io.throttle_read_iops_device),
        ("write_iops", &io.throttle_write_iops_device),
    ];
    for (name, throttles) in rates {
        for throttle in throttles {
            let value =
                format!("{} {}", device_number(throttle.major, throttle.minor)?, throttle.rate);
            out.push(setting(format!("blkio.throttle.{name}_device"), value, throttle.rate != 0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(memory: &str, memsw_now: Option<u64>) -> Vec<String> {
        let json = format!(r#"{{"memory":{memory}}}"#);
        let memory = Resources::parse(json.as_bytes()).unwrap().memory.unwrap();
        let mut out = Vec::new();
        memory_settings(&memory, memsw_now, &mut out).unwrap();
        out.iter().map(|s| format!("{}={}", s.file, s.value)).collect()
    }

    #[test]
    fn memory_and_swap_are_written_in_the_order_the_kernel_takes() {
        let both = r#"{"limit":2000,"swap":3000}"#;
        let (limit, swap) = ("memory.limit_in_bytes=2000", "memory.memsw.limit_in_bytes=3000");
        assert_eq!(lines(both, Some(1000)), [swap, limit]);
        assert_eq!(lines(both, Some(9000)), [limit, swap]);
        assert_eq!(lines(both, None), [limit]);
    }

    #[test]
    fn no_memory_limit_is_none_on_swap_either() {
        let got = lines(r#"{"limit":-1}"#, Some(1000));
        assert_eq!(got, ["memory.memsw.limit_in_bytes=-1", "memory.limit_in_bytes=-1"]);
    }

    #[test]
    fn a_new_cpuset_starts_as_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        let child = dir.path().join("child");
        std::fs::create_dir(&child).unwrap();
        std::fs::write(dir.path().join("cpuset.cpus"), "0-3\n").unwrap();
        std::fs::write(dir.path().join("cpuset.mems"), "0\n").unwrap();
        std::fs::write(child.join("cpuset.cpus"), "\n").unwrap();
        std::fs::write(child.join("cpuset.mems"), "1\n").unwrap();
        inherit_cpuset(dir.path(), &child).unwrap();
        let read = |name: &str| std::fs::read_to_string(child.join(name)).unwrap();
        assert_eq!(read("cpuset.cpus").trim(), "0-3");
        assert_eq!(read("cpuset.mems").trim(), "1");
    }
}
