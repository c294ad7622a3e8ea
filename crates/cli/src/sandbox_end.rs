//! What remains to do when a sandbox's server did not do it.

use kata_protocol::Id;
use kata_sandbox::SandboxDir;
use std::io;

/// Removes everything that a sandbox has on the host; fine when there is nothing.
///
/// # Errors
/// When something cannot be removed.
pub fn clean_up(sandbox: &Id) -> io::Result<()> {
    SandboxDir::of(sandbox).remove()
}
