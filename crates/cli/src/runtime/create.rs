//! `create` and `run`: a container comes to be.
//!
//! 1. The bundle is read and checked, the sandbox chosen.
//! 2. The record is written: from here on `delete --force` can undo everything.
//! 3. The sandbox's server is started, or the pod's is connected to.
//! 4. The stand-in is started: it holds the engine's streams and the network namespace.
//! 5. The server is asked to create the container; it boots the virtual machine.
//! 6. The stand-in's pid goes into the record and the pid file.
//!
//! When a step fails, all before it are undone.

use super::{Call, Global, delete};
use crate::calls::Server;
use crate::console::Pty;
use crate::foreground::{self, Patience, Signals};
use crate::record::{HostProcess, Record, replace};
use crate::stand_in::Netns;
use crate::stand_in::launch::{self, Request};
use crate::stand_in::root::Root;
use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::CreateTaskRequest;
use kata_jail::Child;
use kata_oci::{Process, Spec};
use kata_protocol::Id;
use kata_sandbox::PodRole;
use kata_sandbox::factory::Recipe;
use kata_shim::options::CreateOptions;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Who holds the other end of the terminal.
#[derive(Clone, Copy, Debug)]
pub enum Console<'a> {
    /// The caller, who listens on this socket; we do not stay.
    Socket(Option<&'a Path>),
    /// We do.
    Ours,
}

/// A container that was created.
pub struct Created {
    /// Its sandbox's server.
    pub server: Server,
    /// Its stand-in, a child of ours.
    pub stand_in: Child,
    /// Its terminal, when we serve it.
    pub terminal: Option<Pty>,
}

/// `create`.
pub async fn create_verb(call: &Call) -> Result<u8> {
    refuse_fds(call)?;
    let (id, bundle) = (call.id()?, bundle(call)?);
    let socket = call.flags.text("console-socket").map(Path::new);
    let signals = Signals::take(Patience::Endless)?;
    let console = Console::Socket(socket);
    let created = create_unless_told_to_end(&call.global, &id, &bundle, console, &signals).await?;
    finish_detached(call, &id, &created).await?;
    Ok(0)
}

/// `run`.
pub async fn run_verb(call: &Call) -> Result<u8> {
    refuse_fds(call)?;
    let (id, bundle) = (call.id()?, bundle(call)?);
    let socket = call.flags.text("console-socket").map(Path::new);
    let detach = call.flags.on("detach");
    let console = match socket {
        None if !detach => Console::Ours,
        socket => Console::Socket(socket),
    };
    let signals = Signals::take(Patience::Endless)?;
    let created = create_unless_told_to_end(&call.global, &id, &bundle, console, &signals).await?;
    if detach {
        undo_unless(call, &id, created.server.start_process(&id, None).await).await?;
        finish_detached(call, &id, &created).await?;
        return Ok(0);
    }
    undo_unless(call, &id, write_pid_file(call, created.stand_in.pid())).await?;
    let code = start_and_wait(&id, created, &signals).await;
    if call.flags.on("keep") && code.is_ok() {
        return code;
    }
    let deleted = delete::destroy(&call.global, &id).await;
    let code = code?;
    deleted.map(|()| code)
}

/// Runs a created container's process in the foreground; its exit code.
///
/// # Errors
/// When it cannot be started.
pub async fn start_and_wait(id: &Id, created: Created, signals: &Signals) -> Result<u8> {
    let Created { server, stand_in, terminal } = created;
    server.start_process(id, None).await?;
    foreground::wait(&stand_in, signals, terminal).await
}

async fn finish_detached(call: &Call, id: &Id, created: &Created) -> Result<()> {
    undo_unless(call, id, write_pid_file(call, created.stand_in.pid())).await
}

async fn undo_unless<T>(call: &Call, id: &Id, result: Result<T>) -> Result<T> {
    if result.is_err() {
        // The first failure is the one to tell.
        let _ = delete::destroy(&call.global, id).await;
    }
    result
}

/// Writes `--pid-file`, if asked to.
pub fn write_pid_file(call: &Call, pid: i32) -> Result<()> {
    let Some(path) = call.flags.text("pid-file") else { return Ok(()) };
    replace(Path::new(path), pid.to_string().as_bytes())
        .with_context(|| format!("cannot write the pid file {path}"))
}

/// `--preserve-fds` cannot be kept: better no container than one that lacks its sockets.
pub fn refuse_fds(call: &Call) -> Result<()> {
    if call.flags.number("preserve-fds").unwrap_or(0) > 0 {
        bail!(
            "preserve-fds is not supported: open descriptors cannot be passed into a virtual \
             machine; give the container a volume or a network address instead"
        );
    }
    Ok(())
}

fn bundle(call: &Call) -> Result<PathBuf> {
    let path = call.flags.text("bundle").filter(|path| !path.is_empty()).unwrap_or(".");
    fs::canonicalize(path).with_context(|| format!("cannot find the bundle {path}"))
}

/// Creates, and undoes it when we are told to end meanwhile.
///
/// # Errors
/// Those of [`create`], or that it was interrupted.
pub async fn create_unless_told_to_end(
    global: &Global,
    id: &Id,
    bundle: &Path,
    console: Console<'_>,
    signals: &Signals,
) -> Result<Created> {
    // Somebody else's container of this id must survive our being interrupted.
    let ours = Cell::new(false);
    let work = create(global, id, bundle, console, &ours);
    signals
        .unless_told_to_end(work, async || {
            if ours.get() { delete::destroy(global, id).await } else { Ok(()) }
        })
        .await
}

