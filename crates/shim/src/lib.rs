//! The sandbox server's face: containerd's Task API, and the stand-ins' side door.
//!
//! One server per virtual machine. `containerd-shim-kata-v2` is this server; the OCI
//! command line starts the same one and calls the same API. Start with [`server`].

pub mod attach;
pub mod client;
mod connections;
mod containerd;
pub mod options;
pub mod server;
mod stand_ins;
mod stats;
mod stdio;
mod task;

pub use containerd::shim_main;
