//! A spare sandbox server: it makes a machine, lets it stand still, and waits for a sandbox.

use super::client::failed;
use super::pool::LINE_FD;
use super::recipe::Recipe;
use super::rehearsal::Rehearsal;
use super::wire::{FromSpare, Take};
use crate::agent::{Agent, Hello};
use crate::boot::{Boot, Monitor, Power};
use crate::network::Network;
use crate::packets::Packets;
use crate::share::Share;
use crate::stages::Stages;
use crate::state::{MACHINE_ROLE, SERVER_ROLE, StateFile};
use crate::vm_config::{self, Later};
use crate::{SandboxDir, SandboxError};
use kata_channel::HostChannel;
use kata_config::{SandboxConfig, Sizing};
use kata_hypervisor::{CloneMemory, Hypervisor, Qemu, Start, Stem, VmConfig};
use kata_network::{Model, Netns};
use kata_oci::Spec;
use kata_protocol::Id;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

/// A machine that waits for a sandbox.
pub(crate) struct Warm {
    /// Of which sandboxes it can be.
    pub recipe: Recipe,
    pub machine: Rehearsed,
    /// The factory makes another one when this is dropped.
    pub line: Packets,
}

/// A machine whose agent has answered, and has built a container once.
pub(crate) struct Rehearsed {
    pub config: SandboxConfig,
    pub sizing: Sizing,
    /// With the NIC that waits, in a namespace where nothing else is.
    pub network: Network,
    pub share: Share,
    pub hypervisor: Qemu,
    pub agent: Agent,
    /// The memory of its template, if it is to be forked.
    pub template: Option<OwnedFd>,
}

/// What a machine is made to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The machine of one sandbox.
    Spare,
    /// To be forked.
    Stem,
}

/// What a spare server goes on with.
pub struct Taken {
    pub(crate) warm: Warm,
    /// The server's arguments.
    pub args: String,
    /// On which it serves: calls, and stand-ins if there are any.
    pub fds: Vec<OwnedFd>,
}

/// The host's random numbers.
const RANDOM: &str = "/dev/urandom";
/// What names of spares begin with. No engine's sandbox has such a name.
pub(super) const PREFIX: &str = "spare+";

/// What a spare is called, as long as it has no sandbox.
pub(super) fn name(pid: u32) -> Result<Id, SandboxError> {
    Ok(format!("{PREFIX}{pid}").parse()?)
}

/// The first part of the role `spare`: until a sandbox has come; none when the factory ends
/// before. What it logs is in the directory of the spare, and then in the sandbox's.
///
/// # Errors
/// The machine cannot be made, or has ended.
pub async fn spare(args: &str) -> Result<Option<Taken>, SandboxError> {
    // SAFETY: who starts this role hands it this descriptor (pool::launch); this is the first and
    // only place that takes it.
    let line = unsafe { OwnedFd::from_raw_fd(LINE_FD) };
    let line = Packets::new(line).map_err(failed("use the line to the factory"))?;
    let recipe: Recipe = serde_json::from_str(args).map_err(|error| {
        SandboxError::Factory(format!("what it wants is not readable: {error}"))
    })?;
    let id = name(std::process::id())?;
    let dir = SandboxDir::create(&id).map_err(failed("make a spare's directory"))?;
    File::create(dir.log()).map_err(failed("make a spare's log"))?;
    let taken = wait(recipe, &id, &dir, line).await;
    if !matches!(taken, Ok(Some(_))) {
        // What is wrong is said already, if anything is.
        let _ = dir.remove();
    }
    taken
}

async fn wait(
    recipe: Recipe,
    id: &Id,
    dir: &SandboxDir,
    line: Packets,
) -> Result<Option<Taken>, SandboxError> {
    let mut machine = Rehearsed::prepare(&recipe, id, dir, Purpose::Spare).await?;
    machine.hypervisor.pause().await?;
    let mut warm = Warm { recipe, machine, line };
    tell(&warm.line, &FromSpare::Ready).await?;
    let mut exited = warm.machine.hypervisor.exited();
    let order = tokio::select! {
        order = warm.line.receive() => order.map_err(failed("hear of a sandbox"))?,
        exit = exited.wait() => return Err(SandboxError::Lost(exit.to_string())),
    };
    let Some((order, fds)) = order else { return Ok(None) };
    let take: Take = serde_json::from_slice(&order)
        .map_err(|error| SandboxError::Factory(format!("its order is not readable: {error}")))?;
    warm.move_to(&take, dir)?;
    tell(&warm.line, &FromSpare::Taken).await?;
    Ok(Some(Taken { warm, args: take.args, fds }))
}

/// Without the right to lower it, what is inherited stays.
pub(super) fn set_oom_score(pid: i32, score: i32) {
    let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
}

async fn tell(line: &Packets, what: &FromSpare) -> Result<(), SandboxError> {
    let sent = async { line.send(&serde_json::to_vec(what)?, &[]).await };
    sent.await.map_err(failed("answer the factory"))
}

