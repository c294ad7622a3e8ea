//! containerd 2's Sandbox API (`sandboxer = "shim"`): the pod is the sandbox itself, and no
//! container stands for it.
//!
//! To the [`Sandbox`] it is a pod like any other. `CreateSandbox` writes down what containerd
//! would otherwise have written ([`pod`]), `StartSandbox` starts it, and everything else is
//! asked of the process that stands for it. containerd hears nothing of that process: for it
//! there is no task. (It may ask for one: when containerd starts, it takes a shim whose Task API
//! knows nothing of its sandbox for a leftover.)

use super::pod::{self, cri::PodSandboxConfig};
use crate::server::Parts;
use crate::stats;
use crate::task::{Answer, answer, exited_at, id, pid, refused, timestamp};
use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as SandboxApi;
use containerd_shim_protos::types::platform::Platform;
use kata_protocol::Id;
use kata_sandbox::{CreateRequest, ProcessRef, ProcessStatus, SandboxError, Stdio};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;
use ttrpc::asynchronous::TtrpcContext;

/// The only one that there are guests for, in Go's terms.
const ARCHITECTURE: &str = "amd64";
/// `PodSandboxState` of the CRI, as text.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service of one sandbox.
pub(crate) struct SandboxService {
    parts: Arc<Parts>,
    pod: OnceLock<Pod>,
}

/// What was created.
struct Pod {
    id: Id,
    bundle: PathBuf,
    created: SystemTime,
}

impl Pod {
    fn process(&self) -> ProcessRef {
        ProcessRef { container: self.id.clone(), exec: None }
    }
}

impl SandboxService {
    pub(crate) fn new(parts: Arc<Parts>) -> Self {
        Self { parts, pod: OnceLock::new() }
    }

    /// The pod, if it is the one that is meant.
    fn pod(&self, name: &str) -> Answer<&Pod> {
        let pod = self.pod.get().filter(|pod| pod.id.as_str() == name);
        pod.ok_or_else(|| refused(&SandboxError::NoContainer(name.to_owned())))
    }

    fn created(&self, request: &api::CreateSandboxRequest) -> Answer<()> {
        let id = id(&request.sandbox_id)?;
        let exists = || refused(&SandboxError::Exists(format!("sandbox {id}")));
        if self.pod.get().is_some() {
            return Err(exists());
        }
        let config = config(request.options.get_or_default())?;
        let bundle = PathBuf::from(&request.bundle_path);
        let netns = (!request.netns_path.is_empty()).then(|| Path::new(&request.netns_path));
        pod::write(&bundle, &id, &config, netns).map_err(|source| {
            let what = format!("write the pod's files to {}", bundle.display());
            refused(&SandboxError::Io { what, source })
        })?;
        self.parts.publisher.keep_from(&id);
        let pod = Pod { id: id.clone(), bundle, created: SystemTime::now() };
        self.pod.set(pod).map_err(|_| exists())
    }

    async fn started(&self, pod: &Pod) -> Answer<u32> {
        let create = CreateRequest {
            id: pod.id.clone(),
            bundle: pod.bundle.clone(),
            rootfs: Vec::new(),
            stdio: Stdio::default(),
            stand_in: None,
            config: self.parts.engine.as_ref().and_then(|engine| engine.config.clone()),
            systemd_cgroup: false,
        };
        answer(self.parts.sandbox.create(create).await)?;
        answer(self.parts.sandbox.start(&pod.process()).await.map(pid))
    }

    /// Ends the pod, whatever is still in it. One that has ended stays so.
    async fn stopped(&self, pod: &Pod) -> Answer<()> {
        let signal = libc::SIGKILL.unsigned_abs();
        match self.parts.sandbox.kill(&pod.process(), signal, false).await {
            Ok(())
            | Err(
                SandboxError::Finished(_) | SandboxError::NoContainer(_) | SandboxError::Lost(_),
            ) => Ok(()),
            Err(error) => Err(refused(&error)),
        }
    }

