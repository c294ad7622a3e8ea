//! The jailed side: set up, lock up, serve the guest's requests until the VMM is gone.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use serde::{Deserialize, Serialize};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::kept_pages::KeptPages;
use crate::pages::Pages;
use crate::vhost_user::Device;
use crate::{Monitor, confine, handshake, logger, seccomp};

/// The listening vhost-user socket, with the VMM's connection waiting in it.
pub(crate) const FD_LISTENER: RawFd = 3;
/// The line to the server.
pub(crate) const FD_HANDSHAKE: RawFd = 4;
/// What the machine's memory is copied from, if that is when it is touched.
pub(crate) const FD_ORIGIN: RawFd = 5;

/// How long the guest may use what it knows of a name or of a file's attributes, where the
/// host may change them, too.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(1);
/// And where only the guest changes them.
const TIMEOUT_EXCLUSIVE: Duration = Duration::from_secs(86_400);
/// Descriptors that are not the guest's to use up.
const RESERVED_FDS: u64 = 64;

/// What the guest may keep in its page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cache {
    /// Nothing.
    Never,
    /// What it has read, until the file is opened again after a change; names and attributes
    /// for a second.
    #[default]
    Auto,
    /// Everything: only right where nobody else changes the files.
    Always,
}

/// Arguments of the role, from the server.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Arguments {
    pub cache: Cache,
    pub threads: usize,
    pub announce_submounts: bool,
    pub monitor: Monitor,
    pub touched: bool,
}

/// The role `devices`. Returns when the VMM has closed its socket.
pub fn main(args: &str) -> anyhow::Result<()> {
    logger::start();
    // SAFETY: the server passes these two descriptors, and nothing has touched them yet.
    let (listener, line) =
        unsafe { (OwnedFd::from_raw_fd(FD_LISTENER), OwnedFd::from_raw_fd(FD_HANDSHAKE)) };
    match prepare(args) {
        Ok(device) => {
            handshake::send_ready(line).context("tell the server that the share is ready")?;
            serve(device, listener)
        }
        Err(error) => {
            handshake::send_failure(line, &format!("{error:#}"))?;
            Err(error)
        }
    }
}

/// Enters the jail. Nothing of the guest has been read when this returns.
fn prepare(args: &str) -> anyhow::Result<Device> {
    let arguments: Arguments = serde_json::from_str(args).context("read the role's arguments")?;
    let nofile = confine::raise_descriptor_limit().context("raise the limit of descriptors")?;
    let proc_self_fd = proc_self_fd().context("open /proc/self/fd")?;
    let pages = arguments.touched.then(Pages::of_self).transpose();
    let pages = pages.context("ask to be told of missing pages")?;
    confine::enter().context("enter the jail")?;
    let config = config(&arguments, proc_self_fd, nofile.saturating_sub(RESERVED_FDS));
    let fs = PassthroughFs::new(config).context("set up the file system")?;
    let fs = KeptPages { fs, keep: arguments.cache == Cache::Auto };
    // Threads started from here on are filtered, too.
    seccomp::install(std::process::id()).context("install the system call filter")?;
    let pages = pages.map(Pages::serve).transpose().context("start to copy memory")?;
    let fs = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(arguments.threads)
        .build(fs)
        .context("set up the vhost-user device")?;
    Ok(Device { fs, monitor: arguments.monitor, pages })
}

/// The process's own descriptors as a directory that leads nowhere else: a detached mount
/// of it alone, so that `..` stays there.
fn proc_self_fd() -> io::Result<File> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, "/proc/self/fd", flags)?.into())
}

fn config(arguments: &Arguments, proc_self_fd: File, guest_fd_limit: u64) -> Config {
    let (cache_policy, timeout) = match arguments.cache {
        Cache::Never => (CachePolicy::Never, Duration::ZERO),
        Cache::Auto => (CachePolicy::Auto, TIMEOUT),
        Cache::Always => (CachePolicy::Always, TIMEOUT_EXCLUSIVE),
    };
    Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy,
        root_dir: "/".to_owned(),
        // Images carry file capabilities in them.
        xattr: true,
        // The guest then leaves it to the host to drop set-id bits and file capabilities
        // on write, and does not ask for the xattr before each write.
        killpriv_v2: true,
        readdirplus: arguments.cache != Cache::Never,
        announce_submounts: arguments.announce_submounts,
        proc_sfd_rawfd: Some(proc_self_fd),
        guest_fd_limit,
        ..Config::default()
    }
}

fn serve(device: Device, listener: OwnedFd) -> anyhow::Result<()> {
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user-fs".to_owned(), Arc::new(device), memory)
        .map_err(|e| anyhow::anyhow!("set up the vhost-user daemon: {e}"))?;
    let mut listener = Listener::from(UnixListener::from(listener));
    daemon
        .start(&mut listener)
        .map_err(|e| anyhow::anyhow!("accept the connection of the VMM: {e}"))?;
    drop(listener);
    use vhost::vhost_user::Error as VhostUserError;
    use vhost_user_backend::Error::HandleRequest;
    match daemon.wait() {
        Ok(()) | Err(HandleRequest(VhostUserError::Disconnected)) => Ok(()),
        Err(error) => Err(anyhow::anyhow!("serve the VMM: {error}")),
    }
}
