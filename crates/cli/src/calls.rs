//! Calls to a sandbox's server, and what their failures mean to the caller.

use anyhow::{Context as _, Result, anyhow, bail};
use containerd_shim_protos::api::{
    ConnectRequest, DeleteRequest, KillRequest, ShutdownRequest, StartRequest, StateRequest,
};
use containerd_shim_protos::protobuf::EnumOrUnknown;
use containerd_shim_protos::types::task::Status as TaskStatus;
use kata_oci::Status;
use kata_protocol::Id;
use kata_sandbox::SandboxDir;
use kata_sandbox::factory::Recipe;
use kata_shim::client::{Client, ClientError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;
use ttrpc::Code;
use ttrpc::context::{Context, with_duration};

/// How long a server may take to end the virtual machine and itself.
const END: Duration = Duration::from_secs(20);

/// A sandbox's server.
pub struct Server {
    client: Client,
    sandbox: Id,
}

/// What the server knows of a container.
#[derive(Clone, Copy, Debug)]
pub struct TaskState {
    /// Where it is in its life.
    pub status: Status,
    /// Its stand-in.
    pub pid: i32,
}

/// A server's own words for why it did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    message: String,
    /// The exit code that this stands for, where the program could not be run.
    pub exit: Option<u8>,
}

/// How long a server may take for an answer that needs nobody else.
const ANSWER: Duration = Duration::from_secs(10);

/// For calls that take as long as a virtual machine does: the server has its own limits.
fn unlimited() -> Context {
    Context::default()
}

/// For calls that the server answers by itself: one that hangs must not hang its callers.
fn prompt() -> Context {
    with_duration(ANSWER)
}

impl Server {
    /// Starts the server of a new sandbox.
    ///
    /// # Errors
    /// When there is one already, or the host refuses.
    pub async fn start(sandbox: &Id, recipe: &Recipe) -> Result<Self> {
        let client = Client::start_sandbox(sandbox, recipe).await?;
        Ok(Self { client, sandbox: sandbox.clone() })
    }

