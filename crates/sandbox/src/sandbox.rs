//! The sandbox: one virtual machine and the containers in it.
//!
//! Read [`Sandbox::create`] top to bottom: a bundle is read, the machine is started or
//! found, hooks run while it boots, the guest gets its network, the container is handed
//! over. What fails on the way undoes what was done before it.

use crate::agent::ProcessRef;
use crate::container::{Bundle, Container, hook_state};
use crate::io::Relay;
use crate::machine::{Boot, Machine};
use crate::process::{Exit, Process, ProcessStatus, Stdio, lock};
use crate::state::{StateFile, remove_cgroup};
use crate::{SandboxDir, SandboxError, hooks};
use kata_network::Netns;
use kata_oci::Status;
use kata_protocol::{Id, limits};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tokio::sync::broadcast;

/// Something an engine wants to hear of.
#[derive(Clone, Debug)]
pub enum Event {
    /// A process ended.
    Exit {
        /// Which.
        process: ProcessRef,
        /// The host process that stood for it.
        pid: i32,
        /// How.
        exit: Exit,
    },
    /// A container ran out of memory.
    OutOfMemory {
        /// Which.
        container: Id,
    },
}

/// What an engine asks for with `create`.
#[derive(Debug)]
pub struct CreateRequest {
    /// The container.
    pub id: Id,
    /// Its bundle.
    pub bundle: PathBuf,
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
    state: Mutex<StateFile>,
    machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
    containers: Mutex<BTreeMap<Id, Arc<Container>>>,
    events: broadcast::Sender<Event>,
}

impl Sandbox {
    /// A sandbox whose directory exists; nothing runs in it yet.
    ///
    /// # Errors
    /// The state file cannot be written.
    pub fn new(id: Id) -> Result<Arc<Self>, SandboxError> {
        let dir = SandboxDir::of(&id);
        let mut state = StateFile::new(dir.clone());
        state.record_process(std::process::id().cast_signed(), "sandbox server")?;
        Ok(Arc::new(Self {
            id,
            dir,
            state: Mutex::new(state),
            machine: tokio::sync::Mutex::default(),
            containers: Mutex::default(),
            events: broadcast::Sender::new(256),
        }))
    }

    /// The sandbox's id.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Creates a container; the first one starts the machine. Its process waits for
    /// [`Sandbox::start`]. Returns the host pid that stands for it.
    ///
    /// # Errors
    /// See [`SandboxError`]; nothing of the container is left then.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<i32, SandboxError> {
        let bundle = Bundle::load(&request.id, &request.bundle)?;
        self.check_room(&request.id)?;
        let mut slot = self.machine.lock().await;
        let booted = slot.is_none();
        let machine = match slot.as_ref() {
            Some(machine) => Arc::clone(machine),
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
        let netns = self.netns(bundle, request)?;
        let boot = Boot {
            sandbox: &self.id,
            container: &bundle.id,
            dir: &self.dir,
            spec: &bundle.spec,
            resolv_conf: bundle.plan.resolv_conf.as_deref(),
            netns,
            config: request.config.as_deref(),
        };
        match Machine::start(boot, &self.state).await {
            Ok(machine) => {
                let machine = Arc::new(machine);
                self.watch(&machine);
                Ok(machine)
            }
            Err(error) => {
                self.remove_cgroups();
                Err(error)
            }
        }
    }

    /// The network namespace of the sandbox: the stand-in's, or the one that is named.
    fn netns(
        &self,
        bundle: &Bundle,
        request: &CreateRequest,
    ) -> Result<Option<Netns>, SandboxError> {
        let linux = bundle.spec.linux();
        let named = linux.namespace(kata_oci::NamespaceKind::Network);
        let path = match (request.stand_in, named.and_then(|n| n.path.clone())) {
            (Some(pid), _) => PathBuf::from(format!("/proc/{pid}/ns/net")),
            (None, Some(path)) => path,
            (None, None) => return Ok(None),
        };
        let netns = Netns::open(&path)?;
        kata_network::check(&netns, named.and_then(|n| n.path.as_deref()))?;
        Ok(Some(netns))
    }

