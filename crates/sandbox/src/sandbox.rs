//! The sandbox: one virtual machine and the containers in it.
//!
//! Read [`Sandbox::create`] top to bottom: a bundle is read, the machine is started or
//! found, hooks run while it boots, the guest gets its network, the container is handed
//! over. What fails on the way undoes what was done before it.

use crate::agent::ProcessRef;
use crate::boot::Boot;
use crate::container::{Bundle, Container, hook_state};
use crate::factory::{Taken, Warm};
use crate::life::status_word;
use crate::machine::Machine;
use crate::process::{Exit, ProcessStatus, Stdio, StdioPaths, lock};
use crate::state::{SERVER_ROLE, StateFile, remove_cgroup};
use crate::vm_config::Later;
use crate::{PodRole, SandboxDir, SandboxError, forward, hooks};
use kata_network::Netns;
use kata_oci::{Namespace, Status};
use kata_protocol::{Id, chain, limits};
use kata_storage::{FileSystem, Pod};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

/// Something an engine wants to hear of.
#[derive(Clone, Debug)]
pub enum Event {
    /// A container was created.
    Created {
        /// Which.
        container: Id,
        /// Its bundle, as the engine named it.
        bundle: PathBuf,
        /// What its root is mounted from.
        rootfs: Vec<FileSystem>,
        /// Where its streams are.
        paths: StdioPaths,
        /// It has a terminal.
        terminal: bool,
        /// The host process that stands for it.
        pid: i32,
    },
    /// A process was started.
    Started {
        /// Which.
        process: ProcessRef,
        /// The host process that stands for it.
        pid: i32,
    },
    /// An exec is known, and not started yet.
    ExecAdded {
        /// Which.
        process: ProcessRef,
    },
    /// A process ended.
    Exit {
        /// Which.
        process: ProcessRef,
        /// The host process that stood for it.
        pid: i32,
        /// How.
        exit: Exit,
    },
    /// A container was deleted.
    Deleted {
        /// Which.
        container: Id,
        /// The host process that stood for it.
        pid: i32,
        /// How it had ended.
        exit: Exit,
    },
    /// A container was frozen, or set going again.
    Paused {
        /// Which.
        container: Id,
        /// It is frozen now.
        paused: bool,
    },
    /// A container ran out of memory.
    OutOfMemory {
        /// Which.
        container: Id,
    },
}

impl Event {
    /// The container that it is about.
    pub fn container(&self) -> &Id {
        match self {
            Self::Created { container, .. }
            | Self::Deleted { container, .. }
            | Self::Paused { container, .. }
            | Self::OutOfMemory { container } => container,
            Self::Started { process, .. }
            | Self::ExecAdded { process }
            | Self::Exit { process, .. } => &process.container,
        }
    }
}

/// Who hears of events: called at once, in order, and must not wait.
pub type EventSink = Box<dyn Fn(Event) + Send + Sync>;

/// What an engine asks for with `create`.
#[derive(Debug)]
pub struct CreateRequest {
    /// The container.
    pub id: Id,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What the root is mounted from; none: it is mounted in the bundle already.
    pub rootfs: Vec<FileSystem>,
    /// The first process's streams.
    pub stdio: Stdio,
    /// The host process that stands for the first process; none: the VMM does.
    pub stand_in: Option<i32>,
    /// A configuration file to use instead of the usual ones.
    pub config: Option<PathBuf>,
    /// `linux.cgroupsPath` is systemd's.
    pub systemd_cgroup: bool,
}

/// What `state` tells about a process.
#[derive(Clone, Debug)]
pub struct ProcessState {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// The host process that stands for it.
    pub pid: i32,
    /// Where it is in its life.
    pub status: ProcessStatus,
    /// Its container is frozen.
    pub paused: bool,
    /// It has a terminal.
    pub terminal: bool,
    /// Where the engine said its streams are.
    pub paths: crate::process::StdioPaths,
}

/// One virtual machine and its containers.
pub struct Sandbox {
    id: Id,
    dir: SandboxDir,
    pub(crate) state: Mutex<StateFile>,
    machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
    warm: Mutex<Option<Warm>>,
    pub(crate) containers: Mutex<BTreeMap<Id, Arc<Container>>>,
    events: EventSink,
}

