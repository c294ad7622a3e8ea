//! The containers of this sandbox: created, started, joined, deleted.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kata_cgroups::{Cgroup, Hierarchy, container_path};
use kata_oci::{Spec, Wire as _};
use kata_protocol::agent::{CreateContainerRequest, ExecRequest, Stdio as WantedStdio};
use kata_protocol::{Id, limits};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use crate::container::{self, Builder, Created, NewContainer, Profile};
use crate::error::AgentError;
use crate::events;
use crate::pod::{self, Pod};
use crate::process::Process;
use crate::reaper::Reaper;
use crate::stdio::{self, Stdio};
use crate::storage::{self, Mounted};
use crate::streams::Streams;

/// How long a killed process may take to end.
const KILL_TIME: Duration = Duration::from_secs(10);

/// The table of containers.
#[derive(Debug)]
pub struct Containers {
    table: Mutex<HashMap<Id, Slot>>,
    hierarchy: OnceLock<Option<Hierarchy>>,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    ooms: mpsc::Sender<Id>,
    pod: Pod,
    builder: Builder,
}

#[derive(Clone, Debug)]
enum Slot {
    /// The id is taken; there is nothing to act on yet.
    Building,
    Ready(Arc<Container>),
}

/// One container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: Id,
    /// Its cgroup; none where the agent runs without any (tests).
    pub cgroup: Option<OwnedCgroup>,
    /// Its first process.
    pub init: Arc<Process>,
    /// Kept until its start.
    created: Mutex<Option<CreatedSlot>>,
    profile: Arc<Profile>,
    execs: Mutex<HashMap<Id, Option<Arc<Process>>>>,
    _storages: Vec<Mounted>,
    oom_watch: Option<AbortHandle>,
}

/// A container's start, as it can be debugged.
struct CreatedSlot(Created);

impl std::fmt::Debug for CreatedSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Created")
    }
}

/// A cgroup that is removed, with all processes in it, when its container is.
#[derive(Debug)]
pub struct OwnedCgroup(Cgroup);

impl std::ops::Deref for OwnedCgroup {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for OwnedCgroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.delete() {
            tracing::warn!(%error, "cannot remove a cgroup");
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
    }
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<Id, Option<Arc<Process>>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One of its processes.
    ///
    /// # Errors
    /// When there is no such exec.
    pub fn process(&self, exec: Option<&Id>) -> Result<Arc<Process>, AgentError> {
        match exec {
            None => Ok(Arc::clone(&self.init)),
            Some(exec) => self.execs().get(exec).cloned().flatten().ok_or_else(|| {
                AgentError::NotFound(format!("exec {exec} of container {}", self.id))
            }),
        }
    }

    /// Every process that the engine started in it.
    pub fn processes(&self) -> Vec<Arc<Process>> {
        let execs = self.execs().values().flatten().cloned().collect::<Vec<_>>();
        std::iter::once(Arc::clone(&self.init)).chain(execs).collect()
    }

    /// Its cgroup.
    ///
    /// # Errors
    /// When it has none.
    pub fn cgroup(&self) -> Result<&Cgroup, AgentError> {
        self.cgroup
            .as_deref()
            .ok_or_else(|| AgentError::Precondition(format!("container {} has no cgroup", self.id)))
    }

    fn refuse_unless_running(&self, what: &str) -> Result<(), AgentError> {
        if self.init.has_ended() {
            return Err(AgentError::Precondition(format!("cannot {what} a stopped container")));
        }
        let frozen = self.cgroup.as_ref().is_some_and(|c| c.is_frozen().unwrap_or(false));
        if frozen {
            return Err(AgentError::Precondition(format!(
                "cannot {what} a paused container; resume it first"
            )));
        }
        Ok(())
    }

    /// Puts a process where the container's are. A container that has divided its cgroup
    /// takes new processes only where its first one is now.
    fn join(&self, pid: i32) -> io::Result<()> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let Err(error) = cgroup.add(pid) else { return Ok(()) };
        Hierarchy::detect()
            .and_then(|hierarchy| Cgroup::of_process(&hierarchy, self.init.pid))
            .and_then(|inner| inner.add(pid))
            .map_err(|_| io::Error::other(error))
    }
}

