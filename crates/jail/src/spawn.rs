//! The code between fork and exec.
//!
//! The child shares our memory and the calling thread sleeps until it executes its program
//! (as posix_spawn does it): no page tables are copied, and a failure is reported by
//! writing it down. In return the child may do nothing but system calls on what was made
//! ready before: no allocation, no locks. All signals are blocked meanwhile, so that no
//! handler of ours runs in the child.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use crate::Child;

/// Stack of the child until it executes its program.
const STACK: usize = 64 << 10;

/// Everything the child needs.
pub(crate) struct Plan {
    pub program: CString,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    pub directory: Option<CString>,
    /// What to have under which number, ascending; the sources are above all numbers.
    pub fds: Vec<(OwnedFd, RawFd)>,
    pub new_session: bool,
    pub die_with_parent: bool,
    pub pid_namespace: bool,
}

/// What went wrong, and where.
pub(crate) struct Failure {
    pub step: &'static str,
    pub source: io::Error,
}

/// What the child sees of our memory.
struct Shared<'a> {
    plan: &'a Plan,
    argv: *const *const c_char,
    env: *const *const c_char,
    parent: libc::pid_t,
    failure: Option<(&'static str, c_int)>,
}

/// Starts the planned process.
pub(crate) fn spawn(plan: &Plan) -> Result<Child, Failure> {
    let pointers = |texts: &[CString]| -> Vec<*const c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, env) = (pointers(&plan.argv), pointers(&plan.env));
    let mut shared = Shared {
        plan,
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        // SAFETY: always safe.
        parent: unsafe { libc::getpid() },
        failure: None,
    };
    // u128 for the alignment that the ABI asks of a stack.
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let mut pidfd: c_int = -1;
    let mut flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    if plan.pid_namespace {
        flags |= libc::CLONE_NEWPID;
    }

    let blocked = BlockedSignals::all();
    // SAFETY: the child runs `run` on a stack of its own, and this thread, which owns
    // everything the child uses, sleeps until the child has executed or ended (VFORK).
    let pid = unsafe {
        libc::clone(
            run,
            stack.as_mut_ptr_range().end.cast(),
            flags,
            (&raw mut shared).cast(),
            &raw mut pidfd,
        )
    };
    let error = io::Error::last_os_error();
    drop(blocked);
    if pid < 0 {
        return Err(Failure { step: "clone", source: error });
    }
    // SAFETY: the kernel made this descriptor for us in the call above.
    let child = Child::new(pid, unsafe { OwnedFd::from_raw_fd(pidfd) });
    // SAFETY: the child wrote through the pointer that it got; the compiler cannot know.
    match unsafe { ptr::read_volatile(&raw const shared.failure) } {
        None => Ok(child),
        Some((step, errno)) => {
            let _ = child.wait_blocking();
            Err(Failure { step, source: io::Error::from_raw_os_error(errno) })
        }
    }
}

/// All signals of this thread blocked until dropped.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn all() -> Self {
        // SAFETY: both sets are written before they are read.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is one that the kernel gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

/// The child. Nothing but system calls from here to exec.
extern "C" fn run(shared: *mut c_void) -> c_int {
    // SAFETY: `spawn` passes its `Shared`, and sleeps while we use it.
    let shared = unsafe { &mut *shared.cast::<Shared<'_>>() };
    let (step, errno) = become_program(shared);
    shared.failure = Some((step, errno));
    127
}

/// Does all steps; returns only if one fails.
fn become_program(shared: &Shared<'_>) -> (&'static str, c_int) {
    let plan = shared.plan;
    macro_rules! attempt {
        ($step:literal, $call:expr) => {
            // SAFETY: a plain system call on values that `spawn` keeps alive.
            if unsafe { $call } < 0 {
                return ($step, errno());
            }
        };
    }
    reset_signals();
    if plan.new_session {
        attempt!("setsid", libc::setsid());
    }
    if plan.die_with_parent {
        attempt!("set parent-death signal", libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
        // If the parent died before the call above, nobody will send the signal.
        // In a PID namespace of our own there is no parent to be seen; who needs to know
        // there (`jail-exec`) looks through /proc.
        // SAFETY: always safe.
        if !plan.pid_namespace && unsafe { libc::getppid() } != shared.parent {
            return ("the parent is gone", libc::ESRCH);
        }
    }
    if let Some(directory) = &plan.directory {
        attempt!("change to its working directory", libc::chdir(directory.as_ptr()));
    }
    let mut next = 0;
    for (fd, at) in &plan.fds {
        attempt!("renumber descriptors", libc::dup2(fd.as_raw_fd(), *at));
        if *at > next {
            attempt!("close descriptors", close_range(next, *at - 1));
        }
        next = *at + 1;
    }
    attempt!("close descriptors", close_range(next, RawFd::MAX));
    attempt!("unblock signals", unblock_signals());
    // SAFETY: the program is a C string, both arrays end with a null pointer.
    unsafe { libc::execve(plan.program.as_ptr(), shared.argv, shared.env) };
    ("execute", errno())
}

fn errno() -> c_int {
    // SAFETY: glibc always gives a valid pointer.
    unsafe { *libc::__errno_location() }
}

/// # Safety
/// Closes descriptors whoever owns them: only for the child, whose table is a copy.
unsafe fn close_range(first: RawFd, last: RawFd) -> libc::c_long {
    // SAFETY: as the caller promises.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }
}

/// The kernel's `struct sigaction`; the C library's wrapper refuses its own two signals.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

fn reset_signals() {
    let default = KernelAction { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    for signal in 1..=64 {
        // SAFETY: the structure is the kernel's. SIGKILL and SIGSTOP fail, as they may.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                &raw const default,
                ptr::null_mut::<c_void>(),
                size_of::<u64>(),
            );
        }
    }
}

/// # Safety
/// Only for the child: signals may be delivered from here on.
unsafe fn unblock_signals() -> libc::c_long {
    let none = 0u64;
    // SAFETY: the set is the kernel's.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            ptr::null_mut::<c_void>(),
            size_of::<u64>(),
        )
    }
}
