//! The configuration's terms in the terms of the VMM, the share and the network.

use crate::SandboxError;
use kata_config::{
    Accelerator, Channel, FsCache, Machine, NetworkModel, SandboxConfig, SharedFs, Sizing,
};
use kata_devices::Cache;
use kata_hypervisor::{
    AcceleratorChoice, ChannelKind, KernelKind, Nic, Share, VmConfig, accelerator,
};
use kata_network::{Mac, Model};
use kata_protocol::{Id, SHARE_TAG};
use std::os::fd::OwnedFd;
use std::path::Path;

pub(crate) fn network_model(config: &SandboxConfig) -> Model {
    match config.runtime.internetworking_model {
        NetworkModel::TcFilter => Model::TcFilter,
        NetworkModel::Macvtap => Model::Macvtap,
        NetworkModel::None => Model::None,
    }
}

pub(crate) fn cache(config: &SandboxConfig) -> Cache {
    match config.hypervisor.virtio_fs_cache {
        FsCache::Never => Cache::Never,
        // The library has no mode between these two; names and attributes are kept alike.
        FsCache::Metadata | FsCache::Auto => Cache::Auto,
        FsCache::Always => Cache::Always,
    }
}

/// The machine to start: the configuration's, of this size, with this share and NIC.
pub(crate) fn vm_config(
    config: &SandboxConfig,
    sizing: &Sizing,
    sandbox: &Id,
    share: OwnedFd,
    nic: Option<(OwnedFd, Mac)>,
) -> Result<VmConfig, SandboxError> {
    let hypervisor = &config.hypervisor;
    if hypervisor.shared_fs != SharedFs::VirtioFs {
        return Err(SandboxError::Unsupported("a shared_fs other than \"virtio-fs\""));
    }
    if hypervisor.channel == Channel::Vsock {
        return Err(SandboxError::Unsupported("the vsock channel on this host"));
    }
    let verdict = accelerator::choose(match hypervisor.accelerator {
        Accelerator::Auto => AcceleratorChoice::Auto,
        Accelerator::Kvm => AcceleratorChoice::Kvm,
        Accelerator::Tcg => AcceleratorChoice::Tcg,
    });
    let mut kernel_params = hypervisor.kernel_params.clone();
    if verdict.accelerator == kata_hypervisor::Accelerator::Tcg && sizing.vcpus > 1 {
        // The second processor costs a third of a second at boot; the agent brings it up later.
        kernel_params.push("maxcpus=1".to_owned());
    }
    if config.agent.enable_debug {
        kernel_params.push("agent.log=debug".to_owned());
    }
    Ok(VmConfig {
        id: sandbox.to_string(),
        qemu: hypervisor.path.clone(),
        firmware: hypervisor.firmware.clone(),
        kernel: hypervisor.kernel.clone(),
        kernel_kind: kernel_kind(&hypervisor.kernel),
        initrd: hypervisor.initrd.clone(),
        kernel_params,
        machine: match hypervisor.machine {
            Machine::Q35 => kata_hypervisor::Machine::Q35,
            Machine::Microvm => kata_hypervisor::Machine::Microvm,
        },
        accelerator: verdict.accelerator,
        tsc_khz: verdict.tsc_khz,
        memory_mib: sizing.memory_mib,
        vcpus: sizing.vcpus,
        max_vcpus: sizing.max_vcpus,
        nics: nic.map(|(tap, mac)| self::nic(tap, mac)).into_iter().collect(),
        hotplug_ports: HOTPLUG_PORTS,
        share: Some(Share::VhostUserFs { socket: share, tag: SHARE_TAG.to_owned() }),
        channel: ChannelKind::Serial,
        jail: true,
        uid: FIRST_UID + std::process::id(),
    })
}

/// Networks that may be connected beside the first.
const HOTPLUG_PORTS: u32 = 3;

/// Users of jailed monitors: this plus the server's pid, so that no two live ones share one
/// (pids are below 2²²). Nobody else has users of so high a number.
const FIRST_UID: u32 = 0x7000_0000;

/// Only the kernel that we build takes the parameters of our patch.
fn kernel_kind(kernel: &Path) -> KernelKind {
    if kernel.file_name().is_some_and(|name| name == "vmlinux") {
        KernelKind::Tuned
    } else {
        KernelKind::Distro
    }
}

pub(crate) fn nic(tap: OwnedFd, mac: Mac) -> Nic {
    Nic { tap, mac: kata_hypervisor::Mac(mac.bytes()) }
}
