//! Builds what the guest boots from: the initramfs, and a kernel out of Debian's package.
//!
//! The initramfs holds the agent as `/init` and nothing else, but for the modules of a
//! kernel that needs some. The same input gives the same bytes.
//!
//! Start reading at [`initramfs`] (the archive) and [`distro`] (the kernel that needs no
//! compiling). The tuned kernel is made by `guest/kernel/build.sh`.

pub mod bzimage;
pub mod distro;
pub mod initramfs;
mod lz4;
pub mod modules;
pub mod returns;
