//! Warnings of the device, as lines on standard error, few per second.
//!
//! The guest can provoke them, so it must not be able to fill a disk with them.

use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Lines that may come at once, and that come back in [`PERIOD`].
const BURST: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

struct Logger(Mutex<Budget>);

struct Budget {
    since: Option<Instant>,
    spent: u32,
}

impl Budget {
    /// Whether a line may be written at `now`.
    fn take(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= PERIOD) {
            *self = Self { since: Some(now), spent: 0 };
        }
        self.spent = self.spent.saturating_add(1);
        self.spent <= BURST
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        let may = || self.0.lock().is_ok_and(|mut budget| budget.take(Instant::now()));
        if self.enabled(record.metadata()) && may() {
            // Nobody to tell if standard error is closed.
            let _ = writeln!(std::io::stderr(), "devices: {}", record.args());
        }
    }

    fn flush(&self) {}
}

static LOGGER: Logger = Logger(Mutex::new(Budget { since: None, spent: 0 }));

/// Starts to log.
pub(crate) fn start() {
    // It is only refused when there is a logger already, as in a test.
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_later_lines_come_again() {
        let start = Instant::now();
        let mut budget = Budget { since: None, spent: 0 };
        let written = (0..1000).filter(|_| budget.take(start)).count();
        assert_eq!(written, BURST as usize);
        assert!(!budget.take(start + PERIOD / 2));
        assert!(budget.take(start + PERIOD));
    }
}
