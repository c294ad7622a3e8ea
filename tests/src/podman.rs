//! A private Podman: storage, networks and run-time state of its own, no systemd.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::arena::{Arena, cgroup_roots};
use crate::command::{self, Output, PATIENCE, words};
use crate::images;

/// The image that trials use.
pub const IMAGE: &str = "busybox";

/// The image of a pod's first container.
const PAUSE: &str = "pause";

static NAMES: AtomicU32 = AtomicU32::new(0);

/// Podman, configured by the files that a user would write.
pub struct Podman {
    /// `runc` or `kata-runtime`.
    pub runtime: &'static str,
    /// The private machine.
    pub arena: Arena,
    named: Mutex<()>,
}

impl Podman {
    /// Writes the configuration and imports the image.
    pub fn start(arena: &Arena, runtime: &'static str, probe: &Path) -> Result<Self> {
        let podman = Self { runtime, arena: arena.clone(), named: Mutex::default() };
        podman.configure()?;
        let root = arena.dir("podman-image")?;
        if !root.join("bin/busybox").exists() {
            images::busybox_rootfs(&root, probe)?;
        }
        // A Kubernetes file gives no PATH of its own.
        let path = "--change 'ENV PATH=/bin' --change 'CMD [\"sh\"]'";
        podman.import(&root, path, IMAGE)?;
        let root = arena.dir("podman-pause")?;
        fs::copy(crate::assets::beside("kata-e2e-pause")?, root.join("pause"))?;
        podman.import(&root, "--change 'ENTRYPOINT [\"/pause\"]'", PAUSE)?;
        Ok(podman)
    }

    fn import(&self, root: &Path, changes: &str, image: &str) -> Result<()> {
        let tar = images::archive(root, &self.arena.work.join("podman-image.tar"))?;
        self.ok(&format!("import {changes} {} {image}", tar.display())).map(drop)
    }

    /// Without a word about it Podman takes CNI for its networks, which gives no names here, as
    /// soon as anybody has left a file in `/etc/cni/net.d`: the suites of containerd's CRI do.
    fn configure(&self) -> Result<()> {
        let (work, runtime) = (self.arena.work.display(), self.runtime);
        let path = if runtime == "runc" { "/usr/sbin/runc" } else { crate::assets::RUNTIME };
        let files = [
            (
                "containers.conf",
                format!(
                    "[containers]\nlog_driver = \"k8s-file\"\n\
                     [network]\nnetwork_backend = \"netavark\"\n\
                     [engine]\nruntime = \"{runtime}\"\ncgroup_manager = \"cgroupfs\"\n\
                     events_logger = \"file\"\ninfra_image = \"localhost/{PAUSE}:latest\"\n\
                     [engine.runtimes]\n{runtime} = [\"{path}\"]\n"
                ),
            ),
            (
                "storage.conf",
                format!(
                    "[storage]\ndriver = \"overlay\"\ngraphroot = \"{work}/podman-{runtime}\"\n\
                     runroot = \"/run/containers/storage-{runtime}\"\n"
                ),
            ),
            // Nothing is ever pulled.
            ("registries.conf", "unqualified-search-registries = []\n".to_owned()),
        ];
        fs::create_dir_all("/etc/containers")?;
        for (name, text) in files {
            fs::write(Path::new("/etc/containers").join(name), text)
                .with_context(|| format!("write /etc/containers/{name}"))?;
        }
        Ok(())
    }

    /// Whether our runtime is the one under test.
    pub fn is_kata(&self) -> bool {
        self.runtime != "runc"
    }

    /// `podman line`, to be run by the caller.
    pub fn client(&self, line: &str) -> Command {
        let mut client = Command::new("podman");
        client.args(words(line)).env("HOME", &self.arena.work).env_remove("XDG_RUNTIME_DIR");
        client
    }

    /// `podman line`, whatever it exits with.
    pub fn cmd(&self, line: &str) -> Result<Output> {
        command::run(&mut self.client(line))
    }

    /// `podman line`, which must succeed; its output.
    pub fn ok(&self, line: &str) -> Result<String> {
        Ok(self.cmd(line)?.expect_code(0)?.out())
    }

    /// `podman line sh -c script`, whatever it exits with.
    pub fn shell(&self, line: &str, script: &str) -> Result<Output> {
        command::run(self.client(line).args(["sh", "-c", script]))
    }

