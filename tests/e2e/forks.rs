//! Machines that are forked from one that stands still, under Docker.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, words};
use kata_e2e::docker::Container;
use kata_e2e::leaks::{self, Part};
use kata_e2e::oci::Oci;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::spares::with_hook;
use super::templates::{Templates, config, ctl, ready, status};

pub fn trials() -> Vec<Trial<Templates>> {
    trials!["forks":
        Kata: sandbox_is_forked_into_a_jail_of_its_own,
            fork_has_the_settings_of_a_machine_that_booted,
            fork_has_the_networks_it_is_given_and_no_other,
            hook_finds_a_forks_processes_in_its_cgroup, many_at_once_are_forked,
            fork_by_nine_p_has_the_owners_of_files, fork_copies_what_it_touches,
            fork_copies_all_where_the_kernel_does_not_tell,
            fork_grows_as_far_as_its_share_can_follow, killed_server_takes_its_fork_along,
            killed_fork_is_told_and_leaves_nothing, stem_stays_as_long_as_its_forks,
            killed_stem_ends_its_forks_and_machines_are_cloned;
    ]
}

/// The runtimes of the harness that have a template, and how a sandbox gets one.
const KINDS: [(&str, &str); 2] = [
    ("kata-template", "--runtime kata-template"),
    ("kata-template-9p", "--runtime kata-template-9p"),
];
/// What holds a machine that stands still.
const STEM: &str = "kata-stem";

fn id(templates: &Templates, name: &str) -> Result<String> {
    templates.docker.ok(&format!("inspect --format '{{{{.Id}}}}' {name}"))
}

/// The monitor of a container.
fn monitor(templates: &Templates, container: &Container<'_>) -> Result<i32> {
    let pids = leaks::processes_of(&id(templates, &container.name)?, Part::Hypervisor)?;
    ensure!(pids.len() == 1, "{pids:?}");
    Ok(pids[0])
}

/// How a container's machine came to life.
fn trace(templates: &Templates, container: &Container<'_>) -> Result<String> {
    let line = format!("trace {}", id(templates, &container.name)?);
    Ok(command::ok(&mut ctl(&line))?.out())
}

fn forked<'a>(templates: &'a Templates, options: &str) -> Result<Container<'a>> {
    let container = templates.docker.sleeper(options)?;
    let trace = trace(templates, &container)?;
    ensure!(trace.contains("monitor forked"), "it was not forked:\n{trace}");
    Ok(container)
}

/// Two forks and their stem share no namespace in which they could meet, have no rights but
/// those over files, and cannot look into each other.
fn sandbox_is_forked_into_a_jail_of_its_own(templates: &Templates) -> Result<()> {
    for (name, options) in KINDS {
        ready(templates, name)?;
        ensure!(status()?.contains("yes"), "{}", status()?);
        let containers = [forked(templates, options)?, forked(templates, options)?];
        let mut pids =
            vec![monitor(templates, &containers[0])?, monitor(templates, &containers[1])?];
        for pid in &pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let value = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key));
                line.map(|value| value.trim().to_owned()).context(status.clone())
            };
            let rights =
                if options.ends_with("9p") { "000000008000001b" } else { "0000000000000000" };
            ensure!(value("CapPrm:")? == rights && value("CapEff:")? == rights, "{status}");
            ensure!(value("Seccomp:")? == "2" && value("NoNewPrivs:")? == "1", "{status}");
            ensure!(value("TracerPid:")? == "0", "{status}");
            ensure!(value("THP_enabled:")? == "0", "it may take large pages: {status}");
            let user: u32 = value("Uid:")?.split_whitespace().next().context("a user")?.parse()?;
            ensure!(user != 0, "{status}");
            // The kernel shows root's what its own user may not see either.
            ensure!(
                fs::metadata(format!("/proc/{pid}/environ"))?.uid() == 0,
                "{pid} can be dumped"
            );
            let seen = fs::read_dir(format!("/proc/{pid}/root/proc"))?.flatten();
            let seen = seen.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
            ensure!(seen.eq([1]), "{pid} sees others");
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            ensure!(cgroup.contains(&templates.docker.arena.name), "{cgroup}");
        }
        let stem = leaks::processes_of("sandbox-stem", Part::Hypervisor)?;
        ensure!(stem.len() == 1, "{stem:?}");
        // Of what made it nothing else is left.
        let keeper = leaks::processes_named(STEM)?[0];
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        ensure!(children.trim() == stem[0].to_string(), "{children}");
        pids.extend(stem);
        for kind in ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"] {
            let link = |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
            let different = pids.iter().map(link).collect::<Result<BTreeSet<_>, _>>()?;
            ensure!(different.len() == 3, "{kind}: {different:?}");
        }
        // Nor would one of them be let into another that it sees.
        let [one, _] = [pids[0], pids[1]];
        let user = fs::read_to_string(format!("/proc/{one}/status"))?;
        let user = user.lines().find_map(|line| line.strip_prefix("Uid:")).context("a user")?;
        let user = user.split_whitespace().next().context("a user")?;
        let line = format!(
            "nsenter -t {one} -p setpriv --reuid {user} --clear-groups --inh-caps=-all \
             --bounding-set=-all cat /proc/{}/environ",
            pids[1]
        );
        let words = words(&line);
        let mut look = std::process::Command::new(&words[0]);
        let refused = command::run(look.args(&words[1..]))?;
        ensure!(refused.err().contains("Permission denied"), "{refused}");
        command::ok(&mut ctl("factory destroy"))?;
    }
    Ok(())
}

