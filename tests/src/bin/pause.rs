//! What a pod's first container runs: nothing, until it is told to end. As parent of what
//! loses its own (a shared process namespace) it reaps.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

fn main() {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM] {
        signals.add(signal);
    }
    if signals.thread_block().is_err() {
        return;
    }
    // Until SIGTERM or SIGINT, or an error, of which there is none to tell.
    while let Ok(Signal::SIGCHLD) = signals.wait() {
        while !matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(_)
        ) {}
    }
}
