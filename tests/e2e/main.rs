//! The end-to-end tests: `make e2e`, or `cargo run -p kata-e2e --bin kata-e2e -- [filter…]`.
//!
//! Every scenario that runc can do runs on runc first, which proves the scenario; then on
//! us. `KATA_E2E_RUNTIME=runc` stops after the proof.

mod ctl;
mod docker;
mod failure;
mod standalone;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use kata_e2e::arena::{self, Arena};
use kata_e2e::assets;
use kata_e2e::docker::Docker;
use kata_e2e::leaks::Snapshot;
use kata_e2e::oci::Oci;
use kata_e2e::runner::{On, Selection, Tally, Trial, guarded, run};

fn main() -> ExitCode {
    let selection = match Selection::from_args() {
        Ok(selection) => selection,
        Err(error) => {
            eprintln!("e2e: {error}");
            return ExitCode::from(2);
        }
    };
    if selection.list {
        list(&selection);
        return ExitCode::SUCCESS;
    }
    arena::enter(&assets::scratch(), |arena| match suites(arena, &selection) {
        Ok(tally) => {
            println!("\n{} passed, {} failed", tally.passed, tally.failed);
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("e2e: {error:?}");
            ExitCode::from(2)
        }
    })
}

fn suites(arena: &Arena, selection: &Selection) -> Result<Tally> {
    let mut tally = Tally::default();
    let runtimes = assets::runtimes()?;
    let probe = assets::beside("kata-e2e-probe")?;
    if runtimes.contains(&"kata-runtime") {
        assets::install()?;
    }
    for runtime in runtimes {
        let trials =
            chosen(&format!("standalone/{runtime}"), standalone::trials(), selection, runtime);
        suite(&mut tally, arena, &format!("standalone/{runtime}"), trials, selection, || {
            Oci::new(arena, runtime, &probe)
        });
        let trials = chosen(&format!("docker/{runtime}"), docker::trials(), selection, runtime);
        suite(&mut tally, arena, &format!("docker/{runtime}"), trials, selection, || {
            Docker::start(arena, runtime, &probe)
        });
        let trials = chosen(&format!("failure/{runtime}"), failure::trials(), selection, runtime);
        suite(&mut tally, arena, &format!("failure/{runtime}"), trials, selection, || {
            Oci::new(arena, runtime, &probe)
        });
        let trials = chosen("kata-ctl", ctl::trials(), selection, runtime);
        suite(&mut tally, arena, "kata-ctl", trials, selection, || {
            Oci::new(arena, runtime, &probe)
        });
        if runtime == "kata-runtime" && selection.takes("install/uninstall_undoes_install") {
            let began = Instant::now();
            let result = guarded(uninstall_undoes_install);
            tally.note("install/uninstall_undoes_install", began.elapsed(), &result);
        }
    }
    Ok(tally)
}

fn chosen<C>(
    prefix: &str,
    trials: Vec<Trial<C>>,
    selection: &Selection,
    runtime: &str,
) -> Vec<Trial<C>> {
    let wanted = |trial: &Trial<C>| {
        selection.takes(&format!("{prefix}/{}", trial.name))
            && (trial.on == On::Both || runtime != "runc")
    };
    trials.into_iter().filter(wanted).collect()
}

/// Sets the context up, runs the trials, tears down, and looks for what was left.
fn suite<C: Sync>(
    tally: &mut Tally,
    arena: &Arena,
    name: &str,
    trials: Vec<Trial<C>>,
    selection: &Selection,
    start: impl FnOnce() -> Result<C>,
) {
    if trials.is_empty() {
        return;
    }
    let began = Instant::now();
    let mut before = None;
    let result = guarded(|| {
        before = Some(Snapshot::take(arena)?);
        let context = start()?;
        *tally += run(name, trials, &context, selection.threads);
        Ok(())
    });
    if result.is_err() {
        tally.note(&format!("{name}/can_be_set_up"), began.elapsed(), &result);
    }
    let began = Instant::now();
    let left = guarded(|| before.map_or(Ok(()), |before| before.expect_again(arena)));
    tally.note(&format!("{name}/leaves_nothing_behind"), began.elapsed(), &left);
}

fn uninstall_undoes_install() -> Result<()> {
    assets::uninstall()?;
    for path in [assets::RUNTIME, assets::CTL, "/usr/share/kata-containers"] {
        anyhow::ensure!(!Path::new(path).exists(), "{path} is still there");
    }
    assets::install()
}

fn list(selection: &Selection) {
    let standalone = standalone::trials().into_iter().map(|t| ("standalone", t.name, t.on));
    let docker = docker::trials().into_iter().map(|t| ("docker", t.name, t.on));
    let failure = failure::trials().into_iter().map(|t| ("failure", t.name, t.on));
    for (suite, name, on) in standalone.chain(docker).chain(failure) {
        for runtime in ["runc", "kata-runtime"] {
            let full = format!("{suite}/{runtime}/{name}");
            if (on == On::Both || runtime != "runc") && selection.takes(&full) {
                println!("{full}");
            }
        }
    }
    for trial in ctl::trials() {
        let full = format!("kata-ctl/{}", trial.name);
        if selection.takes(&full) {
            println!("{full}");
        }
    }
}
