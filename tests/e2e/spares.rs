//! Machines that wait for a sandbox, under Docker.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE, words};
use kata_e2e::http;
use kata_e2e::leaks;
use kata_e2e::oci::{Bundle, Oci};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::json;

use super::templates::{Templates, config, ctl, ready, status};

pub fn trials() -> Vec<Trial<Templates>> {
    trials!["spares":
        Kata: sandbox_takes_a_spare_and_another_is_made, sandboxes_from_spares_differ,
            spare_serves_network_volumes_and_terminals, spare_without_a_network_has_none,
            sandbox_with_a_limit_takes_none,
            network_that_a_hook_makes_is_there, failing_hook_leaves_nothing_of_a_spare,
            killed_spare_is_made_anew, spares_end_with_the_factory,
            what_all_killed_leave_is_undone_by_the_next,
            sandbox_that_never_starts_keeps_no_other_from_a_spare;
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

/// Bundles whose sandboxes take spares.
fn bundles(templates: &Templates) -> Result<Oci> {
    let mut oci = Oci::new(&templates.docker.arena, "kata-runtime", &templates.probe)?;
    oci.flags = format!("--config {}", config(templates, POOL));
    Ok(oci)
}

pub(super) fn with_hook<'a>(bundle: Bundle<'a>, kind: &str, script: &str) -> Result<Bundle<'a>> {
    let path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
    let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": [path] });
    bundle.with(|spec| spec["hooks"] = json!({ kind: [hook] }))
}

/// The guest makes the container while the hook runs.
fn network_that_a_hook_makes_is_there(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let oci = bundles(templates)?;
    let script = "pid=$(sed -E 's/.*\"pid\": ?([0-9]+).*/\\1/'); sleep 1; \
        ip link add ve$pid type veth peer name eth7 netns $pid && \
        nsenter -t $pid -n ip addr add 10.98.8.6/24 dev eth7 && \
        nsenter -t $pid -n ip link set eth7 up && ip link set ve$pid up";
    let bundle = with_hook(oci.bundle("ip -4 -o addr; exec sleep 100000")?, "prestart", script)?;
    bundle.start()?;
    let trace = command::ok(&mut ctl(&format!("trace {}", bundle.id)))?.out();
    ensure!(trace.contains("hooks and container"), "{trace}");
    command::eventually("the container has the interface", PATIENCE, || {
        let seen = bundle.stdout()?;
        Ok(seen.contains("10.98.8.6/24") && seen.contains("127.0.0.1/8"))
    })
}

fn failing_hook_leaves_nothing_of_a_spare(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let spares = leaks::processes_named("kata-sandbox (spare)")?;
    let oci = bundles(templates)?;
    let script = "sleep 1; echo the reason >&2; exit 3";
    let bundle = with_hook(oci.bundle("true")?, "createRuntime", script)?;
    let output = bundle.create()?;
    ensure!(output.code == 1 && output.err().contains("the reason"), "{output}");
    ensure!(bundle.verb("state")?.code != 0, "a container is left");
    let directory = Path::new("/run/kata-containers").join(&bundle.id);
    ensure!(!directory.exists(), "{} is left", directory.display());
    filled(templates)?;
    ensure!(leaks::processes_named("kata-sandbox (spare)")? != spares, "no spare was taken");
    Ok(())
}

/// The spare has a NIC, with which it has rehearsed.
fn spare_without_a_network_has_none(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let container = templates.docker.sleeper(&format!("{TAKE} --network none"))?;
    ensure!(taken(templates, &container.name)?, "it was started");
    let seen = container.exec("ls /sys/class/net; ip route")?;
    ensure!(seen == "lo", "{seen}");
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
    Ok(())
}

/// Directories of spares.
fn directories() -> Result<usize> {
    let names = std::fs::read_dir("/run/kata-containers")?;
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with("spare+")).count())
}

fn what_all_killed_leave_is_undone_by_the_next(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let factory = leaks::processes_named("kata-factory")?;
    // So that none can undo what another leaves.
    for pid in &factory {
        command::ok(std::process::Command::new("kill").args(["-STOP", &pid.to_string()]))?;
    }
    leaks::kill_and_wait(&leaks::processes_named("kata-sandbox (spare)")?)?;
    leaks::kill_and_wait(&factory)?;
    command::eventually("the factory is gone", Duration::from_secs(10), || {
        Ok(command::run(&mut ctl("factory status"))?.out().starts_with("no templates"))
    })?;
    ensure!(directories()? == WANTED, "{} directories are left", directories()?);
    filled(templates)?;
    ensure!(directories()? == WANTED, "{} directories there are now", directories()?);
    command::ok(&mut ctl("factory destroy"))?;
    command::eventually("nothing is left", Duration::from_secs(10), || Ok(directories()? == 0))
}

fn sandbox_that_never_starts_keeps_no_other_from_a_spare(templates: &Templates) -> Result<()> {
    filled(templates)?;
    let bundle = templates.docker.arena.dir("never-started")?;
    kata_e2e::images::busybox_rootfs(
        &bundle.join("rootfs"),
        &kata_e2e::assets::beside("kata-e2e-probe")?,
    )?;
    let runtime = |line: &str| {
        let mut command = std::process::Command::new(kata_e2e::assets::RUNTIME);
        command.arg("--config").arg(config(templates, POOL)).args(words(line));
        command.current_dir(&bundle).stdin(std::process::Stdio::null());
        command
    };
    command::ok(&mut runtime("spec"))?;
    let text = std::fs::read_to_string(bundle.join("config.json"))?;
    std::fs::write(
        bundle.join("config.json"),
        text.replace("\"terminal\": true", "\"terminal\": false"),
    )?;
    let null = || std::process::Stdio::null();
    let created = runtime("create never").stdout(null()).stderr(null()).status()?;
    ensure!(created.success(), "{created}");
    let again = filled(templates);
    command::ok(&mut runtime("delete --force never"))?;
    again
}
