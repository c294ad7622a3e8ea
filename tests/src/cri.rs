//! A kubelet's side of the CRI: pods and containers by gRPC, each removed when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self, ContainerConfig, ContainerState, NamespaceMode, PodSandboxConfig};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::command::{self, PATIENCE};
use crate::containerd::{Containerd, IMAGE, SOCKET};
use crate::leaks;

/// The service's client, for calls that have no function here.
pub type Client = RuntimeServiceClient<Channel>;

static NAMES: AtomicU32 = AtomicU32::new(0);

/// A containerd whose CRI is used.
pub struct Cri {
    /// The daemon.
    pub containerd: Containerd,
    executor: tokio::runtime::Runtime,
    channel: Channel,
}

impl Cri {
    /// Connects to the daemon's CRI.
    pub fn new(containerd: Containerd) -> Result<Self> {
        let executor = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("start an executor")?;
        let endpoint = Endpoint::try_from(format!("unix://{SOCKET}"))?;
        // A daemon that is restarted is connected to anew by the next call.
        let channel = {
            let _inside = executor.enter();
            endpoint.connect_lazy()
        };
        let cri = Self { containerd, executor, channel };
        cri.wait_until_ready()?;
        Ok(cri)
    }

    fn wait_until_ready(&self) -> Result<()> {
        command::eventually("the CRI is ready", PATIENCE, || {
            let request = v1::StatusRequest::default();
            let status = self.call("Status", async |mut c| c.status(request).await)?;
            Ok(status.status.is_some_and(|s| s.conditions.iter().all(|c| c.status)))
        })
    }

    /// Stops the daemon as an upgrade would, and starts it again.
    pub fn restart(&self) -> Result<()> {
        self.containerd.restart()?;
        self.wait_until_ready()
    }

    /// Makes one call, for at most as long as a busy machine may need.
    pub fn call<T>(
        &self,
        what: &str,
        call: impl AsyncFnOnce(Client) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        let client = RuntimeServiceClient::new(self.channel.clone());
        let answer =
            self.executor.block_on(async { tokio::time::timeout(PATIENCE, call(client)).await });
        let answer = answer.map_err(|_| anyhow!("{what}: no answer within {PATIENCE:?}"))?;
        answer.map(Response::into_inner).map_err(|status| anyhow!("{what}: {}", status.message()))
    }

    /// Whether our runtime is the one under test.
    pub fn is_kata(&self) -> bool {
        self.containerd.is_kata()
    }

    /// A pod's configuration, as a kubelet would make it for a pod without wishes.
    pub fn pod_config(&self) -> Result<PodSandboxConfig> {
        let arena = &self.containerd.arena;
        let name = format!("pod{}", NAMES.fetch_add(1, Ordering::Relaxed));
        let logs = arena.dir(&format!("pods/{name}/logs"))?;
        Ok(PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
                name: name.clone(),
            }),
            hostname: name.clone(),
            log_directory: logs.display().to_string(),
            dns_config: Some(v1::DnsConfig {
                servers: vec!["192.0.2.53".to_owned()],
                searches: vec!["pods.example.test".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}/{name}", arena.name),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(NamespaceMode::Container)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// A running pod on the default network.
    pub fn pod(&self) -> Result<Pod<'_>> {
        self.run_pod(self.pod_config()?, "")
    }

    /// A running pod with this configuration, on the network of this name.
    pub fn run_pod(&self, config: PodSandboxConfig, network: &str) -> Result<Pod<'_>> {
        let base = if self.is_kata() { "kata" } else { "runc" };
        let handler =
            if network.is_empty() { base.to_owned() } else { format!("{base}-{network}") };
        self.run_pod_with(config, &handler)
    }

    /// A running pod with this configuration and runtime handler.
    pub fn run_pod_with(&self, config: PodSandboxConfig, handler: &str) -> Result<Pod<'_>> {
        // A kubelet makes the pod's cgroup.
        let parent = config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
        for root in crate::arena::cgroup_roots() {
            let dir = root.join(parent.trim_start_matches('/'));
            fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        }
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        match self.call("RunPodSandbox", async |mut c| c.run_pod_sandbox(request).await) {
            Ok(ran) => Ok(Pod { cri: self, id: ran.pod_sandbox_id, config }),
            Err(error) => {
                remove_cgroup(&config)?;
                Err(error)
            }
        }
    }
}

/// Asks as a kubelet does: for some seconds again while the answer is an error with these words.
fn asked_again<T>(words: &str, ask: impl Fn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match ask() {
            Err(error) if error.to_string().contains(words) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            answer => return answer,
        }
    }
}

