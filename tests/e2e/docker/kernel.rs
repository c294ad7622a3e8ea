//! What the tuned kernel does with its own code.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use kata_e2e::assets;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::Docker;
use kata_e2e::leaks::{self, Part};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["kernel":
        Kata: returns_are_jumps_to_thunks_where_those_are_wanted,
            code_is_translated_once,
            one_emulated_processor_has_a_kernel_of_its_own,
            file_systems_that_few_mount_come_when_they_are_asked_for;
    ]
}

/// In the file of the kernel that has thunks they are plain, as an emulated processor may have
/// them. Who asks for thunks gets them, all of them.
fn returns_are_jumps_to_thunks_where_those_are_wanted(docker: &Docker) -> Result<()> {
    if crate::kvm::is_expected() {
        // Which thunks are wanted is its processor's affair, and the memory is another file.
        return Ok(());
    }
    let plain = docker.sleeper("--runtime kata-vmlinux")?;
    let (returns, left) = plain_returns(docker, &plain.name)?;
    ensure!(returns > 40_000 && left > returns / 10 * 9, "{left} of {returns}");
    let thunks = docker.sleeper("--runtime kata-thunks")?;
    let seen = thunks.exec("cat /sys/devices/system/cpu/vulnerabilities/retbleed")?;
    ensure!(seen.contains("untrained return thunk"), "{seen}");
    let (_, left) = plain_returns(docker, &thunks.name)?;
    ensure!(left < returns / 100, "{left} of {returns}");
    Ok(())
}

/// How many plain returns the kernel's code has in its file, and how many of those in the memory of
/// a container's guest.
fn plain_returns(docker: &Docker, container: &str) -> Result<(usize, usize)> {
    const PLAIN: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
    let file = fs::read(assets::ANY_KERNEL)?;
    let word = |at: usize| -> Result<usize> {
        let bytes = file.get(at..).and_then(<[u8]>::first_chunk).context("a short kernel")?;
        Ok(usize::try_from(u64::from_le_bytes(*bytes))?)
    };
    // The first program header: where the code is in the file, and in memory (ELF64).
    let header = word(32)?;
    let (offset, address, size) = (word(header + 8)?, word(header + 24)?, word(header + 32)?);
    let code = file.get(offset..offset + size).context("a short kernel")?;
    let mut loaded = vec![0; size];
    guest_memory(docker, container)?.read_exact_at(&mut loaded, address as u64)?;
    let pairs = code.windows(PLAIN.len()).zip(loaded.windows(PLAIN.len()));
    let returns = pairs.filter(|(code, _)| *code == PLAIN);
    Ok(returns.fold((0, 0), |(all, left), (_, now)| (all + 1, left + usize::from(now == PLAIN))))
}

fn guest_memory(docker: &Docker, container: &str) -> Result<File> {
    let id = docker.ok(&format!("inspect --format '{{{{.Id}}}}' {container}"))?;
    let monitors = leaks::processes_of(&id, Part::Hypervisor)?;
    let monitor = monitors.first().context("no monitor")?;
    for fd in fs::read_dir(format!("/proc/{monitor}/fd"))? {
        let path = fd?.path();
        if fs::read_link(&path)?.to_string_lossy().contains("kata-guest-memory") {
            return Ok(File::open(path)?);
        }
    }
    bail!("the monitor has no file with the guest's memory")
}

/// An emulator translates code for a state of the processor. What a boot runs, up to the agent's
/// first calls, is to be run in one: but for some of what comes before there is one.
fn code_is_translated_once(docker: &Docker) -> Result<()> {
    if crate::kvm::is_expected() {
        // That host's processor is emulated itself, and slow.
        return Ok(());
    }
    let dir = docker.arena.dir(&docker.name())?;
    let log = dir.join("translated");
    let mut emulator = boot(&dir.join("agent"), &log)?;
    let answered = answer(&dir.join("agent"));
    emulator.kill()?;
    let said = emulator.wait_with_output()?;
    answered.with_context(|| String::from_utf8_lossy(&said.stderr).into_owned())?;
    let log = fs::read_to_string(&log)?;
    let blocks = blocks_of_kernel(&log);
    let all: usize = blocks.values().sum();
    ensure!(all > 30_000, "only {all} blocks were translated");
    let again = all - blocks.len();
    ensure!(again < all / 100, "{again} of {all} blocks were translated again");
    Ok(())
}

