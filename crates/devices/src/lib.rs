//! What the guest sees of the host's file system, and the process that serves it.
//!
//! A sandbox has one *devices process*: a vhost-user-fs device (the `virtiofsd` crate) in
//! a jail of its own. Its root is an empty read-only tmpfs in a mount namespace of its own;
//! the sandbox server puts container root file systems and volumes into that namespace with
//! [`DevicesProcess::attach`]. No mount is ever made in the host's namespace, so none is
//! left when any of the processes is killed.
//!
//! ```text
//! sandbox server (trusted)                 devices process (jailed)         VMM process
//!   attach: open_tree, mount_setattr,        / = tmpfs, read-only            QEMU
//!   setns + move_mount ─────────────────►    /<container>/rootfs  ◄── FUSE ──┘ vhost-user
//! ```
//!
//! Trust: every FUSE request comes from the guest and is hostile; vhost-user messages come
//! from the VMM, which the guest may have taken over. Neither reaches the server: what the
//! two sides say to each other is one message, and for a VMM that was forked what that does not
//! say itself ([`greet`]), all before the first guest byte.
//!
//! Start reading at [`DevicesProcess`] (server side) and `serve.rs` (jailed side).

mod confine;
mod error;
mod handshake;
mod host;
mod kept_pages;
mod logger;
mod mounts;
mod new_mount;
mod pages;
mod path;
mod seccomp;
mod serve;
mod tree;
mod vhost_user;

pub use error::Error;
pub use host::{DevicesProcess, Monitor, Options};
pub use path::SharePath;
pub use serve::{Cache, main};
pub use tree::{FileSystem, attach, detach, mount};
pub use vhost_user::greet;
