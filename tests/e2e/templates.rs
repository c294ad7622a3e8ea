//! Machines that are cloned from a template, under Docker.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use kata_e2e::arena::Arena;
use kata_e2e::assets::CTL;
use kata_e2e::command::{self, words};
use kata_e2e::docker::Docker;
use kata_e2e::http;
use kata_e2e::leaks;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

/// A Docker whose default runtime clones; its templates go with it.
pub struct Templates {
    pub docker: Docker,
    /// What the root file system of a bundle is made with.
    pub probe: PathBuf,
}

pub fn start(arena: &Arena, runtime: &'static str, probe: &Path) -> Result<Templates> {
    Ok(Templates { docker: Docker::start(arena, runtime, probe)?, probe: probe.to_owned() })
}

impl Drop for Templates {
    fn drop(&mut self) {
        // What it leaves is found by the suite's last trial.
        let _ = ctl("factory destroy").output();
    }
}

pub fn trials() -> Vec<Trial<Templates>> {
    trials!["clones":
        Kata: factory_makes_shows_and_forgets, template_is_made_beside_the_first_sandbox,
            clones_differ_in_all_that_must_differ, nothing_of_one_clone_is_seen_in_another,
            clone_serves_its_network, clone_announces_nothing,
            clone_takes_volumes_execs_and_terminals, clone_of_nine_p_shares_the_templates_pages,
            killed_factory_is_made_anew, unusable_template_is_one_warning_and_a_boot,
            trace_names_every_stage_of_a_start;
    ]
}

/// By the name of the runtime; see `CHOICES` of the harness.
const CLONE: &str = "--runtime kata-template";
const CLONE_9P: &str = "--runtime kata-template-9p";

pub fn ctl(line: &str) -> Command {
    let mut command = Command::new(CTL);
    command.args(words(line));
    command
}

pub fn status() -> Result<String> {
    Ok(command::ok(&mut ctl("factory status"))?.out())
}

/// The configuration file of one of the runtimes.
pub fn config(templates: &Templates, name: &str) -> String {
    templates.docker.arena.work.join(format!("{name}.toml")).display().to_string()
}

/// A template of this runtime's usual sandbox is there.
pub fn ready(templates: &Templates, name: &str) -> Result<()> {
    let line = format!("--config {} factory init", config(templates, name));
    let said = command::ok(&mut ctl(&line))?.out();
    ensure!(said.contains("ready"), "{said}");
    Ok(())
}

/// How many clones were made so far, of all templates.
fn clones() -> Result<u64> {
    let mut sum = 0;
    for line in status()?.lines().filter(|line| line.ends_with("ready")) {
        sum +=
            line.split_whitespace().rev().nth(2).context("a number of clones")?.parse::<u64>()?;
    }
    Ok(sum)
}

fn factory_makes_shows_and_forgets(templates: &Templates) -> Result<()> {
    ready(templates, "kata-template")?;
    // Once more changes nothing.
    ready(templates, "kata-template")?;
    ensure!(status()?.matches("ready").count() == 1, "{}", status()?);
    command::ok(&mut ctl("factory destroy"))?;
    ensure!(status()?.starts_with("no templates"), "{}", status()?);
    command::eventually("the factory has ended", Duration::from_secs(10), || {
        Ok(leaks::processes_named("kata-factory")?.is_empty())
    })?;
    let off = command::run(&mut ctl("factory init"))?.expect_code(125)?;
    ensure!(off.err().contains("enable_template = true"), "{off}");
    Ok(())
}

fn template_is_made_beside_the_first_sandbox(templates: &Templates) -> Result<()> {
    command::ok(&mut ctl("factory destroy"))?;
    ensure!(templates.docker.sh(CLONE, "echo booted")? == "booted");
    command::eventually("the template is there", Duration::from_secs(60), || {
        Ok(status()?.contains("ready"))
    })?;
    // And the machine that stands still, which is a clone, too.
    ready(templates, "kata-template")?;
    let before = clones()?;
    ensure!(templates.docker.sh(CLONE, "echo cloned")? == "cloned");
    ensure!(clones()? == before + 1, "{}", status()?);
    Ok(())
}

