//! containerd's Task API over a [`Sandbox`]. Every call is a translation, nothing more:
//! ids are parsed, the sandbox does the work, errors get their ttRPC code in one place.

use crate::options::CreateOptions;
use crate::server::Parts;
use crate::stats;
use crate::stdio::Owner;
use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim_protos::shim_async::Task;
use kata_protocol::Id;
use kata_sandbox::{
    CreateRequest, Exit, FileSystem, ProcessRef, ProcessStatus, Sandbox, SandboxError, Stdio,
    StdioPaths,
};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use ttrpc::asynchronous::TtrpcContext;

pub(crate) type Answer<T> = ttrpc::Result<T>;

/// The Task service of one sandbox.
pub(crate) struct TaskService {
    parts: Arc<Parts>,
    /// Containers whose processes have stand-ins.
    with_stand_ins: Mutex<BTreeSet<Id>>,
}

impl TaskService {
    pub(crate) fn new(parts: Arc<Parts>) -> Self {
        Self { parts, with_stand_ins: Mutex::default() }
    }

    fn sandbox(&self) -> &Arc<Sandbox> {
        &self.parts.sandbox
    }

    fn owner<'a>(&'a self, container: &'a Id) -> Owner<'a> {
        let namespace = self.parts.engine.as_ref().map_or("", |engine| engine.namespace.as_str());
        Owner { container, namespace }
    }

    fn with_stand_ins(&self) -> std::sync::MutexGuard<'_, BTreeSet<Id>> {
        self.with_stand_ins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn create_container(&self, request: api::CreateTaskRequest) -> Answer<u32> {
        if !request.checkpoint.is_empty() {
            return Err(refused(&SandboxError::Unsupported("restoring from a checkpoint")));
        }
        let id = id(&request.id)?;
        let mut options = CreateOptions::from_any(request.options.get_or_default());
        if let (None, Some(engine)) = (&options.config, &self.parts.engine) {
            options.config.clone_from(&engine.config);
        }
        let mut create = CreateRequest {
            id: id.clone(),
            bundle: request.bundle.into(),
            rootfs: request.rootfs.into_iter().map(file_system).collect(),
            stdio: Stdio::default(),
            stand_in: None,
            config: options.config,
            systemd_cgroup: options.systemd_cgroup,
        };
        if !options.stand_in {
            create.stdio = answer(
                crate::stdio::open(
                    request.terminal,
                    StdioPaths {
                        stdin: request.stdin,
                        stdout: request.stdout,
                        stderr: request.stderr,
                    },
                    self.owner(&id),
                )
                .await,
            )?;
            return answer(self.sandbox().create(create).await.map(pid));
        }
        let process = ProcessRef { container: id.clone(), exec: None };
        let stand_in = self.parts.stand_ins.take(&process).await.map_err(|e| unknown(&e))?;
        let (host_pid, stdio, bound) = stand_in.into_parts();
        create.stand_in = Some(host_pid);
        create.stdio = stdio;
        let created = self.sandbox().create(create).await;
        let _ = bound.send(created.as_ref().map(|_| ()).map_err(SandboxError::text));
        if created.is_ok() {
            self.with_stand_ins().insert(id);
        }
        answer(created.map(pid))
    }

