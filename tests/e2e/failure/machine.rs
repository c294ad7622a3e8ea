//! What goes wrong with the virtual machine and the processes around it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kata_e2e::assets;
use kata_e2e::command::{self, Output, PATIENCE};
use kata_e2e::oci::{Bundle, Oci};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::json;

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["machine":
        Kata: missing_hypervisor_is_named, missing_kernel_is_named, missing_initrd_is_named,
            kernel_that_is_none_is_an_error, wrong_configuration_names_file_and_line,
            agent_that_cannot_boot_says_why, guest_without_an_init_shows_its_console,
            agent_that_does_not_answer_is_an_error,
            kernel_for_one_is_refused_to_several_cpus,
            kernel_for_emulated_machines_is_refused_under_kvm,
            killed_hypervisor_ends_the_container_at_once, killed_devices_process_ends_the_container,
            killed_server_ends_the_container_and_leaves_nothing,
            killed_stand_in_leaves_nothing_after_delete, panic_of_the_guest_shows_its_console,
            kill_while_creating_leaves_nothing_after_delete,
            everything_killed_at_once_leaves_nothing_after_delete;
    ]
}

/// `create` with a configuration of its own.
fn create_with(oci: &Oci, config: &str) -> Result<(Output, PathBuf)> {
    let bundle = oci.bundle("true")?;
    let file = bundle.dir.join("configuration.toml");
    fs::write(&file, config)?;
    let dir = bundle.dir.display();
    let output =
        oci.cmd(&format!("--config {} create --bundle {dir} {}", file.display(), bundle.id))?;
    ensure!(bundle.verb("state")?.code == 1, "a container is left after\n{output}");
    Ok((output, file))
}

fn is_refused_naming(oci: &Oci, config: &str, names: &[&str]) -> Result<()> {
    let (output, _) = create_with(oci, config)?;
    ensure!(output.code == 1, "{output}");
    for name in names {
        ensure!(output.err().contains(name), "{name:?} is not in\n{output}");
    }
    Ok(())
}

fn missing_hypervisor_is_named(oci: &Oci) -> Result<()> {
    is_refused_naming(oci, "[hypervisor.qemu]\npath = \"/no/qemu\"\n", &["/no/qemu"])
}

fn missing_kernel_is_named(oci: &Oci) -> Result<()> {
    is_refused_naming(oci, "[hypervisor.qemu]\nkernel = \"/no/vmlinux\"\n", &["/no/vmlinux"])
}

fn missing_initrd_is_named(oci: &Oci) -> Result<()> {
    is_refused_naming(oci, "[hypervisor.qemu]\ninitrd = \"/no/initrd\"\n", &["/no/initrd"])
}

fn kernel_that_is_none_is_an_error(oci: &Oci) -> Result<()> {
    let file = oci.arena.work.join("no-kernel");
    fs::write(&file, "this is no kernel\n")?;
    let config = format!("[hypervisor.qemu]\nkernel = \"{}\"\n", file.display());
    is_refused_naming(oci, &config, &["no-kernel"])
}

fn kernel_for_one_is_refused_to_several_cpus(oci: &Oci) -> Result<()> {
    let config = format!("[hypervisor.qemu]\nkernel = \"{}\"\ndefault_vcpus = 2\n", assets::KERNEL);
    is_refused_naming(oci, &config, &["vmlinux-up", "several CPUs", "leave it out"])
}

fn kernel_for_emulated_machines_is_refused_under_kvm(oci: &Oci) -> Result<()> {
    let kernel = assets::KERNEL;
    let config = format!("[hypervisor.qemu]\nkernel = \"{kernel}\"\naccelerator = \"kvm\"\n");
    is_refused_naming(oci, &config, &["vmlinux-up", "KVM", "leave it out"])
}

fn wrong_configuration_names_file_and_line(oci: &Oci) -> Result<()> {
    for wrong in [
        "[hypervisor.qemu\n",
        "[hypervisor.qemu]\ndefault_memory = \"much\"\n",
        "[hypervisor.qemu]\ndefault_memory = 1\n",
    ] {
        is_refused_naming(oci, wrong, &["configuration.toml"])?;
    }
    Ok(())
}

