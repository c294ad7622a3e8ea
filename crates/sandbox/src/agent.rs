//! The guest's agent, as the host sees it: typed calls whose answers are checked.

use crate::SandboxError;
use crate::container::Bundle;
use kata_channel::{CallError, HostChannel};
use kata_oci::{Resources, Spec, Wire as _};
use kata_protocol::agent::{Failure, failure};
use kata_protocol::call::{self, Call};
use kata_protocol::{Id, VERSION, agent as message, chain};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ttrpc::Code;

/// How long the guest may take to answer an ordinary call. Every death on the way (VMM,
/// devices process, channel) ends a call at once; this is for a guest that lives and is silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process of a container in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProcessRef {
    /// The container.
    pub container: Id,
    /// The exec; none is the container's first process.
    pub exec: Option<Id>,
}

impl ProcessRef {
    fn message(&self) -> message::ProcessId {
        message::ProcessId {
            container_id: self.container.to_string(),
            exec_id: self.exec_text(),
            ..Default::default()
        }
    }

    fn exec_text(&self) -> String {
        self.exec.as_ref().map(Id::to_string).unwrap_or_default()
    }
}

/// What the guest said at `Connect`.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Version of the agent.
    pub agent_version: String,
    /// `uname -r`
    pub kernel: String,
    /// Boot to the agent's first line.
    pub init: Duration,
    /// Boot to the agent's readiness.
    pub ready: Duration,
}

/// How a process ended, as the guest tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub code: u8,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    pub oom_killed: bool,
}

/// The first call's arguments.
#[derive(Debug, Default)]
pub(crate) struct Hello {
    pub sandbox: String,
    pub hostname: String,
    pub online_cpus: u32,
    /// The machine is no sandbox's, but is going to be cloned.
    pub template: bool,
}

/// A container for the guest to build.
pub(crate) struct NewContainer<'a> {
    pub bundle: &'a Bundle,
    /// What it is told of the specification.
    pub spec: &'a Spec,
    pub stdio: message::Stdio,
    /// When the guest is to be told anew.
    pub network: Option<message::Network>,
}

/// The agent at the other end of a channel.
#[derive(Clone)]
pub(crate) struct Agent {
    channel: HostChannel,
}

impl Agent {
    pub(crate) fn new(channel: HostChannel) -> Self {
        Self { channel }
    }

    /// What it is reached by, for streams beside the calls.
    pub(crate) fn channel(&self) -> &HostChannel {
        &self.channel
    }

    /// An ordinary call.
    async fn call<C: Call>(&self, request: &C::Request) -> Result<C::Answer, SandboxError> {
        self.call_for::<C>(PATIENCE, request).await
    }

    async fn call_for<C: Call>(
        &self,
        patience: Duration,
        request: &C::Request,
    ) -> Result<C::Answer, SandboxError> {
        let call = tokio::time::timeout(patience, self.call_for_ever::<C>(request));
        call.await.unwrap_or(Err(SandboxError::Late))
    }

    /// A call that waits for something to happen.
    async fn call_for_ever<C: Call>(
        &self,
        request: &C::Request,
    ) -> Result<C::Answer, SandboxError> {
        self.channel.call::<C>(request).await.map_err(failed)
    }

