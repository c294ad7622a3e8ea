//! Figures as a table for people and as JSON for machines.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use kata_e2e::assets;
use serde::Serialize;

use crate::plot::{self, Bar};

/// Milliseconds of many runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Distribution {
    /// How many.
    pub runs: usize,
    /// The fastest.
    pub min: f64,
    /// The middle one.
    pub median: f64,
    /// One in twenty is slower.
    pub p95: f64,
}

impl Distribution {
    /// Of these values; there must be one.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = values.len().saturating_sub(1);
            // The share is between 0 and 1: the index is one of the list's.
            let index = (last as f64 * share).round() as usize;
            values.get(index).copied().unwrap_or(f64::NAN)
        };
        Self { runs: values.len(), min: at(0.0), median: at(0.5), p95: at(0.95) }
    }
}

/// What is promised of a figure.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn verdict(self, value: f64) -> String {
        let (words, bound, holds) = match self {
            Self::AtMost(bound) => ("at most", bound, value <= bound),
            Self::AtLeast(bound) => ("at least", bound, value >= bound),
        };
        format!("  {words} {bound}: {}", if holds { "holds" } else { "MISSED" })
    }
}

#[derive(Debug, Serialize)]
struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bound: Option<Bound>,
    /// Unit of the single runs.
    #[serde(skip)]
    each: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ours: Option<Distribution>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runc: Option<Distribution>,
    #[serde(skip_serializing_if = "Option::is_none")]
    runsc: Option<Distribution>,
}

/// All figures of one run.
#[derive(Debug, Serialize)]
pub struct Report {
    machine: String,
    runs: usize,
    rows: Vec<Row>,
}

impl Report {
    /// With a line that says on what machine.
    pub fn new(runs: usize) -> Result<Self> {
        let cpus = fs::read_to_string("/proc/cpuinfo").context("read /proc/cpuinfo")?;
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.unwrap_or_default().trim_start_matches(['\t', ' ', ':']);
        let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let machine = format!("{count} x {model}, Linux {}", kernel.trim());
        Ok(Self { machine, runs, rows: Vec::new() })
    }

    /// A ratio of medians.
    pub fn compare(
        &mut self,
        what: &str,
        ours: &Distribution,
        runc: &Distribution,
        bound: Option<f64>,
    ) {
        self.rows.push(Row {
            what: what.to_owned(),
            value: ours.median / runc.median,
            unit: "x runc",
            bound: bound.map(Bound::AtMost),
            each: "ms",
            ours: Some(*ours),
            runc: Some(*runc),
            runsc: None,
        });
    }

    /// The same ratio of gVisor's, to compare ours with.
    pub fn compare_runsc(&mut self, what: &str, runsc: &Distribution, runc: &Distribution) {
        self.compare(what, runsc, runc, None);
        if let Some(row) = self.rows.last_mut() {
            row.runsc = row.ours.take();
        }
    }

    /// A ratio of medians of rates, of which more is better.
    pub fn rates(
        &mut self,
        what: &str,
        ours: &Distribution,
        runc: &Distribution,
        bound: Option<f64>,
    ) {
        self.compare(what, ours, runc, None);
        if let Some(row) = self.rows.last_mut() {
            row.bound = bound.map(Bound::AtLeast);
            row.each = "/s";
        }
    }

    /// A figure of many runs.
    pub fn time(&mut self, what: &str, ours: Distribution, bound: Option<f64>) {
        let value = ours.median;
        self.rows.push(Row {
            what: what.to_owned(),
            value,
            unit: "ms",
            bound: bound.map(Bound::AtMost),
            each: "ms",
            ours: Some(ours),
            runc: None,
            runsc: None,
        });
    }

    /// A single figure.
    pub fn value(&mut self, what: &str, value: f64, unit: &'static str, bound: Option<f64>) {
        let what = what.to_owned();
        let bound = bound.map(Bound::AtMost);
        let (ours, runc, runsc) = (None, None, None);
        self.rows.push(Row { what, value, unit, bound, each: "", ours, runc, runsc });
    }

    /// Prints the table and writes `build/bench.json`.
    pub fn finish(&self) -> Result<()> {
        println!("\n{}, {} runs, medians (min to p95)\n", self.machine, self.runs);
        for row in &self.rows {
            let bound = row.bound.map_or(String::new(), |bound| bound.verdict(row.value));
            println!("{:48} {:9.2} {:6}{bound}", row.what, row.value, row.unit);
            for (name, times) in [("ours", row.ours), ("runsc", row.runsc), ("runc", row.runc)] {
                if let Some(t) = times {
                    let Distribution { min, median, p95, .. } = t;
                    println!(
                        "{:48} {median:9.1} {:6}  ({min:.1} to {p95:.1})",
                        format!("    {name}"),
                        row.each
                    );
                }
            }
        }
        let path = file();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))?;
        println!("\nwritten to build/bench.json");
        Ok(())
    }

    /// Draws the ratios into `docs/benchmarks/`, with the machine they were measured on.
    pub fn publish(&self) -> Result<()> {
        let ratio = |row: &&Row| row.unit == "x runc" && row.each == "ms";
        let bars: Vec<Bar> = self
            .rows
            .iter()
            .filter(ratio)
            .map(|row| Bar {
                label: row.what.clone(),
                ratio: row.value,
                bound: match row.bound {
                    Some(Bound::AtMost(bound)) => Some(bound),
                    _ => None,
                },
            })
            .collect();
        let note = format!(
            "{}; {} runs in turn, medians; a line is what is promised",
            self.machine, self.runs
        );
        let dir = assets::source().join("docs/benchmarks");
        fs::create_dir_all(&dir)?;
        let file = dir.join("ratios.svg");
        fs::write(&file, plot::ratios("Time against runc's (less is better)", &note, &bars))
            .with_context(|| format!("write {}", file.display()))?;
        println!("drawn to docs/benchmarks/ratios.svg");
        Ok(())
    }
}

fn file() -> PathBuf {
    assets::source().join("build/bench.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_ends_are_found() {
        let all = Distribution::of((1..=11).rev().map(f64::from).collect());
        assert_eq!((all.runs, all.min, all.median, all.p95), (11, 1.0, 6.0, 11.0));
    }

    #[test]
    fn one_run_is_its_own_median() {
        assert_eq!(Distribution::of(vec![3.0]).median, 3.0);
    }
}