    async fn create_in(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        bundle: Bundle,
        mut request: CreateRequest,
    ) -> Result<i32, SandboxError> {
        let pid = request.stand_in.unwrap_or_else(|| machine.pid());
        if let Some(pid) = request.stand_in {
            machine.adopt(pid)?;
            lock(&self.state).record_process(pid, "stand-in")?;
        }
        let state = hook_state(&bundle.id, &bundle.path, &bundle.spec, Status::Creating, pid);
        let hooks = bundle.hooks();
        let prepare = async {
            machine.attach(&bundle.plan.attachments)?;
            hooks::run("prestart", &hooks.prestart, &state).await?;
            hooks::run("createRuntime", &hooks.create_runtime, &state).await
        };
        tokio::try_join!(prepare, machine.ready())?;
        let network = machine.network_change().await?;
        machine.mark("hooks and network");

        let message = request.stdio.message();
        let reference = ProcessRef { container: bundle.id.clone(), exec: None };
        let process = Process::new(reference, pid, &request.stdio);
        let streams = std::mem::take(&mut request.stdio.streams);
        process.set_relay(Relay::start(machine.channel(), &bundle.id, None, streams).await?);
        let spec = bundle.plan.spec.clone();
        let created = machine.agent().create(&bundle.id, &bundle.path, spec, message, network);
        machine.call(created).await?;
        machine.mark("container created");
        let container = Arc::new(Container::new(bundle, process));
        self.follow(machine, &container, Arc::clone(&container.init));
        lock(&self.containers).insert(container.id.clone(), container);
        Ok(pid)
    }

    /// Starts a created container, or an exec. Returns its host pid.
    ///
    /// # Errors
    /// See [`SandboxError`]; a command that cannot be executed leaves the process ended.
    pub async fn start(self: &Arc<Self>, process: &ProcessRef) -> Result<i32, SandboxError> {
        let container = self.container(&process.container)?;
        let machine = self.machine().await?;
        let found = container.process(process.exec.as_ref())?;
        if found.status() != ProcessStatus::Created {
            return Err(SandboxError::WrongState {
                what: "start",
                id: process.container.to_string(),
                state: status_word(found.status()),
            });
        }
        match &process.exec {
            None => self.start_init(&machine, &container).await?,
            Some(exec) => self.start_exec(&machine, &container, exec, &found).await?,
        }
        Ok(found.pid)
    }

    async fn start_init(
        &self,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
    ) -> Result<(), SandboxError> {
        // Engines may connect the network between create and start.
        let network = machine.network_change().await?;
        let started = machine.call(machine.agent().start(&container.id, network)).await;
        if let Err(error) = started {
            return Err(machine.explain(error).await);
        }
        container.init.running();
        machine.mark("container started");
        machine.write_stages();
        machine.watch_network();
        let hooks = container.spec.hooks.clone().unwrap_or_default();
        let state = hook_state(
            &container.id,
            &container.bundle,
            &container.spec,
            Status::Running,
            container.init.pid,
        );
        if let Err(error) = hooks::run("poststart", &hooks.poststart, &state).await {
            // The specification: a failing poststart hook is logged, the container runs on.
            tracing::warn!(sandbox = %self.id, container = %container.id, %error, "hook failed");
        }
        Ok(())
    }

    async fn start_exec(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        exec: &Id,
        process: &Arc<Process>,
    ) -> Result<(), SandboxError> {
        let Some(mut pending) = process.take_pending() else {
            return Err(SandboxError::WrongState {
                what: "start",
                id: exec.to_string(),
                state: "being started",
            });
        };
        let message = pending.stdio.message();
        let streams = std::mem::take(&mut pending.stdio.streams);
        let relay = Relay::start(machine.channel(), &container.id, Some(exec), streams).await?;
        process.set_relay(relay);
        let reference = container.reference(Some(exec));
        let started = machine.call(machine.agent().exec(&reference, pending.spec, message)).await;
        if let Err(error) = started {
            process.exited(Exit { code: 127, at: SystemTime::now() });
            return Err(machine.explain(error).await);
        }
        process.running();
        self.follow(machine, container, Arc::clone(process));
        Ok(())
    }

