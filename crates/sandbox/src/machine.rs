//! The machine of a sandbox: VMM, devices process, channel, agent and network, started
//! together, watched together, ended together.
//!
//! Any death ends the sandbox at once, with its cause: the first of them goes into `lost`,
//! and every call that waits for the guest gives that cause instead of its own.

use crate::agent::{Agent, Guest, Hello, NewContainer};
use crate::boot::{self, Boot, Started};
use crate::container::Bundle;
use crate::factory::Warm;
use crate::joining::Joining;
use crate::network::Network;
use crate::packets::Packets;
use crate::process::lock;
use crate::share::Share;
use crate::stages::Stages;
use crate::state::{MACHINE_ROLE, StateFile};
use crate::{SandboxDir, SandboxError, vm_config};
use kata_cgroups::Hierarchy;
use kata_channel::HostChannel;
use kata_hypervisor::{Console, Device, DeviceId, Hypervisor, HypervisorError, Qemu};
use kata_network::Netns;
use kata_protocol::{Id, StreamHeader, agent as message, chain};
use kata_storage::Attachment;
use std::borrow::Cow;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{OnceCell, watch};
use tokio::task::AbortHandle;

/// How long a call that failed waits to learn which death was the cause.
const CAUSE: Duration = Duration::from_millis(500);
/// How long a guest may take to write back what it holds before it is ended.
const SYNC: Duration = Duration::from_secs(2);

/// The agent of a machine, which need not have booted.
fn reach(hypervisor: &mut Qemu) -> Result<Agent, SandboxError> {
    let channel = match (hypervisor.vsock_cid(), hypervisor.take_agent_socket()) {
        (Some(cid), _) => HostChannel::vsock(cid),
        (None, Some(socket)) => HostChannel::serial(socket),
        (None, None) => return Err(SandboxError::Unsupported("a machine without a channel")),
    };
    Ok(Agent::new(channel))
}

/// A running machine.
pub(crate) struct Machine {
    sandbox: Id,
    first_container: Id,
    dir: SandboxDir,
    hypervisor: tokio::sync::Mutex<Qemu>,
    pid: i32,
    console: Console,
    share: Arc<Share>,
    agent: Agent,
    guest: OnceCell<Guest>,
    /// The guest has mounted the share.
    mounted: OnceCell<()>,
    awake: bool,
    hostname: String,
    vcpus: u32,
    patience: Duration,
    create_patience: Duration,
    /// Containers' seccomp profiles are left out.
    without_seccomp: bool,
    /// The console goes to the log.
    debug: bool,
    /// Its cgroup.
    joining: Joining,
    network: tokio::sync::Mutex<Option<Network>>,
    resolv_conf: Option<PathBuf>,
    /// The resolver whose answers are carried to the guest, and what carries them.
    dns: tokio::sync::Mutex<Option<(IpAddr, AbortHandle)>>,
    lost: watch::Sender<Option<String>>,
    stopping: AtomicBool,
    stopped: OnceCell<()>,
    stages: Stages,
    /// The factory makes no further spare while this is held.
    factory: Mutex<Option<Packets>>,
}