impl Warm {
    /// From here on all that the spare has is the sandbox's, whatever becomes of either.
    fn move_to(&mut self, take: &Take, from: &SandboxDir) -> Result<(), SandboxError> {
        let to = SandboxDir::of(&take.sandbox.parse()?);
        let mut state = StateFile::open(to.clone());
        let Rehearsed { share, hypervisor, .. } = &mut self.machine;
        let devices = share.process().map(|process| (process.pid(), "devices process"));
        let own = (std::process::id().cast_signed(), SERVER_ROLE);
        let all = [Some(own), Some((hypervisor.pid(), MACHINE_ROLE)), devices];
        for (pid, role) in all.into_iter().flatten() {
            state.record_process(pid, role)?;
            set_oom_score(pid, take.oom_score_adj);
        }
        // Who has it open goes on writing to it.
        let log = || -> io::Result<()> {
            std::fs::rename(from.log(), to.log())?;
            rustix::stdio::dup2_stderr(File::options().append(true).open(to.log())?)?;
            from.remove()
        };
        log().map_err(failed("take over a spare's directory"))?;
        share.move_to(&to);
        self.recipe = take.recipe.clone();
        Ok(())
    }
}

impl Rehearsed {
    /// Clones a machine from the template of this recipe, which exists, and lets it rehearse.
    pub(super) async fn prepare(
        recipe: &Recipe,
        id: &Id,
        dir: &SandboxDir,
        purpose: Purpose,
    ) -> Result<Self, SandboxError> {
        let mut state = StateFile::open(dir.clone());
        state.record_process(std::process::id().cast_signed(), "spare")?;
        let (config, sizing) = recipe.configure(id)?;
        let model = vm_config::network_model(&config);
        if model != Model::TcFilter {
            return Err(SandboxError::Unsupported(
                "a spare machine with another network than tcfilter",
            ));
        }
        let boot = Boot {
            sandbox: id,
            container: id,
            dir,
            spec: &Spec::default(),
            resolv_conf: None,
            netns: None,
            later: Later::Devices,
            // Until it knows whose network it has, the monitor is in one of its own.
            monitor_shows_netns: true,
            config: None,
        };
        let mut network = Some(Network::new(Netns::create()?, model));
        let (state, stages) = (Mutex::new(state), Stages::start());
        let power = Power {
            boot: &boot,
            config: &config,
            sizing: &sizing,
            state: &state,
            stages: &stages,
            joining: None,
        };
        let none = || SandboxError::Factory("there is no template to make a spare of".to_owned());
        let mut clone = power.template(recipe, false).await.ok_or_else(none)?;
        let (monitor, template) = match purpose {
            Purpose::Spare => (Monitor::Executed, None),
            Purpose::Stem => (Monitor::ToBeForked, to_be_forked(&mut clone.vm)?),
        };
        let (share, mut hypervisor) = power.clone_on(&mut network, clone.vm, monitor).await?;
        let mut network = network.ok_or_else(none)?;
        let socket = hypervisor.take_agent_socket();
        let socket = socket.ok_or(SandboxError::Unsupported("a spare without a serial channel"))?;
        let agent = Agent::new(HostChannel::serial(socket));
        let hello = Hello {
            sandbox: id.to_string(),
            hostname: String::new(),
            online_cpus: sizing.vcpus,
            template: false,
        };
        agent.connect(hello, Duration::from_secs(config.agent.dial_timeout.into())).await?;
        agent.mount(share.storage()).await?;
        let hypervisor = tokio::sync::Mutex::new(hypervisor);
        let rehearsal = Rehearsal {
            hypervisor: &hypervisor,
            share: &share,
            agent: &agent,
            network: &mut network,
        };
        rehearsal.run(dir.path()).await?;
        let hypervisor = hypervisor.into_inner();
        Ok(Self { config, sizing, network, share, hypervisor, agent, template })
    }

    /// Brings the machine to a stand, to be forked, with an agent that has left its share and waits
    /// for another connection. What comes along must stay as long as it.
    pub(super) async fn stand_still(self) -> Result<(Stem, impl Sized), SandboxError> {
        let Self { network, share, mut hypervisor, agent, template, .. } = self;
        let template = template.ok_or_else(|| {
            SandboxError::Factory("there is no memory of a template to compare with".to_owned())
        })?;
        let parking = hypervisor.parking().await?;
        let refused = async {
            match agent.leave().await {
                Err(error @ SandboxError::Agent { .. }) => error,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            parked = hypervisor.parked(parking) => parked?,
            error = refused => return Err(error),
        }
        hypervisor.pause().await?;
        let stem = Stem::new(hypervisor, template.as_fd())?;
        // The monitor does not learn of it: forks have another share in its place.
        share.end().await;
        // The channel says goodbye when it is dropped, and forks would hear that.
        Ok((stem, (agent, network)))
    }
}

/// Makes the machine that is started one that can be forked: it has memory of its own, so that
/// there is one file with all of it; its random numbers are the host's, as its monitor's would
/// come twice; and its name has room for any other. Gives the memory of its template.
fn to_be_forked(vm: &mut VmConfig) -> Result<Option<OwnedFd>, SandboxError> {
    vm.entropy.get_or_insert_with(|| RANDOM.into());
    vm.id = Stem::name();
    let Start::Clone { memory, snapshot } = &mut vm.start else { return Ok(None) };
    *memory = CloneMemory::Copied;
    let [template, _] = snapshot.fds();
    let template = template.try_clone_to_owned().map_err(failed("share a template's memory"))?;
    Ok(Some(template))
}
