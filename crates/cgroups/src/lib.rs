//! Control groups: limits, devices, freezing, killing, counting.
//!
//! Used at both ends: in the guest, where only cgroup v2 exists, for containers; and on
//! the host (v1, v1 with an empty unified hierarchy, or v2) for the processes of a
//! sandbox. Start with [`Hierarchy`] (what is mounted) and [`Cgroup`] (one group, wherever
//! it is); [`Cgroup::apply`] takes the OCI resources and writes what they mean here.
//!
//! Paths come from the engine and are checked ([`container_path`]); nothing else is
//! trusted. All I/O is synchronous and short; nothing here needs a runtime.

mod cgroup;
mod device_program;
mod devices;
mod error;
mod file;
mod hierarchy;
mod kill;
mod redirect;
mod stats;
mod v1;
mod v2;

use kata_bpf as bpf;

pub use cgroup::Cgroup;
pub use error::CgroupError;
pub use hierarchy::{Hierarchy, V1Mount, container_path};
pub use redirect::Redirect;
pub use stats::{CpuStats, HugetlbStats, IoStats, MemoryStats, NO_LIMIT, PidsStats, Stats};