impl Machine {
    /// Starts everything; returns while the guest boots. [`Machine::ready`] waits for it.
    pub(crate) async fn start(
        mut boot: Boot<'_>,
        state: &Mutex<StateFile>,
        warm: Option<Warm>,
    ) -> Result<Self, SandboxError> {
        let stages = Stages::start();
        let started = boot::start(&mut boot, state, &stages, warm).await?;
        let Started { config, sizing, joining, network, share, mut hypervisor, .. } = started;
        let pid = hypervisor.pids().first().copied().unwrap_or_default();
        lock(state).record_process(pid, MACHINE_ROLE)?;
        stages.mark("virtual machine started");

        let met = started.met.is_some();
        let agent = match started.met {
            Some(met) => met,
            None => reach(&mut hypervisor)?,
        };
        let machine = Self {
            sandbox: boot.sandbox.clone(),
            first_container: boot.container.clone(),
            dir: boot.dir.clone(),
            pid,
            console: hypervisor.console(),
            share: Arc::new(share),
            agent,
            guest: OnceCell::new(),
            // A spare's has.
            mounted: OnceCell::new_with(met.then_some(())),
            awake: started.awake,
            hostname: boot.spec.hostname.clone(),
            vcpus: sizing.vcpus,
            patience: Duration::from_secs(config.agent.dial_timeout.into()),
            create_patience: Duration::from_secs(config.runtime.create_container_timeout.into()),
            without_seccomp: config.runtime.disable_guest_seccomp,
            debug: config.hypervisor.enable_debug,
            joining,
            network: tokio::sync::Mutex::new(network),
            resolv_conf: boot.resolv_conf.map(Path::to_owned),
            dns: tokio::sync::Mutex::default(),
            lost: watch::Sender::new(None),
            stopping: AtomicBool::new(false),
            stopped: OnceCell::new(),
            stages,
            factory: Mutex::new(started.line),
            hypervisor: tokio::sync::Mutex::new(hypervisor),
        };
        machine.watch_deaths().await;
        // A spare's answers within two milliseconds, if hooks do not take its processor.
        if met && let Err(error) = machine.ready().await {
            machine.stop().await;
            return Err(error);
        }
        Ok(machine)
    }

