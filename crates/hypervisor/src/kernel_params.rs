//! The kernel's command line.
//!
//! Under TCG much of what a kernel does at boot is to measure clocks that we know and to
//! defend against processors that are not there; the parameters here save most of that.
//! Under KVM the guest finds its clock by itself and keeps all its defences.

use crate::config::{Accelerator, KernelKind, VmConfig};
use crate::qemu::first_memory;

/// For every machine. `panic=-1`: a panic restarts at once, which ends the monitor, so
/// that a dead guest is an event and no silence.
const ALWAYS: &[&str] = &["console=hvc0", "panic=-1"];

/// For every kernel under TCG: clocks and processors are what they are.
const TCG: &[&str] = &["tsc=reliable", "no_timer_check"];

/// For kernels that would make one for a single processor of their own code.
const TCG_SMP: &[&str] = &["noreplace-smp"];

/// Defences that cost time under TCG and are of no use there: the guest's code runs on no
/// processor with these faults, but is translated.
const TCG_DEFENCES_OFF: &[&str] =
    &["mitigations=off", "init_on_alloc=0", "randomize_kstack_offset=off"];

/// For every kernel where QEMU is older than 8.0, whose translation of `cmpxchg16b` computes the flags
/// from what it has not stored yet: an interrupt that comes right behind takes the garbage along, and
/// returns to it, say with the direction flag set. Linux allocates memory with this instruction.
const TCG_OLD_QEMU: &[&str] = &["clearcpuid=cx16"];

/// Of our boot-hints patch, as those below. Another kernel would hand them to init as unknown.
const TUNED: &[&str] = &["lazy_memmap"];

/// What is for TCG alone, most of it of the patch.
const TCG_TUNED: &[&str] = &[
    "lapic_khz=1000000",
    "keep_initmem",
    "quick_patching",
    "drop_boot_messages",
    "no_slab_sysfs",
    "initrd_alone",
    // There is no serial port.
    "8250.nr_uarts=0",
];

/// To move the kernel is the work of a bzImage's loader; ours has none, and does not move.
const TCG_DISTRO: &[&str] = &["nokaslr"];

/// For a machine whose memory may grow: the kernel uses what comes, and keeps no 64 MiB of
/// bounce buffers for devices that could not reach it, of which there are none.
const GROWS: &[&str] = &["memhp_default_state=online", "swiotlb=noforce"];

/// For a machine without ACPI and PCI; QEMU adds where the devices are. It has no keyboard's controller
/// either, which Linux would try next to restart, as after a panic: only a triple fault is left.
/// The rest is of our boot-hints patch: it has NICs that nobody may ever need, and queues of a
/// length that nobody asked for.
const BARE: &[&str] = &["acpi=off", "pci=off", "reboot=t", "sleeping_nics", "pci_sized_queues"];

/// The whole command line, for this major version of QEMU.
pub fn command_line(config: &VmConfig, qemu_major: u32) -> String {
    let mut params: Vec<String> = ALWAYS.iter().map(ToString::to_string).collect();
    if config.quiet {
        params.push("quiet".to_owned());
    }
    if config.kernel_kind.is_tuned() {
        params.extend(TUNED.iter().map(ToString::to_string));
    }
    if config.accelerator == Accelerator::Tcg {
        params.extend(TCG.iter().chain(TCG_DEFENCES_OFF).map(ToString::to_string));
        if config.kernel_kind != KernelKind::Uniprocessor {
            params.extend(TCG_SMP.iter().map(ToString::to_string));
        }
        if qemu_major < 8 {
            params.extend(TCG_OLD_QEMU.iter().map(ToString::to_string));
        }
        if config.tsc_khz > 0 {
            params.push(format!("tsc_early_khz={}", config.tsc_khz));
            params.push(format!("lpj={}", loops_per_jiffy(config.tsc_khz, config.kernel_kind)));
        }
        params.extend(match config.kernel_kind {
            KernelKind::Distro => TCG_DISTRO.iter().map(ToString::to_string),
            KernelKind::Tuned | KernelKind::Uniprocessor => {
                TCG_TUNED.iter().map(ToString::to_string)
            }
        });
    }
    if config.is_bare() {
        params.extend(BARE.iter().map(ToString::to_string));
    }
    if let Some(end) = first_memory(config) {
        params.push(format!("mem={end}M"));
    }
    if config.grows() {
        params.extend(GROWS.iter().map(ToString::to_string));
    }
    params.extend(config.kernel_params.iter().cloned());
    params.join(" ")
}

