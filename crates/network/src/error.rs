//! What can go wrong.

use std::io;
use std::path::PathBuf;

use kata_netlink::NetlinkError;

/// Why the network of a sandbox cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A network namespace that cannot be opened.
    #[error("cannot open network namespace {0}: the process or mount that held it may be gone")]
    Open(PathBuf, #[source] io::Error),
    /// A namespace that cannot be entered.
    #[error("cannot enter network namespace {0} (this needs CAP_SYS_ADMIN)")]
    Enter(PathBuf, #[source] io::Error),
    /// Something failed that was done for a namespace.
    #[error("cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// The kernel's answer to a request about a namespace.
    #[error("cannot set up the network of {0}")]
    Netlink(PathBuf, #[source] NetlinkError),
    /// An interface name that the kernel would not take.
    #[error("interface name {0:?} is invalid: use 1 to 15 characters without '/' and spaces")]
    Name(String),
    /// No such interface.
    #[error("no interface {link} in network namespace {netns}")]
    NoLink {
        /// Its name.
        link: String,
        /// Where it should be.
        netns: PathBuf,
    },
    /// `--network host`.
    #[error(
        "host networking (--network host) cannot be used with a VM: the guest has a network \
         stack of its own and cannot share the host's; use the default or a user-defined \
         network, and publish the ports that the container serves with -p"
    )]
    Host,
    /// `--network container:…`.
    #[error(
        "sharing another container's network ({0}; --network container:…) is not possible: \
         that network belongs to another VM or process; put both containers on one \
         user-defined network and let them reach each other by name, or run them in one pod"
    )]
    Foreign(PathBuf),
    /// A DNS stream that broke.
    #[error("the DNS stream to the guest failed")]
    DnsStream(#[source] io::Error),
}
