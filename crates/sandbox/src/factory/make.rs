//! A template is made: a machine boots, its agent waits, it is saved.

use super::recipe::{self, Recipe};
use super::rehearsal;
use crate::agent::{Agent, Hello};
use crate::{SandboxError, vm_config};
use kata_channel::HostChannel;
use kata_config::{SandboxConfig, Sizing};
use kata_hypervisor::{Accelerator, Hypervisor, Qemu, Snapshot, Start, VmConfig};
use kata_network::{Mac, Model, Netns, Tap};
use kata_protocol::{Id, chain};
use std::time::Duration;

/// The address by which a clone finds the NIC of its template.
pub(crate) const NIC: Mac = Mac::new([2, 0, 0, 0, 0, 1]);

/// How long a call that failed waits to learn that its machine ended.
const CAUSE: Duration = Duration::from_millis(500);

/// A template to be.
pub(super) struct Plan {
    pub key: String,
    pub config: SandboxConfig,
    pub sizing: Sizing,
    /// Whether machines of it can be forked, and gain by it.
    pub forks: bool,
}

impl Plan {
    /// What this recipe makes now.
    pub(super) fn of(recipe: &Recipe) -> Result<Self, SandboxError> {
        let name: Id = "factory".parse()?;
        let (config, sizing) = recipe.configure(&name)?;
        let vm = recipe::description(&config, &sizing)?;
        let key = recipe::key(&config, &vm)?;
        // What a processor runs need not be translated.
        let forks = vm.accelerator == Accelerator::Tcg
            && vm_config::network_model(&config) == Model::TcFilter;
        Ok(Self { key, config, sizing, forks })
    }

    /// Makes it.
    pub(super) async fn make(&self) -> Result<Snapshot, SandboxError> {
        let description = recipe::description(&self.config, &self.sizing)?;
        // No frame ever leaves this namespace.
        let netns = Netns::create()?;
        let tap = Tap::create(&netns, "katatap0")?;
        let nics = vec![vm_config::nic(tap.fd, NIC)];
        let vm = VmConfig { start: Start::Template, nics, ..description };
        let mut hypervisor = Qemu::new(vm);
        hypervisor.start().await?;
        let patience = Duration::from_secs(self.config.agent.dial_timeout.into());
        meet(&mut hypervisor, patience).await?;
        Ok(hypervisor.save().await?)
    }
}

/// Waits until the guest is up and its agent has answered, and leaves it waiting.
async fn meet(hypervisor: &mut Qemu, patience: Duration) -> Result<(), SandboxError> {
    let socket = hypervisor
        .take_agent_socket()
        .ok_or(SandboxError::Unsupported("a template without a serial channel"))?;
    let agent = Agent::new(HostChannel::serial(socket));
    // Nothing of a sandbox: no name, no share. Clock and entropy come again with each clone.
    let hello = Hello { sandbox: "template".to_owned(), template: true, ..Hello::default() };
    if let Err(error) = agent.connect(hello, patience).await {
        // The end of the machine is what is behind the end of the call.
        return match tokio::time::timeout(CAUSE, hypervisor.exited().wait()).await {
            Ok(exit) => Err(SandboxError::Lost(exit.to_string())),
            Err(_) => Err(error),
        };
    }
    for spec in rehearsal::specs()? {
        if let Err(error) = agent.rehearse(&spec).await {
            // Clones are only slower without it.
            tracing::warn!(error = %chain(&error), "the template has not rehearsed a container");
        }
    }
    let parking = hypervisor.parking().await?;
    drop(agent);
    Ok(hypervisor.parked(parking).await?)
}
