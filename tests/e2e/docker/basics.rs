//! What the articles show first, and exit codes.

use anyhow::{Context, Result, bail, ensure};
use kata_e2e::command;
use kata_e2e::docker::{Docker, IMAGE};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["basics":
        Both: exit_codes_are_the_processes, missing_command_exits_127_and_says_so,
            file_that_is_no_program_exits_126, uname_is_of_the_expected_kernel,
            mount_shows_what_an_oci_runtime_mounts, environment_workdir_and_hostname_arrive,
            users_and_groups_are_applied, add_host_and_dns_options_are_in_etc;
        Kata: mount_shows_a_root_from_kata_shared, free_shows_the_vms_memory,
            all_memory_that_free_shows_is_there, one_vcpu_is_the_default;
    ]
}

fn exit_codes_are_the_processes(docker: &Docker) -> Result<()> {
    for code in [0, 1, 3, 255] {
        docker.cmd(&format!("run --rm {IMAGE} sh -c 'exit {code}'"))?.expect_code(code)?;
    }
    let container = docker.sleeper("")?;
    docker.ok(&format!("kill {}", container.name))?;
    ensure!(docker.ok(&format!("wait {}", container.name))? == "137");
    Ok(())
}

fn missing_command_exits_127_and_says_so(docker: &Docker) -> Result<()> {
    let output = docker.cmd(&format!("run --rm {IMAGE} no-such-command"))?.expect_code(127)?;
    let said = output.err();
    ensure!(
        said.contains("no-such-command") && said.contains("executable file not found"),
        "{said}"
    );
    Ok(())
}

fn file_that_is_no_program_exits_126(docker: &Docker) -> Result<()> {
    let output = docker.cmd(&format!("run --rm {IMAGE} /bin/not-a-program"))?.expect_code(126)?;
    ensure!(output.err().to_lowercase().contains("permission denied"), "{}", output.err());
    Ok(())
}

fn uname_is_of_the_expected_kernel(docker: &Docker) -> Result<()> {
    let host = command::ok(std::process::Command::new("uname").arg("-r"))?.out();
    let guest = docker.ok(&format!("run --rm {IMAGE} uname -r"))?;
    let all = docker.ok(&format!("run --rm {IMAGE} uname -a"))?;
    ensure!((guest != host) == docker.is_kata(), "host {host}, container {guest}");
    ensure!(all.starts_with("Linux ") && all.contains(&guest), "{all}");
    Ok(())
}

fn mount_shows_what_an_oci_runtime_mounts(docker: &Docker) -> Result<()> {
    let mounts = docker.ok(&format!("run --rm {IMAGE} mount"))?;
    let expected = [
        " on / type ",
        "proc on /proc type proc ",
        "tmpfs on /dev type tmpfs ",
        "devpts on /dev/pts type devpts ",
        "sysfs on /sys type sysfs (ro",
        " on /sys/fs/cgroup",
        "mqueue on /dev/mqueue type mqueue ",
        " on /dev/shm type tmpfs ",
        " on /etc/resolv.conf type ",
        " on /etc/hostname type ",
        " on /etc/hosts type ",
    ];
    for part in expected {
        ensure!(mounts.contains(part), "{part:?} is not in\n{mounts}");
    }
    Ok(())
}

fn mount_shows_a_root_from_kata_shared(docker: &Docker) -> Result<()> {
    let mounts = docker.ok(&format!("run --rm {IMAGE} mount"))?;
    ensure!(mounts.lines().any(|l| l.starts_with("kataShared on / type ")), "{mounts}");
    Ok(())
}

fn free_shows_the_vms_memory(docker: &Docker) -> Result<()> {
    let free = docker.ok(&format!("run --rm {IMAGE} free -m"))?;
    let total: u32 = free
        .lines()
        .find_map(|line| line.strip_prefix("Mem:"))
        .and_then(|line| line.split_whitespace().next())
        .context("free has no Mem: line")?
        .parse()?;
    ensure!((1850..=2048).contains(&total), "{free}");
    Ok(())
}

