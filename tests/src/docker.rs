//! A private Docker: a daemon configured as a user would, and its client.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::arena::Arena;
use crate::command::{self, Output, PATIENCE, words};
use crate::images;
use crate::runner::Skip;

/// The image most trials use.
pub const IMAGE: &str = "busybox";

/// The runtime that is containerd's shim, in [`Docker::start_under_systemd`].
pub const SHIM: &str = "kata-shim";

/// Further runtimes of the daemon: ours, with these configurations.
const CHOICES: [(&str, &str); 9] = [
    ("kata-9p", "[hypervisor.qemu]\nshared_fs = \"virtio-9p\"\nmsize_9p = 262144\n"),
    ("kata-macvtap", "[runtime]\ninternetworking_model = \"macvtap\"\n"),
    ("kata-no-network", "[runtime]\ninternetworking_model = \"none\"\n"),
    (
        "kata-thunks",
        "[hypervisor.qemu]\nkernel = \"/usr/share/kata-containers/vmlinux\"\n\
         kernel_params = \"mitigations=auto retbleed=force,unret\"\n",
    ),
    ("kata-vmlinux", "[hypervisor.qemu]\nkernel = \"/usr/share/kata-containers/vmlinux\"\n"),
    ("kata-pool", "[factory]\nvm_cache_number = 2\n"),
    ("kata-template", "[factory]\nenable_template = true\n"),
    (
        "kata-template-9p",
        "[hypervisor.qemu]\nshared_fs = \"virtio-9p\"\n[factory]\nenable_template = true\n",
    ),
    (
        "kata-template-microvm",
        "[hypervisor.qemu]\nmachine_type = \"microvm\"\n[factory]\nenable_template = true\n",
    ),
];

/// A running daemon whose default runtime is the one under test; stopped when dropped.
pub struct Docker {
    /// `runc` or `kata-runtime`.
    pub runtime: &'static str,
    /// The private machine it runs on.
    pub arena: Arena,
    daemon: Child,
    log: PathBuf,
}

/// gVisor's runtime, a further one where it is installed: to compare with.
pub const RUNSC: &str = "runsc";
const RUNSC_PROGRAM: &str = "/usr/bin/runsc";

static NAMES: AtomicU32 = AtomicU32::new(0);

impl Docker {
    /// Starts the daemon with `daemon.json` as in Kata's articles, and imports the image.
    pub fn start(arena: &Arena, runtime: &'static str, probe: &Path) -> Result<Self> {
        let config = json!({
            "storage-driver": "overlay2",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": format!("/{}", arena.name),
        });
        Self::start_with(config, arena, runtime, probe)
    }

    /// Starts the daemon as Debian has it on a host with systemd, which names the cgroups;
    /// containerd's shim is a further runtime, [`SHIM`].
    pub fn start_under_systemd(arena: &Arena, runtime: &'static str, probe: &Path) -> Result<Self> {
        let config = json!({
            "storage-driver": "overlay2",
            "exec-opts": ["native.cgroupdriver=systemd"],
            "runtimes": { SHIM: { "runtimeType": "io.containerd.kata.v2" } },
        });
        Self::start_with(config, arena, runtime, probe)
    }

