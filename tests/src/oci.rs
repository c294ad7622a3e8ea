//! Containers driven straight by an OCI command line, with no engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::arena::Arena;
use crate::command::{self, Output, words};
use crate::images;

static NAMES: AtomicU32 = AtomicU32::new(0);

/// An OCI runtime and a root file system to give it.
pub struct Oci {
    /// `runc` or `kata-runtime`.
    pub runtime: &'static str,
    /// The private machine.
    pub arena: Arena,
    /// The root file system that bundles share, read-only.
    pub rootfs: PathBuf,
    /// Flags before each verb.
    pub flags: String,
}

impl Oci {
    /// Makes the root file system.
    pub fn new(arena: &Arena, runtime: &'static str, probe: &Path) -> Result<Self> {
        let rootfs = arena.dir("rootfs")?;
        if !rootfs.join("bin/busybox").exists() {
            images::busybox_rootfs(&rootfs, probe)?;
        }
        Ok(Self { runtime, arena: arena.clone(), rootfs, flags: String::new() })
    }

    /// Whether our runtime is the one under test.
    pub fn is_kata(&self) -> bool {
        self.runtime != "runc"
    }

    /// The command line, to be run by the caller.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.runtime);
        command.args(words(&self.flags)).args(words(line));
        command
    }

    /// Runs it, whatever it exits with.
    pub fn cmd(&self, line: &str) -> Result<Output> {
        command::run(&mut self.command(line))
    }

    /// Runs it; it must succeed; its output.
    pub fn ok(&self, line: &str) -> Result<String> {
        Ok(self.cmd(line)?.expect_code(0)?.out())
    }

    /// A bundle whose process is `sh -c script`, with the specification the runtime itself writes.
    pub fn bundle(&self, script: &str) -> Result<Bundle<'_>> {
        let id = format!("{}-{}", self.runtime, NAMES.fetch_add(1, Ordering::Relaxed));
        let dir = self.arena.dir(&format!("bundles/{id}"))?;
        self.ok(&format!("spec --bundle {}", dir.display()))?;
        let mut bundle = Bundle { oci: self, id, dir, spec: Value::Null };
        bundle.spec = serde_json::from_slice(&fs::read(bundle.dir.join("config.json"))?)?;
        bundle.spec["root"] = json!({ "path": self.rootfs, "readonly": true });
        bundle.spec["process"]["terminal"] = json!(false);
        bundle.spec["process"]["args"] = json!(["sh", "-c", script]);
        bundle.spec["linux"]["cgroupsPath"] = json!(format!("/{}/{}", self.arena.name, bundle.id));
        bundle.write()?;
        Ok(bundle)
    }
}

/// A bundle; its container is deleted by force when this is dropped.
pub struct Bundle<'a> {
    /// The runtime it is for.
    pub oci: &'a Oci,
    /// The container's id.
    pub id: String,
    /// Where `config.json` is.
    pub dir: PathBuf,
    /// What is in it; [`Bundle::write`] after a change.
    pub spec: Value,
}

impl Bundle<'_> {
    /// Writes the specification.
    pub fn write(&self) -> Result<()> {
        fs::write(self.dir.join("config.json"), serde_json::to_vec_pretty(&self.spec)?)
            .context("write config.json")
    }

    /// Changes the specification and writes it.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Result<Self> {
        change(&mut self.spec);
        self.write()?;
        Ok(self)
    }

    /// `runtime verb flags id`.
    pub fn verb(&self, verb: &str) -> Result<Output> {
        self.oci.cmd(&format!("{verb} {}", self.id))
    }

    /// `runtime create`, with its standard streams at files in the bundle directory.
    pub fn create(&self) -> Result<Output> {
        self.create_with("")
    }

    /// `runtime create flags`; the container's output goes to the files `stdout` and `stderr`.
    pub fn create_with(&self, flags: &str) -> Result<Output> {
        // The container keeps the streams it is given: files, so that nobody waits for their end.
        let dir = self.dir.display();
        let line = format!(
            "exec {} {} create {flags} --bundle {dir} --pid-file {dir}/pid {} </dev/null >{dir}/stdout 2>{dir}/stderr",
            self.oci.runtime, self.oci.flags, self.id
        );
        let mut output = command::run(Command::new("sh").args(["-c", &line]))?;
        output.stderr = fs::read(self.dir.join("stderr"))?;
        Ok(output)
    }

    /// Create and start.
    pub fn start(&self) -> Result<()> {
        self.create()?.expect_code(0)?;
        self.verb("start")?.expect_code(0)?;
        Ok(())
    }

    /// `runtime run` in the foreground.
    pub fn run(&self) -> Result<Output> {
        self.oci.cmd(&format!("run --bundle {} {}", self.dir.display(), self.id))
    }

    /// What the container wrote to its standard output so far.
    pub fn stdout(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("stdout"))?.trim().to_owned())
    }

    /// The process that stands for the container on the host.
    pub fn pid(&self) -> Result<i32> {
        Ok(fs::read_to_string(self.dir.join("pid"))?.trim().parse()?)
    }

    /// `runtime state`, parsed.
    pub fn state(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&self.verb("state")?.expect_code(0)?.stdout)?)
    }

    /// Waits for this status.
    pub fn until(&self, status: &str) -> Result<()> {
        command::eventually(&format!("{} is {status}", self.id), command::PATIENCE, || {
            Ok(self.state()?["status"] == status)
        })
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        self.verb("delete --force").ok();
    }
}