impl Sandbox {
    /// A sandbox whose directory exists; nothing runs in it yet. What was `taken` from the
    /// factory is its machine, if it turns out to be of the kind that is asked for.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn new(id: Id, events: EventSink, taken: Option<Taken>) -> Result<Arc<Self>, SandboxError> {
        let dir = SandboxDir::of(&id);
        let mut state = StateFile::open(dir.clone());
        state.record_process(std::process::id().cast_signed(), SERVER_ROLE)?;
        Ok(Arc::new(Self {
            id,
            dir,
            state: Mutex::new(state),
            machine: tokio::sync::Mutex::default(),
            warm: Mutex::new(taken.map(|taken| taken.warm)),
            containers: Mutex::default(),
            events,
        }))
    }

    /// The sandbox's id.
    pub fn id(&self) -> &Id {
        &self.id
    }

    pub(crate) fn emit(&self, event: Event) {
        (self.events)(event);
    }

    /// Writes a stand-in down.
    pub(crate) fn record_stand_in(&self, pid: i32) -> Result<(), SandboxError> {
        lock(&self.state).record_process(pid, "stand-in")
    }

    /// Creates a container; the first one starts the machine. Its process waits for
    /// [`Sandbox::start`]. Returns the host pid that stands for it.
    ///
    /// # Errors
    /// See [`SandboxError`]; nothing of the container is left then.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<i32, SandboxError> {
        let pod = self.pod();
        let bundle = Bundle::load(&request, pod.as_ref())?;
        self.check_room(&request.id)?;
        let mut slot = self.machine.lock().await;
        let booted = slot.is_none();
        let machine = match slot.as_ref() {
            Some(machine) => Arc::clone(machine),
            None if pod_of(&bundle)?.is_some() => {
                return Err(SandboxError::WrongState {
                    what: "create a container in",
                    id: self.id.to_string(),
                    state: "stopped",
                });
            }
            None => {
                let machine = self.boot(&bundle, &request).await?;
                Arc::clone(slot.insert(machine))
            }
        };
        drop(slot);
        let id = request.id.clone();
        match self.create_in(&machine, bundle, request).await {
            Ok(pid) => {
                tracing::info!(sandbox = %self.id, container = %id, pid, "container created");
                Ok(pid)
            }
            Err(error) => {
                let error = machine.explain(error).await;
                if booted {
                    self.end_machine().await;
                }
                Err(error)
            }
        }
    }

    /// The pod that a further container joins; none for the sandbox's first.
    fn pod(&self) -> Option<Pod> {
        let containers: Vec<_> = lock(&self.containers).values().cloned().collect();
        let stands = |container: &&Arc<Container>| {
            PodRole::of(&container.spec.annotations).is_ok_and(|role| role == PodRole::Sandbox)
        };
        let sandbox = containers.iter().find(stands);
        (!containers.is_empty()).then(|| {
            let pids = containers.iter().map(|container| container.init.pid).collect();
            Pod::of(sandbox.map(|container| &container.spec), pids)
        })
    }

    fn check_room(&self, id: &Id) -> Result<(), SandboxError> {
        let containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(SandboxError::Exists(format!("container {id}")));
        }
        if containers.len() >= limits::CONTAINERS {
            return Err(SandboxError::Unsupported("more than 512 containers in one sandbox"));
        }
        Ok(())
    }

    async fn boot(
        self: &Arc<Self>,
        bundle: &Bundle,
        request: &CreateRequest,
    ) -> Result<Arc<Machine>, SandboxError> {
        let linux = bundle.spec.linux();
        let named = linux.namespace(kata_oci::NamespaceKind::Network);
        let own = request.stand_in.is_none() && named.is_some_and(|named| named.path.is_none());
        let netns = if own { Netns::create()? } else { netns(request.stand_in, named)? };
        let role = PodRole::of(&bundle.spec.annotations)?;
        let alone = role == PodRole::Alone && bundle.plan.disk.is_none();
        let boot = Boot {
            sandbox: &self.id,
            container: &bundle.id,
            dir: &self.dir,
            spec: &bundle.spec,
            resolv_conf: bundle.plan.resolv_conf.as_deref(),
            netns: Some(netns),
            later: if alone { Later::Networks } else { Later::Devices },
            monitor_shows_netns: own,
            config: request.config.as_deref(),
        };
        let warm = lock(&self.warm).take();
        match Machine::start(boot, &self.state, warm).await {
            Ok(machine) => {
                let machine = Arc::new(machine);
                self.watch(&machine);
                if role == PodRole::Sandbox
                    && let Some(netns) = machine.netns().await
                {
                    forward::serve(&machine, &netns);
                }
                Ok(machine)
            }
            Err(error) => {
                self.remove_cgroups();
                Err(error)
            }
        }
    }

    /// Forgets a process that has ended; with the first process, the container.
    /// The last container takes the machine with it.
    ///
    /// # Errors
    /// There is no such process, or it has not ended.
    pub async fn delete(
        self: &Arc<Self>,
        process: &ProcessRef,
    ) -> Result<(i32, Exit), SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        let exit = match (found.status(), &process.exec) {
            (ProcessStatus::Exited(exit), _) => exit,
            // Never started: it has no exit of its own.
            (ProcessStatus::Created, Some(_)) => Exit { code: 0, at: SystemTime::now() },
            (status, _) => {
                return Err(SandboxError::WrongState {
                    what: "delete",
                    id: process.container.to_string(),
                    state: status_word(status),
                });
            }
        };
        let machine = self.machine.lock().await.clone();
        if let Some(machine) = machine.filter(|machine| !machine.is_over() && container.in_guest) {
            let removed = machine.call(machine.agent().delete(process)).await;
            if let Err(error) = removed {
                tracing::debug!(sandbox = %self.id, error = %chain(&error), "the guest had nothing to delete");
            }
            if process.exec.is_none() {
                machine.detach(&container.attached);
                let others = lock(&self.containers).len() > 1;
                if let Some(disk) = container.disk.as_ref().filter(|_| others) {
                    machine.unplug(disk).await;
                }
            }
        }
        match &process.exec {
            Some(exec) => {
                container.remove(exec);
                if found.pid != container.init.pid {
                    lock(&self.state).forget_process(found.pid);
                }
            }
            None => {
                self.forget(&container).await;
                let container = container.id.clone();
                self.emit(Event::Deleted { container, pid: found.pid, exit });
            }
        }
        Ok((found.pid, exit))
    }

    async fn forget(self: &Arc<Self>, container: &Arc<Container>) {
        let last = {
            let mut containers = lock(&self.containers);
            containers.remove(&container.id);
            containers.is_empty()
        };
        if last {
            self.end_machine().await;
        }
        let hooks = container.spec.hooks.clone().unwrap_or_default();
        let state =
            hook_state(&container.id, &container.bundle, &container.spec, Status::Stopped, 0);
        if let Err(error) = hooks::run("poststop", &hooks.poststop, &state).await {
            tracing::warn!(sandbox = %self.id, container = %container.id, error = %chain(&error), "hook failed");
        }
        tracing::info!(sandbox = %self.id, container = %container.id, "container deleted");
    }

    /// Ends the machine and removes all that the sandbox has on the host, its directory
    /// included. Returns whether it did: it does not while there are containers.
    pub async fn shutdown(self: &Arc<Self>, now: bool) -> bool {
        if !now && !lock(&self.containers).is_empty() {
            return false;
        }
        self.end_machine().await;
        lock(&self.state).remove_sockets();
        if let Err(error) = self.dir.remove() {
            tracing::warn!(sandbox = %self.id, error = %chain(&error), "cannot remove the sandbox's directory");
        }
        true
    }

    async fn end_machine(&self) {
        let machine = self.machine.lock().await.take();
        if let Some(machine) = machine {
            machine.stop().await;
        }
        self.remove_cgroups();
    }

    fn remove_cgroups(&self) {
        for path in lock(&self.state).cgroups() {
            let removed = crate::machine::leave_cgroup().and_then(|()| remove_cgroup(&path));
            if let Err(error) = removed {
                tracing::warn!(sandbox = %self.id, error = %chain(&error), "cannot remove a cgroup");
            }
        }
    }

    pub(crate) fn container(&self, id: &Id) -> Result<Arc<Container>, SandboxError> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| SandboxError::NoContainer(id.to_string()))
    }

    pub(crate) async fn machine(&self) -> Result<Arc<Machine>, SandboxError> {
        let machine = self.machine.lock().await.clone();
        machine.ok_or_else(|| SandboxError::Lost("its virtual machine has ended".to_owned()))
    }
}

/// The pod's sandbox, for a container that says to be in one.
fn pod_of(bundle: &Bundle) -> Result<Option<Id>, SandboxError> {
    Ok(match PodRole::of(&bundle.spec.annotations)? {
        PodRole::Container { sandbox } if sandbox != bundle.id => Some(sandbox),
        _ => None,
    })
}

/// The network namespace that an engine made: the stand-in's, or the one that is named.
fn netns(stand_in: Option<i32>, named: Option<&Namespace>) -> Result<Netns, SandboxError> {
    let path = named.and_then(|named| named.path.as_deref());
    let netns = match (stand_in, path) {
        (Some(pid), _) => Netns::of_process(pid)?,
        (None, Some(path)) => Netns::open(path)?,
        (None, None) => return Err(kata_network::NetworkError::Host.into()),
    };
    kata_network::check(&netns, path)?;
    Ok(netns)
}
