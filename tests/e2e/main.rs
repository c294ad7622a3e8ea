//! The end-to-end tests: `make e2e`, or `cargo run -p kata-e2e --bin kata-e2e -- [filter…]`.
//!
//! Every scenario that runc can do runs on runc first, which proves the scenario; then on
//! us. `KATA_E2E_RUNTIME=runc` stops after the proof.

mod containerd;
mod cri;
mod ctl;
mod deploy;
mod docker;
mod failure;
mod forks;
mod kvm;
mod podman;
mod spares;
mod standalone;
mod templates;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use kata_e2e::arena::{self, Arena};
use kata_e2e::assets;
use kata_e2e::containerd::{Containerd, Programs};
use kata_e2e::docker::Docker;
use kata_e2e::leaks::Snapshot;
use kata_e2e::oci::Oci;
use kata_e2e::podman::Podman;
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
        for runtime in ["runc", "kata-runtime"] {
            Suites { selection: &selection, arena: None, threads: 1, tally: Tally::default() }
                .all(runtime, Path::new(""));
        }
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
    let threads = selection.threads;
    let mut suites = Suites { selection, arena: Some(arena), threads, tally: Tally::default() };
    let runtimes = assets::runtimes()?;
    let probe = assets::beside("kata-e2e-probe")?;
    if runtimes.contains(&"kata-runtime") {
        assets::install()?;
    }
    for runtime in runtimes {
        suites.all(runtime, &probe);
        if runtime == "kata-runtime" && selection.takes("install/uninstall_undoes_install") {
            let began = Instant::now();
            let result = guarded(uninstall_undoes_install);
            suites.tally.note("install/uninstall_undoes_install", began.elapsed(), &result);
        }
    }
    Ok(suites.tally)
}

/// What is run, or, without an arena, listed.
struct Suites<'a> {
    selection: &'a Selection,
    arena: Option<&'a Arena>,
    /// How many trials of a suite run at a time.
    threads: usize,
    tally: Tally,
}

impl Suites<'_> {
    /// All suites that make sense on this runtime.
    fn all(&mut self, runtime: &'static str, probe: &Path) {
        let named = |suite: &str| format!("{suite}/{runtime}");
        self.one(&named("standalone"), runtime, standalone::trials(), |arena| {
            Oci::new(arena, runtime, probe)
        });
        self.one(&named("docker"), runtime, docker::trials(), |arena| {
            Docker::start(arena, runtime, probe)
        });
        self.one(&named("podman"), runtime, podman::trials(), |arena| {
            Podman::start(arena, runtime, probe)
        });
        self.one(&named("containerd"), runtime, containerd::trials(), |arena| {
            Containerd::start(arena, runtime, probe, Programs::installed(), "")
        });
        self.one(&named("cri"), runtime, cri::trials(), |arena| {
            cri::start(arena, runtime, probe, cri::Daemon::Installed)
        });
        if runtime != "runc" {
            // The trials are the same, and proved.
            self.one(&named("cri2"), runtime, cri::trials_of_pods(), |arena| {
                cri::start(arena, runtime, probe, cri::Daemon::Two)
            });
            let trials = cri::trials_of_the_sandbox_api();
            self.one(&named("sandbox-api"), runtime, trials, |arena| {
                cri::start(arena, runtime, probe, cri::Daemon::SandboxApi)
            });
        }
        let threads = std::mem::replace(&mut self.threads, 1);
        self.one(&named("cri"), runtime, cri::lonely_trials(), |arena| {
            cri::start(arena, runtime, probe, cri::Daemon::Installed)
        });
        if runtime != "runc" {
            self.one(&named("sandbox-api"), runtime, cri::lonely_trials(), |arena| {
                cri::start(arena, runtime, probe, cri::Daemon::SandboxApi)
            });
        }
        self.one(&named("templates"), runtime, templates::trials(), |arena| {
            templates::start(arena, runtime, probe)
        });
        self.one(&named("templates"), runtime, forks::trials(), |arena| {
            templates::start(arena, runtime, probe)
        });
        self.one(&named("templates"), runtime, spares::trials(), |arena| {
            templates::start(arena, runtime, probe)
        });
        self.one(&named("deploy"), runtime, deploy::trials(), |arena| deploy::start(arena, probe));
        self.threads = threads;
        self.one(&named("failure"), runtime, failure::trials(), |arena| {
            Oci::new(arena, runtime, probe)
        });
        if kvm::is_expected() || self.arena.is_none() {
            self.one("kvm", runtime, kvm::trials(), |arena| {
                Docker::start_under_systemd(arena, runtime, probe)
            });
        }
        self.one("kata-ctl", runtime, ctl::trials(), |arena| Oci::new(arena, runtime, probe));
    }

    /// Sets the context up, runs the trials, tears down, and looks for what was left.
    fn one<C: Sync>(
        &mut self,
        name: &str,
        runtime: &str,
        mut trials: Vec<Trial<C>>,
        start: impl FnOnce(&Arena) -> Result<C>,
    ) {
        trials.retain(|trial| {
            self.selection.takes(&format!("{name}/{}", trial.name))
                && (trial.on == On::Both || runtime != "runc")
        });
        let Some(arena) = self.arena else {
            trials.iter().for_each(|trial| println!("{name}/{}", trial.name));
            return;
        };
        if trials.is_empty() {
            return;
        }
        let began = Instant::now();
        let mut before = None;
        let result = guarded(|| {
            before = Some(Snapshot::take(arena)?);
            let context = start(arena)?;
            let tries = if runtime == "runc" { 3 } else { 1 };
            self.tally += run(name, trials, &context, self.threads, tries);
            Ok(())
        });
        if result.is_err() {
            self.tally.note(&format!("{name}/can_be_set_up"), began.elapsed(), &result);
        }
        let began = Instant::now();
        let left = guarded(|| before.map_or(Ok(()), |before| before.expect_again(arena)));
        self.tally.note(&format!("{name}/leaves_nothing_behind"), began.elapsed(), &left);
    }
}

fn uninstall_undoes_install() -> Result<()> {
    assets::uninstall()?;
    for path in [assets::RUNTIME, assets::CTL, "/usr/share/kata-containers"] {
        anyhow::ensure!(!Path::new(path).exists(), "{path} is still there");
    }
    assets::install()
}
