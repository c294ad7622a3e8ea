//! What a running container gets of files and network, against runc's.

use std::process::Command;

use anyhow::{Context, Result};
use kata_e2e::assets;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::Docker;
use serde_json::Value;

use crate::report::{Distribution, Report};
use crate::{OURS, THEIRS};

/// Where containers have the program that does it.
const PROGRAM: &str = "/load";
const PORT: u16 = 7007;
const ROUNDS: usize = 3;

/// Rates in the root file system, by the name of each in the program's answer.
const FILES: [(&str, &str); 5] = [
    ("create", "files created (5,000 small ones)"),
    ("walk", "files found and looked at (10,000)"),
    ("write", "MiB written and flushed, in sequence"),
    ("read", "MiB read back"),
    ("flush", "writes of 4 KiB, each flushed"),
];

/// Rates between the host and a container on Docker's bridge.
const NETWORK: [(&str, &str); 4] = [
    ("from", "MiB by TCP from the container"),
    ("to", "MiB by TCP to the container"),
    ("connections", "TCP connections made, used and closed"),
    ("trips", "TCP round trips"),
];

/// Both, a few rounds in turn.
pub fn measure(docker: &Docker, report: &mut Report) -> Result<()> {
    let program = assets::beside("kata-bench-load")?;
    let mount = format!("-v {}:{PROGRAM}:ro", program.display());
    eprintln!("bench: files of the container's root");
    in_turn(report, &FILES, |runtime| {
        let line =
            format!("run --rm --runtime {runtime} {mount} {} {PROGRAM} files /", crate::IMAGE);
        docker.ok(&line)
    })?;
    eprintln!("bench: network over the bridge");
    in_turn(report, &NETWORK, |runtime| {
        let options = format!("--runtime {runtime} {mount}");
        let server = docker.detached(&options, &format!("{PROGRAM} serve {PORT}"))?;
        let address = format!("{}:{PORT}", server.address("bridge")?);
        command::eventually("the container listens", PATIENCE, || {
            Ok(std::net::TcpStream::connect(&address).is_ok())
        })?;
        Ok(command::ok(Command::new(&program).args(["ask", &address]))?.out())
    })
}

fn in_turn(
    report: &mut Report,
    figures: &[(&str, &str)],
    mut run: impl FnMut(&'static str) -> Result<String>,
) -> Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (runtime, said) in [(OURS, &mut ours), (THEIRS, &mut theirs)] {
            let text = run(runtime)?;
            said.push(serde_json::from_str(&text).with_context(|| format!("read {text:?}"))?);
        }
    }
    for (key, what) in figures {
        let of = |said: &[Value]| {
            let rates = said.iter().filter_map(|said| said[key].as_f64());
            Distribution::of(rates.collect())
        };
        report.rates(&format!("{what}, per second"), &of(&ours), &of(&theirs), None);
    }
    Ok(())
}