/// The kernel has descriptors of few pages when it has booted: what it says of the rest has to be
/// as if it had, and the rest has to be there when it is needed.
fn all_memory_that_free_shows_is_there(docker: &Docker) -> Result<()> {
    let script = "awk '/^Mem(Free|Available)/ { print int($2 / 1024) }' /proc/meminfo
        free -m | awk '/^Mem:/ { print $4 }'
        cat /proc/sys/fs/file-max
        awk '{ print $3 }' /proc/sys/net/ipv4/tcp_mem
        dd if=/dev/urandom of=/dev/shm/first bs=64k count=8 2>/dev/null
        dd if=/dev/zero of=/dev/shm/zeros bs=1M count=1400 2>/dev/null
        cp /dev/shm/first /dev/shm/last
        cmp /dev/shm/first /dev/shm/last && stat -c %s /dev/shm/zeros
        awk '/^MemFree/ { print int($2 / 1024) }' /proc/meminfo
        rm /dev/shm/*
        awk '/^MemFree/ { print int($2 / 1024) }' /proc/meminfo";
    let seen = docker.sh("--shm-size 1600m", script)?;
    let numbers: Vec<u64> = seen
        .lines()
        .map(|line| Ok(line.parse()?))
        .collect::<Result<_>>()
        .with_context(|| seen.clone())?;
    let [free, available, also_free, files, tcp_pages, written, left, again] = numbers[..] else {
        bail!("{seen}");
    };
    let mib = |shown: u64, least| (least..=2048).contains(&shown);
    ensure!(mib(free, 1750) && mib(available, 1750) && mib(also_free, 1750), "{seen}");
    // These follow from how much memory was free at boot.
    ensure!(files > 100_000 && tcp_pages > 40_000, "{seen}");
    ensure!(written == 1400 << 20 && left < free - 1390 && mib(again, free - 100), "{seen}");
    Ok(())
}

fn one_vcpu_is_the_default(docker: &Docker) -> Result<()> {
    let cpus = docker.ok(&format!("run --rm {IMAGE} nproc"))?;
    ensure!(cpus == "1", "{cpus}");
    Ok(())
}

fn environment_workdir_and_hostname_arrive(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "-e COLOUR=green -e 'TWO=a b' -w /made/here --hostname box --domainname example.test",
        "echo $COLOUR; echo $TWO; pwd; hostname; cat /proc/sys/kernel/domainname; cat /etc/hostname",
    )?;
    let expected = ["green", "a b", "/made/here", "box", "example.test", "box"];
    // Docker writes the full name into /etc/hostname.
    let lines: Vec<_> = seen.lines().map(|l| l.trim_end_matches(".example.test")).collect();
    ensure!(lines == expected, "{lines:?}");
    Ok(())
}

fn users_and_groups_are_applied(docker: &Docker) -> Result<()> {
    for (options, expected) in [
        ("", "0 0 0"),
        ("-u 1234", "1234 0 0"),
        ("-u 1234:4321", "1234 4321 4321"),
        ("-u alice", "1000 1000 1000 29 3000"),
        ("-u alice --group-add 77 --group-add audio", "1000 1000 1000 29 77 3000"),
    ] {
        let seen = docker.sh(options, "echo $(id -u) $(id -g) $(id -G)")?;
        let sorted = |text: &str| {
            let mut numbers: Vec<u32> = text.split(' ').filter_map(|n| n.parse().ok()).collect();
            numbers[2..].sort_unstable();
            numbers.dedup();
            numbers
        };
        ensure!(sorted(&seen) == sorted(expected), "{options}: {seen} instead of {expected}");
    }
    let home = docker.sh("-u alice", "echo $HOME")?;
    ensure!(home == "/home/alice", "{home}");
    Ok(())
}

fn add_host_and_dns_options_are_in_etc(docker: &Docker) -> Result<()> {
    let seen = docker.sh(
        "--add-host other:192.0.2.77 --dns 192.0.2.53 --dns-search example.test",
        "cat /etc/hosts /etc/resolv.conf",
    )?;
    for part in ["192.0.2.77\tother", "nameserver 192.0.2.53", "search example.test"] {
        ensure!(seen.contains(part), "{part:?} is not in\n{seen}");
    }
    Ok(())
}
