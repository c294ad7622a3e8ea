//! Machines that wait for a sandbox, under Docker.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::http;
use kata_e2e::leaks;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::templates::{Templates, config, ctl, ready, status};

pub fn trials() -> Vec<Trial<Templates>> {
    trials!["spares":
        Kata: sandbox_takes_a_spare_and_another_is_made, sandboxes_from_spares_differ,
            spare_serves_network_volumes_and_terminals, sandbox_with_a_limit_takes_none,
            killed_spare_is_made_anew, spares_end_with_the_factory;
    ]
}

const POOL: &str = "kata-pool";
const TAKE: &str = "--runtime kata-pool";
/// As the configuration of the harness says.
const WANTED: usize = 2;

/// All spares are there.
fn filled(templates: &Templates) -> Result<()> {
    ready(templates, POOL)?;
    command::eventually("the spares are there", PATIENCE, || {
        Ok(status()?.contains(&format!("{WANTED}/{WANTED}")))
    })
}

/// A running container, and whether its sandbox was a spare.
fn taken(templates: &Templates, name: &str) -> Result<bool> {
    let id = templates.docker.ok(&format!("inspect --format '{{{{.Id}}}}' {name}"))?;
    Ok(command::ok(&mut ctl(&format!("trace {id}")))?.out().contains("spare taken over"))
}

fn sandbox_takes_a_spare_and_another_is_made(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let spares: BTreeSet<i32> =
        leaks::processes_named("kata-sandbox (spare)")?.into_iter().collect();
    ensure!(spares.len() == WANTED, "{spares:?}");
    let container = templates.docker.sleeper(TAKE)?;
    ensure!(taken(templates, &container.name)?, "it was started");
    ensure!(container.exec("hostname; ls /sys/class/net")?.lines().count() == 3);
    filled(templates)?;
    drop(container);
    let later: BTreeSet<i32> =
        leaks::processes_named("kata-sandbox (spare)")?.into_iter().collect();
    ensure!(later.len() == WANTED && later != spares, "{spares:?}, then {later:?}");
    Ok(())
}

fn sandboxes_from_spares_differ(templates: &Templates) -> Result<()> {
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname; \
        od -An -tx1 -N16 /dev/urandom; date +%s";
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        filled(templates)?;
        let said = templates.docker.sh(TAKE, script)?;
        let (differ, clock) = said.rsplit_once('\n').context("a time")?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(clock.parse()?) <= 5, "it is {now}, the guest says {clock}");
        for line in differ.lines() {
            ensure!(seen.insert(line.to_owned()), "{line} came twice");
        }
    }
    Ok(())
}

fn spare_serves_network_volumes_and_terminals(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let dir = templates.docker.arena.dir("spare-volume")?;
    let options = format!("{TAKE} -p 18099:80 -v {}:/v", dir.display());
    let server = templates.docker.detached(&options, "httpd -f -p 80 -h /var/www")?;
    ensure!(taken(templates, &server.name)?);
    let seen = http::page("127.0.0.1:18099")?;
    ensure!(seen.ends_with("hello from the image\n"), "{seen}");
    server.exec("echo kept > /v/f")?;
    ensure!(std::fs::read_to_string(dir.join("f"))? == "kept\n");
    let terminal = templates.docker.cmd(&format!("exec -t {} tty", server.name))?.expect_code(0)?;
    ensure!(terminal.out().starts_with("/dev/pts/"), "{terminal}");
    Ok(())
}

fn sandbox_with_a_limit_takes_none(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let container = templates.docker.sleeper(&format!("{TAKE} --memory 4g"))?;
    ensure!(!taken(templates, &container.name)?, "it has another size");
    ensure!(container.exec("echo up")? == "up");
    Ok(())
}

fn killed_spare_is_made_anew(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let spares = leaks::processes_named("kata-sandbox (spare)")?;
    leaks::kill_and_wait(&spares[..1])?;
    let replaced = || -> Result<bool> {
        let now = leaks::processes_named("kata-sandbox (spare)")?;
        Ok(now.len() == WANTED && now != spares && status()?.contains("2/2"))
    };
    command::eventually("another spare is there", PATIENCE, replaced)?;
    ensure!(templates.docker.sh(TAKE, "echo up")? == "up");
    Ok(())
}

fn spares_end_with_the_factory(templates: &Templates) -> Result<()> {
    filled(templates)?;
    command::ok(&mut ctl("factory destroy"))?;
    command::eventually("no spare is left", Duration::from_secs(10), || {
        Ok(leaks::processes_named("kata-sandbox (spare)")?.is_empty())
    })?;
    ensure!(templates.docker.sh(TAKE, "echo started")? == "started");
    let text = std::fs::read_to_string(config(templates, POOL))?;
    ensure!(text.contains("vm_cache_number"), "{text}");
    Ok(())
}