/// What a kubelet made, it removes.
fn remove_cgroup(config: &PodSandboxConfig) -> Result<()> {
    let parent = config.linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default();
    for root in crate::arena::cgroup_roots() {
        let dir = root.join(parent.trim_start_matches('/'));
        if dir.exists() {
            fs::remove_dir(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
    }
    Ok(())
}

fn namespaces(pid: NamespaceMode) -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: pid.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

/// Makes the pod's containers share its processes.
pub fn share_processes(config: &mut PodSandboxConfig) {
    if let Some(context) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        context.namespace_options = Some(namespaces(NamespaceMode::Pod));
    }
}

/// A pod.
pub struct Pod<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
    /// With what it was made.
    pub config: PodSandboxConfig,
}

impl<'a> Pod<'a> {
    /// Its status.
    pub fn status(&self) -> Result<v1::PodSandboxStatus> {
        Ok(self.verbose_status()?.0)
    }

    fn verbose_status(&self) -> Result<(v1::PodSandboxStatus, serde_json::Value)> {
        let request =
            v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let ask = || {
            let request = request.clone();
            self.cri.call("PodSandboxStatus", async |mut c| c.pod_sandbox_status(request).await)
        };
        // containerd 2 still asks a shim that was killed a moment ago.
        let answer = asked_again("ttrpc: closed", ask)?;
        let info = answer
            .info
            .get("info")
            .map_or(Ok(serde_json::Value::Null), |text| serde_json::from_str(text))?;
        Ok((answer.status.context("no status")?, info))
    }

    /// Whether it is ready.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.status()?.state == i32::from(v1::PodSandboxState::SandboxReady))
    }

    /// Its addresses.
    pub fn addresses(&self) -> Result<Vec<String>> {
        let network = self.status()?.network.context("the pod has no network")?;
        let more = network.additional_ips.into_iter().map(|ip| ip.ip);
        Ok(std::iter::once(network.ip).chain(more).collect())
    }

    /// Its first address.
    pub fn address(&self) -> Result<String> {
        self.addresses()?.into_iter().next().context("the pod has no address")
    }

    /// The name of its network namespace.
    fn netns(&self) -> Result<String> {
        let (_, info) = self.verbose_status()?;
        let list = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned();
        let list = list.unwrap_or_default();
        let network = list.iter().find(|namespace| namespace["type"] == "network");
        let path = network.and_then(|n| n["path"].as_str()).unwrap_or_default();
        Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// A container's configuration: `sh -c script` in the image.
    pub fn container(&self, name: &str, script: &str) -> ContainerConfig {
        let shared = self.config.linux.as_ref().and_then(|l| l.security_context.as_ref());
        ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig {
                resources: Some(v1::LinuxContainerResources::default()),
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: shared.and_then(|s| s.namespace_options.clone()),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    /// Creates a container.
    pub fn create(&self, config: ContainerConfig) -> Result<Container<'a>> {
        let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        let log = Path::new(&self.config.log_directory).join(&config.log_path);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let created =
            self.cri.call("CreateContainer", async |mut c| c.create_container(request).await)?;
        Ok(Container { cri: self.cri, id: created.container_id, name, log })
    }

    /// Creates and starts `sh -c script`.
    pub fn run(&self, name: &str, script: &str) -> Result<Container<'a>> {
        self.run_config(self.container(name, script))
    }

    /// Creates and starts a container with this configuration.
    pub fn run_config(&self, config: ContainerConfig) -> Result<Container<'a>> {
        let container = self.create(config)?;
        container.start()?;
        Ok(container)
    }

    /// `StopPodSandbox`.
    pub fn stop(&self) -> Result<()> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("StopPodSandbox", async |mut c| c.stop_pod_sandbox(request).await).map(drop)
    }

    /// Stops and removes it, as a kubelet would; nothing of it may be left then, nor of its
    /// containers, whose ids are `containers`.
    pub fn remove(&self, containers: &[&str]) -> Result<()> {
        let netns = self.netns()?;
        // containerd 2 takes a container whose shim was killed for running until it has tried a
        // second time to delete its task.
        asked_again("still running", || self.stop().and_then(|()| self.remove_stopped()))?;
        let mut ids = vec![self.id.as_str()];
        ids.extend(containers);
        ids.extend((!netns.is_empty()).then_some(netns.as_str()));
        leaks::expect_no_trace(&ids)
    }

    fn remove_stopped(&self) -> Result<()> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.call("RemovePodSandbox", async |mut c| c.remove_pod_sandbox(request).await)?;
        remove_cgroup(&self.config)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.verbose_status().is_ok() {
            self.stop().ok();
            self.remove_stopped().ok();
        }
    }
}

