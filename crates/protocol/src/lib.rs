//! The contract between the host's sandbox server and the guest's agent.
//!
//! Start with [`call`]: one call per engine request, and `proto/agent.proto` for what they
//! carry. Beside the calls there are byte streams (process input and output, the DNS relay).
//! Everything opens with a [`StreamHeader`]. Both ends check every length and id against [`limits`].
//!
//! Nothing here trusts the other side: the header's decoder is fuzzed, ids are parsed
//! into [`Id`] before they name anything.

pub mod call;
mod causes;
mod id;
pub mod stats;
mod stream;

pub use causes::chain;
pub use id::{Id, InvalidId};
pub use stream::{InvalidHeader, StreamHeader, StreamKind};

/// Version of this protocol. Both sides send theirs at `Connect`; they must be equal.
pub const VERSION: u32 = 6;

/// Name of the virtio-serial port that carries the channel.
pub const SERIAL_PORT: &str = "kata.agent.0";

/// The port's device, in machines that have one virtio-serial device with it behind the console.
pub const SERIAL_DEVICE: &str = "/dev/vport0p1";

/// vsock port on which the agent listens.
pub const VSOCK_PORT: u32 = 1024;

/// Tag of the share that carries root file systems and volumes.
pub const SHARE_TAG: &str = "kataShared";

/// Where the guest mounts the share; `<container>/rootfs` and `<container>/<n>` are below.
pub const SHARE_MOUNT: &str = "/run/kata-containers/shared";

/// Where the guest mounts root file systems that come as disks; `<container>` is below.
pub const DISK_ROOTS: &str = "/run/kata-containers/roots";

/// Where the guest mounts memory that the containers of a pod share; `<name>` is below.
pub const POD_MOUNTS: &str = "/run/kata-containers/pod/memory";

/// A path for a PID namespace in a container's specification that stands for the pod's.
/// The agent makes it when the first container asks for it.
pub const SHARED_PID_NAMESPACE: &str = "/run/kata-containers/pod/pid-namespace";

/// Bounds that both sides enforce on what the other sends.
pub mod limits {
    /// Longest message of one call, bytes: an engine's request to us is not longer (ttRPC).
    pub const MESSAGE: usize = 4 << 20;
    /// Containers in one sandbox.
    pub const CONTAINERS: usize = 512;
    /// Processes an engine may start in one container.
    pub const PROCESSES: usize = 1024;
    /// Streams open at once on one channel.
    pub const STREAMS: usize = 4096;
    /// Network interfaces of one sandbox.
    pub const INTERFACES: usize = 32;
}

/// The messages of `agent.proto`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unused,
    non_snake_case,
    non_upper_case_globals
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/messages.rs"));
}
