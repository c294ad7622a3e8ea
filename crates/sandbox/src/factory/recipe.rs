//! Which machine a template is of.

use crate::SandboxError;
use crate::vm_config::{Later, vm_config};
use kata_config::{Host, Limits, Machine, SandboxConfig, SharedFs, Sizing};
use kata_hypervisor::{CloneMemory, Share, VmConfig};
use kata_oci::Spec;
use kata_protocol::{Id, SHARE_TAG};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a machine's configuration and size are decided from.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
pub struct Recipe {
    /// The configuration file; none: the usual ones.
    config: Option<PathBuf>,
    annotations: BTreeMap<String, String>,
    limits: Limits,
}

impl Recipe {
    /// Of the sandbox that this specification describes.
    pub fn of(config: Option<&Path>, spec: &Spec) -> Self {
        let limits = Limits::of_pod(&spec.annotations)
            .unwrap_or_else(|| Limits::of_container(spec.linux().resources.as_ref()));
        let ours = |name: &str| name.starts_with("io.katacontainers.");
        let annotations = spec.annotations.iter().filter(|(name, _)| ours(name));
        Self {
            config: config.map(Path::to_owned),
            annotations: annotations.map(|(name, value)| (name.clone(), value.clone())).collect(),
            limits,
        }
    }

    /// Of a sandbox that says nothing of itself.
    pub(crate) fn usual(config: Option<PathBuf>) -> Self {
        Self { config, ..Self::default() }
    }

    /// Whether it says nothing of itself: there are spares for such sandboxes only.
    pub(crate) fn is_usual(&self) -> bool {
        *self == Self::usual(self.config.clone())
    }

    /// The configuration, and how large the machine is to be.
    pub(crate) fn configure(&self, sandbox: &Id) -> Result<(SandboxConfig, Sizing), SandboxError> {
        let mut config = kata_config::load(self.config.as_deref())?;
        config.annotate(&self.annotations)?;
        for warning in &config.warnings {
            tracing::warn!(%sandbox, "configuration: {warning}");
        }
        config.check_files()?;
        let sizing = Sizing::decide(&config, self.limits, Host::detect());
        tracing::info!(%sandbox, "the virtual machine has {sizing}");
        Ok((config, sizing))
    }
}

/// The machine that a template is of, and its clones are.
pub(crate) fn description(
    config: &SandboxConfig,
    sizing: &Sizing,
) -> Result<VmConfig, SandboxError> {
    if config.hypervisor.machine == Machine::Microvm {
        return Err(SandboxError::Unsupported(
            "a template of a microvm (its clones could be given no share: use machine_type = \"q35\")",
        ));
    }
    let mut vm = vm_config(config, sizing, &"template".parse()?, Later::Devices)?;
    match config.hypervisor.shared_fs {
        // Its device cannot be saved; it is plugged, and takes a port.
        SharedFs::VirtioFs | SharedFs::None => vm.hotplug_ports += 1,
        SharedFs::Virtio9p => vm.share = Some(Share::NineP { tag: SHARE_TAG.to_owned() }),
    }
    Ok(vm)
}

/// By what a template is found: it is of exactly this machine, and so is the share of a machine
/// that is forked.
pub(crate) fn key(config: &SandboxConfig, vm: &VmConfig) -> Result<String, SandboxError> {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let text = format!("{} {}", vm.fingerprint()?, config.hypervisor.virtio_fs_queue_size);
    // The text itself is compared, too: this only makes a short name of it.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    Ok(format!("{:016x} {text}", hasher.finish()))
}

/// The memory of a clone: its own copy where another process has to see it.
pub(crate) fn memory_of_clones(config: &SandboxConfig) -> CloneMemory {
    match config.hypervisor.shared_fs {
        SharedFs::VirtioFs | SharedFs::None => CloneMemory::Copied,
        SharedFs::Virtio9p => CloneMemory::Private,
    }
}