    /// Makes an exec known; [`Sandbox::start`] runs it.
    ///
    /// # Errors
    /// The container is not running, the process object is bad, or the id is taken.
    pub fn exec(
        &self,
        process: &ProcessRef,
        spec: Vec<u8>,
        stdio: Stdio,
        stand_in: Option<i32>,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let exec = process.exec.as_ref().ok_or(SandboxError::Unsupported("an exec without id"))?;
        kata_oci::Process::parse(&spec)?;
        if container.init.status() != ProcessStatus::Running || container.is_paused() {
            let paused = container.is_paused();
            return Err(SandboxError::WrongState {
                what: "exec in",
                id: container.id.to_string(),
                state: if paused { "paused" } else { status_word(container.init.status()) },
            });
        }
        let pid = stand_in.unwrap_or(container.init.pid);
        if stand_in.is_some() {
            lock(&self.state).record_process(pid, "stand-in")?;
            if let Ok(slot) = self.machine.try_lock()
                && let Some(machine) = slot.as_ref()
            {
                machine.adopt(pid)?;
            }
        }
        container.add(exec, Process::pending(process.clone(), pid, spec, stdio))
    }

    /// What `state` tells about a process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn process_state(&self, process: &ProcessRef) -> Result<ProcessState, SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        Ok(ProcessState {
            bundle: container.bundle.clone(),
            pid: found.pid,
            status: found.status(),
            paused: container.is_paused(),
            terminal: found.terminal,
            paths: found.paths.clone(),
        })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn wait(&self, process: &ProcessRef) -> Result<Exit, SandboxError> {
        let container = self.container(&process.container)?;
        Ok(container.process(process.exec.as_ref())?.wait().await)
    }

    /// Sends a signal to a process, or to all of its container's.
    ///
    /// # Errors
    /// There is no such process, or it has ended.
    pub async fn kill(
        &self,
        process: &ProcessRef,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        if matches!(found.status(), ProcessStatus::Exited(_)) {
            if all {
                // Nobody is left to get it.
                return Ok(());
            }
            return Err(SandboxError::WrongState {
                what: "signal",
                id: process.container.to_string(),
                state: "stopped (process already finished)",
            });
        }
        let machine = self.machine().await?;
        machine.call(machine.agent().signal(process, signal, all)).await
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// There is no such process, or it has no terminal.
    pub async fn resize(
        &self,
        process: &ProcessRef,
        rows: u32,
        columns: u32,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        if found.status() != ProcessStatus::Running {
            return Ok(());
        }
        let machine = self.machine().await?;
        machine.call(machine.agent().resize(process, rows, columns)).await
    }

    /// The process gets what is in its input, and then end of file.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, process: &ProcessRef) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        if let Some(relay) = container.process(process.exec.as_ref())?.relay() {
            relay.close_stdin();
        }
        Ok(())
    }

    /// The host processes that stand for the container's living ones.
    ///
    /// # Errors
    /// There is no such container.
    pub fn pids(&self, container: &Id) -> Result<Vec<i32>, SandboxError> {
        let container = self.container(container)?;
        let alive = |process: &Arc<Process>| !matches!(process.status(), ProcessStatus::Exited(_));
        Ok(container.processes().iter().filter(|p| alive(p)).map(|p| p.pid).collect())
    }

    /// What the container used.
    ///
    /// # Errors
    /// There is no such container, or the guest cannot tell.
    pub async fn stats(
        &self,
        container: &Id,
    ) -> Result<kata_protocol::agent::StatsResponse, SandboxError> {
        self.container(container)?;
        let machine = self.machine().await?;
        machine.call(machine.agent().stats(container)).await
    }

    /// Changes the container's limits.
    ///
    /// # Errors
    /// The resources are bad, or the guest refuses.
    pub async fn update(&self, container: &Id, resources: &[u8]) -> Result<(), SandboxError> {
        self.container(container)?;
        kata_oci::Resources::parse(resources)?;
        let mut value: serde_json::Value =
            serde_json::from_slice(resources).map_err(kata_oci::SpecError::from)?;
        if let Some(map) = value.as_object_mut() {
            kata_storage::guest_resources(map);
        }
        let machine = self.machine().await?;
        machine.call(machine.agent().update(container, value.to_string().into_bytes())).await
    }

    /// Freezes the container's processes, or lets them go on.
    ///
    /// # Errors
    /// There is no such container, it is not running, or the guest refuses.
    pub async fn set_paused(&self, container: &Id, paused: bool) -> Result<(), SandboxError> {
        let container = self.container(container)?;
        let what = if paused { "pause" } else { "resume" };
        let wrong = |state| SandboxError::WrongState { what, id: container.id.to_string(), state };
        if container.init.status() != ProcessStatus::Running {
            return Err(wrong(status_word(container.init.status())));
        }
        if container.is_paused() == paused {
            return Err(wrong(if paused { "paused" } else { "not paused" }));
        }
        let machine = self.machine().await?;
        if paused {
            machine.call(machine.agent().pause(&container.id)).await?;
        } else {
            machine.call(machine.agent().resume(&container.id)).await?;
        }
        container.set_paused(paused);
        Ok(())
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
        if let Some(machine) = machine.filter(|machine| !machine.is_over()) {
            let removed = machine.call(machine.agent().delete(process)).await;
            if let Err(error) = removed {
                tracing::debug!(sandbox = %self.id, %error, "the guest had nothing to delete");
            }
            if process.exec.is_none() {
                machine.detach(&container.attached);
            }
        }
        match &process.exec {
            Some(exec) => {
                container.remove(exec);
                if found.pid != container.init.pid {
                    lock(&self.state).forget_process(found.pid);
                }
            }
            None => self.forget(&container).await,
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
            tracing::warn!(sandbox = %self.id, container = %container.id, %error, "hook failed");
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
        if let Err(error) = self.dir.remove() {
            tracing::warn!(sandbox = %self.id, %error, "cannot remove the sandbox's directory");
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
                tracing::warn!(sandbox = %self.id, %error, "cannot remove a cgroup");
            }
        }
    }

    fn container(&self, id: &Id) -> Result<Arc<Container>, SandboxError> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| SandboxError::NoContainer(id.to_string()))
    }

    async fn machine(&self) -> Result<Arc<Machine>, SandboxError> {
        let machine = self.machine.lock().await.clone();
        machine.ok_or_else(|| SandboxError::Lost("its virtual machine has ended".to_owned()))
    }

    /// Follows a process to its end, and tells everybody.
    fn follow(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        process: Arc<Process>,
    ) {
        let (sandbox, machine, container) =
            (Arc::clone(self), Arc::clone(machine), Arc::clone(container));
        tokio::spawn(async move {
            let ended = machine.call(machine.agent().wait(&process.reference)).await;
            let code = match ended {
                Ok(ended) => {
                    if ended.oom_killed && process.reference.exec.is_none() {
                        container.set_oom_killed();
                    }
                    if let Some(relay) = process.relay() {
                        relay.end_input();
                        tokio::select! {
                            () = relay.delivered(ended.stdout_bytes, ended.stderr_bytes) => {}
                            _cause = machine.lost() => {}
                        }
                    }
                    ended.code
                }
                Err(_lost) => crate::LOST,
            };
            let exit = Exit { code, at: SystemTime::now() };
            if process.exited(exit) {
                let _ = sandbox.events.send(Event::Exit {
                    process: process.reference.clone(),
                    pid: process.pid,
                    exit,
                });
            }
            // The sandbox ends with its first container; what it holds is given back at once.
            if process.reference.exec.is_none() && container.id == *machine.first_container() {
                machine.stop().await;
            }
        });
    }

    /// Ends every process when the machine is lost, and reports memory exhaustion.
    fn watch(self: &Arc<Self>, machine: &Arc<Machine>) {
        let (sandbox, lost) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            let cause = lost.lost().await;
            if !lost.is_stopping() {
                tracing::error!(sandbox = %sandbox.id, %cause, "the sandbox is lost");
            }
            let containers: Vec<_> = lock(&sandbox.containers).values().cloned().collect();
            let exit = Exit { code: crate::LOST, at: SystemTime::now() };
            for process in containers.iter().flat_map(|container| container.processes()) {
                if process.exited(exit) {
                    let reference = process.reference.clone();
                    let pid = process.pid;
                    let _ = sandbox.events.send(Event::Exit { process: reference, pid, exit });
                }
            }
            lost.stop().await;
        });
        let (sandbox, machine) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            if machine.ready().await.is_err() {
                return;
            }
            while let Ok(container) = machine.call(machine.agent().next_oom()).await {
                let _ = sandbox.events.send(Event::OutOfMemory { container });
            }
        });
    }
}

fn status_word(status: ProcessStatus) -> &'static str {
    match status {
        ProcessStatus::Created => "created",
        ProcessStatus::Running => "running",
        ProcessStatus::Exited(_) => "stopped",
    }
}