    fn start_with(
        mut config: Value,
        arena: &Arena,
        runtime: &'static str,
        probe: &Path,
    ) -> Result<Self> {
        if runtime != "runc" {
            config["default-runtime"] = json!(runtime);
            config["runtimes"][runtime] = json!({ "path": crate::assets::RUNTIME });
            if Path::new(RUNSC_PROGRAM).exists() {
                // Debian 12's takes every network namespace of a new kernel for the host's, and
                // refuses it: it runs without its network stack.
                let arguments = ["--platform=ptrace", "--network=none"];
                config["runtimes"][RUNSC] =
                    json!({ "path": RUNSC_PROGRAM, "runtimeArgs": arguments });
            }
            for (name, text) in CHOICES {
                let file = arena.work.join(format!("{name}.toml"));
                fs::write(&file, text)?;
                config["runtimes"][name] = json!({
                    "path": crate::assets::RUNTIME, "runtimeArgs": ["--config", file],
                });
            }
        }
        fs::create_dir_all("/etc/docker")?;
        fs::write("/etc/docker/daemon.json", serde_json::to_vec_pretty(&config)?)?;
        let log = arena.work.join(format!("dockerd-{runtime}.log"));
        let output = File::create(&log)?;
        let daemon = Command::new("dockerd")
            .arg("--data-root")
            .arg(arena.dir("docker")?)
            .args(["--host", "unix:///run/docker.sock"])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("start dockerd (package docker.io)")?;
        let mut docker = Self { runtime, arena: arena.clone(), daemon, log };
        docker.wait_until_up()?;
        docker.import(probe)?;
        Ok(docker)
    }

    /// Whether there is a runtime [`RUNSC`].
    pub fn has_runsc(&self) -> bool {
        self.is_kata() && Path::new(RUNSC_PROGRAM).exists()
    }

    fn wait_until_up(&mut self) -> Result<()> {
        command::eventually("dockerd answers", PATIENCE, || {
            if let Some(status) = self.daemon.try_wait()? {
                bail!("dockerd ended with {status}:\n{}", self.log_tail());
            }
            Ok(Path::new("/run/docker.sock").exists()
                && self.client("version").output()?.status.success())
        })
    }

    fn import(&self, probe: &Path) -> Result<()> {
        if self.cmd(&format!("image inspect {IMAGE}"))?.code == 0 {
            return Ok(());
        }
        let root = self.arena.dir("image")?;
        images::busybox_rootfs(&root, probe)?;
        let tar = images::archive(&root, &self.arena.work.join("image.tar"))?;
        self.ok(&format!("import --change 'CMD [\"sh\"]' {} {IMAGE}", tar.display())).map(drop)
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// The client, to be run by the caller, as `docker line`.
    pub fn client(&self, line: &str) -> Command {
        let program = std::env::var("KATA_E2E_DOCKER").unwrap_or_else(|_| "docker".into());
        let mut client = Command::new(program);
        client.env("DOCKER_HOST", "unix:///run/docker.sock").env("DOCKER_BUILDKIT", "0");
        client.env("HOME", &self.arena.work).args(words(line));
        client
    }

    /// `docker line`, whatever it exits with.
    pub fn cmd(&self, line: &str) -> Result<Output> {
        command::run(&mut self.client(line))
    }

    /// `docker line`, which must succeed; its output.
    pub fn ok(&self, line: &str) -> Result<String> {
        Ok(self.cmd(line)?.expect_code(0)?.out())
    }

    /// `docker line` with `input` on its standard input.
    pub fn feed(&self, line: &str, input: Vec<u8>, patience: Duration) -> Result<Output> {
        command::run_with(&mut self.client(line), Some(input), patience)
    }

    /// `docker run --rm options image sh -c script`, which must succeed; its output.
    pub fn sh(&self, options: &str, script: &str) -> Result<String> {
        let mut client = self.client(&format!("run --rm {options} {IMAGE} sh -c"));
        Ok(command::run(client.arg(script))?.expect_code(0)?.out())
    }

    /// `docker exec options container sh -c script`, which must succeed; its output.
    pub fn exec(&self, options: &str, container: &str, script: &str) -> Result<String> {
        let mut client = self.client(&format!("exec {options} {container} sh -c"));
        Ok(command::run(client.arg(script))?.expect_code(0)?.out())
    }

    /// A detached container that sleeps until it is removed.
    pub fn sleeper(&self, options: &str) -> Result<Container<'_>> {
        self.detached(options, "sleep 1000000")
    }