/// A hundred with `KATA_E2E_CLONES=100`.
fn clones_differ_in_all_that_must_differ(templates: &Templates) -> Result<()> {
    let number = std::env::var("KATA_E2E_CLONES").ok().and_then(|n| n.parse().ok()).unwrap_or(6);
    ready(templates, "kata-template")?;
    let before = clones()?;
    let script = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname; \
        od -An -tx1 -N16 /dev/urandom; mktemp -u; date +%s";
    // Docker gives a hardware address again once it is free, so that one may come twice.
    const DIFFERENT: [&str; 5] = ["boot id", "uuid", "host name", "random bytes", "file name"];
    let mut seen = vec![BTreeSet::new(); DIFFERENT.len()];
    for _ in 0..number {
        let said = templates.docker.sh(CLONE, script)?;
        let lines: Vec<&str> = said.lines().collect();
        ensure!(lines.len() == DIFFERENT.len() + 1, "{said}");
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let clock: u64 = lines[DIFFERENT.len()].parse()?;
        ensure!(now.abs_diff(clock) <= 5, "it is {now}, the clone says {clock}");
        for (what, line) in seen.iter_mut().zip(&lines) {
            what.insert((*line).to_owned());
        }
    }
    ensure!(clones()? == before + number as u64, "not all were clones: {}", status()?);
    for (what, values) in DIFFERENT.iter().zip(&seen) {
        ensure!(values.len() == number, "{what}: {values:?}");
    }
    Ok(())
}

fn nothing_of_one_clone_is_seen_in_another(templates: &Templates) -> Result<()> {
    for (runtime, name) in [(CLONE, "kata-template"), (CLONE_9P, "kata-template-9p")] {
        ready(templates, name)?;
        let docker = &templates.docker;
        let secret = "echo a-secret-of-the-first > /dev/shm/secret; hostname the-first; \
            sysctl -w kernel.domainname=the-first; ip link set lo mtu 1400";
        docker.sh(&format!("{runtime} --privileged"), secret)?;
        let other = docker.sh(
            &format!("{runtime} --privileged"),
            "ls /dev/shm; sysctl -n kernel.domainname; cat /sys/class/net/lo/mtu; \
             dmesg | grep -c a-secret || true",
        )?;
        ensure!(other == "(none)\n65536\n0", "{other}");
    }
    Ok(())
}

fn clone_serves_its_network(templates: &Templates) -> Result<()> {
    ready(templates, "kata-template")?;
    let docker = &templates.docker;
    let before = clones()?;
    let server = docker.detached(&format!("{CLONE} -p 80"), "httpd -f -p 80 -h /var/www")?;
    let other = docker.sleeper(CLONE)?;
    ensure!(clones()? == before + 2, "{}", status()?);
    let port = docker.ok(&format!("port {} 80", server.name))?;
    let port = port.lines().next().and_then(|line| line.rsplit(':').next()).context("a port")?;
    let page = http::page(&format!("127.0.0.1:{port}"))?;
    ensure!(page.ends_with("hello from the image\n"), "{page}");
    let address = server.address("bridge")?;
    let seen = other.exec(&format!("fetch http://{address}/"))?;
    ensure!(seen == "hello from the image", "{seen}");
    let net = docker.name();
    docker.ok(&format!("network create {net}"))?;
    docker.ok(&format!("network connect {net} {}", other.name))?;
    command::eventually("the second network is there", Duration::from_secs(30), || {
        Ok(other.exec("ls /sys/class/net")?.contains("eth1"))
    })?;
    docker.ok(&format!("network disconnect {net} {}", other.name))?;
    docker.ok(&format!("network rm {net}")).map(drop)
}

/// A restored machine tells the network where it is, and has the guest do so, unless told not
/// to: with the address of its template, and with a guest that hangs when its NIC is closed
/// meanwhile.
fn clone_announces_nothing(templates: &Templates) -> Result<()> {
    // The rounds last a second.
    let script = "sleep 2; nic=$(basename $(readlink /sys/class/net/eth0/device)); \
        grep $nic- /proc/interrupts";
    for (runtime, name) in [(CLONE, "kata-template"), (CLONE_9P, "kata-template-9p")] {
        ready(templates, name)?;
        let before = clones()?;
        let seen = templates.docker.sh(runtime, script)?;
        ensure!(clones()? == before + 1, "{}", status()?);
        let config = seen.lines().find(|line| line.contains("-config")).context(seen.clone())?;
        ensure!(config.split_ascii_whitespace().nth(1) == Some("0"), "{seen}");
    }
    Ok(())
}