/// An initramfs whose `/init` is this shell script, or that has none.
fn initrd(oci: &Oci, name: &str, init: Option<&str>) -> Result<String> {
    let root = oci.arena.dir(name)?;
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir_all(root.join("dev"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    if let Some(init) = init {
        fs::write(root.join("init"), format!("#!/bin/busybox sh\n{init}\n"))?;
    }
    let file = oci.arena.work.join(format!("{name}.cpio"));
    let line = format!(
        "cd {0} && chmod -f 755 init; find . | busybox cpio -o -H newc > {1}",
        root.display(),
        file.display()
    );
    command::ok(Command::new("sh").args(["-c", &line]))?;
    Ok(format!("[hypervisor.qemu]\ninitrd = \"{}\"\n", file.display()))
}

fn guest_without_an_init_shows_its_console(oci: &Oci) -> Result<()> {
    let config = initrd(oci, "no-init", None)?;
    let began = Instant::now();
    is_refused_naming(oci, &config, &["Kernel panic"])?;
    ensure!(began.elapsed() < Duration::from_secs(30), "only after {:?}", began.elapsed());
    Ok(())
}

/// The agent opens the console only to say it.
fn agent_that_cannot_boot_says_why(oci: &Oci) -> Result<()> {
    let root = oci.arena.dir("no-module")?;
    fs::create_dir_all(root.join("etc/kata"))?;
    fs::write(root.join("etc/kata/modules"), "/none.ko\n")?;
    let file = oci.arena.work.join("no-module.cpio");
    let line = format!(
        "cd {} && (cat {}; find etc | busybox cpio -o -H newc) > {}",
        root.display(),
        assets::INITRAMFS,
        file.display()
    );
    command::ok(Command::new("sh").args(["-c", &line]))?;
    let config = format!("[hypervisor.qemu]\ninitrd = \"{}\"\n", file.display());
    let began = Instant::now();
    is_refused_naming(oci, &config, &["kata-agent: fatal: cannot load kernel module /none.ko"])?;
    ensure!(began.elapsed() < Duration::from_secs(30), "only after {:?}", began.elapsed());
    Ok(())
}

fn agent_that_does_not_answer_is_an_error(oci: &Oci) -> Result<()> {
    let script = "/bin/busybox mknod /dev/hvc0 c 229 0; echo I-will-not-answer > /dev/hvc0; exec /bin/busybox sleep 100000";
    let config = initrd(oci, "silent", Some(script))? + "[agent.kata]\ndial_timeout = 6\n";
    is_refused_naming(oci, &config, &["answer", "6"])
}

/// A running container, and the processes that serve it by what they are.
struct Victim<'a> {
    bundle: Bundle<'a>,
    stand_in: i32,
}

impl Victim<'_> {
    /// The processes of the sandbox whose command line says `what`.
    fn processes(&self, what: &str) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            if line.contains(what) && line.contains(&self.bundle.id) && pid != self.stand_in {
                found.push(pid);
            }
        }
        Ok(found)
    }

    fn kill(&self, what: &str) -> Result<()> {
        let pids = self.processes(what)?;
        ensure!(!pids.is_empty(), "no process of {} is {what}", self.bundle.id);
        kill(&pids);
        Ok(())
    }

    /// The stand-in ends with the code of a killed process, soon; then delete leaves nothing.
    fn ends(&self, within: Duration) -> Result<()> {
        let began = Instant::now();
        command::eventually("the stand-in ends", within, || Ok(!alive(self.stand_in)))?;
        println!("        (the engine sees the end after {:?})", began.elapsed());
        ensure!(self.bundle.state()?["status"] == "stopped", "{}", self.bundle.state()?);
        self.bundle.verb("delete")?.expect_code(0)?;
        self.is_gone()
    }

    fn is_gone(&self) -> Result<()> {
        let run = Path::new("/run/kata-containers").join(&self.bundle.id);
        ensure!(!run.exists(), "{} is left", run.display());
        command::eventually("all its processes are gone", Duration::from_secs(5), || {
            Ok(self.processes("")?.is_empty())
        })
    }
}

