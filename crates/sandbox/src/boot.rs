//! A machine comes to life: as a clone of a template where there is one, else it boots.

use crate::agent::Agent;
use crate::factory::{self, Keeper, Recipe, Rehearsed, Template, Warm};
use crate::joining::Joining;
use crate::network::Network;
use crate::packets::Packets;
use crate::process::lock;
use crate::share::{self, Greeting, Share};
use crate::stages::Stages;
use crate::state::{Resource, StateFile};
use crate::vm_config::{self, Later};
use crate::{SandboxDir, SandboxError};
use kata_cgroups::{Cgroup, Hierarchy};
use kata_config::{SandboxConfig, Sizing};
use kata_hypervisor::{ForkMemory, Hypervisor, Qemu, Start, VmConfig};
use kata_network::{Mac, Model, Netns};
use kata_oci::Spec;
use kata_protocol::{Id, chain};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Mutex;

/// What a machine is started for.
pub(crate) struct Boot<'a> {
    pub sandbox: &'a Id,
    pub container: &'a Id,
    pub dir: &'a SandboxDir,
    pub spec: &'a Spec,
    /// The host's file behind the container's `/etc/resolv.conf`.
    pub resolv_conf: Option<&'a Path>,
    pub netns: Option<Netns>,
    /// What the machine may have to take in once it runs.
    pub later: Later,
    /// The engine looks for the network namespace where the monitor is.
    pub monitor_shows_netns: bool,
    pub config: Option<&'a Path>,
}

/// What was started.
pub(crate) struct Started {
    pub config: SandboxConfig,
    pub sizing: Sizing,
    /// Not all of its processes may be in its cgroup yet.
    pub joining: Joining,
    pub network: Option<Network>,
    pub share: Share,
    pub hypervisor: Qemu,
    /// How the agent is reached, where it has answered already.
    pub met: Option<Agent>,
    /// It was not booted: the agent answers at once.
    pub awake: bool,
    /// To the factory, whose next spare waits until the sandbox has started.
    pub line: Option<Packets>,
}

/// Starts all processes of a machine. Returns while it boots.
pub(crate) async fn start(
    boot: &mut Boot<'_>,
    state: &Mutex<StateFile>,
    stages: &Stages,
    warm: Option<Warm>,
) -> Result<Started, SandboxError> {
    let recipe = Recipe::of(boot.config, boot.spec);
    // What was made for another sandbox goes.
    if let Some(warm) = warm.filter(|warm| warm.recipe == recipe) {
        match adopt(boot, state, stages, warm).await {
            Ok(started) => return Ok(started),
            Err(error) => tracing::warn!(sandbox = %boot.sandbox, error = %chain(&error),
                "the spare machine cannot be used: another one is started"),
        }
    }
    let (config, sizing) = recipe.configure(boot.sandbox)?;
    let joining = Joining::new(make_cgroup(boot.spec, boot.container, state)?);
    joining.add(std::process::id().cast_signed()).await;
    stages.mark("configuration and cgroup");

    let model = vm_config::network_model(&config);
    let mut network = boot.netns.take().map(|netns| Network::new(netns, model));
    let (sizes, joins) = (&sizing, Some(&joining));
    let power = Power { boot, config: &config, sizing: sizes, state, stages, joining: joins };
    match power.start(&recipe, &mut network).await {
        Ok((share, hypervisor, awake)) => {
            let (met, line) = (None, None);
            Ok(Started { config, sizing, joining, network, share, hypervisor, met, awake, line })
        }
        Err(error) => {
            // Nobody is to arrive in a cgroup that is about to be removed.
            let _ = joining.done().await;
            Err(error)
        }
    }
}

/// Makes a machine that stands still this sandbox's.
async fn adopt(
    boot: &mut Boot<'_>,
    state: &Mutex<StateFile>,
    stages: &Stages,
    warm: Warm,
) -> Result<Started, SandboxError> {
    let Warm { machine, line, .. } = warm;
    let Rehearsed { config, sizing, mut network, share, mut hypervisor, agent, .. } = machine;
    hypervisor.resume().await?;
    stages.mark("monitor goes on");
    let joining = Joining::new(make_cgroup(boot.spec, boot.container, state)?);
    let devices = share.process().map(kata_jail::Child::pid);
    let pids = [Some(std::process::id().cast_signed()), Some(hypervisor.pid()), devices];
    for pid in pids.into_iter().flatten() {
        joining.add(pid).await;
    }
    if let Some(netns) = boot.netns.as_ref().filter(|_| !boot.monitor_shows_netns) {
        network.move_to(Netns::open(netns.path())?);
    }
    boot.netns = None;
    stages.mark("spare taken over");
    let (network, met, awake, line) = (Some(network), Some(agent), true, Some(line));
    Ok(Started { config, sizing, joining, network, share, hypervisor, met, awake, line })
}