    fn status(&self, pod: &Pod, verbose: bool) -> api::SandboxStatusResponse {
        let mut status = api::SandboxStatusResponse {
            sandbox_id: pod.id.to_string(),
            state: NOT_READY.to_owned(),
            created_at: MessageField::some(timestamp(pod.created)),
            ..Default::default()
        };
        let Ok(state) = self.parts.sandbox.process_state(&pod.process()) else { return status };
        status.pid = pid(state.pid);
        match state.status {
            ProcessStatus::Running => status.state = READY.to_owned(),
            ProcessStatus::Exited(exit) => {
                status.exited_at = MessageField::some(exited_at(exit));
            }
            ProcessStatus::Created => {}
        }
        if verbose {
            status.info.insert("info".to_owned(), info(pod, &status).to_string());
        }
        status
    }
}

/// What `crictl inspectp` shows beside the status.
fn info(pod: &Pod, status: &api::SandboxStatusResponse) -> Value {
    let spec = std::fs::read(pod.bundle.join("config.json")).unwrap_or_default();
    let spec: Value = serde_json::from_slice(&spec).unwrap_or_default();
    json!({"sandboxID": status.sandbox_id, "pid": status.pid, "processStatus": status.state,
           "runtimeSpec": spec})
}

/// The pod's description; a client other than the CRI plugin may give none.
fn config(options: &Any) -> Answer<PodSandboxConfig> {
    match options.type_url.rsplit('/').next().unwrap_or_default() {
        "" => Ok(PodSandboxConfig::new()),
        pod::TYPE => PodSandboxConfig::parse_from_bytes(&options.value)
            .map_err(|error| invalid(&format!("cannot read the pod's description: {error}"))),
        other => Err(invalid(&format!(
            "cannot make a sandbox of {other}: {} is known, of containerd's CRI plugin",
            pod::TYPE
        ))),
    }
}

fn invalid(text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, text))
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> Answer<api::CreateSandboxResponse> {
        self.created(&request).map(|()| api::CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> Answer<api::StartSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let pid = self.started(pod).await?;
        let created_at = MessageField::some(timestamp(pod.created));
        Ok(api::StartSandboxResponse { pid, created_at, ..Default::default() })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> Answer<api::PlatformResponse> {
        self.pod(&request.sandbox_id)?;
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: ARCHITECTURE.to_owned(),
            ..Default::default()
        };
        Ok(api::PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> Answer<api::StopSandboxResponse> {
        self.stopped(self.pod(&request.sandbox_id)?).await?;
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> Answer<api::WaitSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let exit = answer(self.parts.sandbox.wait(&pod.process()).await)?;
        Ok(api::WaitSandboxResponse {
            exit_status: exit.code.into(),
            exited_at: MessageField::some(exited_at(exit)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> Answer<api::SandboxStatusResponse> {
        Ok(self.status(self.pod(&request.sandbox_id)?, request.verbose))
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::PingRequest,
    ) -> Answer<api::PingResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        match self.parts.sandbox.process_state(&pod.process()).map(|state| state.status) {
            Ok(ProcessStatus::Running) => Ok(api::PingResponse::default()),
            _ => Err(refused(&SandboxError::Lost(format!("sandbox {} does not run", pod.id)))),
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> Answer<api::ShutdownSandboxResponse> {
        // Also of one that could not be created: nothing of it is to stay.
        if let Ok(pod) = self.pod(&request.sandbox_id) {
            self.stopped(pod).await?;
            // It takes the machine along; one that never started is not there.
            let _ = self.parts.sandbox.delete(&pod.process()).await;
        }
        self.parts.end(true).await;
        Ok(api::ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> Answer<api::SandboxMetricsResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let stats = answer(self.parts.sandbox.stats(&pod.id).await)?;
        let mut response = api::SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = MessageField::some(timestamp(SystemTime::now()));
        metrics.id = pod.id.to_string();
        metrics.data = MessageField::some(stats::to_any(&stats, self.parts.unified));
        Ok(response)
    }
}
