//! fork(2) for the agent's single-threaded processes, which may give the child to their own
//! parent.

use std::io;

/// Whose child the new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// This process's.
    This,
    /// This process's parent's (`CLONE_PARENT`), as that of any child that it forked itself.
    Its,
}

/// Forks this process. The child gets `None`, this process the child's pid.
///
/// # Safety
/// This process has one thread: a lock that another one holds would never be given back in
/// the child.
///
/// # Errors
/// When there is no room for one more process.
pub unsafe fn fork(parent: Parent) -> io::Result<Option<i32>> {
    let flags = match parent {
        Parent::This => libc::SIGCHLD,
        Parent::Its => libc::SIGCHLD | libc::CLONE_PARENT,
    };
    // SAFETY: without a stack of its own the child goes on as after fork(2), which it may, as
    // the caller says that there is one thread.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        0 => Ok(None),
        -1 => Err(io::Error::last_os_error()),
        pid => i32::try_from(pid).map(Some).map_err(io::Error::other),
    }
}