    /// Makes the guest this sandbox. The guest may still be booting: this waits for it.
    pub(crate) async fn connect(
        &self,
        hello: Hello,
        patience: Duration,
    ) -> Result<Guest, SandboxError> {
        let mut entropy = vec![0; 64];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| SandboxError::io("get entropy for the guest")(error.into()))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = message::ConnectRequest {
            protocol_version: VERSION,
            sandbox_id: hello.sandbox,
            realtime_ns: now.as_nanos().try_into().unwrap_or(i64::MAX),
            entropy,
            hostname: hello.hostname,
            online_cpus: hello.online_cpus,
            template: hello.template,
            ..Default::default()
        };
        let answer = self.call_for::<call::Connect>(patience, &request).await?;
        if answer.protocol_version != VERSION {
            return Err(SandboxError::Version { guest: answer.protocol_version, host: VERSION });
        }
        let nanos = |value: i64| Duration::from_nanos(value.try_into().unwrap_or(0));
        Ok(Guest {
            agent_version: printable(&answer.agent_version),
            kernel: printable(&answer.kernel_release),
            init: nanos(answer.init_ns),
            ready: nanos(answer.ready_ns),
        })
    }

    /// Has the guest mount what its containers share with the host.
    pub(crate) async fn mount(&self, storage: message::Storage) -> Result<(), SandboxError> {
        let request = message::MountRequest { storages: vec![storage], ..Default::default() };
        self.call::<call::Mount>(&request).await?;
        Ok(())
    }

    pub(crate) async fn create(
        &self,
        new: NewContainer<'_>,
        patience: Duration,
    ) -> Result<(), SandboxError> {
        let NewContainer { bundle, spec, stdio, network } = new;
        let request = message::CreateContainerRequest {
            container_id: bundle.id.to_string(),
            bundle: bundle.path.display().to_string(),
            spec: spec.to_wire()?,
            stdio: Some(stdio).into(),
            network: network.into(),
            storages: bundle.plan.disk.iter().map(|disk| disk.storage.clone()).collect(),
            shared_storages: bundle.plan.shared_storages.clone(),
            ..Default::default()
        };
        self.call_for::<call::CreateContainer>(patience, &request).await?;
        Ok(())
    }

    /// Lets the guest build a container that is of no use, on an empty root, and forget it:
    /// what a kernel does the first time only is done then. That there is no such program to
    /// run is as it should be.
    pub(crate) async fn rehearse(&self, spec: &Spec) -> Result<(), SandboxError> {
        const NAME: &str = "rehearsal";
        let root = message::Storage {
            driver: "tmpfs".to_owned(),
            source: NAME.to_owned(),
            fstype: "tmpfs".to_owned(),
            mount_point: format!("/run/{NAME}"),
            ..Default::default()
        };
        let request = message::CreateContainerRequest {
            container_id: NAME.to_owned(),
            bundle: "/".to_owned(),
            spec: spec.to_wire()?,
            stdio: Some(message::Stdio::default()).into(),
            storages: vec![root],
            ..Default::default()
        };
        match self.call::<call::CreateContainer>(&request).await {
            Ok(_) => self.delete(&ProcessRef { container: NAME.parse()?, exec: None }).await,
            Err(SandboxError::Agent { exit: Some(_), .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Has the guest give up its shares and this connection; an answer may never come.
    pub(crate) async fn leave(&self) -> Result<(), SandboxError> {
        self.call_for_ever::<call::Leave>(&message::Empty::default()).await.map(drop)
    }

    pub(crate) async fn start(
        &self,
        container: &Id,
        network: Option<message::Network>,
    ) -> Result<(), SandboxError> {
        let request = message::StartContainerRequest {
            container_id: container.to_string(),
            network: network.into(),
            ..Default::default()
        };
        self.call::<call::StartContainer>(&request).await?;
        Ok(())
    }

    pub(crate) async fn exec(
        &self,
        process: &ProcessRef,
        spec: &kata_oci::Process,
        stdio: message::Stdio,
    ) -> Result<(), SandboxError> {
        let request = message::ExecRequest {
            container_id: process.container.to_string(),
            exec_id: process.exec_text(),
            process: spec.to_wire()?,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.call::<call::Exec>(&request).await?;
        Ok(())
    }

    /// Waits for the end of a process, however long that takes.
    pub(crate) async fn wait(&self, process: &ProcessRef) -> Result<Ended, SandboxError> {
        let answer = self.call_for_ever::<call::Wait>(&process.message()).await?;
        Ok(Ended {
            // A guest may say anything; an engine knows 0 to 255.
            code: u8::try_from(answer.exit_code).unwrap_or(u8::MAX),
            stdout_bytes: answer.stdout_bytes,
            stderr_bytes: answer.stderr_bytes,
            oom_killed: answer.oom_killed,
        })
    }

    pub(crate) async fn signal(
        &self,
        process: &ProcessRef,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let request = message::SignalRequest {
            container_id: process.container.to_string(),
            exec_id: process.exec_text(),
            signal,
            all,
            ..Default::default()
        };
        self.call::<call::Signal>(&request).await?;
        Ok(())
    }

    pub(crate) async fn resize(
        &self,
        process: &ProcessRef,
        rows: u32,
        columns: u32,
    ) -> Result<(), SandboxError> {
        let request = message::ResizeTerminalRequest {
            container_id: process.container.to_string(),
            exec_id: process.exec_text(),
            rows,
            columns,
            ..Default::default()
        };
        self.call::<call::ResizeTerminal>(&request).await?;
        Ok(())
    }

    pub(crate) async fn delete(&self, process: &ProcessRef) -> Result<(), SandboxError> {
        self.call::<call::DeleteProcess>(&process.message()).await?;
        Ok(())
    }

    pub(crate) async fn stats(
        &self,
        container: &Id,
    ) -> Result<message::StatsResponse, SandboxError> {
        self.call::<call::Stats>(&of(container)).await
    }

    pub(crate) async fn update(
        &self,
        container: &Id,
        resources: &Resources,
    ) -> Result<(), SandboxError> {
        let request = message::UpdateRequest {
            container_id: container.to_string(),
            resources: resources.to_wire()?,
            ..Default::default()
        };
        self.call::<call::Update>(&request).await?;
        Ok(())
    }

    /// Makes use of what the machine got: processors, and memory that was kept back.
    pub(crate) async fn grow(&self, cpus: u32, kept_back_mib: u32) -> Result<(), SandboxError> {
        let request =
            message::GrowRequest { online_cpus: cpus, kept_back_mib, ..Default::default() };
        self.call::<call::Grow>(&request).await?;
        Ok(())
    }

    pub(crate) async fn pause(&self, container: &Id) -> Result<(), SandboxError> {
        self.call::<call::Pause>(&of(container)).await?;
        Ok(())
    }

    pub(crate) async fn resume(&self, container: &Id) -> Result<(), SandboxError> {
        self.call::<call::Resume>(&of(container)).await?;
        Ok(())
    }

    pub(crate) async fn configure_network(
        &self,
        network: &message::Network,
    ) -> Result<(), SandboxError> {
        self.call::<call::ConfigureNetwork>(network).await?;
        Ok(())
    }

    /// The next container that ran out of memory; waits for it.
    pub(crate) async fn next_oom(&self) -> Result<Id, SandboxError> {
        loop {
            let event = self.call_for_ever::<call::NextEvent>(&message::Empty::default()).await?;
            if event.has_oom() {
                return Ok(event.oom().container_id.parse()?);
            }
        }
    }

    /// Lets the guest write back what it holds, for at most `deadline`.
    pub(crate) async fn sync(&self, deadline: Duration) -> Result<(), SandboxError> {
        self.call_for::<call::Sync>(deadline, &message::Empty::default()).await?;
        Ok(())
    }
}

fn of(container: &Id) -> message::ContainerId {
    message::ContainerId { container_id: container.to_string(), ..Default::default() }
}

fn failed(error: CallError) -> SandboxError {
    match error {
        CallError::Failed(failure) => refused(&failure),
        CallError::Channel(error) => error.into(),
        CallError::Request(error) => error.into(),
        other => SandboxError::Lost(format!("a call to the agent failed: {}", chain(&other))),
    }
}

/// What the guest says of a call's failure, as far as it can be believed.
fn refused(failure: &Failure) -> SandboxError {
    let code = match failure.code.enum_value_or_default() {
        failure::Code::Unknown => Code::UNKNOWN,
        failure::Code::NotFound => Code::NOT_FOUND,
        failure::Code::Exists => Code::ALREADY_EXISTS,
        failure::Code::Precondition => Code::FAILED_PRECONDITION,
        failure::Code::Invalid => Code::INVALID_ARGUMENT,
        failure::Code::Limit => Code::RESOURCE_EXHAUSTED,
        failure::Code::GivenUp => Code::CANCELLED,
        failure::Code::Internal => Code::INTERNAL,
    };
    SandboxError::Agent {
        code,
        message: printable(&failure.message),
        // Nothing but these is a program that could not be run.
        exit: u8::try_from(failure.exit_code).ok().filter(|code| matches!(code, 126 | 127)),
    }
}

/// Text of the guest's, without what could play tricks on a terminal or a log.
fn printable(text: &str) -> String {
    const LONGEST: usize = 4096;
    text.chars().take(LONGEST).filter(|c| !c.is_control() || *c == '\n').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_of_the_guest_are_dropped() {
        assert_eq!(printable("a\x1b[31mb\r\nc"), "a[31mb\nc");
        assert_eq!(printable(&"x".repeat(10_000)).len(), 4096);
    }
}