/// Whether several are kept apart is the only difference: what containers ask of a kernel is there.
fn one_emulated_processor_has_a_kernel_of_its_own(docker: &Docker) -> Result<()> {
    let [one, two] = ["", "--cpus 2"].map(|options| docker.sleeper(options));
    let (one, two) = (one?, two?);
    ensure!(two.exec("nproc")? == "2" && two.exec("uname -v")?.contains("SMP"));
    let several = one.exec("uname -v")?.contains("SMP");
    ensure!(one.exec("nproc")? == "1" && several == crate::kvm::is_expected(), "{several}");
    let controllers = [&one, &two].map(|container| -> Result<String> {
        container.exec("cat /sys/fs/cgroup/cgroup.controllers")
    });
    let [of_one, of_two] = controllers;
    let (of_one, of_two) = (of_one?, of_two?);
    ensure!(of_one.contains("cpuset") && of_one == of_two, "{of_one}, {of_two}");
    // Descriptors of the pages that nobody has needed yet are not made, by either.
    let free = one.exec("awk '/^MemFree/ { print $2 }' /proc/meminfo")?.parse::<u64>()?;
    let managed = one.exec("awk '/managed/ { all += $2 } END { print all * 4 }' /proc/zoneinfo")?;
    ensure!(managed.parse::<u64>()? < free / 2, "{managed} of {free} KiB have descriptors");
    Ok(())
}

/// Whoever mounts one of them finds it, as where it is in a module.
fn file_systems_that_few_mount_come_when_they_are_asked_for(docker: &Docker) -> Result<()> {
    docker.needs_privileged()?;
    let guest = docker.sleeper("--privileged")?;
    let known = |name: &str| guest.exec(&format!("grep -cw {name} /proc/filesystems || true"));
    let mount = |what: &str| guest.exec(&format!("mkdir -p /m; mount {what} /m 2>&1 || true"));
    ensure!(known("nfs4")? == "0" && known("xfs")? == "0", "they are there before");
    // Nobody serves it, but it is known what was to be mounted.
    let refused = mount("-t nfs4 -o addr=127.0.0.1,clientaddr=127.0.0.1 127.0.0.1:/")?;
    ensure!(refused.contains("Connection refused"), "{refused}");
    let no_disk = mount("-t xfs /dev/null")?;
    ensure!(no_disk.contains("Block device required"), "{no_disk}");
    for name in ["nfs", "nfs4", "rpc_pipefs", "xfs"] {
        ensure!(known(name)? == "1", "{name} is not there");
    }
    Ok(())
}

/// A machine of the tuned kernel and the agent, which has nothing to do; what is translated for it
/// goes to `log`.
fn boot(agent: &Path, log: &Path) -> Result<Child> {
    let channel = format!("socket,id=agent,path={},server=on,wait=off", agent.display());
    let mut emulator = Command::new("qemu-system-x86_64");
    emulator.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    emulator.args(["-machine", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-m", "512"]);
    emulator.args(["-global", "virtio-mmio.force-legacy=false"]);
    emulator.args(["-kernel", assets::KERNEL, "-initrd", assets::INITRAMFS]);
    let hints = "console=hvc0 quiet panic=-1 mitigations=off acpi=off reboot=t quick_patching \
        clearcpuid=cx16";
    emulator.args(["-append", hints, "-chardev", &channel, "-device", "virtio-serial-device"]);
    emulator.args(["-device", "virtserialport,chardev=agent,name=kata.agent.0"]);
    emulator.args(["-d", "in_asm", "-D"]).arg(log);
    emulator.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    emulator.spawn().context("start qemu-system-x86_64")
}

/// Waits until the agent has opened its end of the channel.
fn answer(agent: &Path) -> Result<()> {
    command::eventually("the channel", PATIENCE, || Ok(agent.exists()))?;
    let socket = UnixStream::connect(agent)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    (&socket).read_exact(&mut [0]).context("the agent did not open its channel")
}

/// How often each block of the kernel's code was translated, by the addresses of its instructions.
fn blocks_of_kernel(log: &str) -> HashMap<Vec<&str>, usize> {
    let mut blocks = HashMap::new();
    for block in log.split("IN:").skip(1) {
        let addresses: Vec<&str> = block
            .lines()
            .filter_map(|line| Some(line.strip_prefix("0x")?.split_once(':')?.0))
            .collect();
        if addresses.first().is_some_and(|first| first.starts_with("ffffffff")) {
            *blocks.entry(addresses).or_default() += 1;
        }
    }
    blocks
}
