//! The calls of `agent.proto`: checks the request, acts, answers.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use kata_channel::{CallError, Stream};
use kata_oci::{Resources, Wire as _};
use kata_protocol::agent::{
    self, ConnectRequest, ConnectResponse, ContainerId, CreateContainerRequest, Empty, Event,
    ExecRequest, GrowRequest, ListProcessesResponse, MountRequest, Network, OomEvent, ProcessId,
    ProcessInfo, ProcessStarted, ResizeTerminalRequest, SignalRequest, StartContainerRequest,
    StatsResponse, UpdateRequest, WaitResponse,
};
use kata_protocol::call::{self, Call, InvalidCall, Method};
use kata_protocol::{Id, VERSION, chain};
use protobuf::Message as _;
use tokio::sync::{Notify, mpsc};

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
    /// Told when the connection is to end.
    pub left: Notify,
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
            left: Notify::new(),
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

    async fn mount(&self, request: &MountRequest) -> Result<Empty, AgentError> {
        self.containers.pod().mount(&request.storages).await?;
        Ok(Empty::default())
    }

    async fn create(
        &self,
        mut request: CreateContainerRequest,
    ) -> Result<ProcessStarted, AgentError> {
        self.configure(request.network.take().as_ref()).await?;
        self.containers.create(request).await.map(started)
    }

    async fn start(&self, request: StartContainerRequest) -> Result<Empty, AgentError> {
        self.configure(request.network.as_ref()).await?;
        self.containers.start(&request.container_id.parse()?).await?;
        Ok(Empty::default())
    }

    async fn network(&self, network: &Network) -> Result<Empty, AgentError> {
        self.configure(Some(network)).await?;
        Ok(Empty::default())
    }

    async fn configure(&self, network: Option<&Network>) -> Result<(), AgentError> {
        match network {
            Some(network) => self.networking.configure(network).await,
            None => Ok(()),
        }
    }

    async fn exec(&self, request: ExecRequest) -> Result<ProcessStarted, AgentError> {
        self.containers.exec(request).await.map(started)
    }

    fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, AgentError> {
        self.containers.get(&container.parse()?)?.process(exec_id(exec)?.as_ref())
    }

    async fn wait(&self, request: &ProcessId) -> Result<WaitResponse, AgentError> {
        self.process(&request.container_id, &request.exec_id)?.wait().await
    }

    fn signal(&self, request: &SignalRequest) -> Result<Empty, AgentError> {
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

    async fn delete(&self, request: &ProcessId) -> Result<Empty, AgentError> {
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
        let resources = Resources::from_wire(&request.resources)?;
        container.cgroup()?.apply(&resources, !resources.devices.is_empty())?;
        Ok(Empty::default())
    }

    async fn freeze(&self, request: &ContainerId, freeze: bool) -> Result<Empty, AgentError> {
        let container = self.containers.get(&request.container_id.parse()?)?;
        let cgroup = container.cgroup()?.clone();
        // Waits until every process has stopped.
        tokio::task::spawn_blocking(move || if freeze { cgroup.freeze() } else { cgroup.thaw() })
            .await
            .map_err(|_| AgentError::GivenUp)??;
        Ok(Empty::default())
    }

    async fn grow(&self, request: &GrowRequest) -> Result<Empty, AgentError> {
        let (cpus, mib) = (request.online_cpus, request.kept_back_mib);
        let grow = move || {
            machine::online_cpus(cpus);
            match mib {
                0 => Ok(()),
                mib => memory::use_kept_back(mib),
            }
        };
        if self.role == Role::Guest {
            let grown = tokio::task::spawn_blocking(grow).await;
            let grown = grown.map_err(|_| AgentError::GivenUp)?;
            grown.map_err(|error| AgentError::System("use more of the memory", error))?;
        }
        Ok(Empty::default())
    }

    async fn leave(&self) -> Result<Empty, AgentError> {
        self.containers.pod().unmount().await?;
        self.left.notify_one();
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

/// Writes back what the guest holds. It is about to end or to be forked: there is nobody to be
/// served meanwhile, and where it is emulated a thread would be the dearest part of this.
fn sync() -> Empty {
    rustix::fs::sync();
    Empty::default()
}

fn started(pid: i32) -> ProcessStarted {
    ProcessStarted { guest_pid: pid.cast_unsigned(), ..ProcessStarted::default() }
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

/// Takes the call that a stream was opened for, does it, and answers. A task of its own: what
/// was begun is not left half-way when nobody waits for the answer any more.
pub async fn serve(agent: Arc<Agent>, mut stream: Stream) {
    let done = match stream.receive_call().await {
        Ok(Some((method, request))) => agent.call(method, &request).await,
        Ok(None) => return,
        Err(CallError::Invalid(error)) => Err(error.into()),
        Err(error) => return tracing::debug!(%error, "a call did not arrive"),
    };
    let answer = done.or_else(|error| call::failure(&error.into()));
    let sent = match answer {
        Ok(answer) => stream.answer_call(&answer).await,
        Err(error) => return tracing::error!(error = %chain(&error), "a call has no answer"),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "nobody waits for the answer of a call");
    }
}

impl Agent {
    /// Does a call; the bytes of its answer.
    async fn call(&self, method: Method, request: &[u8]) -> Result<Vec<u8>, AgentError> {
        macro_rules! answer {
            ($call:ident, $request:ident => $act:expr) => {
                answer::<call::$call>(request, async |$request| $act).await
            };
        }
        match method {
            Method::Connect => answer!(Connect, r => self.connect(r).await),
            Method::CreateContainer => answer!(CreateContainer, r => self.create(r).await),
            Method::StartContainer => answer!(StartContainer, r => self.start(r).await),
            Method::Exec => answer!(Exec, r => self.exec(r).await),
            Method::Wait => answer!(Wait, r => self.wait(&r).await),
            Method::Signal => answer!(Signal, r => self.signal(&r)),
            Method::ResizeTerminal => answer!(ResizeTerminal, r => self.resize(&r)),
            Method::DeleteProcess => answer!(DeleteProcess, r => self.delete(&r).await),
            Method::ListProcesses => answer!(ListProcesses, r => self.list(&r)),
            Method::Stats => answer!(Stats, r => self.stats(&r)),
            Method::Update => answer!(Update, r => self.update(&r)),
            Method::Pause => answer!(Pause, r => self.freeze(&r, true).await),
            Method::Resume => answer!(Resume, r => self.freeze(&r, false).await),
            Method::Grow => answer!(Grow, r => self.grow(&r).await),
            Method::ConfigureNetwork => answer!(ConfigureNetwork, r => self.network(&r).await),
            Method::NextEvent => answer!(NextEvent, _r => self.next_event().await),
            Method::Sync => answer!(Sync, _r => Ok(sync())),
            Method::Leave => answer!(Leave, _r => self.leave().await),
            Method::Mount => answer!(Mount, r => self.mount(&r).await),
        }
    }
}

/// Parses a request, acts, and encodes the answer.
async fn answer<C: Call>(
    request: &[u8],
    act: impl AsyncFnOnce(C::Request) -> Result<C::Answer, AgentError>,
) -> Result<Vec<u8>, AgentError> {
    let request = C::Request::parse_from_bytes(request).map_err(InvalidCall::from)?;
    Ok(call::answer::<C>(&act(request).await?)?)
}
