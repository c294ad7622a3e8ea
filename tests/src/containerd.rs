//! A private containerd, with its client `ctr` and, by [`crate::cri`], its CRI.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::arena::Arena;
use crate::command::{self, Output, PATIENCE, words};
use crate::runner::Skip;
use crate::{assets, images};

/// The image that trials use.
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// The image of a pod's first container.
pub const PAUSE: &str = "localhost/pause:latest";
/// Where it listens, as by default.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// The namespace of the CRI plugin.
const CRI: &str = "k8s.io";

static NAMES: AtomicU32 = AtomicU32::new(0);

/// A running daemon; stopped when dropped.
pub struct Containerd {
    /// `runc` or `kata-runtime`.
    pub runtime: &'static str,
    /// The private machine it runs on.
    pub arena: Arena,
    programs: Programs,
    daemon: Mutex<Child>,
    log: PathBuf,
}

/// Which containerd, and where it keeps what it has.
#[derive(Clone, Debug)]
pub struct Programs {
    /// Where it is; none: where all programs are.
    dir: Option<PathBuf>,
    root: &'static str,
}

impl Programs {
    /// The system's.
    pub fn installed() -> Self {
        Self { dir: None, root: "containerd" }
    }

    /// containerd 2, from where `KATA_E2E_CONTAINERD2` says (see `scripts/containerd2`).
    pub fn containerd_2() -> Result<Self> {
        let named = std::env::var_os("KATA_E2E_CONTAINERD2").filter(|dir| !dir.is_empty());
        let none = "KATA_E2E_CONTAINERD2 names no containerd 2; scripts/containerd2 fetches one";
        let dir = named.map(PathBuf::from).ok_or(Skip(none))?;
        Ok(Self { dir: Some(dir), root: "containerd2" })
    }

    fn command(&self, name: &str) -> Command {
        let Some(dir) = &self.dir else { return Command::new(name) };
        let mut command = Command::new(dir.join(name));
        // It looks for its shims where it looks for everything.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", dir.display()));
        command
    }
}

impl Containerd {
    /// Starts it with `/etc/containerd/config.toml` as a user would write it, and imports
    /// the images. `handlers` are lines for the CRI plugin's configuration.
    pub fn start(
        arena: &Arena,
        runtime: &'static str,
        probe: &Path,
        programs: Programs,
        handlers: &str,
    ) -> Result<Self> {
        let root = arena.work.join(programs.root);
        fs::create_dir_all("/etc/containerd")?;
        fs::write("/etc/containerd/config.toml", configuration(&root, handlers))?;
        let log = arena.work.join(format!("{}-{runtime}.log", programs.root));
        let daemon = Mutex::new(spawn(&programs, &log)?);
        let containerd = Self { runtime, arena: arena.clone(), programs, daemon, log };
        containerd.wait_until_up()?;
        containerd.import(probe)?;
        Ok(containerd)
    }

