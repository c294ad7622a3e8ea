//! Forks another process, with all its threads, from outside.
//!
//! A process is brought to a stand once ([`Frozen::freeze`]) and never runs again. Each
//! [`Frozen::fork`] makes another process of it that goes on where it stood: the same memory,
//! whose pages are shared until one of them writes; the same threads, under the same numbers;
//! and descriptors of its own. It is for a monitor that translates its guest's code
//! (QEMU's TCG): what it has translated cannot be saved, but it can be inherited.
//!
//! How: by ptrace(2). System calls are made in the standing process's name (`puppet.rs`):
//! `clone3` in its first thread makes the new process, `clone3` in that one its further
//! threads, whose registers are then set as they were (`thread.rs`). The process knows nothing
//! of it: each thread was in a system call that waits, and makes that call again.
//!
//! What a fork would share with its siblings, and must not:
//! - *Names and signals.* It has namespaces of its own, all of them, and is the first process
//!   of its PID namespace; threads can have the numbers that they had only there.
//! - *Descriptors* (`descriptors.rs`). Each is given anew, made anew, or one of the kinds that
//!   hold nothing; a process with any other is not forked.
//! - *Shared memory* is given anew, or becomes private ([`Memory`]), and comes page by page
//!   (`by_page.rs`).
//! - *`/proc`* shows it alone. Nor may one of them look into another, as none can be dumped.
//!
//! A fork dies with the frozen process, which is the first of the PID namespace around its own,
//! and that one with its tracer.
//!
//! Who calls needs to be root, and free of system call filters: those of the process are
//! suspended for calls that are made in its name, and hold again when a fork runs.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("registers and system calls are those of x86-64");

mod by_page;
mod descriptors;
mod error;
mod frozen;
mod maps;
mod puppet;
mod thread;
mod tracee;
mod zeros;

pub use error::ForkError;
pub use frozen::{Forked, Frozen, Memory, Plan, Touches};
