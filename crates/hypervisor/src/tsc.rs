//! The rate of the host's time stamp counter.
//!
//! QEMU's TCG gives the guest the host's counter, but no way to learn its rate except to
//! measure it, which a busy host disturbs so badly that one boot in four hangs. So we
//! measure it here, once, and tell the guest.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How long to measure. The error is below a few parts in a million.
const SPAN: Duration = Duration::from_millis(20);
/// Tries to read both clocks at one moment; the closest counts.
const READINGS: u32 = 16;

/// One moment by both clocks.
#[derive(Clone, Copy)]
pub(crate) struct Reading {
    counter: u64,
    nanoseconds: u64,
}

/// Reads both clocks at (nearly) one moment.
pub(crate) fn read() -> Reading {
    let mut best = (u64::MAX, Reading { counter: 0, nanoseconds: 0 });
    for _ in 0..READINGS {
        let before = counter();
        let now = clock_gettime(ClockId::MonotonicRaw);
        let after = counter();
        let gap = after.wrapping_sub(before);
        if gap < best.0 {
            let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
            best = (gap, Reading { counter: before.wrapping_add(gap / 2), nanoseconds });
        }
    }
    best.1
}

/// The rate in kHz between a moment and now; sleeps if that is too short a time.
pub(crate) fn khz_since(start: Reading) -> u64 {
    let elapsed = || Duration::from_nanos(read().nanoseconds.saturating_sub(start.nanoseconds));
    if let Some(rest) = SPAN.checked_sub(elapsed()) {
        std::thread::sleep(rest);
    }
    rate(start, read())
}

fn rate(start: Reading, end: Reading) -> u64 {
    let ticks = u128::from(end.counter.wrapping_sub(start.counter));
    let nanoseconds = u128::from(end.nanoseconds.saturating_sub(start.nanoseconds)).max(1);
    let khz = (ticks * 1_000_000 + nanoseconds / 2) / nanoseconds;
    u64::try_from(khz).unwrap_or(0)
}

/// Whether the counter runs at one rate, also when the processor sleeps; if not, a
/// measured rate is of no use.
pub(crate) fn is_constant() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().any(|flag| flag == "constant_tsc")
}

#[cfg(target_arch = "x86_64")]
fn counter() -> u64 {
    // SAFETY: the instruction is there on every x86-64; Linux lets everyone use it.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let measured: Vec<u64> = (0..4).map(|_| khz_since(read())).collect();
        let (low, high) = (measured.iter().min().unwrap(), measured.iter().max().unwrap());
        assert!(*low > 100_000, "{low} kHz is no rate of a processor");
        assert!((high - low) * 10_000 < *high, "{measured:?} differ by more than 100 ppm");
    }

    #[test]
    fn a_rate_is_ticks_per_millisecond() {
        let start = Reading { counter: u64::MAX - 10, nanoseconds: 5 };
        let end = Reading { counter: 2_600_000 - 11, nanoseconds: 1_000_005 };
        assert_eq!(rate(start, end), 2_600_000);
    }
}
