//! The kernel's command line.
//!
//! Under TCG much of what a kernel does at boot is to measure clocks that we know and to
//! defend against processors that are not there; the parameters here save most of that.
//! Under KVM the guest finds its clock by itself and keeps all its defences.

use crate::config::{Accelerator, KernelKind, VmConfig};

/// For every machine. `panic=-1`: a panic restarts at once, which ends the monitor, so
/// that a dead guest is an event and no silence.
const ALWAYS: &[&str] = &["console=hvc0", "quiet", "panic=-1"];

/// For every kernel under TCG: clocks and processors are what they are.
const TCG: &[&str] = &["tsc=reliable", "no_timer_check", "noreplace-smp"];

/// Defences that cost time under TCG and are of no use there: the guest's code runs on no
/// processor with these faults, but is translated.
const TCG_DEFENCES_OFF: &[&str] =
    &["mitigations=off", "init_on_alloc=0", "nokaslr", "randomize_kstack_offset=off"];

/// Of our boot-hints patch. Another kernel would hand them to init as unknown.
const TCG_TUNED: &[&str] = &["lapic_khz=1000000", "keep_initmem"];

/// The whole command line.
pub fn command_line(config: &VmConfig) -> String {
    let mut params: Vec<String> = ALWAYS.iter().map(ToString::to_string).collect();
    if config.accelerator == Accelerator::Tcg {
        params.extend(TCG.iter().chain(TCG_DEFENCES_OFF).map(ToString::to_string));
        if config.tsc_khz > 0 {
            params.push(format!("tsc_early_khz={}", config.tsc_khz));
            params.push(format!("lpj={}", loops_per_jiffy(config.tsc_khz, config.kernel_kind)));
        }
        if config.kernel_kind == KernelKind::Tuned {
            params.extend(TCG_TUNED.iter().map(ToString::to_string));
        }
    }
    params.extend(config.kernel_params.iter().cloned());
    params.join(" ")
}

/// What the kernel would measure for its delay loop, which counts the time stamp counter.
fn loops_per_jiffy(tsc_khz: u64, kernel: KernelKind) -> u64 {
    let ticks_per_second = match kernel {
        KernelKind::Tuned => 100,
        KernelKind::Distro => 250,
    };
    tsc_khz.saturating_mul(1000) / ticks_per_second
}