    /// `podman run --rm options image sh -c script`, which must succeed; its output.
    pub fn sh(&self, options: &str, script: &str) -> Result<String> {
        let line = format!("run --rm {} {options} {IMAGE}", self.parent());
        Ok(self.shell(&line, script)?.expect_code(0)?.out())
    }

    /// The flag by which a container's cgroup is one that is looked at in the end.
    pub fn parent(&self) -> String {
        format!("--cgroup-parent /{}", self.arena.name)
    }

    /// Held by who uses a network whose containers are found by name.
    ///
    /// Podman's one name server reads the files of all such networks whenever a container comes
    /// or goes. Debian 12's (aardvark-dns 1.4) ends when a file it has just listed is gone, which
    /// is what the end of another network's last container does. Until the next container starts
    /// nobody answers, whatever the runtime is.
    pub fn named_network(&self) -> MutexGuard<'_, ()> {
        self.named.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A name nothing else here has.
    pub fn name(&self) -> String {
        format!("p{}", NAMES.fetch_add(1, Ordering::Relaxed))
    }

    /// `podman run -d options image sh -c script`; removed when dropped.
    pub fn detached(&self, options: &str, script: &str) -> Result<Container<'_>> {
        let container = Container { podman: self, name: self.name() };
        let line = format!("run -d --name {} {} {options} {IMAGE}", container.name, self.parent());
        self.shell(&line, script)?.expect_code(0)?;
        Ok(container)
    }

    /// A container of a pod, whose cgroup is the pod's; removed with the pod.
    pub fn in_pod(&self, pod: &Pod<'_>, options: &str, script: &str) -> Result<String> {
        let name = self.name();
        let line = format!("run -d --pod {} --name {name} {options} {IMAGE}", pod.name);
        self.shell(&line, script)?.expect_code(0)?;
        Ok(name)
    }

    /// An empty pod; removed with all its containers when dropped.
    pub fn pod(&self, options: &str) -> Result<Pod<'_>> {
        let pod = Pod { podman: self, name: self.name() };
        self.ok(&format!("pod create --name {} {} {options}", pod.name, self.parent()))?;
        Ok(pod)
    }

    /// `podman inspect` of one object, parsed.
    pub fn inspect(&self, kind: &str, object: &str) -> Result<Value> {
        let value: Value = serde_json::from_str(&self.ok(&format!("{kind} inspect {object}"))?)?;
        Ok(match value {
            Value::Array(mut list) => list.pop().context("inspect gave nothing")?,
            other => other,
        })
    }

    /// Waits until the container is in this state.
    pub fn until(&self, container: &str, status: &str) -> Result<()> {
        command::eventually(&format!("{container} is {status}"), PATIENCE, || {
            Ok(self.inspect("container", container)?["State"]["Status"] == status)
        })
    }

    /// Runs `line` with `input` on its standard input.
    pub fn feed(&self, line: &str, input: Vec<u8>, patience: Duration) -> Result<Output> {
        command::run_with(&mut self.client(line), Some(input), patience)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.cmd("pod rm -a -f -t 0").ok();
        self.cmd("rm -a -f -t 0").ok();
        // Its storage is mounted on itself while it is in use.
        let graph = self.arena.work.join(format!("podman-{}", self.runtime)).join("overlay");
        command::run(Command::new("umount").arg("-l").arg(graph)).ok();
        // Podman leaves cgroups of its own: conmon's, and a pod's in hierarchies it does not use.
        for root in cgroup_roots() {
            fs::remove_dir(root.join("libpod_parent")).ok();
            for entry in fs::read_dir(root.join(&self.arena.name)).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name == "conmon" || (name.len() == 64 && !name.contains('-')) {
                    fs::remove_dir(entry.path()).ok();
                }
            }
        }
    }
}

/// A container that is removed when dropped.
pub struct Container<'a> {
    podman: &'a Podman,
    /// Its name.
    pub name: String,
}

impl Container<'_> {
    /// `podman exec name sh -c script`, which must succeed; its output.
    pub fn exec(&self, script: &str) -> Result<String> {
        let line = format!("exec {}", self.name);
        Ok(self.podman.shell(&line, script)?.expect_code(0)?.out())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.podman.cmd(&format!("rm -f -t 0 -v {}", self.name)).ok();
    }
}

/// A pod that is removed with what is in it when dropped.
pub struct Pod<'a> {
    podman: &'a Podman,
    /// Its name.
    pub name: String,
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        self.podman.cmd(&format!("pod rm -f -t 0 {}", self.name)).ok();
    }
}
