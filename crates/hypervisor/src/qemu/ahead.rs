//! The memory that a guest touches when it boots is taken from the host ahead.
//!
//! Each page that is touched first is a fault of the monitor's, in which the host finds a page
//! and clears it: of an emulated boot that is a tenth of the time, in which the guest stands
//! still. But what a boot touches is known before it begins, and another of the host's
//! processors can take it meanwhile. Nothing is taken that the guest would not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, fallocate};

use super::resize::Room;
use crate::config::{Accelerator, KernelKind, VmConfig};
use crate::snapshot::guest_memory;

const MIB: u64 = 1 << 20;
/// Where our kernel is, MiB. This and the rest is so in guests of every size (`SEEK_DATA` on the
/// memory of a running one shows it), but that the rest is only where there is no hole in the memory.
const KERNEL: Range<u64> = 16..36;
/// What is allocated when all memory is known; by a kernel for one processor, at least.
const FIRST: Range<u64> = 8..16;
const FIRST_OF_ONE: Range<u64> = 8..11;
/// The end of the memory: the initial file system, and what is allocated at first.
const TOP: u64 = 3;
/// Before that there is room for the descriptors of pages, a 64th of the memory, of which few are
/// made; around where it begins are those, and tables.
const DESCRIPTORS: u64 = 64;
const TABLES: Range<u64> = 2..6;
/// The least memory whose ranges lie apart, MiB.
const LEAST: u64 = 128;
/// From here on the memory may have a hole, MiB.
const HOLE: u64 = 2048;

/// The memory of a machine that is about to boot, and a thread that takes from the host what it
/// will touch; none where that is not known, or the monitor makes the memory better itself.
pub(super) fn memory(config: &VmConfig) -> io::Result<Option<OwnedFd>> {
    let room = Room::new(config);
    let shared = config.shares_memory() || room.keeps_back();
    let known = config.accelerator == Accelerator::Tcg && config.kernel_kind.is_tuned();
    if !shared || !known {
        return Ok(None);
    }
    let memory = guest_memory(room.memory_mib())?;
    let (ahead, ranges) =
        (File::from(memory.try_clone()?), touched(config.memory_mib.into(), config.kernel_kind));
    let take = move || {
        for range in ranges {
            let (start, length) = (range.start * MIB, (range.end - range.start) * MIB);
            if let Err(error) = fallocate(ahead.as_fd(), FallocateFlags::empty(), start, length) {
                // The guest will say so, if it needs it.
                tracing::debug!(%error, "no memory is to be had ahead");
                return;
            }
        }
    };
    std::thread::Builder::new().name("memory".to_owned()).spawn(take)?;
    Ok(Some(memory))
}

/// The ranges that a guest of this size touches when it boots this kernel, MiB; those first that
/// it needs first.
fn touched(memory: u64, kernel: KernelKind) -> Vec<Range<u64>> {
    if memory < LEAST {
        return Vec::new();
    }
    let mut ranges = vec![KERNEL];
    if memory <= HOLE {
        let room = memory - memory / DESCRIPTORS;
        let first = if kernel == KernelKind::Uniprocessor { FIRST_OF_ONE } else { FIRST };
        ranges.extend([memory - TOP..memory, room - TABLES.end..room - TABLES.start, first]);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Machine;
    use crate::qemu::sample_config;

    #[test]
    fn what_is_taken_ahead_is_inside_and_once() {
        for memory in [64, 128, 129, 256, 2048, 2050, 6 << 10, 1 << 20] {
            let mut ranges = touched(memory, KernelKind::Tuned);
            ranges.sort_by_key(|range| range.start);
            assert!(ranges.iter().all(|range| range.start < range.end && range.end <= memory));
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start), "{ranges:?}");
        }
        assert_eq!(touched(64, KernelKind::Tuned), []);
        assert_eq!(touched(2048, KernelKind::Tuned), [16..36, 2045..2048, 2010..2014, 8..16]);
        let of_one = touched(2048, KernelKind::Uniprocessor);
        assert_eq!(of_one, [16..36, 2045..2048, 2010..2014, 8..11]);
    }

    #[test]
    fn memory_is_the_monitors_own_where_nobody_else_sees_it_or_little_is_known() {
        let has = |change: fn(&mut VmConfig)| {
            let mut config = sample_config();
            change(&mut config);
            memory(&config).unwrap().is_some()
        };
        assert!(has(|config| config.machine = Machine::Microvm));
        assert!(!has(|_| {}));
        assert!(!has(|config| {
            (config.machine, config.accelerator) = (Machine::Microvm, Accelerator::Kvm);
        }));
        assert!(!has(|config| config.kernel_kind = KernelKind::Distro));
    }
}