/// What the stem has rehearsed leaves no setting behind: a container that asks for none has the
/// kernel's. The reserve for users is a part of what is free while a kernel boots, and it is another
/// machine that boots.
fn fork_has_the_settings_of_a_machine_that_booted(templates: &Templates) -> Result<()> {
    const SCRIPT: &str = "cd /proc/sys; grep -rs '' net kernel vm \
        | grep -v -e /random/ -e user_reserve_kbytes | sort; echo all; exec sleep 100000";
    let settings = |flags: String, stage: &str| {
        let mut oci = Oci::new(&templates.docker.arena, "kata-runtime", &templates.probe)?;
        oci.flags = flags;
        let bundle = oci.bundle(SCRIPT)?;
        bundle.start()?;
        let trace = command::ok(&mut ctl(&format!("trace {}", bundle.id)))?.out();
        ensure!(trace.contains(stage), "{stage}:\n{trace}");
        command::eventually("all settings", Duration::from_secs(60), || {
            Ok(bundle.stdout()?.ends_with("\nall"))
        })?;
        bundle.stdout()
    };
    let booted = settings(String::new(), "share attached")?;
    ensure!(booted.contains("ip_unprivileged_port_start:1024"), "{booted}");
    for (name, _) in KINDS {
        ready(templates, name)?;
        let forked = settings(format!("--config {}", config(templates, name)), "monitor forked")?;
        let changed: Vec<_> = forked.lines().zip(booted.lines()).filter(|(a, b)| a != b).collect();
        ensure!(changed.is_empty() && forked.len() == booted.len(), "{name}: {changed:?}");
    }
    Ok(())
}

/// The NIC that the stem has rehearsed with shows nothing of that, and is not to be seen where there
/// is no network.
fn fork_has_the_networks_it_is_given_and_no_other(templates: &Templates) -> Result<()> {
    const ADDRESSES: &str = "ip -o addr | awk '{ print $2, $4 }'; ip route | wc -l";
    for (name, options) in KINDS {
        ready(templates, name)?;
        let none = forked(templates, &format!("{options} --network none"))?;
        ensure!(none.exec("ls /sys/class/net")? == "lo");
        let seen = none.exec(ADDRESSES)?;
        ensure!(seen.lines().all(|line| line.starts_with("lo ") || line == "0"), "{seen}");
        let one = forked(templates, options)?;
        let seen = one.exec(&format!("ls /sys/class/net; {ADDRESSES}"))?;
        let address = one.address("bridge")?;
        ensure!(seen.starts_with("eth0\nlo\n") && seen.contains(&address), "{seen}");
        let of_eth0 = |line: &&str| line.starts_with("eth0 ") && !line.contains("fe80:");
        ensure!(seen.lines().filter(of_eth0).count() == 1 && seen.ends_with("\n2"), "{seen}");
    }
    Ok(())
}