    async fn add_exec(&self, request: api::ExecProcessRequest) -> Answer<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        let spec = request.spec.get_or_default().value.as_slice();
        if !self.with_stand_ins().contains(&process.container) {
            let paths =
                StdioPaths { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr };
            let owner = self.owner(&process.container);
            let stdio = answer(crate::stdio::open(request.terminal, paths, owner).await)?;
            return answer(self.sandbox().exec(&process, spec, stdio, None).map(|()| empty()));
        }
        let stand_in = self.parts.stand_ins.take(&process).await.map_err(|e| unknown(&e))?;
        let (host_pid, stdio, bound) = stand_in.into_parts();
        let added = self.sandbox().exec(&process, spec, stdio, Some(host_pid));
        let _ = bound.send(added.as_ref().map(|_| ()).map_err(SandboxError::text));
        answer(added.map(|()| empty()))
    }

    fn state_of(&self, process: &ProcessRef) -> Answer<api::StateResponse> {
        let state = answer(self.sandbox().process_state(process))?;
        let (status, exit) = match state.status {
            _ if state.paused => (api::Status::PAUSED, None),
            ProcessStatus::Created => (api::Status::CREATED, None),
            ProcessStatus::Running => (api::Status::RUNNING, None),
            ProcessStatus::Exited(exit) => (api::Status::STOPPED, Some(exit)),
        };
        Ok(api::StateResponse {
            id: process.container.to_string(),
            exec_id: process.exec.as_ref().map(Id::to_string).unwrap_or_default(),
            bundle: state.bundle.to_string_lossy().into_owned(),
            pid: pid(state.pid),
            status: EnumOrUnknown::new(status),
            stdin: state.paths.stdin,
            stdout: state.paths.stdout,
            stderr: state.paths.stderr,
            terminal: state.terminal,
            exit_status: exit.map(|e| e.code.into()).unwrap_or_default(),
            exited_at: exit.map(exited_at).into(),
            ..Default::default()
        })
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        let pid = self.create_container(request).await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> Answer<api::StartResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let pid = answer(self.sandbox().start(&process).await.map(pid))?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Answer<api::Empty> {
        self.add_exec(request).await
    }

    async fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> Answer<api::StateResponse> {
        self.state_of(&process(&request.id, &request.exec_id)?)
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Answer<api::WaitResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let exit = answer(self.sandbox().wait(&process).await)?;
        Ok(api::WaitResponse {
            exit_status: exit.code.into(),
            exited_at: MessageField::some(exited_at(exit)),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Answer<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        answer(self.sandbox().kill(&process, request.signal, request.all).await.map(|()| empty()))
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> Answer<api::DeleteResponse> {
        let process = process(&request.id, &request.exec_id)?;
        let (host_pid, exit) = answer(self.sandbox().delete(&process).await)?;
        if process.exec.is_none() {
            self.with_stand_ins().remove(&process.container);
        }
        Ok(api::DeleteResponse {
            pid: pid(host_pid),
            exit_status: exit.code.into(),
            exited_at: MessageField::some(exited_at(exit)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Answer<api::PidsResponse> {
        let pids = answer(self.sandbox().pids(&id(&request.id)?))?;
        let processes = pids
            .into_iter()
            .map(|host| api::ProcessInfo { pid: pid(host), ..Default::default() })
            .collect();
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Answer<api::Empty> {
        answer(self.sandbox().set_paused(&id(&request.id)?, true).await.map(|()| empty()))
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Answer<api::Empty> {
        answer(self.sandbox().set_paused(&id(&request.id)?, false).await.map(|()| empty()))
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> Answer<api::Empty> {
        let process = process(&request.id, &request.exec_id)?;
        let resized = self.sandbox().resize(&process, request.height, request.width).await;
        answer(resized.map(|()| empty()))
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Answer<api::Empty> {
        if request.stdin {
            answer(self.sandbox().close_stdin(&process(&request.id, &request.exec_id)?))?;
        }
        Ok(empty())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateTaskRequest,
    ) -> Answer<api::Empty> {
        let resources = &request.resources.get_or_default().value;
        answer(self.sandbox().update(&id(&request.id)?, resources).await.map(|()| empty()))
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> Answer<api::StatsResponse> {
        let stats = answer(self.sandbox().stats(&id(&request.id)?).await)?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats::to_any(&stats, self.parts.unified)),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> Answer<api::ConnectResponse> {
        let task_pid = match request.id.is_empty() {
            true => 0,
            false => self.state_of(&process(&request.id, "")?)?.pid,
        };
        Ok(api::ConnectResponse { shim_pid: std::process::id(), task_pid, ..Default::default() })
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownRequest,
    ) -> Answer<api::Empty> {
        let parts = &self.parts;
        // containerd's `delete` gives a server up that it has lost; it has not lost one that
        // somebody is connected to beside this caller.
        let given_up = request.now && (parts.engine.is_none() || parts.connections.count() <= 1);
        parts.end(given_up).await;
        Ok(empty())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        _: api::CheckpointTaskRequest,
    ) -> Answer<api::Empty> {
        Err(refused(&SandboxError::Unsupported("checkpoint of a virtual machine's container")))
    }
}

fn empty() -> api::Empty {
    api::Empty::default()
}

pub(crate) fn id(text: &str) -> Answer<Id> {
    text.parse().map_err(|error| refused(&SandboxError::Id(error)))
}

fn process(container: &str, exec: &str) -> Answer<ProcessRef> {
    let exec = (!exec.is_empty()).then(|| id(exec)).transpose()?;
    Ok(ProcessRef { container: id(container)?, exec })
}

fn file_system(mount: api::Mount) -> FileSystem {
    FileSystem { kind: mount.type_, source: mount.source, options: mount.options }
}

pub(crate) fn pid(pid: i32) -> u32 {
    pid.unsigned_abs()
}

pub(crate) fn exited_at(exit: Exit) -> Timestamp {
    timestamp(exit.at)
}

pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at
        .duration_since(UNIX_EPOCH)
        .unwrap_or_else(|_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
    Timestamp {
        seconds: since.as_secs().cast_signed(),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}

pub(crate) fn answer<T>(result: Result<T, SandboxError>) -> Answer<T> {
    result.map_err(|error| refused(&error))
}

pub(crate) fn refused(error: &SandboxError) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(error.status())
}

fn unknown(error: &anyhow::Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::UNKNOWN, format!("{error:#}")))
}
