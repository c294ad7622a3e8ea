//! `kata-agent`: PID 1 of the guest.
//!
//! It brings the guest up (`boot.rs`), serves the host's calls (`service.rs`) and streams
//! (`server.rs`, `stdio.rs`), and keeps containers and their processes (`containers.rs`,
//! `process.rs`, `reaper.rs`). Containers are built by single-threaded children
//! of its beginnings ([`container`]).
//!
//! The host is trusted; what runs in a container is not.

pub mod boot;
pub mod console;
pub mod container;
pub mod containers;
pub mod dns;
pub mod error;
pub mod events;
pub mod fork;
pub mod forward;
pub mod log;
pub mod machine;
pub mod memory;
pub mod network;
pub mod networking;
pub mod pod;
pub mod process;
pub mod reaper;
pub mod server;
pub mod service;
pub mod stats;
pub mod stdio;
pub mod storage;
pub mod streams;
pub mod uevent;