/// They are moved while the machine is made.
fn hook_finds_a_forks_processes_in_its_cgroup(templates: &Templates) -> Result<()> {
    const SCRIPT: &str = "pid=$(sed -E 's/.*\"pid\": ?([0-9]+).*/\\1/'); \
        group=$(awk -F: '$2 == \"memory\" || $2 == \"\" { print $3; exit }' /proc/$pid/cgroup); \
        procs=$(ls -d /sys/fs/cgroup/memory$group /sys/fs/cgroup$group 2>/dev/null | head -n1); \
        { echo $group; cat $procs/cgroup.procs; }";
    for (name, _) in KINDS {
        ready(templates, name)?;
        let mut oci = Oci::new(&templates.docker.arena, "kata-runtime", &templates.probe)?;
        oci.flags = format!("--config {}", config(templates, name));
        let bundle = oci.bundle("exec sleep 100000")?;
        let seen = bundle.dir.join("seen");
        let script = format!("{SCRIPT} > {}", seen.display());
        let bundle = with_hook(bundle, "createRuntime", &script)?;
        bundle.start()?;
        let trace = command::ok(&mut ctl(&format!("trace {}", bundle.id)))?.out();
        ensure!(trace.contains("monitor forked"), "it was not forked:\n{trace}");
        let seen = fs::read_to_string(seen)?;
        let (group, procs) = seen.split_once('\n').context("a cgroup")?;
        ensure!(group.ends_with(&bundle.id), "{seen}");
        let procs: BTreeSet<i32> = procs.lines().filter_map(|pid| pid.parse().ok()).collect();
        let mut wanted = leaks::processes_named(&format!("kata-sandbox {}", bundle.id))?;
        wanted.extend(leaks::processes_of(&bundle.id, Part::Hypervisor)?);
        wanted.push(bundle.pid()?);
        ensure!(wanted.len() == 3, "{wanted:?}");
        ensure!(wanted.iter().all(|pid| procs.contains(pid)), "{wanted:?} in {seen}");
    }
    Ok(())
}

fn many_at_once_are_forked(templates: &Templates) -> Result<()> {
    const MANY: usize = 8;
    for (name, options) in KINDS {
        ready(templates, name)?;
        let line = format!("{options} --network none");
        let said = std::thread::scope(|scope| {
            let run = |number: usize| {
                let line = &line;
                scope.spawn(move || {
                    templates
                        .docker
                        .sh(line, &format!("echo {number}; cat /proc/sys/kernel/random/boot_id"))
                })
            };
            let runs: Vec<_> = (0..MANY).map(run).collect();
            runs.into_iter()
                .map(|run| run.join().map_err(|_| anyhow::anyhow!("it panicked"))?)
                .collect::<Result<BTreeSet<_>>>()
        })?;
        let boots: BTreeSet<&str> = said.iter().filter_map(|said| said.lines().nth(1)).collect();
        ensure!(said.len() == MANY && boots.len() == MANY, "{said:?}");
        command::ok(&mut ctl("factory destroy"))?;
    }
    Ok(())
}