/// How a command that was executed in a container ended.
#[derive(Debug)]
pub struct Executed {
    /// Its exit code.
    pub code: i32,
    /// Standard output without surrounding blanks.
    pub out: String,
    /// Standard error without surrounding blanks.
    pub err: String,
}

/// A container of a pod; it goes with its pod.
pub struct Container<'a> {
    cri: &'a Cri,
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    log: PathBuf,
}

impl Container<'_> {
    /// `StartContainer`.
    pub fn start(&self) -> Result<()> {
        let request = v1::StartContainerRequest { container_id: self.id.clone() };
        self.cri.call("StartContainer", async |mut c| c.start_container(request).await).map(drop)
    }

    /// `ExecSync` of `sh -c script`, whatever it exits with.
    pub fn execute(&self, script: &str) -> Result<Executed> {
        self.execute_for(script, 0)
    }

    /// The same with a time limit in seconds; 0: none.
    pub fn execute_for(&self, script: &str, timeout: i64) -> Result<Executed> {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: self.id.clone(), cmd, timeout };
        let done = self.cri.call("ExecSync", async |mut c| c.exec_sync(request).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        Ok(Executed { code: done.exit_code, out: text(&done.stdout), err: text(&done.stderr) })
    }

    /// `ExecSync` of `sh -c script`, which must succeed; its output.
    pub fn exec(&self, script: &str) -> Result<String> {
        let done = self.execute(script)?;
        ensure!(done.code == 0, "{script}: {done:?}");
        Ok(done.out)
    }

    /// `StopContainer`.
    pub fn stop(&self, timeout: i64) -> Result<()> {
        let request = v1::StopContainerRequest { container_id: self.id.clone(), timeout };
        self.cri.call("StopContainer", async |mut c| c.stop_container(request).await).map(drop)
    }

    /// `RemoveContainer`.
    pub fn remove(&self) -> Result<()> {
        let request = v1::RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.call("RemoveContainer", async |mut c| c.remove_container(request).await).map(drop)
    }

    /// Its status.
    pub fn status(&self) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer =
            self.cri.call("ContainerStatus", async |mut c| c.container_status(request).await)?;
        answer.status.context("no status")
    }

    /// Waits for its end, and gives its exit code.
    pub fn wait(&self) -> Result<i32> {
        self.wait_for(PATIENCE)
    }

    /// The same, for so long.
    pub fn wait_for(&self, patience: Duration) -> Result<i32> {
        let mut code = 0;
        command::eventually(&format!("{} ends", self.name), patience, || {
            let status = self.status()?;
            code = status.exit_code;
            Ok(status.state == i32::from(ContainerState::ContainerExited))
        })?;
        Ok(code)
    }

    /// What it wrote, by stream: `stdout` or `stderr`.
    pub fn logged(&self, stream: &str) -> Result<String> {
        let text = fs::read_to_string(&self.log)
            .with_context(|| format!("read {}", self.log.display()))?;
        let mut out = String::new();
        for line in text.lines() {
            // Time, stream, whether the line is whole, the line.
            let mut parts = line.splitn(4, ' ').skip(1);
            if parts.next() == Some(stream) {
                let whole = parts.next() == Some("F");
                out.push_str(parts.next().unwrap_or_default());
                out.push_str(if whole { "\n" } else { "" });
            }
        }
        Ok(out.trim().to_owned())
    }

    /// Waits until what it has logged on the stream is as it should be: containerd copies it
    /// while, and a little longer than, the process runs.
    pub fn expect_logged(&self, stream: &str, is_right: impl Fn(&str) -> bool) -> Result<()> {
        let mut text = String::new();
        command::eventually("its output is logged", PATIENCE, || {
            text = self.logged(stream)?;
            Ok(is_right(&text))
        })
        .with_context(|| {
            let end = text.char_indices().rev().nth(99).map_or(0, |(at, _)| at);
            format!("logged are {} bytes: {text:.100} … {}", text.len(), &text[end..])
        })
    }

    /// Waits until its log has this text.
    pub fn until_logged(&self, text: &str) -> Result<()> {
        command::eventually(&format!("{} says {text:?}", self.name), PATIENCE, || {
            Ok(self.logged("stdout")?.contains(text))
        })
    }
}
