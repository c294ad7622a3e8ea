//! The heart: a sandbox, the containers in it, their processes.
//!
//! A [`Sandbox`] is one virtual machine. It knows nothing of engines: the Task API and the
//! OCI command line are translations onto it (crate `kata-shim`). Start with
//! [`Sandbox::create`], then `machine.rs`: what is started together and dies together.
//!
//! What is created on the host is written to [`SandboxDir::state`] first; [`cleanup`]
//! undoes a sandbox from that file alone. What the guest says is checked in `agent.rs`.

mod agent;
mod boot;
mod build;
mod container;
mod dir;
mod error;
mod exit;
pub mod factory;
mod forward;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hooks;
mod io;
mod joining;
mod life;
mod machine;
mod network;
pub mod packets;
mod pod;
mod process;
mod resize;
mod sandbox;
mod share;
pub mod stages;
mod state;
mod vm_config;

pub use agent::ProcessRef;
pub use dir::{RUN_DIR, SandboxDir, SocketPath};
pub use error::SandboxError;
pub use exit::exit_code;
pub use io::{EngineStreams, watch_fd};
pub use kata_storage::FileSystem;
pub use pod::PodRole;
pub use process::{Exit, ProcessStatus, Stdio, StdioPaths};
pub use sandbox::{CreateRequest, Event, EventSink, ProcessState, Sandbox};
pub use state::{MACHINE_ROLE, Resource, StateFile, cleanup, pid_of, start_time};

/// The exit code of a process whose machine was lost: as if killed by SIGKILL.
pub const LOST: u8 = 137;
