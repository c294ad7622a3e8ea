//! The calls of `agent.proto`: checks the request, acts, answers.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use async_trait::async_trait;
use kata_protocol::agent::{
    self, ConnectRequest, ConnectResponse, ContainerId, CreateContainerRequest, Empty, Event,
    ExecRequest, GrowRequest, ListProcessesResponse, Network, OomEvent, ProcessId, ProcessInfo,
    ProcessStarted, ResizeTerminalRequest, SignalRequest, StartContainerRequest, StatsResponse,
    UpdateRequest, WaitResponse,
};
use kata_protocol::{Id, VERSION};
use tokio::sync::mpsc;
use ttrpc::r#async::TtrpcContext;

use crate::container::Builder;
use crate::containers::Containers;
use crate::error::AgentError;
use crate::networking::Networking;
use crate::process::Process;
use crate::reaper::Reaper;
use crate::streams::Streams;
use crate::{boot, machine, memory, stats};

/// What this agent can do beyond the first version of the protocol.
const FEATURES: [&str; 3] = ["dns-relay", "oom-events", "reconnect"];
/// Events nobody has asked for yet.
const EVENTS: usize = 64;

/// The agent: all state that calls share.
pub struct Agent {
    containers: Containers,
    /// Streams on their way to processes.
    pub streams: Arc<Streams>,
    /// Interfaces and the DNS relay.
    pub networking: Networking,
    ooms: tokio::sync::Mutex<mpsc::Receiver<Id>>,
    role: Role,
    init_ns: i64,
    ready_ns: i64,
}

/// What the agent is to the machine it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// PID 1 of a virtual machine that is its own.
    Guest,
    /// A process among others, for tests: the machine stays as it is.
    Test,
}

impl Agent {
    /// An agent without containers. Needs a tokio runtime.
    ///
    /// # Errors
    /// When children cannot be watched.
    pub fn new(role: Role, init_ns: i64, builder: Builder) -> std::io::Result<Arc<Self>> {
        let streams = Arc::new(Streams::default());
        let (sender, ooms) = mpsc::channel(EVENTS);
        let hierarchy = match role {
            Role::Guest => Some(boot::hierarchy()),
            Role::Test => None,
        };
        Ok(Arc::new(Self {
            containers: Containers::new(
                Reaper::start()?,
                Arc::clone(&streams),
                sender,
                hierarchy,
                builder,
            ),
            streams,
            networking: match role {
                Role::Guest => Networking::of_guest(),
                Role::Test => Networking::default(),
            },
            ooms: tokio::sync::Mutex::new(ooms),
            role,
            init_ns,
            ready_ns: machine::boottime_ns(),
        }))
    }

    async fn connect(&self, request: ConnectRequest) -> Result<ConnectResponse, AgentError> {
        tracing::debug!(sandbox = request.sandbox_id, "connecting");
        if request.protocol_version != VERSION {
            return Err(AgentError::Precondition(format!(
                "the host speaks agent protocol {}, this guest's agent {} speaks {VERSION}: \
                 rebuild the guest image with the installed version",
                request.protocol_version,
                env!("CARGO_PKG_VERSION"),
            )));
        }
        if self.role == Role::Guest {
            machine::adopt(&request)?;
        }
        if request.template {
            self.networking.prepare().await?;
        }
        // After a reconnect they are there already.
        self.containers.pod().mount(&request.storages).await?;
        tracing::debug!(sandbox = request.sandbox_id, "connected");
        Ok(ConnectResponse {
            protocol_version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            features: FEATURES.map(str::to_owned).to_vec(),
            kernel_release: machine::kernel_release(),
            init_ns: self.init_ns,
            ready_ns: self.ready_ns,
            ..ConnectResponse::default()
        })
    }

    async fn create(&self, mut request: CreateContainerRequest) -> Result<i32, AgentError> {
        self.configure(request.network.take().as_ref()).await?;
        self.containers.create(request).await
    }

    async fn start(&self, request: StartContainerRequest) -> Result<Empty, AgentError> {
        self.configure(request.network.as_ref()).await?;
        self.containers.start(&request.container_id.parse()?).await?;
        Ok(Empty::default())
    }