/// What a machine is cloned from.
pub(crate) struct Cloned {
    /// By which its template is found.
    pub key: String,
    /// The clone.
    pub vm: VmConfig,
    /// It is a fork, made by this one.
    pub keeper: Option<Keeper>,
}

/// How the monitor of a machine comes to be.
pub(crate) enum Monitor {
    /// It is executed.
    Executed,
    /// It is executed, to be forked.
    ToBeForked,
    /// It is forked, by this one.
    Fork(Keeper),
}

impl Monitor {
    /// What the devices process is to know of it.
    fn of_devices(&self) -> kata_devices::Monitor {
        match self {
            Self::Executed => kata_devices::Monitor::Executed,
            Self::ToBeForked | Self::Fork(_) => kata_devices::Monitor::Forked,
        }
    }
}

/// What it takes to start a machine.
pub(crate) struct Power<'a> {
    pub boot: &'a Boot<'a>,
    pub config: &'a SandboxConfig,
    pub sizing: &'a Sizing,
    pub state: &'a Mutex<StateFile>,
    pub stages: &'a Stages,
    /// The cgroup that its processes are to be in, if any.
    pub joining: Option<&'a Joining>,
}

impl Power<'_> {
    /// Starts the machine in the cheapest way there is; says whether it was not booted.
    async fn start(
        &self,
        recipe: &Recipe,
        network: &mut Option<Network>,
    ) -> Result<(Share, Qemu, bool), SandboxError> {
        let template = match network {
            // A template has one NIC that waits for its network.
            // A fork's monitor is in no namespace that could be shown.
            Some(_) if vm_config::network_model(self.config) == Model::TcFilter => {
                self.template(recipe, !self.boot.monitor_shows_netns).await
            }
            _ => None,
        };
        if let Some(Cloned { key, vm, keeper }) = template {
            let forks = keeper.is_some();
            let monitor = keeper.map_or(Monitor::Executed, Monitor::Fork);
            match self.clone_on(network, vm, monitor).await {
                Ok((share, hypervisor)) => return Ok((share, hypervisor, forks)),
                // Another machine would not be in it, either.
                Err(error @ SandboxError::Cgroup { .. }) => return Err(error),
                Err(error) => tracing::warn!(sandbox = %self.boot.sandbox, error = %chain(&error),
                    "the template cannot be used: the machine boots"),
            }
            factory::report_broken(&key).await;
            if let Some(network) = network {
                network.take_back();
            }
        }
        let (share, hypervisor) = self.boot_on(network).await?;
        Ok((share, hypervisor, false))
    }

    /// The clone of such a machine's template; none while there is no template. It may be a fork
    /// if `forks` are wanted.
    pub(crate) async fn template(&self, recipe: &Recipe, forks: bool) -> Option<Cloned> {
        if !self.config.factory.makes_templates() {
            return None;
        }
        let found = async {
            let vm = factory::description(self.config, self.sizing)?;
            let key = factory::key(self.config, &vm)?;
            let memory = factory::memory_of_clones(self.config);
            let (start, keeper) = match factory::fetch(&key, recipe, forks).await? {
                Some(Template::Saved(snapshot)) => (Start::Clone { snapshot, memory }, None),
                Some(Template::Standing(keeper, from)) => {
                    let memory = ForkMemory::of(memory);
                    (Start::Fork { from, memory }, Some(keeper))
                }
                None => return Ok(None),
            };
            let id = self.boot.sandbox.to_string();
            Ok::<_, SandboxError>(Some(Cloned { key, vm: VmConfig { start, id, ..vm }, keeper }))
        };
        let found = found.await.unwrap_or_else(|error| {
            tracing::warn!(sandbox = %self.boot.sandbox, error = %chain(&error),
                "no template is to be had: the machine boots");
            None
        });
        self.stages.mark("template asked for");
        found
    }

    /// Starts a machine that boots.
    async fn boot_on(&self, network: &mut Option<Network>) -> Result<(Share, Qemu), SandboxError> {
        let mut vm =
            vm_config::vm_config(self.config, self.sizing, self.boot.sandbox, self.boot.later)?;
        vm_config::prefer_vsock(&mut vm, self.config.hypervisor.channel)?;
        self.on(network, vm, Monitor::Executed, None).await
    }

    /// Starts a clone or a fork.
    pub(crate) async fn clone_on(
        &self,
        network: &mut Option<Network>,
        vm: VmConfig,
        monitor: Monitor,
    ) -> Result<(Share, Qemu), SandboxError> {
        self.on(network, vm, monitor, Some(factory::NIC)).await
    }

    /// Starts share and monitor; nothing of them is left when that fails. A first NIC has the
    /// `known` address, if there is one.
    async fn on(
        &self,
        network: &mut Option<Network>,
        mut vm: VmConfig,
        monitor: Monitor,
        known: Option<Mac>,
    ) -> Result<(Share, Qemu), SandboxError> {
        let Self { boot, config, .. } = *self;
        let count = vm_config::first_nics(&vm);
        let nics = network.as_mut().map(|network| network.first_nics(known, count));
        let nics = nics.transpose()?.unwrap_or_default();
        if let Some(network) = network.as_ref().filter(|_| boot.monitor_shows_netns) {
            let shown = network.netns().as_fd().try_clone_to_owned();
            vm.netns = Some(shown.map_err(SandboxError::io("duplicate a network namespace"))?);
        }
        vm.nics = nics.into_iter().map(|(tap, mac)| vm_config::nic(tap, mac)).collect();
        self.stages.mark("taps made");
        let of = share::Of { monitor: monitor.of_devices(), touched: vm.touched() };
        let (share, device) = Share::start(config, boot.sandbox, boot.dir, of)?;
        let greeting = match monitor {
            Monitor::Fork(_) => Greeting::begin(&device),
            Monitor::Executed | Monitor::ToBeForked => None,
        };
        if let Some(devices) = share.process() {
            lock(self.state).record_process(devices.pid(), "devices process")?;
            // It was begun before this process was in the cgroup.
            self.join(devices.pid()).await;
        }
        self.stages.mark("share started");
        vm.share = Some(device);
        let mut hypervisor = Qemu::new(vm);
        let powered = match monitor {
            Monitor::Fork(keeper) => self.fork(&mut hypervisor, keeper, greeting).await,
            Monitor::Executed | Monitor::ToBeForked => self.execute(&mut hypervisor).await,
        };
        if let Err(error) = powered {
            share.end().await;
            return Err(error);
        }
        for (stage, at) in hypervisor.milestones() {
            self.stages.mark_at(stage, *at);
        }
        Ok((share, hypervisor))
    }

    /// Executes the monitor. What that takes is counted in the cgroup from its first page on.
    async fn execute(&self, hypervisor: &mut Qemu) -> Result<(), SandboxError> {
        if let Some(joining) = self.joining {
            joining.done().await?;
            self.stages.mark("in its cgroup");
        }
        Ok(hypervisor.start().await?)
    }

    /// Has the monitor forked, and lets its machine go on when its share has been spoken to.
    async fn fork(
        &self,
        hypervisor: &mut Qemu,
        keeper: Keeper,
        greeting: Option<Greeting>,
    ) -> Result<(), SandboxError> {
        let order = hypervisor.order().await?;
        let forked = keeper.fork(order).await;
        let (child, touches) = forked.map_err(SandboxError::io("fork a monitor"))?;
        if let Some(greeting) = greeting {
            greeting.done().await?;
        }
        hypervisor.forked(child, touches).await?;
        // It is no child of this process.
        self.join(hypervisor.pid()).await;
        Ok(())
    }

    /// Begins to move a process into the cgroup, if there is one.
    async fn join(&self, pid: i32) {
        if let Some(joining) = self.joining {
            joining.add(pid).await;
        }
    }
}

/// Makes the container's cgroup. Written down first.
fn make_cgroup(
    spec: &Spec,
    container: &Id,
    state: &Mutex<StateFile>,
) -> Result<Cgroup, SandboxError> {
    let named = spec.linux().cgroups_path.clone();
    let failed = |source| SandboxError::Cgroup { path: named.clone().unwrap_or_default(), source };
    let path =
        kata_cgroups::container_path(named.as_deref(), container.as_str()).map_err(failed)?;
    let hierarchy = Hierarchy::detect().map_err(failed)?;
    lock(state).record(Resource::Cgroup { path: path.clone() })?;
    Cgroup::create(&hierarchy, &path).map_err(failed)
}