    fn daemon(&self) -> MutexGuard<'_, Child> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until_up(&self) -> Result<()> {
        command::eventually("containerd answers", PATIENCE, || {
            if let Some(status) = self.daemon().try_wait()? {
                bail!("containerd ended with {status}:\n{}", self.log_tail());
            }
            Ok(Path::new(SOCKET).exists() && self.ctr("version").output()?.status.success())
        })
    }

    fn import(&self, probe: &Path) -> Result<()> {
        let archive = self.arena.work.join("containerd-image.tar");
        let root = self.arena.dir("containerd-image")?;
        if !root.join("bin/busybox").exists() {
            images::busybox_rootfs(&root, probe)?;
        }
        let config = json!({ "Env": ["PATH=/bin"], "Cmd": ["sh"] });
        images::saved_image(&root, IMAGE, &config, &archive)?;
        for namespace in [self.arena.name.as_str(), CRI] {
            self.in_namespace(namespace, &format!("images import {}", archive.display()))?;
        }
        // containerd 2 takes a snapshotter here only with the platform; nobody needs it there.
        if self.programs.dir.is_none() {
            let native = format!("images import --snapshotter native {}", archive.display());
            self.in_namespace(&self.arena.name, &native)?;
        }
        let root = self.arena.dir("containerd-pause")?;
        fs::copy(assets::beside("kata-e2e-pause")?, root.join("pause"))?;
        let config = json!({ "Entrypoint": ["/pause"] });
        images::saved_image(&root, PAUSE, &config, &archive)?;
        self.in_namespace(CRI, &format!("images import {}", archive.display()))
    }

    /// `ctr line` in the CRI plugin's namespace, which must succeed; its output.
    pub fn in_cri(&self, line: &str) -> Result<String> {
        let mut ctr = self.programs.command("ctr");
        Ok(command::ok(ctr.args(["--namespace", CRI]).args(words(line)))?.out())
    }

    fn in_namespace(&self, namespace: &str, line: &str) -> Result<()> {
        let mut ctr = self.programs.command("ctr");
        command::ok(ctr.args(["--namespace", namespace]).args(words(line))).map(drop)
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Whether our runtime is the one under test.
    pub fn is_kata(&self) -> bool {
        self.runtime != "runc"
    }

    /// As containerd calls the runtime under test.
    pub fn kind(&self) -> &'static str {
        if self.is_kata() { "io.containerd.kata.v2" } else { "io.containerd.runc.v2" }
    }

    /// `ctr line`, to be run by the caller, in a namespace named as the arena: so are then the
    /// containers' cgroups.
    pub fn ctr(&self, line: &str) -> Command {
        let mut ctr = self.programs.command("ctr");
        ctr.args(["--namespace", &self.arena.name]).args(words(line));
        ctr
    }

    /// `ctr line`, whatever it exits with.
    pub fn cmd(&self, line: &str) -> Result<Output> {
        command::run(&mut self.ctr(line))
    }

    /// `ctr line`, which must succeed; its output.
    pub fn ok(&self, line: &str) -> Result<String> {
        Ok(self.cmd(line)?.expect_code(0)?.out())
    }

    /// `ctr run flags image name sh -c script`, whatever it exits with.
    pub fn run(&self, flags: &str, script: &str) -> Result<Output> {
        command::run(&mut self.run_command(flags, &self.name(), script))
    }

    /// The command of [`Containerd::run`].
    pub fn run_command(&self, flags: &str, name: &str, script: &str) -> Command {
        let kind = self.kind();
        let mut ctr = self.ctr(&format!("run --rm --runtime {kind} {flags} {IMAGE} {name}"));
        ctr.args(["sh", "-c", script]);
        ctr
    }

    /// A detached container; removed when dropped.
    pub fn detached(&self, flags: &str, script: &str) -> Result<Task<'_>> {
        self.detached_as(&self.name(), flags, script)
    }

    /// A detached container of this name; removed when dropped.
    pub fn detached_as(&self, name: &str, flags: &str, script: &str) -> Result<Task<'_>> {
        let task = Task::of(self, name.to_owned());
        let line = format!("run -d --runtime {} {flags} {IMAGE} {}", self.kind(), task.name);
        // It would keep our pipes as its streams.
        let null = Stdio::null;
        let mut ctr = self.ctr(&line);
        ctr.args(["sh", "-c", script]).stdin(null());
        let errors = self.arena.work.join(format!("{}.err", task.name));
        let mut child =
            ctr.stdout(null()).stderr(File::create(&errors)?).spawn().context("start ctr")?;
        match command::wait(&mut child, PATIENCE)? {
            Some(status) if status.success() => Ok(task),
            status => bail!("ctr {line}: {status:?}: {}", fs::read_to_string(errors)?),
        }
    }

    /// A name nothing else here has.
    pub fn name(&self) -> String {
        format!("c{}-{}", NAMES.fetch_add(1, Ordering::Relaxed), self.arena.name)
    }

    /// Stops the daemon as an upgrade would, and starts it again; containers live on.
    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        *self.daemon() = spawn(&self.programs, &self.log)?;
        self.wait_until_up()
    }

    /// Stops the daemon and waits for it.
    pub fn stop(&self) -> Result<()> {
        let mut daemon = self.daemon();
        kill(Pid::from_raw(i32::try_from(daemon.id())?), Signal::SIGTERM).ok();
        match command::wait(&mut daemon, Duration::from_secs(30))? {
            Some(_) => Ok(()),
            None => bail!("containerd did not stop:\n{}", self.log_tail()),
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.stop().ok();
    }
}

