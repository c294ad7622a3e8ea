//! Virtual machine monitors, behind one small trait.
//!
//! A [`VmConfig`] says what the machine is; [`Hypervisor`] is what every monitor can do
//! with it; [`Qemu`] is the one there is. Its process is jailed and inherits every socket
//! and device that it uses, so that it opens nothing and nothing is polled.
//!
//! A machine that ends, for whatever reason, ends loudly: [`Exited`] resolves to a
//! [`VmExit`] that says why, with the guest's last words.
//!
//! [`accelerator`] decides whether the machine runs on KVM or is emulated, by trying.
//! Of what comes from the guest only two things are looked at here, both as hostile:
//! its console ([`Console`]) and, should QEMU be taken over, QMP (`qemu/qmp.rs`).

pub mod accelerator;
mod config;
mod console;
mod error;
mod exit;
mod fingerprint;
#[cfg(fuzzing)]
pub mod fuzzing;
mod image;
pub mod kernel_params;
mod kvm_test;
mod qemu;
mod snapshot;
pub mod tsc;
mod vsock;

use async_trait::async_trait;
use tokio::net::UnixStream;

pub use config::{
    Accelerator, AcceleratorChoice, ChannelKind, Disk, InvalidMac, KernelKind, Mac, Machine, Nic,
    Share, VmConfig,
};
pub use console::Console;
pub use error::HypervisorError;
pub use exit::{Exited, VmExit};
pub use kata_fork::{Forked, Touches};
pub use qemu::{Parking, Qemu, QmpError, Stem, find_firmware};
pub use snapshot::{CloneMemory, ForkMemory, ForkOrder, Snapshot, Start, StemMemory};
pub use vsock::{VHOST_VSOCK, VsockDevice, vsock_available};

/// Something to plug into a running machine.
#[derive(Debug)]
pub enum Device {
    /// A network interface.
    Nic(Nic),
    /// A disk.
    Disk(Disk),
}

/// Names a device that was plugged, so that it can be unplugged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId(pub(crate) String);

/// How much a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u32,
}

/// What a monitor can do, beyond what all can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Devices can be plugged while the machine runs.
    pub plug: bool,
    /// Virtual CPUs can be added while the machine runs.
    pub plug_vcpus: bool,
    /// The machine's memory is shared with vhost-user processes.
    pub shared_memory: bool,
    /// Memory that is added was there from the start: the guest is to be told to use it.
    pub keeps_memory_back: bool,
}

/// One virtual machine.
#[async_trait]
pub trait Hypervisor: Send {
    /// Starts the machine. Returns when the monitor's process runs, of a clone when it goes on
    /// where its template stood; whether the guest comes up shows on the channel, and if it
    /// does not, by [`Hypervisor::exited`].
    ///
    /// # Errors
    /// When the configuration is wrong or the process cannot be started.
    async fn start(&mut self) -> Result<(), HypervisorError>;

    /// Ends the machine at once. The guest is not asked.
    async fn stop(&mut self) -> Result<VmExit, HypervisorError>;

    /// Stops all virtual CPUs.
    async fn pause(&mut self) -> Result<(), HypervisorError>;

    /// Lets the virtual CPUs run again.
    async fn resume(&mut self) -> Result<(), HypervisorError>;

    /// Saves a machine that was started as [`Start::Template`], and ends it.
    async fn save(&mut self) -> Result<Snapshot, HypervisorError>;

    /// Plugs a device. Returns when the monitor has it; the guest notices by itself.
    async fn plug(&mut self, device: Device) -> Result<DeviceId, HypervisorError>;

    /// Unplugs a device. Returns when the guest has let go of it.
    async fn unplug(&mut self, device: &DeviceId) -> Result<(), HypervisorError>;

    /// To be called once the guest has booted, and before anything runs in it that is not ours:
    /// from here on it has no memory beyond its size.
    ///
    /// # Errors
    /// The host does not take the rest away.
    fn settle(&mut self) -> Result<(), HypervisorError>;

    /// How large the machine is.
    fn size(&self) -> Size;

    /// Makes the machine at least so large, or as large as it can become. Returns when the
    /// guest's kernel has taken what was added; virtual CPUs are not online yet, and memory that
    /// was kept back is not used ([`Capabilities::keeps_memory_back`]). It never shrinks, also
    /// when not all that was to be added could be.
    async fn resize(&mut self, wanted: Size) -> Result<(), HypervisorError>;

    /// What this monitor can do with this machine.
    fn capabilities(&self) -> Capabilities;

    /// Pids of the monitor's processes (as the host sees them), for cgroups and metrics.
    fn pids(&self) -> Vec<i32>;

    /// The host's end of the channel to the agent, once, when it is a serial one.
    fn take_agent_socket(&mut self) -> Option<UnixStream>;

    /// The guest's address, when the channel to the agent is vsock.
    fn vsock_cid(&self) -> Option<u32>;

    /// What the guest wrote on its console.
    fn console(&self) -> Console;

    /// Resolves when the machine has ended, however it came about.
    fn exited(&self) -> Exited;
}