/// What the kernel would measure for its delay loop, which counts the time stamp counter.
fn loops_per_jiffy(tsc_khz: u64, kernel: KernelKind) -> u64 {
    let ticks_per_second = match kernel {
        KernelKind::Tuned | KernelKind::Uniprocessor => 100,
        KernelKind::Distro => 250,
    };
    tsc_khz.saturating_mul(1000) / ticks_per_second
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Machine;
    use crate::qemu::sample_config;

    fn params(change: impl FnOnce(&mut VmConfig)) -> Vec<String> {
        let mut config = sample_config();
        change(&mut config);
        command_line(&config, 7).split(' ').map(str::to_owned).collect()
    }

    fn has(params: &[String], name: &str) -> bool {
        params.iter().any(|param| param.split('=').next() == Some(name))
    }

    #[test]
    fn under_kvm_a_guest_keeps_its_clock_and_its_defences() {
        let params = params(|config| {
            (config.accelerator, config.memory_slots) = (Accelerator::Kvm, 0);
        });
        assert_eq!(params, ["console=hvc0", "panic=-1", "quiet", "lazy_memmap"]);
    }

    #[test]
    fn where_memory_may_come_the_kernel_takes_it() {
        assert!(has(&params(|_| {}), "memhp_default_state"));
        let microvm = |accelerator| {
            params(|config| {
                (config.machine, config.accelerator) = (Machine::Microvm, accelerator);
            })
        };
        let bare = microvm(Accelerator::Tcg);
        assert!(has(&bare, "memhp_default_state") && bare.contains(&"mem=2048M".to_owned()));
        assert!(!has(&microvm(Accelerator::Kvm), "memhp_default_state"));
    }

    #[test]
    fn a_kernel_looks_for_no_acpi_where_there_is_none() {
        let microvm = params(|config| config.machine = Machine::Microvm);
        assert!(microvm.contains(&"acpi=off".to_owned()));
        assert!(!has(&params(|_| {}), "acpi"));
    }

    #[test]
    fn an_old_qemus_guest_does_without_cmpxchg16b() {
        assert!(has(&params(|_| {}), "clearcpuid"));
        assert!(!command_line(&sample_config(), 8).contains("clearcpuid"));
        assert!(!has(&params(|config| config.accelerator = Accelerator::Kvm), "clearcpuid"));
    }

    #[test]
    fn under_tcg_the_clock_is_told() {
        let params = params(|config| config.tsc_khz = 2_600_000);
        assert!(params.contains(&"tsc_early_khz=2600000".to_owned()));
        assert!(params.contains(&"lpj=26000000".to_owned()));
    }

    #[test]
    fn a_clock_that_is_not_known_is_not_told() {
        let params = params(|config| config.tsc_khz = 0);
        assert!(!has(&params, "tsc_early_khz") && !has(&params, "lpj"));
    }

    #[test]
    fn a_distributions_kernel_gets_nothing_that_it_would_hand_to_init() {
        let params = params(|config| {
            config.kernel_kind = KernelKind::Distro;
            config.tsc_khz = 2_600_000;
        });
        let ours = |param: &String| TUNED.iter().chain(TCG_TUNED).any(|ours| param == ours);
        assert!(!params.iter().any(ours));
        assert!(params.contains(&"lpj=10400000".to_owned()));
    }

    #[test]
    fn the_configurations_parameters_come_last_and_so_win() {
        let params = params(|config| config.kernel_params = vec!["panic=5".to_owned()]);
        assert_eq!(params.last().unwrap(), "panic=5");
    }

    #[test]
    fn a_kernel_for_one_processor_takes_all_hints_and_nothing_about_several() {
        let with = |kind| params(|config| config.kernel_kind = kind);
        let (one, several) = (with(KernelKind::Uniprocessor), with(KernelKind::Tuned));
        assert!(has(&several, "noreplace-smp") && !has(&one, "noreplace-smp"));
        let others = several.iter().filter(|param| *param != "noreplace-smp");
        assert!(others.eq(one.iter()));
    }
}
