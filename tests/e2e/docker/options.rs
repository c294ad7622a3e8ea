//! `docker run` options that limit or open up a container.

use std::fs;

use anyhow::{Result, ensure};
use kata_e2e::docker::{Docker, IMAGE};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["options":
        Both: tmpfs_is_mounted_as_asked, shm_size_is_as_asked, read_only_root_refuses_writes,
            capabilities_are_added_and_dropped, no_new_privileges_is_set,
            seccomp_profile_of_a_file_is_applied, seccomp_is_on_by_default_and_can_be_off,
            init_is_pid_one_and_reaps, ulimits_are_set, sysctls_are_set, pids_limit_holds,
            memory_limit_is_seen_and_kills, docker_knows_who_ran_out_of_memory, cpu_limit_slows_down, devices_are_passed,
            privileged_container_runs, oom_score_is_passed, ipc_private_is_its_own;
        Kata: memory_limit_leaves_room_for_the_limit, vm_has_more_than_the_container_limit;
    ]
}

fn tmpfs_is_mounted_as_asked(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "--tmpfs /scratch:rw,noexec,size=8m,mode=1770",
        "grep ' /scratch ' /proc/mounts; stat -c %a /scratch; df -m /scratch | tail -n1",
    )?;
    ensure!(seen.contains("tmpfs /scratch tmpfs") && seen.contains("noexec"), "{seen}");
    ensure!(seen.contains("\n1770\n") && seen.contains(" 8 "), "{seen}");
    Ok(())
}

fn shm_size_is_as_asked(docker: &Docker) -> Result<()> {
    for (options, kib) in [("", "65536"), ("--shm-size 128m", "131072")] {
        let seen = docker.sh(options, "df -k /dev/shm | tail -n1")?;
        ensure!(seen.split_whitespace().nth(1) == Some(kib), "{options}: {seen}");
    }
    Ok(())
}

fn read_only_root_refuses_writes(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "--read-only --tmpfs /scratch",
        "touch /x 2>&1; touch /bin/x 2>&1; touch /scratch/x && echo scratch; echo y > /dev/null && echo null",
    )?;
    ensure!(seen.matches("Read-only file system").count() == 2, "{seen}");
    ensure!(seen.ends_with("scratch\nnull"), "{seen}");
    Ok(())
}

fn effective(docker: &Docker, options: &str) -> Result<u64> {
    let line = docker.sh(options, "grep CapEff /proc/self/status")?;
    Ok(u64::from_str_radix(line.trim_start_matches("CapEff:").trim(), 16)?)
}

fn capabilities_are_added_and_dropped(docker: &Docker) -> Result<()> {
    const NET_ADMIN: u64 = 1 << 12;
    const SYS_TIME: u64 = 1 << 25;
    const DEFAULT: u64 = 0xa804_25fb;
    for (options, expected) in [
        ("", DEFAULT),
        ("--cap-add NET_ADMIN", DEFAULT | NET_ADMIN),
        ("--cap-drop ALL", 0),
        ("--cap-drop ALL --cap-add SYS_TIME", SYS_TIME),
        ("-u 1000", 0),
    ] {
        let seen = effective(docker, options)?;
        ensure!(seen == expected, "{options}: {seen:x} instead of {expected:x}");
    }
    docker
        .sh("--cap-add NET_ADMIN", "ip link add dummy9 type bridge || ip link set lo mtu 1600")?;
    Ok(())
}

fn no_new_privileges_is_set(docker: &Docker) -> Result<()> {
    let script = "grep NoNewPrivs /proc/self/status";
    ensure!(docker.sh("", script)?.ends_with('0'));
    ensure!(docker.sh("--security-opt no-new-privileges", script)?.ends_with('1'));
    Ok(())
}

fn seccomp_profile_of_a_file_is_applied(docker: &Docker) -> Result<()> {
    let profile = docker.arena.work.join("seccomp.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}"#;
    fs::write(&profile, text)?;
    let options = format!("--security-opt seccomp={}", profile.display());
    let seen = docker.sh(&options, "mkdir /tmp/d 2>&1; touch /tmp/f && echo made")?;
    ensure!(seen.contains("Operation not supported") && seen.ends_with("made"), "{seen}");
    Ok(())
}

fn seccomp_is_on_by_default_and_can_be_off(docker: &Docker) -> Result<()> {
    let script = "grep Seccomp: /proc/self/status";
    ensure!(docker.sh("", script)?.ends_with('2'));
    ensure!(docker.sh("--security-opt seccomp=unconfined", script)?.ends_with('0'));
    Ok(())
}

fn init_is_pid_one_and_reaps(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--init")?;
    let first = container.exec("cat /proc/1/comm")?;
    ensure!(first.contains("init") || first.contains("tini"), "{first}");
    container.exec("sh -c 'sleep 0.1 & exec true'; sleep 0.5; ! grep -q 'State:.Z' /proc/[0-9]*/status 2>/dev/null")?;
    Ok(())
}

fn ulimits_are_set(docker: &Docker) -> Result<()> {
    let seen = docker
        .sh("--ulimit nofile=1234:2345 --ulimit core=0", "ulimit -n; ulimit -Hn; ulimit -c")?;
    ensure!(seen == "1234\n2345\n0", "{seen}");
    Ok(())
}

fn sysctls_are_set(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "--sysctl net.ipv4.ip_local_port_range='2000 3000' --sysctl kernel.msgmax=4096",
        "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/msgmax",
    )?;
    let numbers: Vec<_> = seen.split_whitespace().collect();
    ensure!(numbers == ["2000", "3000", "4096"], "{seen}");
    Ok(())
}

