//! Network namespaces that no VM can take over.

use std::path::Path;

use kata_netlink::Link;

use crate::tap::is_ours;
use crate::{Netns, NetworkError};

/// Refuses a namespace that a new sandbox cannot take over: the host's, another VM's, and
/// another container's. `path` is the one the container's specification names, if it
/// names one; a container that joins the VM of its own pod needs no check.
///
/// # Errors
/// [`NetworkError::Host`] or [`NetworkError::Foreign`], which say what to do instead; or
/// that the namespace cannot be looked at.
pub fn check(netns: &Netns, path: Option<&Path>) -> Result<(), NetworkError> {
    if netns.is_host() {
        return Err(NetworkError::Host);
    }
    // Engines make namespaces under /run/netns; one that is found by a process is that
    // process's.
    if let Some(path) = path.filter(|path| path.starts_with("/proc")) {
        return Err(NetworkError::Foreign(path.to_owned()));
    }
    let mut socket = netns.socket()?;
    let links = Link::all(&mut socket).map_err(|e| netns.netlink(e))?;
    if links.iter().any(is_ours) {
        return Err(NetworkError::Foreign(path.unwrap_or_else(|| netns.path()).to_owned()));
    }
    Ok(())
}