impl Containers {
    /// An empty table. Out-of-memory kills go to `ooms`. Without a hierarchy, whatever is
    /// mounted is used.
    pub fn new(
        reaper: Arc<Reaper>,
        streams: Arc<Streams>,
        ooms: mpsc::Sender<Id>,
        hierarchy: Option<Hierarchy>,
        builder: Builder,
    ) -> Self {
        let hierarchy = hierarchy.map_or_else(OnceLock::new, |known| OnceLock::from(Some(known)));
        let pod = Pod::default();
        Self { table: Mutex::default(), hierarchy, reaper, streams, ooms, pod, builder }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Id, Slot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all containers share.
    pub fn pod(&self) -> &Pod {
        &self.pod
    }

    /// The reaper of all processes.
    pub fn reaper(&self) -> &Reaper {
        &self.reaper
    }

    /// A container.
    ///
    /// # Errors
    /// When there is none of that id.
    pub fn get(&self, id: &Id) -> Result<Arc<Container>, AgentError> {
        match self.table().get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            _ => Err(AgentError::NotFound(format!("container {id}"))),
        }
    }

    /// Builds a container; its first process then waits for the start. Returns its pid.
    ///
    /// # Errors
    /// When it cannot be built; nothing is left of it then.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<i32, AgentError> {
        let id: Id = request.container_id.parse()?;
        {
            let mut table = self.table();
            if table.contains_key(&id) {
                return Err(AgentError::Exists(format!("container {id}")));
            }
            if table.len() >= limits::CONTAINERS {
                return Err(AgentError::Limit(format!("{} containers", limits::CONTAINERS)));
            }
            table.insert(id.clone(), Slot::Building);
        }
        match self.build(&id, request).await {
            Ok(container) => {
                let pid = container.init.pid;
                self.table().insert(id, Slot::Ready(Arc::new(container)));
                Ok(pid)
            }
            Err(error) => {
                self.streams.forget(&id, None);
                self.table().remove(&id);
                Err(error)
            }
        }
    }

    async fn build(
        &self,
        id: &Id,
        request: CreateContainerRequest,
    ) -> Result<Container, AgentError> {
        self.pod.mount(&request.shared_storages).await?;
        let mut storages = Vec::with_capacity(request.storages.len());
        for storage in &request.storages {
            storages.push(storage::mount(storage).await?);
        }
        tracing::debug!(container = %id, "storages are mounted");
        let spec = Spec::from_wire(&request.spec)?;
        self.pod.prepare(&spec).await?;
        let shares_pids = pod::shares_pids(&spec);
        let cgroup = self.cgroup(id, &spec)?;
        tracing::debug!(container = %id, "cgroup is made");
        let wanted = request.stdio.unwrap_or_default();
        let (io, ends) = pipes(&wanted)?;
        let join = |pid| match &cgroup {
            Some(cgroup) => cgroup.add(pid).map_err(io::Error::other),
            None => Ok(()),
        };
        let bundle = PathBuf::from(request.bundle);
        let container = NewContainer { id: id.clone(), bundle, spec, size: size(&wanted) };
        let (built, created) = self.builder.create(container, io, join).await?;
        tracing::debug!(container = %id, pid = built.pid, "container is built");
        let stdio = Stdio::start(&self.streams, id, None, ends, built.terminal_master)
            .map_err(|error| AgentError::System("watch the process's output", error))?;
        let init = Process::watch(None, built.pid, stdio, &self.reaper, cgroup.as_deref());
        if let Some(cgroup) = cgroup.as_deref().filter(|_| shares_pids) {
            end_with(Arc::clone(&init), cgroup.clone());
        }
        let oom_watch = cgroup
            .as_deref()
            .and_then(|cgroup| events::watch_oom(id.clone(), cgroup.clone(), self.ooms.clone()));
        Ok(Container {
            id: id.clone(),
            cgroup,
            init,
            profile: created.profile(),
            created: Mutex::new(Some(CreatedSlot(created))),
            execs: Mutex::default(),
            _storages: storages,
            oom_watch,
        })
    }

    fn cgroup(&self, id: &Id, spec: &Spec) -> Result<Option<OwnedCgroup>, AgentError> {
        let hierarchy = self.hierarchy.get_or_init(|| match Hierarchy::detect() {
            Ok(hierarchy) => Some(hierarchy),
            Err(error) => {
                tracing::warn!(%error, "containers run without cgroups");
                None
            }
        });
        let Some(hierarchy) = hierarchy else { return Ok(None) };
        let linux = spec.linux();
        let path = container_path(linux.cgroups_path.as_deref(), id.as_str())?;
        let cgroup = OwnedCgroup(Cgroup::create(hierarchy, &path)?);
        if let Some(resources) = &linux.resources {
            // An empty list of devices is a list too: only the default ones may be used.
            cgroup.apply(resources, true)?;
        }
        Ok(Some(cgroup))
    }

    /// Lets a created container's program run.
    ///
    /// # Errors
    /// When it is not in that state, or the program cannot be executed.
    pub async fn start(&self, id: &Id) -> Result<(), AgentError> {
        let container = self.get(id)?;
        let created = container.created.lock().unwrap_or_else(PoisonError::into_inner).take();
        match created {
            _ if container.init.has_ended() => Err(AgentError::Precondition(
                "cannot start a container that has stopped".to_owned(),
            )),
            Some(CreatedSlot(created)) => Ok(created.start().await?),
            None => Err(AgentError::Precondition(
                "cannot start an already running container".to_owned(),
            )),
        }
    }

    /// Runs one more process in a container. Returns its pid.
    ///
    /// # Errors
    /// When it cannot be run; nothing is left of it then.
    pub async fn exec(&self, request: ExecRequest) -> Result<i32, AgentError> {
        let container = self.get(&request.container_id.parse()?)?;
        let exec: Id = request.exec_id.parse()?;
        container.refuse_unless_running("exec in")?;
        {
            let mut execs = container.execs();
            if execs.contains_key(&exec) {
                return Err(AgentError::Exists(format!("exec {exec}")));
            }
            if execs.len() >= limits::PROCESSES {
                return Err(AgentError::Limit(format!("{} processes", limits::PROCESSES)));
            }
            execs.insert(exec.clone(), None);
        }
        match self.build_exec(&container, &exec, request).await {
            Ok(process) => {
                let pid = process.pid;
                container.execs().insert(exec, Some(process));
                Ok(pid)
            }
            Err(error) => {
                self.streams.forget(&container.id, Some(&exec));
                container.execs().remove(&exec);
                Err(error)
            }
        }
    }

    async fn build_exec(
        &self,
        container: &Container,
        exec: &Id,
        request: ExecRequest,
    ) -> Result<Arc<Process>, AgentError> {
        let wanted = request.stdio.unwrap_or_default();
        let (io, ends) = pipes(&wanted)?;
        let built = self
            .builder
            .exec(
                container.init.pid,
                &container.profile,
                kata_oci::Process::from_wire(&request.process)?,
                io,
                |pid| container.join(pid),
                size(&wanted),
            )
            .await?;
        let streams = &self.streams;
        let stdio = Stdio::start(streams, &container.id, Some(exec), ends, built.terminal_master)
            .map_err(|error| AgentError::System("watch the process's output", error))?;
        let cgroup = container.cgroup.as_deref();
        Ok(Process::watch(Some(exec.clone()), built.pid, stdio, &self.reaper, cgroup))
    }

    /// Forgets an exec that has ended, or removes a container with everything in it.
    ///
    /// # Errors
    /// When the exec still runs, or a process cannot be killed.
    pub async fn delete(&self, id: &Id, exec: Option<&Id>) -> Result<(), AgentError> {
        let container = self.get(id)?;
        let process = container.process(exec)?;
        if let Some(exec) = exec {
            if !process.has_ended() {
                return Err(AgentError::Precondition(format!("exec {exec} is still running")));
            }
            container.execs().remove(exec);
            self.streams.forget(id, Some(exec));
            return Ok(());
        }
        if !process.has_ended() {
            // It may end in between.
            let _ = process.signal(&self.reaper, libc::SIGKILL);
        }
        if let Some(cgroup) = &container.cgroup {
            delete_cgroup(cgroup).await?;
        }
        timeout(KILL_TIME, process.wait()).await.map_err(|_| {
            AgentError::Precondition(format!("the first process of container {id} will not die"))
        })??;
        for process in container.processes() {
            self.streams.forget(id, process.exec.as_ref());
        }
        self.table().remove(id);
        Ok(())
    }
}

