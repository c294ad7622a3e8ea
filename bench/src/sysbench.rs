//! The comparison of the Kata articles: `sysbench` in a container of ours and of runc's.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use kata_e2e::arena::Arena;
use kata_e2e::assets;
use kata_e2e::command;
use kata_e2e::docker::Docker;
use kata_e2e::images;
use serde_json::Value;

use crate::report::{Distribution, Report};
use crate::{OURS, THEIRS};

const PROGRAM: &str = "/usr/bin/sysbench";
const IMAGE: &str = "sysbench";

/// One of its tests: its arguments, and the line with the rate.
struct Test {
    what: &'static str,
    arguments: &'static str,
    /// What stands before the figure.
    before: &'static str,
}

const TESTS: [Test; 3] = [
    Test {
        what: "sysbench cpu, primes to 20000",
        arguments: "cpu --cpu-max-prime=20000 --time=10 run",
        before: "events per second:",
    },
    Test {
        what: "sysbench memory, write",
        arguments: "memory --memory-block-size=1M --memory-total-size=1T --time=10 run",
        before: "transferred (",
    },
    Test {
        what: "sysbench memory, read",
        arguments: "memory --memory-oper=read --memory-block-size=1M --memory-total-size=1T --time=10 run",
        before: "transferred (",
    },
];

/// What of runc's rate must be left, where KVM runs the guest.
const AT_LEAST: f64 = 0.95;

/// Runs each test in turn on both.
pub fn measure(arena: &Arena, docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    import(arena, docker)?;
    for test in TESTS {
        eprintln!("bench: {}, {runs} times each in turn", test.what);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            for (runtime, rates) in [(OURS, &mut ours), (THEIRS, &mut theirs)] {
                let line =
                    format!("run --rm --runtime {runtime} {IMAGE} sysbench {}", test.arguments);
                let said = docker.ok(&line)?;
                rates.push(rate(&said, test.before).with_context(|| said.clone())?);
            }
        }
        let (ours, theirs) = (Distribution::of(ours), Distribution::of(theirs));
        report.rates(test.what, &ours, &theirs, Some(AT_LEAST));
    }
    pieces(docker, runs, report)
}

/// What is lost to a guest's exits, and what is not: pieces of work that nothing disturbs, and
/// the part of the time in which something does. On an emulated host an exit costs what
/// emulating it costs.
fn pieces(docker: &Docker, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: pieces of work, {runs} times each in turn");
    let program = assets::beside("kata-bench-load")?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        for (runtime, said) in [(OURS, &mut ours), (THEIRS, &mut theirs)] {
            let mount = format!("-v {}:/load:ro", program.display());
            let text =
                docker.ok(&format!("run --rm --runtime {runtime} {mount} {IMAGE} /load pieces"))?;
            said.push(serde_json::from_str(&text).with_context(|| format!("read {text:?}"))?);
        }
    }
    let of = |said: &[Value], pointer: &str| {
        let figures = said.iter().filter_map(|said| said.pointer(pointer)?.as_f64());
        Distribution::of(figures.collect())
    };
    for (work, what) in [("compute", "computing"), ("memory", "walking through memory")] {
        let rate = format!("/{work}/rate");
        let what_rate = format!("{what}, undisturbed");
        report.rates(&what_rate, &of(&ours, &rate), &of(&theirs, &rate), Some(AT_LEAST));
        let lost = format!("/{work}/lost_percent");
        report.value(&format!("{what}: lost to disturbances"), of(&ours, &lost).median, "%", None);
        report.value(&format!("{what}: the same, runc"), of(&theirs, &lost).median, "%", None);
    }
    report.value("an exit of the guest", of(&ours, "/exit_us").median, "us", None);
    Ok(())
}

/// The number that follows `before`.
fn rate(said: &str, before: &str) -> Option<f64> {
    let after = said.split_once(before)?.1.trim_start();
    after.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}

/// An image with the program and the libraries that it is linked to.
fn import(arena: &Arena, docker: &Docker) -> Result<()> {
    let root = arena.dir("sysbench")?;
    for file in files()? {
        let inside = root.join(file.strip_prefix("/")?);
        let dir = inside.parent().context("a file is in a directory")?;
        fs::create_dir_all(dir)?;
        fs::copy(&file, &inside).with_context(|| format!("copy {}", file.display()))?;
    }
    let tar = images::archive(&root, &arena.work.join("sysbench.tar"))?;
    docker.ok(&format!("import {} {IMAGE}", tar.display())).map(drop)
}

fn files() -> Result<BTreeSet<PathBuf>> {
    fs::metadata(PROGRAM).with_context(|| format!("find {PROGRAM}: install package sysbench"))?;
    let linked = command::ok(Command::new("ldd").arg(PROGRAM))?.out();
    let mut files: BTreeSet<PathBuf> =
        linked.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect();
    files.insert(Path::new(PROGRAM).to_owned());
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_number_after_its_words() {
        assert_eq!(rate("  events per second:   123.45\n", "events per second:"), Some(123.45));
        let memory = "1024.00 MiB transferred (9876.5 MiB/sec)\n";
        assert_eq!(rate(memory, "transferred ("), Some(9876.5));
        assert_eq!(rate("nothing", "transferred ("), None);
    }
}