/// What root may do to files it may do in a fork as well. What one fork has mounted is not seen
/// in another.
fn fork_by_nine_p_has_the_owners_of_files(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[1];
    ready(templates, name)?;
    let one = forked(templates, options)?;
    let said = one.exec(
        "touch /f && chown 1234:5678 /f && chmod 4751 /f && stat -c '%u %g %a' /f; \
         ln -s f /l && readlink /l; mkdir -m 700 /d && chown 99 /d && touch /d/f && stat -c %u /d/f",
    )?;
    ensure!(said == "1234 5678 4751\nf\n0", "{said}");
    let shared = |container: &Container<'_>| -> Result<Vec<String>> {
        let pid = monitor(templates, container)?;
        let names = fs::read_dir(format!("/proc/{pid}/root/share"))?;
        Ok(names.flatten().map(|name| name.file_name().to_string_lossy().into_owned()).collect())
    };
    let other = forked(templates, options)?;
    let (ours, theirs) = (shared(&one)?, shared(&other)?);
    ensure!(
        !ours.is_empty() && ours.iter().all(|name| !theirs.contains(name)),
        "{ours:?} {theirs:?}"
    );
    // It lives on as its stem's share does when the last thing in it goes.
    drop(one);
    ensure!(forked(templates, options)?.exec("cat /f 2>/dev/null; echo none")? == "none");
    Ok(())
}

/// By virtio-fs the memory is the fork's own, and holds what guest and share have touched.
fn fork_copies_what_it_touches(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[0];
    ready(templates, name)?;
    let out = templates.docker.arena.dir("fork-touched")?;
    let container = forked(templates, &format!("{options} -v {}:/out", out.display()))?;
    let pid = monitor(templates, &container)?;
    let idle = held(pid)?;
    ensure!((1..16).contains(&idle), "{idle} MiB were copied");
    // Its monitor has no part in it that a guest could use.
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = fs::read_link(entry?.path())?;
        ensure!(!link.to_string_lossy().contains("userfaultfd"), "{}", link.display());
    }
    // What it takes into use is the same for it and for what serves its files.
    same_outside(&container, &out)?;
    ensure!(held(pid)? >= idle + 60);
    Ok(())
}

/// MiB that the host has of the memory of this monitor's guest.
fn held(pid: i32) -> Result<u64> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path)?.to_string_lossy().contains("memfd:kata-guest-memory") {
            return Ok(fs::metadata(&path)?.blocks() * 512 / (1 << 20));
        }
    }
    anyhow::bail!("the guest has no memory")
}

/// As on a host before Linux 6.1.
fn fork_copies_all_where_the_kernel_does_not_tell(templates: &Templates) -> Result<()> {
    const DEVICE: &str = "/dev/userfaultfd";
    let (name, options) = KINDS[0];
    ready(templates, name)?;
    let command = |line: &str| {
        let words = words(line);
        command::ok(std::process::Command::new(&words[0]).args(&words[1..]))
    };
    command(&format!("mount --bind /dev/null {DEVICE}"))?;
    let out = templates.docker.arena.dir("fork-copied")?;
    let container = forked(templates, &format!("{options} -v {}:/out", out.display()));
    command(&format!("umount {DEVICE}"))?;
    let container = container?;
    let held = held(monitor(templates, &container)?)?;
    ensure!(held > 20, "only {held} MiB were copied");
    same_outside(&container, &out)
}

/// What the guest writes to a file that it shares at `/out` is there outside.
fn same_outside(container: &Container<'_>, out: &Path) -> Result<()> {
    let copy = "head -c 64m /dev/urandom > /tmp/data && cp /tmp/data /out/ && md5sum < /tmp/data";
    let guest = container.exec(copy)?;
    let host = command::ok(std::process::Command::new("md5sum").arg(out.join("data")))?.out();
    let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);
    ensure!(sum(&guest) == sum(&host), "in the guest {guest}, on the host {host}");
    Ok(())
}

/// The monitor tells of all memory at once, and only of so many pieces.
fn fork_grows_as_far_as_its_share_can_follow(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[0];
    ready(templates, name)?;
    let out = templates.docker.arena.dir("fork-grown")?;
    let container = forked(templates, &format!("{options} -v {}:/out", out.display()))?;
    let total = || -> Result<u64> {
        let info = container.exec("cat /proc/meminfo")?;
        Ok(info.split_whitespace().nth(1).context("MemTotal")?.parse::<u64>()? / 1024)
    };
    let update = |mib: u32| {
        let limits = format!("--memory {mib}m --memory-swap {mib}m");
        templates.docker.ok(&format!("update {limits} {}", container.name))
    };
    let mut before = total()?;
    for mib in [2304, 2432, 2560, 2688] {
        update(mib)?;
        let now = total()?;
        ensure!(now >= before + 100, "{mib}: {before}, {now}");
        before = now;
    }
    update(2944)?;
    ensure!(total()? == before);
    let id = id(templates, &container.name)?;
    let log = fs::read_to_string(format!("/run/kata-containers/{id}/server.log"))?;
    ensure!(log.contains("limits are above what the virtual machine can become"), "{log}");
    // What serves the share has each piece.
    let devices = leaks::processes_of(&id, Part::Devices)?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", devices[0]))?;
    let pieces = maps.lines().filter(|line| line.contains("memory-backend-memfd")).count();
    ensure!(pieces == 4, "{maps}");
    same_outside(&container, &out)
}

