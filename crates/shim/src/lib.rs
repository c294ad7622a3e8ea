//! The sandbox server's face: containerd's Task API, and the stand-ins' side door.
//!
//! One server per virtual machine. `containerd-shim-kata-v2` is this server; the OCI
//! command line starts the same one and calls the same API. Start with [`server`].

pub mod attach;
pub mod client;
pub mod options;
pub mod server;
mod stand_ins;
mod stats;
mod stdio;
mod task;

/// `containerd-shim-kata-v2`, as containerd calls it; gives the exit code.
pub fn shim_main() -> i32 {
    eprintln!(
        "containerd-shim-kata-v2: not supported yet: use kata-runtime as runtime of Docker or \
         containerd's runc shim (BinaryName)"
    );
    1
}