    async fn configure(&self, network: Option<&Network>) -> Result<(), AgentError> {
        match network {
            Some(network) => self.networking.configure(network).await,
            None => Ok(()),
        }
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, AgentError> {
        self.containers.get(&container.parse()?)?.process(exec_id(exec)?.as_ref())
    }

    async fn signal(&self, request: SignalRequest) -> Result<Empty, AgentError> {
        let signal = i32::try_from(request.signal)
            .map_err(|_| AgentError::Invalid(format!("signal {} is none", request.signal)))?;
        if request.all {
            let container = self.containers.get(&request.container_id.parse()?)?;
            container.cgroup()?.kill(signal)?;
        } else {
            self.process(&request.container_id, &request.exec_id)?
                .signal(self.containers.reaper(), signal)?;
        }
        Ok(Empty::default())
    }

    fn resize(&self, request: &ResizeTerminalRequest) -> Result<Empty, AgentError> {
        let process = self.process(&request.container_id, &request.exec_id)?;
        let fit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        match process.stdio.resize(fit(request.rows), fit(request.columns)) {
            Ok(true) => Ok(Empty::default()),
            Ok(false) => Err(AgentError::Precondition("the process has no terminal".to_owned())),
            Err(error) => Err(AgentError::System("resize the terminal", error)),
        }
    }

    async fn delete(&self, request: ProcessId) -> Result<Empty, AgentError> {
        let exec = exec_id(&request.exec_id)?;
        self.containers.delete(&request.container_id.parse()?, exec.as_ref()).await?;
        Ok(Empty::default())
    }

    fn list(&self, request: &ContainerId) -> Result<ListProcessesResponse, AgentError> {
        let container = self.containers.get(&request.container_id.parse()?)?;
        let known: HashMap<i32, String> = container
            .processes()
            .iter()
            .filter(|process| !process.has_ended())
            .map(|process| (process.pid, process.exec.as_ref().map(Id::to_string)))
            .map(|(pid, exec)| (pid, exec.unwrap_or_default()))
            .collect();
        let pids = match &container.cgroup {
            Some(cgroup) => cgroup.pids()?,
            None => known.keys().copied().collect(),
        };
        let info = |pid: i32| ProcessInfo {
            guest_pid: pid.cast_unsigned(),
            known: known.contains_key(&pid),
            exec_id: known.get(&pid).cloned().unwrap_or_default(),
            command: command_line(pid),
            ..ProcessInfo::default()
        };
        Ok(ListProcessesResponse {
            processes: pids.into_iter().map(info).collect(),
            ..ListProcessesResponse::default()
        })
    }

    fn stats(&self, request: &ContainerId) -> Result<StatsResponse, AgentError> {
        let container = self.containers.get(&request.container_id.parse()?)?;
        let used = container.cgroup()?.stats()?;
        Ok(kata_protocol::stats::response(used, stats::interfaces()))
    }

    fn update(&self, request: &UpdateRequest) -> Result<Empty, AgentError> {
        let container = self.containers.get(&request.container_id.parse()?)?;
        let resources = kata_oci::Resources::parse(&request.resources)?;
        container.cgroup()?.apply(&resources, !resources.devices.is_empty())?;
        Ok(Empty::default())
    }

    async fn freeze(&self, request: ContainerId, freeze: bool) -> Result<Empty, AgentError> {
        let container = self.containers.get(&request.container_id.parse()?)?;
        let cgroup = container.cgroup()?.clone();
        // Waits until every process has stopped.
        tokio::task::spawn_blocking(move || if freeze { cgroup.freeze() } else { cgroup.thaw() })
            .await
            .map_err(|_| AgentError::GivenUp)??;
        Ok(Empty::default())
    }

    async fn next_event(&self) -> Result<Event, AgentError> {
        let id = self.ooms.lock().await.recv().await.ok_or(AgentError::GivenUp)?;
        let oom = OomEvent { container_id: id.to_string(), ..OomEvent::default() };
        Ok(Event { kind: Some(agent::event::Kind::Oom(oom)), ..Event::default() })
    }
}

/// None for the container's first process.
fn exec_id(text: &str) -> Result<Option<Id>, AgentError> {
    Ok(if text.is_empty() { None } else { Some(text.parse()?) })
}

fn command_line(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let words: Vec<String> = text.trim_end_matches('\0').split('\0').map(str::to_owned).collect();
    if words == [""] {
        // A zombie, or a process that has no arguments: by its name.
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        return vec![format!("[{}]", name.trim_end())];
    }
    words
}

/// The agent as ttRPC sees it.
pub struct Service(pub Arc<Agent>);

impl Service {
    /// Does to the end what must not stop half-way when the connection is lost.
    async fn whole<T, F>(&self, work: impl FnOnce(Arc<Agent>) -> F) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, AgentError>> + Send + 'static,
    {
        let work = work(Arc::clone(&self.0));
        Ok(tokio::spawn(work).await.unwrap_or(Err(AgentError::GivenUp))?)
    }
}

fn started(pid: i32) -> ProcessStarted {
    ProcessStarted { guest_pid: pid.cast_unsigned(), ..ProcessStarted::default() }
}

type Context<'a> = &'a TtrpcContext;

#[async_trait]
impl kata_protocol::agent_ttrpc::Agent for Service {
    async fn connect(&self, _: Context<'_>, r: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        self.whole(|agent| async move { agent.connect(r).await }).await
    }

