//! What is known of a container between two commands: `<root>/<id>/container.json`.
//!
//! It is written before anything of the container exists, so that `delete --force` can
//! undo whatever was reached.

use anyhow::{Context, Result, bail};
use kata_protocol::Id;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where records are, unless `--root` says otherwise.
pub const DEFAULT_ROOT: &str = "/run/kata-runtime";

const VERSION: u32 = 1;
const FILE: &str = "container.json";

/// runc's words for an unknown container; engines look for "does not exist".
pub const NOT_FOUND: &str = "container does not exist";

/// A container as the command line knows it.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Of this file's format.
    version: u32,
    /// The container.
    pub id: String,
    /// The sandbox (virtual machine) it is in.
    pub sandbox: String,
    /// Absolute path.
    pub bundle: PathBuf,
    /// Absolute path.
    pub rootfs: PathBuf,
    /// `config.json`'s version.
    pub oci_version: String,
    /// From `config.json`.
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339.
    pub created: String,
    /// Name of the user who made it.
    pub owner: String,
    /// The stand-in, once there is one.
    pub stand_in: Option<HostProcess>,
    /// Whether creation has ended well.
    pub created_fully: bool,
}

/// A process of the host that cannot be mistaken for a later one of the same pid.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct HostProcess {
    /// Its pid.
    pub pid: i32,
    /// Clock ticks after boot at which it started.
    pub start: u64,
}

impl HostProcess {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { pid, start: start_time(&fs::read_to_string(format!("/proc/{pid}/stat"))?)?.0 })
    }

    /// Whether it still lives (a zombie does not).
    pub fn alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .and_then(|stat| start_time(&stat))
            .is_ok_and(|(start, state)| start == self.start && !"ZX".contains(state))
    }

    /// Ends it with SIGKILL, if it is still the same process.
    pub fn kill(&self) {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // First the descriptor, then the comparison: the descriptor cannot change hands.
        if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty())
            && self.alive()
        {
            // It ended in between: what we wanted.
            let _ = pidfd_send_signal(&fd, Signal::KILL);
        }
    }
}

/// Start time and state out of `/proc/<pid>/stat`.
fn start_time(stat: &str) -> io::Result<(u64, char)> {
    let parsed = (|| {
        // The command name may hold anything, also parentheses and spaces.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        Some((fields.nth(18)?.parse().ok()?, state))
    })();
    parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected /proc/<pid>/stat"))
}

/// The directory of all records.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// The given directory.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    /// Makes room for a new container and writes its first record.
    ///
    /// # Errors
    /// In runc's words when the id is taken.
    pub fn create(&self, record: &Record) -> Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&self.0)
            .with_context(|| format!("cannot create the root directory {}", self.0.display()))?;
        let dir = self.dir(&record.id);
        match DirBuilder::new().mode(0o711).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("container with given ID already exists")
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot create {}", dir.display()));
            }
        }
        self.save(record).inspect_err(|_| {
            // The first failure is the one to tell.
            let _ = self.remove(&record.id);
        })
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// When the disk is full or the directory is gone.
    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.dir(&record.id).join(FILE);
        let bytes = serde_json::to_vec_pretty(record)?;
        replace(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads a container's record.
    ///
    /// # Errors
    /// In runc's words when there is none.
    pub fn load(&self, id: &str) -> Result<Record> {
        let id: Id = id.parse().context("invalid container ID format")?;
        let path = self.dir(id.as_str()).join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(NOT_FOUND),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let record: Record = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is damaged: use delete --force", path.display()))?;
        if record.version != VERSION || record.id != id.as_str() {
            bail!("{} was written by another version: use delete --force", path.display());
        }
        Ok(record)
    }

    /// Ids of all containers.
    ///
    /// # Errors
    /// When the directory cannot be read; one that does not exist holds none.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", self.0.display()));
            }
        };
        let mut ids: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| self.dir(name).join(FILE).exists())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// Forgets a container; whether it was known.
    ///
    /// # Errors
    /// When its directory cannot be removed.
    pub fn remove(&self, id: &str) -> Result<bool> {
        let id: Id = id.parse().context("invalid container ID format")?;
        let dir = self.dir(id.as_str());
        match fs::remove_dir_all(&dir) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot remove {}", dir.display())),
        }
    }
}

impl Record {
    /// The record of a container that is about to be made.
    pub fn new(id: &Id, sandbox: &Id, bundle: PathBuf, spec: &kata_oci::Spec) -> Self {
        let root = spec.root.as_ref().map(|root| root.path.clone()).unwrap_or_default();
        Self {
            version: VERSION,
            id: id.to_string(),
            sandbox: sandbox.to_string(),
            rootfs: bundle.join(root),
            bundle,
            oci_version: spec.oci_version.clone(),
            annotations: spec.annotations.clone(),
            created: crate::time::rfc3339(std::time::SystemTime::now()),
            owner: owner(),
            stand_in: None,
            created_fully: false,
        }
    }

    /// The sandbox's id.
    ///
    /// # Errors
    /// When the record was tampered with.
    pub fn sandbox(&self) -> Result<Id> {
        self.sandbox.parse().context("the container's record names an invalid sandbox")
    }
}

/// Who runs this, by name where there is one.
fn owner() -> String {
    let uid = rustix::process::getuid().as_raw();
    fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|text| {
            text.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
            })
        })
        .unwrap_or_else(|| uid.to_string())
}

/// Replaces a file as one step: its readers see the old bytes or the new ones.
///
/// # Errors
/// As the file system says.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(hidden);
    let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        let id: Id = id.parse().unwrap();
        let spec = kata_oci::Spec::parse(
            br#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"annotations":{"a":"b"}}"#,
        );
        Record::new(&id, &id, "/b".into(), &spec.unwrap())
    }

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().join("deep/root"));
        let written = record("c1");
        root.create(&written).unwrap();
        assert_eq!(root.load("c1").unwrap(), written);
        assert_eq!(written.rootfs, Path::new("/b/rootfs"));
        assert_eq!(root.ids().unwrap(), ["c1"]);
    }

    #[test]
    fn a_second_container_of_the_same_id_is_refused_in_runcs_words() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        root.create(&record("c1")).unwrap();
        let error = root.create(&record("c1")).unwrap_err();
        assert_eq!(error.to_string(), "container with given ID already exists");
    }

    #[test]
    fn an_unknown_container_does_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        assert_eq!(root.load("c1").unwrap_err().to_string(), "container does not exist");
        assert!(!root.remove("c1").unwrap());
        assert!(root.load("../etc").is_err());
        assert!(root.remove("..").is_err());
    }

    #[test]
    fn a_damaged_record_is_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        root.create(&record("c1")).unwrap();
        fs::write(dir.path().join("c1/container.json"), "{").unwrap();
        assert!(root.load("c1").unwrap_err().to_string().contains("is damaged"));
        assert!(root.remove("c1").unwrap());
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = HostProcess::of(std::process::id() as i32).unwrap();
        assert!(me.alive());
        assert!(!HostProcess { start: me.start + 1, ..me }.alive());
    }

    #[test]
    fn stat_is_read_past_a_hostile_command_name() {
        let stat = format!("7 (a) R 1 (b) S {} 4242 1", ["0"; 18].join(" "));
        assert_eq!(start_time(&stat).unwrap(), (4242, 'S'));
    }
}