fn kill(pids: &[i32]) {
    for pid in pids {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::SIGKILL).ok();
    }
}

fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

fn victim(oci: &Oci) -> Result<Victim<'_>> {
    let bundle = oci.bundle("echo up; exec sleep 1000000")?;
    bundle.start()?;
    command::eventually("it is up", PATIENCE, || Ok(bundle.stdout()? == "up"))?;
    let stand_in = bundle.pid()?;
    Ok(Victim { bundle, stand_in })
}

const HYPERVISOR: &str = "qemu-system";
const DEVICES: &str = "devices";
const SERVER: &str = "sandbox";

fn killed_hypervisor_ends_the_container_at_once(oci: &Oci) -> Result<()> {
    let victim = victim(oci)?;
    victim.kill(HYPERVISOR)?;
    victim.ends(Duration::from_secs(2))
}

fn killed_devices_process_ends_the_container(oci: &Oci) -> Result<()> {
    let victim = victim(oci)?;
    victim.kill(DEVICES)?;
    victim.ends(Duration::from_secs(2))
}

fn killed_server_ends_the_container_and_leaves_nothing(oci: &Oci) -> Result<()> {
    let victim = victim(oci)?;
    victim.kill(SERVER)?;
    victim.ends(Duration::from_secs(2))
}

fn killed_stand_in_leaves_nothing_after_delete(oci: &Oci) -> Result<()> {
    let victim = victim(oci)?;
    kill(&[victim.stand_in]);
    victim.bundle.until("stopped")?;
    victim.bundle.verb("delete --force")?.expect_code(0)?;
    victim.is_gone()
}

fn everything_killed_at_once_leaves_nothing_after_delete(oci: &Oci) -> Result<()> {
    let victim = victim(oci)?;
    let mut all = victim.processes("")?;
    ensure!(all.len() >= 3, "only {all:?} belong to {}", victim.bundle.id);
    all.push(victim.stand_in);
    kill(&all);
    victim.bundle.verb("delete --force")?.expect_code(0)?;
    victim.is_gone()
}

fn kill_while_creating_leaves_nothing_after_delete(oci: &Oci) -> Result<()> {
    for milliseconds in [30, 120, 400, 900] {
        let bundle = oci.bundle("sleep 1000")?;
        let mut create =
            oci.command(&format!("create --bundle {} {}", bundle.dir.display(), bundle.id));
        create.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        let mut child = create.stderr(std::process::Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(milliseconds));
        let victim = Victim { bundle, stand_in: 0 };
        let all = victim.processes("")?;
        kill(&all);
        child.kill().ok();
        child.wait()?;
        victim.bundle.verb("delete --force")?.expect_code(0)?;
        victim.is_gone().with_context(|| format!("killed after {milliseconds} ms"))?;
    }
    Ok(())
}

fn panic_of_the_guest_shows_its_console(oci: &Oci) -> Result<()> {
    // /proc/sysrq-trigger is the host's in runc's eyes, but the guest's own in ours.
    let bundle = oci.bundle("sleep 1; echo c > /proc/sysrq-trigger; sleep 1000")?.with(|spec| {
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["maskedPaths"] = json!([]);
    })?;
    bundle.start()?;
    let stand_in = bundle.pid()?;
    command::eventually("the stand-in ends", Duration::from_secs(30), || Ok(!alive(stand_in)))?;
    ensure!(bundle.state()?["status"] == "stopped");
    let log = fs::read_to_string(format!("/run/kata-containers/{}/server.log", bundle.id))
        .unwrap_or_default();
    ensure!(
        log.contains("sysrq triggered crash") || log.contains("Kernel panic"),
        "the log says: {log}"
    );
    bundle.verb("delete")?.expect_code(0)?;
    Ok(())
}