    /// Connects to a running one; `None` when the sandbox is gone.
    ///
    /// # Errors
    /// When it is there and does not answer.
    pub async fn connect(sandbox: &Id) -> Result<Option<Self>> {
        match Client::connect(sandbox).await {
            Ok(client) => Ok(Some(Self { client, sandbox: sandbox.clone() })),
            Err(ClientError::NotRunning(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The calls themselves.
    pub fn tasks(&self) -> &containerd_shim_protos::shim_async::TaskClient {
        self.client.tasks()
    }

    /// Makes a call's failure readable: the server's own words, or how the server ended.
    pub fn explain(&self, error: ttrpc::Error) -> anyhow::Error {
        match error {
            ttrpc::Error::RpcStatus(status) if status.code() == Code::DEADLINE_EXCEEDED => {
                anyhow!("the server of sandbox {} does not answer", self.sandbox)
            }
            ttrpc::Error::RpcStatus(status) => {
                let exit = kata_sandbox::exit_code(&status);
                Refused { message: status.message, exit }.into()
            }
            other => match last_line(&SandboxDir::of(&self.sandbox)) {
                Some(line) => anyhow!("the server of sandbox {} ended: {line}", self.sandbox),
                None => anyhow!("the server of sandbox {} does not answer: {other}", self.sandbox),
            },
        }
    }

    /// Makes one call.
    ///
    /// # Errors
    /// As [`Self::explain`] tells.
    pub async fn call<T>(
        &self,
        call: impl AsyncFnOnce(
            &containerd_shim_protos::shim_async::TaskClient,
            Context,
        ) -> ttrpc::Result<T>,
    ) -> Result<T> {
        call(self.tasks(), unlimited()).await.map_err(|error| self.explain(error))
    }

    /// The state of a container; `None` when the server does not know it (any more).
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn state(&self, id: &Id) -> Result<Option<TaskState>> {
        let request = StateRequest { id: id.to_string(), ..Default::default() };
        let answer = match self.tasks().state(prompt(), &request).await {
            Ok(answer) => answer,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {
                return Ok(None);
            }
            Err(error @ ttrpc::Error::RpcStatus(_)) => return Err(self.explain(error)),
            // It ended between our connecting and our asking.
            Err(_) => return Ok(None),
        };
        let status = status(answer.status);
        let pid = if status == Status::Stopped { 0 } else { answer.pid.try_into().unwrap_or(0) };
        Ok(Some(TaskState { status, pid }))
    }

    /// Runs the container's process.
    ///
    /// # Errors
    /// As the server says.
    pub async fn start_process(&self, id: &Id, exec: Option<&Id>) -> Result<()> {
        let request = StartRequest {
            id: id.to_string(),
            exec_id: exec.map(Id::to_string).unwrap_or_default(),
            ..Default::default()
        };
        self.call(async |tasks, context| tasks.start(context, &request).await).await?;
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// As the server says.
    pub async fn kill(&self, id: &Id, signal: i32, all: bool) -> Result<()> {
        let signal = signal.try_into().context("a signal is a positive number")?;
        let request = KillRequest { id: id.to_string(), signal, all, ..Default::default() };
        self.call(async |tasks, context| tasks.kill(context, &request).await).await?;
        Ok(())
    }

    /// Deletes a stopped container.
    ///
    /// # Errors
    /// As the server says; one that is not known is fine.
    pub async fn delete(&self, id: &Id) -> Result<()> {
        let request = DeleteRequest { id: id.to_string(), ..Default::default() };
        match self.tasks().delete(unlimited(), &request).await {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => Ok(()),
            Err(error) => Err(self.explain(error)),
        }
    }

    /// Ends the sandbox if it holds no container any more (`now`: in any case), and waits
    /// until its server is gone. Returns whether it is.
    ///
    /// # Errors
    /// When the server hangs.
    pub async fn shut_down(&self, now: bool) -> Result<bool> {
        let server = self.pidfd().await;
        let request = ShutdownRequest { id: self.sandbox.to_string(), now, ..Default::default() };
        match self.tasks().shutdown(unlimited(), &request).await {
            // The server may end before its answer is out.
            Ok(_)
            | Err(ttrpc::Error::Socket(_) | ttrpc::Error::RemoteClosed | ttrpc::Error::Eof) => {}
            Err(error) => return Err(self.explain(error)),
        }
        let Some(server) = server else { return Ok(true) };
        // The other containers of a pod keep it, and then it goes on answering.
        if !now && !ended(&server, Duration::from_millis(20)) && self.answers().await {
            return Ok(false);
        }
        if ended(&server, END) {
            return Ok(true);
        }
        bail!("the server of sandbox {} does not end: use delete --force", self.sandbox)
    }

    async fn answers(&self) -> bool {
        let request = ConnectRequest::default();
        self.tasks().connect(prompt(), &request).await.is_ok()
    }

    /// The server process, to see its end.
    async fn pidfd(&self) -> Option<OwnedFd> {
        let request = ConnectRequest::default();
        let answer = self.tasks().connect(prompt(), &request).await.ok()?;
        let pid = Pid::from_raw(answer.shim_pid.try_into().ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }
}

fn ended(process: &OwnedFd, within: Duration) -> bool {
    let timeout =
        Timespec { tv_sec: within.as_secs() as i64, tv_nsec: within.subsec_nanos().into() };
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).is_ok_and(|ready| ready > 0)
}

fn status(status: EnumOrUnknown<TaskStatus>) -> Status {
    match status.enum_value_or(TaskStatus::UNKNOWN) {
        TaskStatus::CREATED => Status::Created,
        TaskStatus::RUNNING => Status::Running,
        TaskStatus::PAUSED | TaskStatus::PAUSING => Status::Paused,
        TaskStatus::STOPPED => Status::Stopped,
        TaskStatus::UNKNOWN => Status::Creating,
    }
}

/// The last thing that a server said.
fn last_line(dir: &SandboxDir) -> Option<String> {
    let bytes = fs::read(dir.log()).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_owned)
}
