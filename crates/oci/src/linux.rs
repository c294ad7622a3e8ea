//! `linux`: namespaces, devices, resources, seccomp.

use crate::SpecError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// All that is Linux's own.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Namespaces to create or join.
    pub namespaces: Vec<Namespace>,
    /// User ids of the container in terms of the host.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of the container in terms of the host.
    pub gid_mappings: Vec<IdMapping>,
    /// Device nodes beside the default ones.
    pub devices: Vec<Device>,
    /// Where in the cgroup hierarchy; `slice:prefix:name` with systemd.
    pub cgroups_path: Option<String>,
    /// Limits.
    pub resources: Option<Resources>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<String>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// Paths hidden from the container.
    pub masked_paths: Vec<PathBuf>,
    /// Paths made read-only.
    pub readonly_paths: Vec<PathBuf>,
    /// SELinux label of mounts.
    pub mount_label: Option<String>,
    /// `personality(2)`.
    pub personality: Option<Personality>,
    /// Offsets of the clocks of a new time namespace: `monotonic`, `boottime`.
    pub time_offsets: BTreeMap<String, TimeOffset>,
}

/// What is added to a clock.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(default)]
pub struct TimeOffset {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanosecs: u32,
}

/// One namespace.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Namespace {
    /// Which.
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// Join this one instead of making a new one.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

impl Namespace {
    /// The namespace to join, if one is named: engines also write an empty path for none.
    pub fn joined(&self) -> Option<&Path> {
        self.path.as_deref().filter(|path| !path.as_os_str().is_empty())
    }
}

/// Kinds of namespaces.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum NamespaceKind {
    Pid,
    Network,
    Mount,
    Ipc,
    Uts,
    User,
    Cgroup,
    Time,
}

/// A range of ids.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct IdMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// A device node.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// `c`, `b`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path in the container.
    pub path: PathBuf,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permissions.
    pub file_mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// Limits of a container (`config-linux.md`, "Control groups").
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Which devices may be used.
    pub devices: Vec<DeviceRule>,
    /// Memory.
    pub memory: Option<Memory>,
    /// CPU time and placement.
    pub cpu: Option<Cpu>,
    /// Number of tasks.
    pub pids: Option<Pids>,
    /// Block I/O, in cgroup v1's terms.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// Huge pages.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// cgroup v2 files, written as they are.
    pub unified: BTreeMap<String, String>,
}

/// One rule of the device list; the last match wins.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Allow or deny.
    pub allow: bool,
    /// `c`, `b` or `a` (all, also when absent).
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Absent or -1: any.
    pub major: Option<i64>,
    /// Absent or -1: any.
    pub minor: Option<i64>,
    /// Some of `rwm`; absent: all.
    pub access: Option<String>,
}

/// Memory limits, bytes; -1 is no limit.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// Soft limit.
    pub reservation: Option<i64>,
    /// Memory plus swap.
    pub swap: Option<i64>,
    /// 0 to 100.
    pub swappiness: Option<u64>,
    /// Do not kill when out of memory.
    #[serde(rename = "disableOOMKiller")]
    pub disable_oom_killer: Option<bool>,
    /// Refuse an update that is below the usage.
    pub check_before_update: Option<bool>,
}

/// CPU limits.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// cgroup v1 weight, 2 to 262144.
    pub shares: Option<u64>,
    /// Microseconds a period.
    pub quota: Option<i64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Microseconds above the quota.
    pub burst: Option<u64>,
    /// `0-3,5`
    pub cpus: Option<String>,
    /// `0-1`
    pub mems: Option<String>,
    /// `cpu.idle`
    pub idle: Option<i64>,
}

/// Number of tasks; 0 or less: no limit.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Pids {
    /// At most so many.
    pub limit: i64,
}

/// Block I/O limits.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    /// 10 to 1000.
    pub weight: Option<u16>,
    /// Weights of single devices.
    pub weight_device: Vec<DeviceWeight>,
    /// Bytes a second.
    pub throttle_read_bps_device: Vec<Throttle>,
    /// Bytes a second.
    pub throttle_write_bps_device: Vec<Throttle>,
    /// Operations a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Vec<Throttle>,
    /// Operations a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Vec<Throttle>,
}

/// The weight of a device.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceWeight {
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// 10 to 1000.
    pub weight: Option<u16>,
    /// For tasks beside child cgroups; no scheduler that is left knows it.
    pub leaf_weight: Option<u16>,
}

/// A rate on a device.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Throttle {
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// The rate.
    pub rate: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HugepageLimit {
    /// `2MB`, `1GB`
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// System call filter (`config-linux.md`, "Seccomp").
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// `SCMP_ACT_*` for what no rule matches.
    pub default_action: String,
    /// errno of the default action.
    pub default_errno_ret: Option<u32>,
    /// `SCMP_ARCH_*`
    pub architectures: Vec<String>,
    /// `SECCOMP_FILTER_FLAG_*`
    pub flags: Vec<String>,
    /// Where notifications go.
    pub listener_path: Option<PathBuf>,
    /// Rules.
    pub syscalls: Vec<SyscallRule>,
}

/// One rule for some system calls.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SyscallRule {
    /// The calls; unknown ones are ignored.
    pub names: Vec<String>,
    /// `SCMP_ACT_*`
    pub action: String,
    /// errno or trace message of the action.
    pub errno_ret: Option<u32>,
    /// All must match.
    pub args: Vec<SyscallArg>,
}

/// A comparison of one argument.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SyscallArg {
    /// 0 to 5.
    pub index: u32,
    /// Value, or mask for `SCMP_CMP_MASKED_EQ`.
    pub value: u64,
    /// Value for `SCMP_CMP_MASKED_EQ`.
    pub value_two: u64,
    /// `SCMP_CMP_*`
    pub op: String,
}

/// `personality(2)`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// None are defined.
    pub flags: Vec<String>,
}

impl Resources {
    /// Reads a resources object, as `update` gives it.
    ///
    /// # Errors
    /// [`SpecError`] when it is not the JSON the specification asks for.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        crate::from_slice(bytes)
    }
}

impl Linux {
    pub(crate) fn check(&self) -> Result<(), SpecError> {
        let mut seen = Vec::new();
        for namespace in &self.namespaces {
            if seen.contains(&namespace.kind) {
                return Err(SpecError::Invalid {
                    field: "linux.namespaces",
                    problem: format!("names {:?} twice", namespace.kind),
                });
            }
            seen.push(namespace.kind);
        }
        self.check_time_offsets()
    }

    fn check_time_offsets(&self) -> Result<(), SpecError> {
        let invalid =
            |problem: String| Err(SpecError::Invalid { field: "linux.timeOffsets", problem });
        let clocks = ["monotonic", "boottime"];
        if let Some(clock) = self.time_offsets.keys().find(|c| !clocks.contains(&c.as_str())) {
            return invalid(format!("names the clock {clock:?}: say monotonic or boottime"));
        }
        let new = self.namespace(NamespaceKind::Time).is_some_and(|time| time.path.is_none());
        if !self.time_offsets.is_empty() && !new {
            return invalid("needs a new time namespace".to_owned());
        }
        Ok(())
    }

    /// The namespace of a kind, if the container has one of its own or joins one.
    pub fn namespace(&self, kind: NamespaceKind) -> Option<&Namespace> {
        self.namespaces.iter().find(|n| n.kind == kind)
    }
}