fn killed_server_takes_its_fork_along(templates: &Templates) -> Result<()> {
    for (name, options) in KINDS {
        ready(templates, name)?;
        let container = forked(templates, options)?;
        let id = id(templates, &container.name)?;
        let server = leaks::processes_named(&format!("kata-sandbox {id}"))?;
        ensure!(server.len() == 1, "{server:?}");
        leaks::kill_and_wait(&server)?;
        command::eventually("its fork is gone", Duration::from_secs(5), || {
            Ok(leaks::processes_of(&id, Part::Hypervisor)?.is_empty())
        })?;
        templates.docker.until(&container.name, "{{.State.Running}}", "false")?;
        drop(container);
        leaks::expect_no_trace(&[&id])?;
    }
    Ok(())
}

fn killed_fork_is_told_and_leaves_nothing(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[0];
    ready(templates, name)?;
    let container = forked(templates, options)?;
    let id = id(templates, &container.name)?;
    let log = fs::File::open(format!("/run/kata-containers/{id}/server.log"))?;
    leaks::kill_and_wait(&[monitor(templates, &container)?])?;
    templates.docker.until(&container.name, "{{.State.ExitCode}}", "137")?;
    let said = std::io::read_to_string(log)?;
    ensure!(said.contains("qemu was killed by signal 9 (SIGKILL)"), "{said}");
    drop(container);
    leaks::expect_no_trace(&[&id])
}

fn stem_stays_as_long_as_its_forks(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[0];
    ready(templates, name)?;
    let container = forked(templates, options)?;
    command::ok(&mut ctl("factory destroy"))?;
    ensure!(container.exec("echo still here")? == "still here");
    ensure!(leaks::processes_named(STEM)?.len() == 1);
    drop(container);
    command::eventually("the stem is gone", Duration::from_secs(10), || {
        let monitors = leaks::processes_of("sandbox-stem", Part::Hypervisor)?;
        Ok(leaks::processes_named(STEM)?.is_empty() && monitors.is_empty())
    })
}

/// Whichever of its two processes is killed.
fn killed_stem_ends_its_forks_and_machines_are_cloned(templates: &Templates) -> Result<()> {
    let (name, options) = KINDS[0];
    let keeper = || leaks::processes_named(STEM);
    let monitor = || leaks::processes_of("sandbox-stem", Part::Hypervisor);
    for victims in [&keeper as &dyn Fn() -> Result<Vec<i32>>, &monitor] {
        ready(templates, name)?;
        let container = forked(templates, options)?;
        let id = id(templates, &container.name)?;
        leaks::kill_and_wait(&victims()?)?;
        templates.docker.until(&container.name, "{{.State.Running}}", "false")?;
        drop(container);
        leaks::expect_no_trace(&[&id])?;
        command::eventually("nothing of the stem is left", Duration::from_secs(5), || {
            Ok(keeper()?.is_empty() && monitor()?.is_empty())
        })?;
        let container = templates.docker.sleeper(options)?;
        let trace = trace(templates, &container)?;
        ensure!(trace.contains("devices restored"), "{trace}");
        ensure!(container.exec("echo cloned")? == "cloned");
        ensure!(status()?.contains("no "), "{}", status()?);
        command::ok(&mut ctl("factory destroy"))?;
    }
    ready(templates, name)?;
    forked(templates, options).map(drop)
}