    /// Each process and the channel is waited for; the first to go is the cause.
    async fn watch_deaths(&self) {
        let mut vm = self.hypervisor.lock().await.exited();
        let lost = self.lost.clone();
        tokio::spawn(async move { tell(&lost, vm.wait().await.to_string()) });

        let (share, lost) = (Arc::clone(&self.share), self.lost.clone());
        tokio::spawn(async move {
            let Some(devices) = share.process() else { return };
            let ended = devices.wait().await;
            if ended.as_ref().is_ok_and(|status| status.success()) {
                // It ends by itself only when the VMM has: that death is the cause to tell.
                tokio::time::sleep(CAUSE).await;
            }
            let cause = match ended {
                Ok(status) => format!("the devices process ended: {status}"),
                Err(error) => format!("the devices process cannot be watched: {error}"),
            };
            tell(&lost, cause);
        });

        let (channel, lost) = (self.agent.channel().clone(), self.lost.clone());
        tokio::spawn(async move {
            let reason = channel.closed().await;
            tokio::time::sleep(CAUSE / 2).await;
            tell(&lost, format!("the channel to the agent closed: {reason}"));
        });
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// The container with which the machine ends.
    pub(crate) fn first_container(&self) -> &Id {
        &self.first_container
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    pub(crate) fn hypervisor(&self) -> &tokio::sync::Mutex<Qemu> {
        &self.hypervisor
    }

    /// The sandbox's id.
    pub(crate) fn sandbox(&self) -> &Id {
        &self.sandbox
    }

    pub(crate) fn channel(&self) -> &HostChannel {
        self.agent.channel()
    }

    pub(crate) fn mark(&self, stage: &'static str) {
        self.stages.mark(stage);
    }

    /// What follows the first start of a container in it.
    pub(crate) fn has_started(&self) {
        self.stages.write(&self.dir);
        drop(lock(&self.factory).take());
    }

    /// Begins to put a process that stands for one of the guest's into the sandbox's cgroup.
    pub(crate) async fn adopt(&self, pid: i32) {
        self.joining.add(pid).await;
    }

    /// What the sandbox's processes use on the host.
    pub(crate) fn host_stats(&self) -> Result<message::StatsResponse, SandboxError> {
        let used = self.joining.cgroup().stats();
        let used = used.map_err(|source| self.joining.failed(source))?;
        Ok(kata_protocol::stats::response(used, Vec::new()))
    }

    /// Puts host paths into the share.
    pub(crate) async fn attach(&self, attachments: &[Attachment]) -> Result<(), SandboxError> {
        for attachment in attachments {
            self.share.attach(&self.hypervisor, attachment).await?;
        }
        self.mark("share attached");
        Ok(())
    }

    /// Plugs the disk that is the root of a container. None, and the plan changed, when
    /// the machine has no room for another: the root is shared then.
    pub(crate) async fn plug_root(
        &self,
        bundle: &mut Bundle,
    ) -> Result<Option<DeviceId>, SandboxError> {
        let Some(disk) = &bundle.plan.disk else { return Ok(None) };
        let path = disk.path.display();
        let file = std::fs::File::options()
            .read(true)
            .write(!disk.readonly)
            .open(&disk.path)
            .map_err(SandboxError::io(format!("open {path}, the root of the container")))?;
        let device = Device::Disk(kata_hypervisor::Disk {
            file: file.into(),
            is_file: disk.is_file,
            readonly: disk.readonly,
            serial: disk.storage.source.clone(),
        });
        match self.hypervisor.lock().await.plug(device).await {
            Ok(device) => Ok(Some(device)),
            Err(HypervisorError::NoPort) => {
                tracing::info!(sandbox = %self.sandbox, container = %bundle.id,
                    "no room for another disk: the root is mounted on the host and shared");
                bundle.plan.share_root(&bundle.share);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a disk out again; the guest no longer uses it.
    pub(crate) async fn unplug(&self, device: &DeviceId) {
        if let Err(error) = self.hypervisor.lock().await.unplug(device).await {
            tracing::warn!(sandbox = %self.sandbox, %error, "cannot unplug a disk");
        }
    }

    /// Takes them out again.
    pub(crate) fn detach(&self, attached: &[PathBuf]) {
        for at in attached.iter().rev() {
            if let Err(error) = self.share.detach(at) {
                tracing::debug!(sandbox = %self.sandbox, error = %chain(&error), "cannot detach");
            }
        }
    }

    /// Waits until the guest answers, and makes it this sandbox; once.
    pub(crate) async fn ready(&self) -> Result<(), SandboxError> {
        let connect = async {
            let hello = Hello {
                sandbox: self.sandbox.to_string(),
                hostname: self.hostname.clone(),
                online_cpus: self.vcpus,
                template: false,
            };
            let guest = self.call(self.agent.connect(hello, self.patience)).await;
            let guest = guest.map_err(|error| match error {
                SandboxError::Late => {
                    SandboxError::Silent { waited: self.patience, console: self.last_words() }
                }
                other => other,
            })?;
            self.mark("agent ready");
            self.hypervisor.lock().await.settle()?;
            tracing::info!(sandbox = %self.sandbox, kernel = guest.kernel, agent = guest.agent_version,
                init_ms = guest.init.as_millis(), ready_ms = guest.ready.as_millis(), "guest is up");
            Ok(guest)
        };
        self.guest.get_or_try_init(|| connect).await.map(|_| ())
    }

    /// Has the guest, which has answered, mount the share, without which it makes no container;
    /// once.
    pub(crate) async fn mounted(&self) -> Result<(), SandboxError> {
        let mount = async {
            self.call(self.agent.mount(self.share.storage())).await?;
            self.mark("share mounted");
            Ok(())
        };
        self.mounted.get_or_try_init(|| mount).await.copied()
    }

    /// Whether the guest has answered.
    pub(crate) fn is_ready(&self) -> bool {
        self.guest.initialized()
    }

    /// Whether it was not booted, so that the guest answers at once.
    pub(crate) fn is_awake(&self) -> bool {
        self.awake
    }

    /// Waits until all its processes are in the sandbox's cgroup.
    pub(crate) async fn joined(&self) -> Result<(), SandboxError> {
        self.joining.done().await
    }

    fn last_words(&self) -> String {
        match self.console.last_lines(20) {
            lines if lines.is_empty() => "its console is silent".to_owned(),
            lines => format!("its console says:\n{}", lines.join("\n")),
        }
    }

    /// Waits for a call to the guest, or for the death of what it needs.
    pub(crate) async fn call<T>(
        &self,
        call: impl Future<Output = Result<T, SandboxError>>,
    ) -> Result<T, SandboxError> {
        let result = tokio::select! {
            biased;
            result = call => result,
            cause = self.lost() => Err(SandboxError::Lost(cause)),
        };
        match result {
            Err(error) => Err(self.explain(error).await),
            ok => ok,
        }
    }

    /// The death behind an error, when there was one.
    pub(crate) async fn explain(&self, error: SandboxError) -> SandboxError {
        if !matches!(error, SandboxError::Lost(_) | SandboxError::Channel(_)) {
            return error;
        }
        match tokio::time::timeout(CAUSE, self.lost()).await {
            Ok(cause) => SandboxError::Lost(cause),
            Err(_) => error,
        }
    }

    /// Waits for the end of the machine; gives its cause.
    pub(crate) async fn lost(&self) -> String {
        let mut lost = self.lost.subscribe();
        match lost.wait_for(Option::is_some).await {
            Ok(cause) => cause.clone().unwrap_or_default(),
            // The sender is ours; this cannot be.
            Err(_) => String::new(),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.is_stopping() || self.lost.borrow().is_some()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Hands a container over to the guest.
    pub(crate) async fn create(
        &self,
        bundle: &Bundle,
        stdio: message::Stdio,
        network: Option<message::Network>,
    ) -> Result<(), SandboxError> {
        tokio::try_join!(self.joined(), self.mounted())?;
        let mut spec = Cow::Borrowed(&bundle.plan.spec);
        if self.without_seccomp
            && let Some(linux) = &mut spec.to_mut().linux
        {
            linux.seccomp = None;
        }
        let new = NewContainer { bundle, spec: &spec, stdio, network };
        self.call(self.agent.create(new, self.create_patience)).await
    }

    /// Joins what is new in the engine's namespace; gives the guest's network when the
    /// guest does not know it yet.
    pub(crate) async fn network_change(&self) -> Result<Option<message::Network>, SandboxError> {
        let mut slot = self.network.lock().await;
        let Some(network) = slot.as_mut() else { return Ok(None) };
        self.plug_nics(network).await?;
        self.sync_network(network).await
    }

    /// Makes the guest's network what is in the engine's namespace now.
    pub(crate) async fn follow_engine(&self) -> Result<(), SandboxError> {
        match self.network_change().await? {
            Some(network) => self.call(self.agent.configure_network(&network)).await,
            None => Ok(()),
        }
    }

    /// A NIC for each interface that has none.
    async fn plug_nics(&self, network: &mut Network) -> Result<(), SandboxError> {
        while let Some((tap, mac)) = network.grow()? {
            let nic = vm_config::nic(tap, mac);
            let plugged = self.hypervisor.lock().await.plug(Device::Nic(nic)).await;
            if let Err(source) = plugged {
                network.take_back();
                return Err(match source {
                    HypervisorError::NoPort => {
                        SandboxError::NoRoom { networks: network.settle_for_less(), source }
                    }
                    other => other.into(),
                });
            }
        }
        Ok(())
    }

    async fn sync_network(
        &self,
        network: &mut Network,
    ) -> Result<Option<message::Network>, SandboxError> {
        let resolver = self.resolver();
        let change = network.sync(resolver)?;
        if change.is_some() {
            self.serve_dns(network.netns(), resolver).await?;
        }
        Ok(change)
    }

    /// Docker's embedded resolver listens on a loopback address of the namespace, which
    /// the guest cannot reach but through us.
    fn resolver(&self) -> Option<IpAddr> {
        let text = std::fs::read_to_string(self.resolv_conf.as_ref()?).ok()?;
        kata_network::loopback_nameserver(&text)
    }

    /// Carries the guest's questions to this resolver from now on, on a stream of its own.
    async fn serve_dns(
        &self,
        netns: Arc<Netns>,
        resolver: Option<IpAddr>,
    ) -> Result<(), SandboxError> {
        let mut served = self.dns.lock().await;
        if served.as_ref().map(|(address, _)| *address) == resolver {
            return Ok(());
        }
        if let Some((_, old)) = served.take() {
            old.abort();
        }
        let Some(address) = resolver else { return Ok(()) };
        let stream = self.channel().open(&StreamHeader::dns()).await?;
        let sandbox = self.sandbox.clone();
        let task = tokio::spawn(async move {
            if let Err(error) = kata_network::serve_dns(&netns, address, stream).await {
                tracing::warn!(%sandbox, error = %chain(&error), "names are no longer resolved for the guest");
            }
        });
        *served = Some((address, task.abort_handle()));
        Ok(())
    }

    /// The engine's network namespace; none without one.
    pub(crate) async fn netns(&self) -> Option<Arc<Netns>> {
        self.network.lock().await.as_ref().map(Network::netns)
    }

    /// Follows the engine's namespace from now on: networks that are connected later.
    pub(crate) fn watch_network(self: &Arc<Self>) {
        let machine = Arc::clone(self);
        tokio::spawn(async move {
            let followed = tokio::select! {
                followed = machine.follow_network() => followed,
                _cause = machine.lost() => Ok(()),
            };
            if let Err(error) = followed {
                tracing::warn!(sandbox = %machine.sandbox, error = %chain(&error),
                    "changes of the network are no longer followed");
            }
        });
    }

    async fn follow_network(&self) -> Result<(), SandboxError> {
        let netns = match self.network.lock().await.as_ref() {
            Some(network) => network.netns(),
            None => return Ok(()),
        };
        let mut changes = kata_network::Changes::watch(&netns)?;
        loop {
            if let Err(error) = self.follow_once().await {
                tracing::warn!(sandbox = %self.sandbox, error = %chain(&error),
                    "the guest's network is not what the engine made it");
            }
            changes.next().await?;
        }
    }

    /// What fails of a change does not keep later ones from being followed.
    async fn follow_once(&self) -> Result<(), SandboxError> {
        let mut slot = self.network.lock().await;
        let Some(network) = slot.as_mut() else { return Ok(()) };
        let plugged = self.plug_nics(network).await;
        if let Some(network) = self.sync_network(network).await? {
            self.call(self.agent.configure_network(&network)).await?;
        }
        plugged
    }

    /// Ends the machine: the guest writes back what it holds, then everything goes.
    /// Waits until it is gone, also when another call is ending it.
    pub(crate) async fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.stopped.get_or_init(|| self.end()).await;
    }

    async fn end(&self) {
        // Nobody is to arrive in a cgroup that is about to be removed.
        let _ = self.joined().await;
        if self.lost.borrow().is_none() && self.is_ready() {
            let synced = tokio::time::timeout(SYNC, self.call(self.agent.sync(SYNC))).await;
            if !matches!(synced, Ok(Ok(()))) {
                tracing::warn!(sandbox = %self.sandbox, "the guest was ended before it wrote back all it held");
            }
        }
        if let Err(error) = self.hypervisor.lock().await.stop().await {
            tracing::warn!(sandbox = %self.sandbox, error = %chain(&error), "cannot stop the virtual machine in order");
        }
        if self.debug {
            for line in self.console.last_lines(usize::MAX) {
                tracing::info!(sandbox = %self.sandbox, "console: {line}");
            }
        }
        self.share.end().await;
        if let Some(network) = self.network.lock().await.as_mut() {
            network.unjoin();
        }
        tell(&self.lost, "it was stopped".to_owned());
    }
}

fn tell(lost: &watch::Sender<Option<String>>, cause: String) {
    lost.send_if_modified(|known| {
        let first = known.is_none();
        known.get_or_insert(cause);
        first
    });
}

/// Moves this process to the root of the hierarchies, so that its cgroup can go.
pub(crate) fn leave_cgroup() -> Result<(), SandboxError> {
    let failed = |source| SandboxError::Cgroup { path: "/".to_owned(), source };
    let hierarchy = Hierarchy::detect().map_err(failed)?;
    hierarchy.leave(std::process::id().cast_signed()).map_err(failed)
}