    /// `docker run -d options image command`; removed when dropped.
    pub fn detached(&self, options: &str, command: &str) -> Result<Container<'_>> {
        let name = self.name();
        let container = Container { docker: self, name };
        self.ok(&format!("run -d --name {} {options} {IMAGE} {command}", container.name))?;
        Ok(container)
    }

    /// `docker create`; removed when dropped.
    pub fn created(&self, options: &str, command: &str) -> Result<Container<'_>> {
        let container = Container { docker: self, name: self.name() };
        self.ok(&format!("create --name {} {options} {IMAGE} {command}", container.name))?;
        Ok(container)
    }

    /// A network made with `options`; removed when dropped.
    pub fn network(&self, options: &str) -> Result<Network<'_>> {
        let network = Network { docker: self, name: self.name() };
        self.ok(&format!("network create {options} {}", network.name))?;
        Ok(network)
    }

    /// A name nothing else here has.
    pub fn name(&self) -> String {
        format!("t{}", NAMES.fetch_add(1, Ordering::Relaxed))
    }

    /// Whether our runtime is the one under test.
    pub fn is_kata(&self) -> bool {
        self.runtime != "runc"
    }

    /// Skips a trial of `--privileged` where runc cannot give what the host itself has not.
    ///
    /// In our VM all capabilities are there, whatever the host allows.
    pub fn needs_privileged(&self) -> Result<()> {
        if self.is_kata() { Ok(()) } else { self.needs_privileged_on_runc() }
    }

    /// Skips a trial that runs `--privileged` on runc where the host's root lacks capabilities.
    pub fn needs_privileged_on_runc(&self) -> Result<()> {
        let status = fs::read_to_string("/proc/self/status")?;
        let set = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap_or(0)
        };
        let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse()?;
        if set("CapBnd").count_ones() <= last {
            return Err(
                Skip("this host's root lacks capabilities, so runc cannot grant them").into()
            );
        }
        Ok(())
    }

    /// One field of `docker inspect`.
    pub fn inspect(&self, object: &str) -> Result<Value> {
        let text = self.ok(&format!("inspect {object}"))?;
        let mut list: Vec<Value> = serde_json::from_str(&text)?;
        list.pop().with_context(|| format!("inspect {object} gave nothing"))
    }

    /// Waits until `docker inspect --format` of the object gives `expected`.
    pub fn until(&self, object: &str, format: &str, expected: &str) -> Result<()> {
        let mut last = String::new();
        let what = format!("{format} of {object} becomes {expected}");
        command::eventually(&what, PATIENCE, || {
            last = self.ok(&format!("inspect --format '{format}' {object}"))?;
            Ok(last == expected)
        })
        .with_context(|| format!("it is {last}"))
    }

    /// Stops the daemon and waits for it.
    pub fn stop(&mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.daemon.id())?), Signal::SIGTERM).ok();
        match command::wait(&mut self.daemon, Duration::from_secs(30))? {
            Some(_) => {
                // It leaves its rules, and with them a policy that drops what other bridges carry.
                let mut policy = Command::new("iptables");
                command::ok(policy.args(["-w", "-P", "FORWARD", "ACCEPT"])).map(drop)
            }
            None => bail!("dockerd did not stop:\n{}", self.log_tail()),
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.stop().ok();
    }
}

/// A container that is removed when dropped.
pub struct Container<'a> {
    docker: &'a Docker,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// `docker exec name sh -c script`, which must succeed; its output.
    pub fn exec(&self, script: &str) -> Result<String> {
        self.docker.exec("", &self.name, script)
    }

    /// Its address in the network of this name.
    pub fn address(&self, network: &str) -> Result<String> {
        let inspected = self.docker.inspect(&self.name)?;
        let address = &inspected["NetworkSettings"]["Networks"][network]["IPAddress"];
        Ok(address.as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.docker.cmd(&format!("rm -f -v {}", self.name)).ok();
    }
}

/// A network that is removed when dropped.
pub struct Network<'a> {
    docker: &'a Docker,
    /// Its name.
    pub name: String,
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        self.docker.cmd(&format!("network rm {}", self.name)).ok();
    }
}
