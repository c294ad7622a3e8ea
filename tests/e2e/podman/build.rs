//! `podman build` and `buildah run`.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use kata_e2e::assets;
use kata_e2e::command::{self, run_with, words};
use kata_e2e::podman::{IMAGE, Podman};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Podman>> {
    trials!["build":
        Both: file_with_run_steps_is_built, failing_run_step_fails_the_build,
            buildah_runs_in_a_working_container;
    ]
}

fn runtime(podman: &Podman) -> &'static str {
    if podman.is_kata() { assets::RUNTIME } else { "/usr/sbin/runc" }
}

fn file_with_run_steps_is_built(podman: &Podman) -> Result<()> {
    let dir = podman.arena.dir(&podman.name())?;
    let text = format!(
        "FROM localhost/{IMAGE}\nCOPY greeting /greeting\nENV WHO=world\n\
         RUN echo \"$(cat /greeting) $WHO\" > /made && uname -r > /kernel\n\
         RUN chown -R 1000 /made\nUSER alice\nRUN id -un > /tmp/who\n\
         CMD [\"cat\", \"/made\", \"/tmp/who\", \"/kernel\"]\n"
    );
    fs::write(dir.join("Containerfile"), text)?;
    fs::write(dir.join("greeting"), "hello")?;
    let image = podman.name();
    let line = format!("build --isolation oci -t {image} {}", dir.display());
    run_with(&mut podman.client(&line), None, Duration::from_secs(300))?.expect_code(0)?;
    let seen = podman.ok(&format!("run --rm {} {image}", podman.parent()));
    podman.ok(&format!("rmi {image}"))?;
    let seen = words(&seen?);
    ensure!(seen[..3] == ["hello", "world", "alice"], "{seen:?}");
    let host = command::ok(Command::new("uname").arg("-r"))?.out();
    ensure!((seen[3] != host) == podman.is_kata(), "the steps ran on kernel {}", seen[3]);
    Ok(())
}

fn failing_run_step_fails_the_build(podman: &Podman) -> Result<()> {
    let dir = podman.arena.dir(&podman.name())?;
    let text = format!("FROM localhost/{IMAGE}\nRUN echo reason >&2; exit 42\n");
    fs::write(dir.join("Containerfile"), text)?;
    let output = podman.cmd(&format!("build --isolation oci {}", dir.display()))?;
    let said = output.out() + &output.err();
    ensure!(output.code != 0 && said.contains("reason") && said.contains("42"), "{output}");
    Ok(())
}

fn buildah_runs_in_a_working_container(podman: &Podman) -> Result<()> {
    let buildah = |line: &str| -> Result<String> {
        let mut command = Command::new("buildah");
        command.args(words(line)).env("HOME", &podman.arena.work);
        Ok(command::ok(&mut command)?.out())
    };
    let name = podman.name();
    buildah(&format!("from --name {name} localhost/{IMAGE}"))?;
    let result = (|| {
        let run = format!("run --isolation oci --runtime {} {name}", runtime(podman));
        let kernel = buildah(&format!("{run} uname -r"))?;
        let host = command::ok(Command::new("uname").arg("-r"))?.out();
        ensure!((kernel != host) == podman.is_kata(), "host {host}, container {kernel}");
        buildah(&format!("{run} sh -c 'echo made > /made'"))?;
        ensure!(buildah(&format!("{run} cat /made"))? == "made");
        Ok(())
    })();
    buildah(&format!("rm {name}"))?;
    result
}