fn spawn(programs: &Programs, log: &Path) -> Result<Child> {
    let output = File::options().create(true).append(true).open(log)?;
    programs
        .command("containerd")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .context("start containerd (package containerd)")
}

fn configuration(root: &Path, handlers: &str) -> String {
    let root = root.display();
    format!(
        r#"version = 2
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  # Root of a test machine may lack the right to lower a score.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
{handlers}"#
    )
}

/// A container with a task; both are removed when dropped.
pub struct Task<'a> {
    containerd: &'a Containerd,
    /// Its name.
    pub name: String,
}

impl<'a> Task<'a> {
    /// A container that somebody else made, or tried to.
    pub fn of(containerd: &'a Containerd, name: String) -> Self {
        Self { containerd, name }
    }

    /// `ctr task exec` of `sh -c script`, whatever it exits with.
    pub fn exec(&self, script: &str) -> Result<Output> {
        command::run(&mut self.exec_command("", script))
    }

    /// The command of [`Task::exec`].
    pub fn exec_command(&self, flags: &str, script: &str) -> Command {
        let exec = self.containerd.name();
        let mut ctr =
            self.containerd.ctr(&format!("task exec {flags} --exec-id {exec} {}", self.name));
        ctr.args(["sh", "-c", script]);
        ctr
    }

    /// `ctr task verb name`.
    pub fn verb(&self, verb: &str) -> Result<Output> {
        self.containerd.cmd(&format!("task {verb} {}", self.name))
    }

    /// What `ctr task list` says of it: its pid and state.
    pub fn state(&self) -> Result<(i32, String)> {
        let list = self.containerd.ok("task list")?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(&self.name));
        let words: Vec<_> = line.context("no such task")?.split_whitespace().collect();
        Ok((words[1].parse()?, words[2].to_owned()))
    }

    /// Waits for this state.
    pub fn until(&self, state: &str) -> Result<()> {
        command::eventually(&format!("{} is {state}", self.name), PATIENCE, || {
            Ok(self.state()?.1 == state)
        })
    }

    /// Removes task and container, by force where it must.
    pub fn remove(&self) -> Result<()> {
        self.verb("rm -f")?;
        self.containerd.ok(&format!("container rm {}", self.name)).map(drop)
    }

    /// Removes the task, not the container; it must have ended with this code.
    pub fn expect_removed_with(&self, code: i32) -> Result<()> {
        let removed = self.verb("rm")?.expect_code(0)?;
        if !removed.err().contains(&format!("non-zero exit code {code}")) {
            bail!("not {code}: {removed}");
        }
        Ok(())
    }

    /// Removes what there is of it, and sees to it that nothing is.
    pub fn remove_whatever_there_is(&self) -> Result<()> {
        command::eventually(&format!("{} is removed", self.name), PATIENCE, || {
            self.verb("rm -f")?;
            self.containerd.cmd(&format!("container rm {}", self.name))?;
            let lists = ["task list -q", "container list -q"];
            let listed = lists.map(|list| self.containerd.ok(list));
            let there = |list: Result<String>| Ok(list?.lines().any(|line| line == self.name));
            let there: Result<Vec<bool>> = listed.into_iter().map(there).collect();
            Ok(!there?.contains(&true))
        })
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        if self.containerd.cmd(&format!("container info {}", self.name)).is_ok_and(|o| o.code == 0)
        {
            self.remove().ok();
        }
    }
}
