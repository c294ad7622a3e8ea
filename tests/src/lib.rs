//! What the end-to-end tests and the benchmark stand on.
//!
//! Everything runs in an [`arena`]: its own PID, mount, network and IPC namespace with
//! its own `/run`, `/etc` and `/usr`, so that a private Docker with its default names
//! and addresses disturbs nothing, and the kernel itself removes every process, mount
//! and interface when the arena ends, however it ends. Start reading at
//! `e2e/main.rs`; [`runner`] says what a trial is, [`docker`], [`podman`] and [`oci`] are
//! ways a container is driven, [`leaks`] compares the machine before and after.

pub mod arena;
pub mod assets;
pub mod command;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod http;
pub mod images;
pub mod leaks;
pub mod oci;
pub mod podman;
pub mod pty;
pub mod runner;
pub mod streaming;