fn clone_takes_volumes_execs_and_terminals(templates: &Templates) -> Result<()> {
    for (runtime, name) in [(CLONE, "kata-template"), (CLONE_9P, "kata-template-9p")] {
        ready(templates, name)?;
        let docker = &templates.docker;
        let dir = docker.arena.dir(&docker.name())?;
        fs::write(dir.join("in"), "from the host\n")?;
        let container = docker.sleeper(&format!("{runtime} -v {}:/data", dir.display()))?;
        ensure!(container.exec("cat /data/in; echo out > /data/out")? == "from the host");
        ensure!(fs::read_to_string(dir.join("out"))? == "out\n");
        let tty = docker.ok(&format!("exec -t {} tty", container.name))?;
        ensure!(tty.trim_end() == "/dev/pts/0", "{tty}");
        // A clone that was paused goes on, and a stopped one starts again.
        docker.ok(&format!("pause {}", container.name))?;
        docker.ok(&format!("unpause {}", container.name))?;
        docker.ok(&format!("restart -t 0 {}", container.name))?;
        ensure!(container.exec("cat /data/out")? == "out");
    }
    Ok(())
}

/// What two clones have read of their template is in the host's memory once.
fn clone_of_nine_p_shares_the_templates_pages(templates: &Templates) -> Result<()> {
    ready(templates, "kata-template-9p")?;
    let docker = &templates.docker;
    let (one, _other) = (docker.sleeper(CLONE_9P)?, docker.sleeper(CLONE_9P)?);
    let id = docker.ok(&format!("inspect --format '{{{{.Id}}}}' {}", one.name))?;
    let pids = leaks::processes_of(&id, leaks::Part::Hypervisor)?;
    ensure!(pids.len() == 1, "{pids:?}");
    let maps = fs::read_to_string(format!("/proc/{}/smaps", pids[0]))?;
    let memory = maps.split("kata-guest-memory").nth(1).context("the guest's memory")?;
    let kib = |what: &str| -> Result<u64> {
        let line = memory.lines().find(|line| line.starts_with(what)).context("a number")?;
        Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
    };
    // The kernel counts pages of a memfd as dirty, whoever wrote them.
    let (shared, own) = (kib("Shared_Dirty:")?, kib("Private_Dirty:")?);
    // It has mapped what it has touched; a guest that boots has some 30 MiB of its own.
    ensure!(shared > 1 << 10 && own < 8 << 10, "{shared} KiB are shared, {own} are its own");
    Ok(())
}

fn killed_factory_is_made_anew(templates: &Templates) -> Result<()> {
    ready(templates, "kata-template")?;
    let container = templates.docker.sleeper(CLONE)?;
    let pids = leaks::processes_named("kata-factory")?;
    ensure!(pids.len() == 1, "{pids:?}");
    leaks::kill_and_wait(&pids)?;
    ensure!(container.exec("echo still here")? == "still here");
    ensure!(status()?.starts_with("no templates"), "{}", status()?);
    ensure!(templates.docker.sh(CLONE, "echo booted")? == "booted");
    ready(templates, "kata-template")
}

fn unusable_template_is_one_warning_and_a_boot(templates: &Templates) -> Result<()> {
    let container = templates.docker.sleeper("--runtime kata-template-microvm")?;
    let id = templates.docker.ok(&format!("inspect --format '{{{{.Id}}}}' {}", container.name))?;
    let log = fs::read_to_string(format!("/run/kata-containers/{id}/server.log"))?;
    let warnings = log.lines().filter(|line| line.contains("WARN")).collect::<Vec<_>>();
    ensure!(warnings.len() == 1 && warnings[0].contains("microvm"), "{warnings:#?}");
    ensure!(container.exec("echo booted")? == "booted");
    Ok(())
}

fn trace_names_every_stage_of_a_start(templates: &Templates) -> Result<()> {
    ready(templates, "kata-template")?;
    let clone = templates.docker.sleeper(CLONE)?;
    let id = templates.docker.ok(&format!("inspect --format '{{{{.Id}}}}' {}", clone.name))?;
    let table = command::ok(&mut ctl(&format!("trace {}", &id[..12])))?.out();
    let stages = [
        "share started",
        "monitor forked",
        "memory copied",
        "agent ready",
        "share mounted",
        "container created",
        "container started",
    ];
    let mut rest = table.as_str();
    for stage in stages {
        rest = rest.split_once(stage).with_context(|| format!("{stage}, in order:\n{table}"))?.1;
    }
    let spans = command::ok(&mut ctl(&format!("trace --otlp {id}")))?.out();
    let spans: serde_json::Value = serde_json::from_str(&spans)?;
    let spans = spans["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().context("spans")?;
    ensure!(spans.len() == table.lines().count(), "{spans:#?}");
    let none = command::run(&mut ctl("trace nosuchsandbox"))?.expect_code(125)?;
    ensure!(none.err().contains("no sandbox begins with"), "{none}");
    Ok(())
}