/// Removes a container's cgroup, and kills what is in it. Mostly that is nothing any more, and a thread
/// for it would be the dearest part where the guest is emulated.
async fn delete_cgroup(cgroup: &Cgroup) -> Result<(), AgentError> {
    if cgroup.delete_unused()? {
        return Ok(());
    }
    let cgroup = cgroup.clone();
    // Waits for processes to die.
    let deleted = tokio::task::spawn_blocking(move || cgroup.delete()).await;
    Ok(deleted.map_err(|_| AgentError::GivenUp)??)
}

/// Ends what a container's first process leaves in a PID namespace that is not its own.
fn end_with(init: Arc<Process>, cgroup: Cgroup) {
    tokio::spawn(async move {
        if init.wait().await.is_ok()
            && let Err(error) = cgroup.kill(libc::SIGKILL)
        {
            tracing::debug!(%error, "cannot end what a container left");
        }
    });
}

fn pipes(wanted: &WantedStdio) -> Result<(container::ProcessIo, stdio::Ends), AgentError> {
    stdio::pipes(wanted).map_err(|error| AgentError::System("make the process's pipes", error))
}

/// Rows and columns, where the request names any.
fn size(wanted: &WantedStdio) -> Option<(u16, u16)> {
    let fit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    (wanted.terminal && wanted.rows > 0 && wanted.columns > 0)
        .then(|| (fit(wanted.rows), fit(wanted.columns)))
}
