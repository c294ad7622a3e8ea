//! Many containers at once.

use std::time::Instant;

use anyhow::{Result, anyhow};
use kata_e2e::docker::{Docker, IMAGE};

use crate::THEIRS;
use crate::report::{Distribution, Report};

const ROUNDS: usize = 2;

/// How many there are at once.
const COUNTS: [usize; 2] = [10, 20];

/// `docker run` of so many side by side, until the last of them has ended: by one of our runtimes,
/// whose machines come to life in this way, and by runc.
pub fn measure(docker: &Docker, runtime: &str, way: &str, report: &mut Report) -> Result<()> {
    for count in COUNTS {
        eprintln!("bench: {count} containers at once");
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            for (runtime, times) in [(runtime, &mut ours), (THEIRS, &mut theirs)] {
                times.push(burst(docker, runtime, count)?);
            }
        }
        let what = format!("{count} x docker run --rm busybox true at once, {way}");
        report.compare(&what, &Distribution::of(ours), &Distribution::of(theirs), None);
    }
    Ok(())
}

/// Milliseconds until all have ended.
fn burst(docker: &Docker, runtime: &str, count: usize) -> Result<f64> {
    let began = Instant::now();
    let line = format!("run --rm --runtime {runtime} {IMAGE} true");
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..count).map(|_| scope.spawn(|| docker.ok(&line))).collect();
        runs.into_iter()
            .try_for_each(|run| run.join().map_err(|_| anyhow!("a thread panicked"))?.map(drop))
    })?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}
