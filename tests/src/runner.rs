//! Running trials: a few at a time, each timed, with names to filter by.

use std::collections::VecDeque;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// On which runtimes a trial makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// Both: runc proves the trial, then it is ours to pass.
    Both,
    /// Ours only: runc has no such thing, or does it otherwise by design.
    Kata,
}

/// One thing that is tried with a context `C`.
pub struct Trial<C> {
    /// `module/what_must_hold`.
    pub name: String,
    /// Where it applies.
    pub on: On,
    /// The trial itself.
    pub run: fn(&C) -> Result<()>,
}

/// A table of trials of one module: `trials!["stdio": Both: a, b; Kata: c]`.
#[macro_export]
macro_rules! trials {
    [$module:literal: $($on:ident: $($name:ident),+ $(,)?);+ $(;)?] => {
        vec![$($($crate::runner::Trial {
            name: format!(concat!($module, "/", stringify!($name))),
            on: $crate::runner::On::$on,
            run: $name,
        }),+),+]
    };
}

/// What the command line asks for.
#[derive(Debug, Default)]
pub struct Selection {
    filters: Vec<String>,
    skips: Vec<String>,
    /// Only names are wanted.
    pub list: bool,
    /// How many trials run at a time.
    pub threads: usize,
}

impl Selection {
    /// Reads `[filter…] [--skip text] [--list] [--test-threads n]`.
    pub fn from_args() -> Result<Self> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let mut selection = Self { threads: cores.min(4), ..Self::default() };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| anyhow!("{arg} needs a value"));
            match arg.as_str() {
                "--skip" => selection.skips.push(value()?),
                "--test-threads" => selection.threads = value()?.parse()?,
                "--list" => selection.list = true,
                // What cargo test hands on with -q and --nocapture.
                "-q" | "--quiet" | "--nocapture" => {}
                flag if flag.starts_with('-') => return Err(anyhow!("unknown flag {flag}")),
                _ => selection.filters.push(arg),
            }
        }
        Ok(selection)
    }

    /// Whether the trial of this full name is asked for.
    pub fn takes(&self, name: &str) -> bool {
        (self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str())))
            && !self.skips.iter().any(|s| name.contains(s.as_str()))
    }
}

/// Why a trial cannot say anything here; it is neither passed nor failed.
#[derive(Debug)]
pub struct Skip(pub &'static str);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Skip {}

/// What is known not to hold yet: `name: why`, a line each. Such a trial runs and is shown,
/// and does not count; one that holds counts as passed and should leave the list.
const GAPS: &str = include_str!("../gaps.txt");

/// Why the trial of this full name is known not to hold yet.
fn gap(name: &str) -> Option<&'static str> {
    GAPS.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(": "))
        .find_map(|(known, why)| (known == name).then_some(why))
}

/// How trials ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Trials that held.
    pub passed: usize,
    /// Trials that did not.
    pub failed: usize,
}

impl Tally {
    /// Notes the end of one trial and says so in one line.
    pub fn note(&mut self, name: &str, took: Duration, result: &Result<()>) {
        let skipped = result.as_ref().err().and_then(|error| error.downcast_ref::<Skip>());
        if let Some(reason) = skipped {
            println!("skip          {name}: {reason}");
            return;
        }
        if let (Some(why), Err(error)) = (gap(name), result) {
            println!("gap  {:6.2}s  {name}: {why}", took.as_secs_f64());
            println!("        {error}");
            return;
        }
        let word = if result.is_ok() { "ok  " } else { "FAIL" };
        println!("{word} {:6.2}s  {name}", took.as_secs_f64());
        match result {
            Ok(()) => self.passed += 1,
            Err(error) => {
                self.failed += 1;
                let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
                for line in causes.join("\ncaused by: ").lines().filter(|line| !line.is_empty()) {
                    println!("        {line}");
                }
            }
        }
        std::io::stdout().flush().ok();
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Runs `trials`, `threads` at a time, each named `prefix/its name`, and one that fails up to
/// `tries` times in all. Ours get one try. A proof on the peer gets more: engines have races
/// of their own, and what is asked there is whether the trial *can* hold.
pub fn run<C: Sync>(
    prefix: &str,
    trials: Vec<Trial<C>>,
    context: &C,
    threads: usize,
    tries: u32,
) -> Tally {
    let tally = Mutex::new(Tally::default());
    let queue = Mutex::new(VecDeque::from(trials));
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let next = lock(&queue).pop_front();
                    let Some(trial) = next else { break };
                    let name = format!("{prefix}/{}", trial.name);
                    let began = Instant::now();
                    let mut result = guarded(|| (trial.run)(context));
                    for _ in 1..tries {
                        let Err(error) = &result else { break };
                        if error.is::<Skip>() {
                            break;
                        }
                        println!("again         {name}: {error}");
                        result = guarded(|| (trial.run)(context));
                    }
                    lock(&tally).note(&name, began.elapsed(), &result);
                }
            });
        }
    });
    *lock(&tally)
}

/// Runs `body`; a panic is an error as any other.
pub fn guarded(body: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(anyhow!("panicked: {text}"))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(_: &()) -> Result<()> {
        Ok(())
    }

    fn breaks(_: &()) -> Result<()> {
        anyhow::bail!("so it is")
    }

    fn panics(_: &()) -> Result<()> {
        panic!("oh")
    }

    #[test]
    fn errors_and_panics_count_as_failed() {
        let tally = run("unit", trials!["m": Both: holds, breaks; Kata: panics], &(), 2, 1);
        assert_eq!((tally.passed, tally.failed), (1, 2));
    }

    #[test]
    fn a_proof_that_fails_is_tried_again_and_ours_is_not() {
        use std::sync::atomic::{AtomicU32, Ordering};
        fn holds_the_second_time(calls: &AtomicU32) -> Result<()> {
            anyhow::ensure!(calls.fetch_add(1, Ordering::Relaxed) > 0, "not yet");
            Ok(())
        }
        for (tries, held) in [(1, 0), (2, 1)] {
            let trials = trials!["m": Both: holds_the_second_time];
            let tally = run("unit", trials, &AtomicU32::new(0), 1, tries);
            assert_eq!((tally.passed, tally.failed), (held, 1 - held));
        }
    }

    #[test]
    fn filters_choose_and_skips_leave_out() {
        let selection = Selection {
            filters: vec!["docker".into()],
            skips: vec!["runc".into()],
            ..Selection::default()
        };
        assert!(selection.takes("docker/kata-runtime/a"));
        assert!(!selection.takes("docker/runc/a"));
        assert!(!selection.takes("failure/a"));
    }
}
