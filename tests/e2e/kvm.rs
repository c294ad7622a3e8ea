//! What is different on a host with KVM: run where `KATA_E2E_KVM=1` says that there is one,
//! such as the KVM test host (`tests/kvm-host`).

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use kata_e2e::assets::RUNTIME;
use kata_e2e::command;
use kata_e2e::docker::{Docker, IMAGE, SHIM};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

/// Whether this machine is said to have a working KVM.
pub fn is_expected() -> bool {
    std::env::var_os("KATA_E2E_KVM").is_some_and(|value| value == "1")
}

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["machine":
        Kata: self_test_finds_kvm, monitor_uses_kvm_vsock_and_vhost_net,
            guest_has_the_hosts_processor, clock_is_kvms_and_right,
            machine_grows_with_an_update;
    ]
    .into_iter()
    .chain(trials!["docker":
        Kata: systemds_cgroup_holds_the_sandbox, shim_of_daemon_json_runs_and_tells_the_exit_code,
            network_connected_after_create_is_there;
    ])
    .collect()
}

/// The command line of the monitor of this sandbox.
fn monitor(sandbox: &str) -> Result<String> {
    for entry in fs::read_dir("/proc").context("list processes")?.flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains("qemu-system") && line.contains(&format!("-name sandbox-{sandbox} ")) {
            return Ok(line);
        }
    }
    bail!("no monitor runs {sandbox}")
}

fn self_test_finds_kvm(_: &Docker) -> Result<()> {
    let check = command::ok(Command::new(RUNTIME).arg("kata-check"))?.out();
    let line = check.lines().find(|line| line.contains("accelerator")).unwrap_or_default();
    ensure!(line.starts_with("ok") && line.contains("accelerator: kvm"), "{check}");
    Ok(())
}

fn monitor_uses_kvm_vsock_and_vhost_net(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    let id = docker.inspect(&container.name)?["Id"].as_str().context("Id")?.to_owned();
    let line = monitor(&id)?;
    for part in ["-accel kvm", "-cpu host", "vhost-vsock", "vhost=on"] {
        ensure!(line.contains(part), "{part:?} is not in {line}");
    }
    ensure!(container.exec("echo over vsock")? == "over vsock");
    Ok(())
}

fn guest_has_the_hosts_processor(docker: &Docker) -> Result<()> {
    let model = |text: &str| -> Option<String> {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let guest = model(&docker.sh("", "cat /proc/cpuinfo")?);
    let host = model(&fs::read_to_string("/proc/cpuinfo")?);
    ensure!(guest == host && guest.is_some(), "host {host:?}, guest {guest:?}");
    Ok(())
}

fn clock_is_kvms_and_right(docker: &Docker) -> Result<()> {
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let before = now()?;
    let said = docker.sh("", &format!("cat {clock}; date +%s"))?;
    let after = now()?;
    let (source, guest) = said.split_once('\n').context("two lines")?;
    ensure!(source == "kvm-clock" || source == "tsc", "the clock is {source}");
    let guest: u64 = guest.trim().parse()?;
    ensure!((before - 1..=after + 1).contains(&guest), "{guest} is not in {before} to {after}");
    Ok(())
}

/// Processors and memory are added while it runs, and vhost's users of the memory follow.
fn machine_grows_with_an_update(docker: &Docker) -> Result<()> {
    let container =
        docker.sleeper("--cpus 1 --memory 256m --memory-swap 256m --tmpfs /big:size=400m")?;
    let sized = || -> Result<(u64, u64)> {
        let seen = container.exec("nproc; cat /proc/meminfo")?;
        let mut words = seen.split_whitespace();
        let cpus = words.next().context("nproc")?.parse()?;
        Ok((cpus, words.nth(1).context("MemTotal")?.parse::<u64>()? / 1024))
    };
    let before = sized()?;
    docker.ok(&format!("update --cpus 2 --memory 640m --memory-swap 640m {}", container.name))?;
    let after = sized()?;
    ensure!((before.0, after.0) == (1, 2), "{} CPUs, then {}", before.0, after.0);
    let grown = after.1 - before.1;
    ensure!((350..=550).contains(&grown), "{} MiB, and {grown} more", before.1);
    // Both processors work, and what is beyond the first memory is sent by vsock and by the share.
    container.exec(
        "taskset -p 2 $$ >/dev/null && dd if=/dev/zero of=/big/zeros bs=1M count=300 2>/dev/null",
    )?;
    let copy = "dd if=/dev/urandom of=/big/data bs=1M count=4 2>/dev/null && cp /big/data /data";
    let guest = container.exec(&format!("{copy} && md5sum < /big/data && md5sum < /data"))?;
    let sums: Vec<_> = guest.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "{guest}");
    Ok(())
}

/// With systemd's driver a container's cgroup is the scope that systemd would have made.
fn systemds_cgroup_holds_the_sandbox(docker: &Docker) -> Result<()> {
    let driver = docker.ok("info --format {{.CgroupDriver}}-{{.CgroupVersion}}")?;
    ensure!(driver == "systemd-2", "{driver}");
    let scope = {
        let container = docker.sleeper("--memory 300m")?;
        let id = docker.inspect(&container.name)?["Id"].as_str().context("Id")?.to_owned();
        let scope = PathBuf::from(format!("/sys/fs/cgroup/system.slice/docker-{id}.scope"));
        let pids = fs::read_to_string(scope.join("cgroup.procs"))?;
        let names: Vec<_> = pids.lines().filter_map(|pid| name_of(pid).ok()).collect();
        ensure!(names.iter().any(|name| name.starts_with("qemu")), "{names:?}");
        scope
    };
    ensure!(!scope.exists(), "{} is still there", scope.display());
    Ok(())
}

fn name_of(pid: &str) -> Result<String> {
    Ok(fs::read_to_string(format!("/proc/{pid}/comm"))?.trim().to_owned())
}

/// Docker runs containerd's shim without our command line.
fn shim_of_daemon_json_runs_and_tells_the_exit_code(docker: &Docker) -> Result<()> {
    let host = command::ok(Command::new("uname").arg("-r"))?.out();
    let line = format!("run --rm --runtime {SHIM} {IMAGE} sh -c");
    let mut client = docker.client(&line);
    let output = command::run(client.arg("uname -r; echo problem >&2; exit 9"))?.expect_code(9)?;
    ensure!(output.out() != host && output.err() == "problem", "{output}");
    Ok(())
}

fn network_connected_after_create_is_there(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    for runtime in [docker.runtime, SHIM] {
        let container = docker.created(&format!("--runtime {runtime}"), "sleep 1000000")?;
        docker.ok(&format!("network connect {} {}", network.name, container.name))?;
        docker.ok(&format!("start {}", container.name))?;
        let address = container.address(&network.name)?;
        let seen = container.exec("ip -4 addr")?;
        let has = !address.is_empty() && seen.contains(&format!("inet {address}/"));
        ensure!(has, "with {runtime}: {address:?} is not in\n{seen}");
        ensure!(seen.matches("inet ").count() == 3, "with {runtime}:\n{seen}");
    }
    Ok(())
}

/// Seconds since 1970.
fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}