    async fn create_container(
        &self,
        _: Context<'_>,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        self.whole(|agent| async move { agent.create(r).await.map(started) }).await
    }

    async fn start_container(
        &self,
        _: Context<'_>,
        r: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.whole(|agent| async move { agent.start(r).await }).await
    }

    async fn exec(&self, _: Context<'_>, r: ExecRequest) -> ttrpc::Result<ProcessStarted> {
        self.whole(|agent| async move { agent.containers.exec(r).await.map(started) }).await
    }

    async fn wait(&self, _: Context<'_>, r: ProcessId) -> ttrpc::Result<WaitResponse> {
        Ok(self.0.process(&r.container_id, &r.exec_id)?.wait().await?)
    }

    async fn signal(&self, _: Context<'_>, r: SignalRequest) -> ttrpc::Result<Empty> {
        Ok(self.0.signal(r).await?)
    }

    async fn resize_terminal(
        &self,
        _: Context<'_>,
        r: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        Ok(self.0.resize(&r)?)
    }

    async fn delete_process(&self, _: Context<'_>, r: ProcessId) -> ttrpc::Result<Empty> {
        self.whole(|agent| async move { agent.delete(r).await }).await
    }

    async fn list_processes(
        &self,
        _: Context<'_>,
        r: ContainerId,
    ) -> ttrpc::Result<ListProcessesResponse> {
        Ok(self.0.list(&r)?)
    }

    async fn stats(&self, _: Context<'_>, r: ContainerId) -> ttrpc::Result<StatsResponse> {
        Ok(self.0.stats(&r)?)
    }

    async fn update(&self, _: Context<'_>, r: UpdateRequest) -> ttrpc::Result<Empty> {
        Ok(self.0.update(&r)?)
    }

    async fn pause(&self, _: Context<'_>, r: ContainerId) -> ttrpc::Result<Empty> {
        self.whole(|agent| async move { agent.freeze(r, true).await }).await
    }

    async fn resume(&self, _: Context<'_>, r: ContainerId) -> ttrpc::Result<Empty> {
        self.whole(|agent| async move { agent.freeze(r, false).await }).await
    }

    async fn configure_network(&self, _: Context<'_>, r: Network) -> ttrpc::Result<Empty> {
        self.whole(|agent| async move { agent.configure(Some(&r)).await }).await?;
        Ok(Empty::default())
    }

    async fn next_event(&self, _: Context<'_>, _: Empty) -> ttrpc::Result<Event> {
        Ok(self.0.next_event().await?)
    }

    async fn grow(&self, _: Context<'_>, r: GrowRequest) -> ttrpc::Result<Empty> {
        let grow = move || {
            machine::online_cpus(r.online_cpus);
            match r.kept_back_mib {
                0 => Ok(()),
                mib => memory::use_kept_back(mib),
            }
        };
        if self.0.role == Role::Guest {
            let grown = tokio::task::spawn_blocking(grow).await;
            let grown = grown.map_err(|_| AgentError::GivenUp)?;
            grown.map_err(|error| AgentError::System("use more of the memory", error))?;
        }
        Ok(Empty::default())
    }

    async fn sync(&self, _: Context<'_>, _: Empty) -> ttrpc::Result<Empty> {
        let written = tokio::task::spawn_blocking(rustix::fs::sync).await;
        Ok(written.map(|()| Empty::default()).map_err(|_| AgentError::GivenUp)?)
    }
}