/// Creates a container; see the module's text for the order. `ours` becomes true when the
/// id is taken for us.
async fn create(
    global: &Global,
    id: &Id,
    bundle: &Path,
    console: Console<'_>,
    ours: &Cell<bool>,
) -> Result<Created> {
    let spec = read_spec(bundle)?;
    let process = spec.process.as_ref().context("config.json: process is missing")?;
    let terminal = open_terminal(process, console)?;
    let sandbox = sandbox_of(id, &spec.annotations)?;
    let mut record = Record::new(id, &sandbox, bundle.to_owned(), &spec);
    if !record.rootfs.is_dir() {
        bail!("the root file system {} is not a directory", record.rootfs.display());
    }
    global.root.create(&record)?;
    ours.set(true);
    let created = reach(global, &mut record, &spec, process, terminal).await;
    if created.is_err() {
        // The first failure is the one to tell.
        let _ = global.root.remove(id.as_str());
    }
    let mut created = created?;
    if let (Console::Socket(_), Some(_)) = (console, &created.terminal) {
        created.terminal = None;
    }
    Ok(created)
}

async fn reach(
    global: &Global,
    record: &mut Record,
    spec: &Spec,
    process: &Process,
    terminal: Option<Pty>,
) -> Result<Created> {
    let (id, sandbox): (Id, Id) = (record.id.parse()?, record.sandbox()?);
    let alone = id == sandbox;
    let server = if alone {
        Server::start(&sandbox, &Recipe::of(global.config.as_deref(), spec)).await?
    } else {
        Server::connect(&sandbox)
            .await?
            .with_context(|| format!("sandbox {sandbox} of container {id} is not running"))?
    };
    let created = fill(global, record, spec, process, &server, terminal.as_ref()).await;
    match created {
        Ok(stand_in) => Ok(Created { server, stand_in, terminal }),
        Err(error) => {
            delete::undo(&server, &id, alone).await;
            Err(error)
        }
    }
}

async fn fill(
    global: &Global,
    record: &mut Record,
    spec: &Spec,
    process: &Process,
    server: &Server,
    terminal: Option<&Pty>,
) -> Result<Child> {
    let (id, sandbox): (Id, Id) = (record.id.parse()?, record.sandbox()?);
    let stand_in = launch::start(&Request {
        sandbox: &sandbox,
        container: &id,
        exec: None,
        command: &process.args,
        netns: Netns::of(&spec.linux().namespaces),
        root: Some(Root::of(&record.bundle, &record.rootfs, spec)),
        terminal,
    })?;
    let finished = async {
        record.stand_in = Some(
            HostProcess::of(stand_in.pid()).context("the container's host process has ended")?,
        );
        global.root.save(record)?;
        let options = CreateOptions {
            config: global.config.clone(),
            systemd_cgroup: global.systemd_cgroup,
            stand_in: true,
        };
        let request = CreateTaskRequest {
            id: record.id.clone(),
            bundle: text_of(&record.bundle)?,
            terminal: process.terminal,
            options: Some(options.to_any()).into(),
            ..Default::default()
        };
        server.call(async |tasks, context| tasks.create(context, &request).await).await?;
        record.created_fully = true;
        global.root.save(record)
    };
    match finished.await {
        Ok(()) => Ok(stand_in),
        Err(error) => {
            launch::discard(&stand_in);
            Err(error)
        }
    }
}

fn text_of(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// Reads and checks a bundle's `config.json`.
///
/// # Errors
/// In runc's words when there is none.
pub fn read_spec(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("JSON specification file {} not found", path.display())
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    Spec::parse(&bytes).with_context(|| format!("cannot use {}", path.display()))
}

/// The terminal a process asks for; refuses what runc refuses.
pub fn open_terminal(process: &Process, console: Console<'_>) -> Result<Option<Pty>> {
    match (process.terminal, console) {
        (false, Console::Socket(Some(_))) => {
            bail!("cannot use console socket if the process has no terminal (process.terminal)")
        }
        (false, _) => Ok(None),
        (true, Console::Socket(None)) => {
            bail!("cannot allocate tty if kata-runtime will detach without setting console socket")
        }
        (true, Console::Socket(Some(socket))) => {
            let pty = Pty::open()?;
            if let Some(size) = process.console_size {
                let small = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
                pty.resize(small(size.height), small(size.width));
            }
            pty.send_master(socket)?;
            Ok(Some(pty))
        }
        (true, Console::Ours) => {
            let pty = Pty::open()?;
            pty.resize_like_ours();
            Ok(Some(pty))
        }
    }
}

/// The sandbox that a container belongs to: its pod's, or one of its own.
fn sandbox_of(id: &Id, annotations: &BTreeMap<String, String>) -> Result<Id> {
    Ok(match PodRole::of(annotations)? {
        PodRole::Container { sandbox } => sandbox,
        PodRole::Alone | PodRole::Sandbox => id.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_needs_somebody_who_takes_it() {
        let with = Process { terminal: true, ..Process::default() };
        let without = Process::default();
        assert!(open_terminal(&with, Console::Socket(None)).is_err());
        assert!(open_terminal(&without, Console::Socket(Some(Path::new("/x")))).is_err());
        assert!(open_terminal(&without, Console::Socket(None)).unwrap().is_none());
        assert!(open_terminal(&with, Console::Ours).unwrap().is_some());
    }

    #[test]
    fn a_missing_or_broken_config_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = read_spec(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json not found"), "{error}");
        fs::write(dir.path().join("config.json"), "{").unwrap();
        let error = format!("{:#}", read_spec(dir.path()).unwrap_err());
        assert!(error.contains("not a valid OCI specification"), "{error}");
    }
}
