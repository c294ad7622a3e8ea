//! `docker build` with steps that run.

use std::fs;

use anyhow::{Result, ensure};
use kata_e2e::command::{run_with, words};
use kata_e2e::docker::Docker;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["build": Both: dockerfile_with_run_steps_is_built, failing_run_step_fails_the_build]
}

fn dockerfile_with_run_steps_is_built(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let text = "FROM busybox\nCOPY greeting /greeting\nENV WHO=world\n\
        RUN echo \"$(cat /greeting) $WHO\" > /made && mkdir -p /a/b && chown -R 1000 /a\n\
        RUN adduser -D bob 2>/dev/null || echo 'bob:x:1001:1001::/:/bin/sh' >> /etc/passwd\n\
        USER bob\nWORKDIR /a\nRUN id -un > /tmp/who\nCMD [\"cat\", \"/made\", \"/tmp/who\"]\n";
    fs::write(dir.join("Dockerfile"), text)?;
    fs::write(dir.join("greeting"), "hello")?;
    let image = docker.name();
    let mut client = docker.client(&format!("build -t {image} {}", dir.display()));
    run_with(&mut client, None, std::time::Duration::from_secs(300))?.expect_code(0)?;
    let seen = docker.ok(&format!("run --rm {image}"));
    docker.ok(&format!("rmi {image}"))?;
    let seen = seen?;
    ensure!(words(&seen) == ["hello", "world", "bob"], "{seen}");
    Ok(())
}

fn failing_run_step_fails_the_build(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    fs::write(dir.join("Dockerfile"), "FROM busybox\nRUN echo reason >&2; exit 42\n")?;
    let output = docker.cmd(&format!("build {}", dir.display()))?;
    let said = output.out() + &output.err();
    ensure!(output.code != 0 && said.contains("reason") && said.contains("42"), "{output}");
    Ok(())
}