fn pids_limit_holds(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--pids-limit 8")?;
    let output = docker.cmd(&format!(
        "exec {} sh -c 'for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; echo survived'",
        container.name
    ))?;
    let said = output.out() + &output.err();
    ensure!(said.contains("can't fork") || said.contains("fork:"), "{output}");
    Ok(())
}

/// Runs a process that takes more than its limit: its exit code, and what Docker says of it.
fn exhaust_memory(docker: &Docker) -> Result<(i32, String)> {
    // A string that doubles: awk grows far past the limit at once.
    let script = "exec awk 'BEGIN { s = \"x\"; while (1) s = s s }'";
    let name = docker.name();
    let mut client =
        docker.client(&format!("run --name {name} --memory 64m --memory-swap 64m {IMAGE} sh -c"));
    let output = kata_e2e::command::run(client.arg(script))?;
    let killed = docker.ok(&format!("inspect --format '{{{{.State.OOMKilled}}}}' {name}"));
    docker.ok(&format!("rm -f {name}"))?;
    Ok((output.code, killed?))
}

fn memory_limit_is_seen_and_kills(docker: &Docker) -> Result<()> {
    let (code, _) = exhaust_memory(docker)?;
    ensure!(code == 137, "exit code {code}");
    Ok(())
}

fn docker_knows_who_ran_out_of_memory(docker: &Docker) -> Result<()> {
    let (_, killed) = exhaust_memory(docker)?;
    ensure!(killed == "true", "OOMKilled is {killed}");
    Ok(())
}

fn memory_limit_leaves_room_for_the_limit(docker: &Docker) -> Result<()> {
    // The process may use nearly all of its limit: the VM is larger than the limit.
    let seen = docker.sh(
        "--memory 200m",
        "dd if=/dev/zero of=/dev/shm/x bs=1M count=50 2>/dev/null; free -m | grep Mem:; echo fine",
    )?;
    ensure!(seen.ends_with("fine"), "{seen}");
    Ok(())
}

fn vm_has_more_than_the_container_limit(docker: &Docker) -> Result<()> {
    let total = docker.sh("--memory 300m", "free -m | awk '/Mem:/ { print $2 }'")?;
    ensure!(total.parse::<u32>()? >= 300, "{total} MiB in the VM of a container limited to 300");
    let limit = docker.sh("--memory 300m", "cat /sys/fs/cgroup/memory.max")?;
    ensure!(limit == (300 << 20).to_string(), "{limit}");
    Ok(())
}

fn cpu_limit_slows_down(docker: &Docker) -> Result<()> {
    // User time in a fixed wall-clock span, half a CPU against the whole.
    let script = "timeout 2 probe spin; cat /proc/1/stat > /dev/null; times | tail -n1";
    let seconds = |options: &str| -> Result<f64> {
        let line = docker.sh(options, script)?;
        let user = line.split_whitespace().next().unwrap_or_default();
        let (minutes, rest) = user.split_once('m').unwrap_or(("0", user));
        Ok(minutes.parse::<f64>()? * 60.0 + rest.trim_end_matches('s').parse::<f64>()?)
    };
    let limited = seconds("--cpus 0.3")?;
    ensure!(limited < 1.1, "{limited} s of CPU in 2 s with --cpus 0.3");
    Ok(())
}

fn devices_are_passed(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "--device /dev/zero:/dev/nothing",
        "head -c 4 /dev/nothing | od -An -tx1; ls -l /dev/nothing",
    )?;
    ensure!(seen.starts_with("00 00 00 00") && seen.contains("1,   5"), "{seen}");
    let refused = docker.sh(
        "--device-cgroup-rule 'c 1:5 r'",
        "mknod /tmp/mem c 1 1 && cat /tmp/mem 2>&1 | head -c 100; true",
    )?;
    ensure!(refused.contains("Operation not permitted"), "{refused}");
    Ok(())
}

fn privileged_container_runs(docker: &Docker) -> Result<()> {
    docker.needs_privileged()?;
    let seen = docker.sh("--privileged", "mkdir /tmp/m && mount -t tmpfs none /tmp/m && grep -c ' /tmp/m ' /proc/mounts; mount | grep 'on /sys type'")?;
    ensure!(seen.starts_with('1') && seen.contains("sysfs (rw"), "{seen}");
    Ok(())
}

fn oom_score_is_passed(docker: &Docker) -> Result<()> {
    let seen = docker.sh("--oom-score-adj 321", "cat /proc/self/oom_score_adj")?;
    ensure!(seen == "321", "{seen}");
    Ok(())
}

fn ipc_private_is_its_own(docker: &Docker) -> Result<()> {
    let seen = docker.sh("--ipc private", "touch /dev/shm/x && ls /dev/shm")?;
    ensure!(seen == "x", "{seen}");
    Ok(())
}
