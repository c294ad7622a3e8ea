//! The configuration's terms in the terms of the VMM, the share and the network.

use crate::SandboxError;
use kata_config::{Accelerator, Channel, Machine, NetworkModel, SandboxConfig, Sizing};
use kata_hypervisor::{
    AcceleratorChoice, ChannelKind, KernelKind, Nic, Start, VHOST_VSOCK, VmConfig, VsockDevice,
    accelerator,
};
use kata_network::{Mac, Model};
use kata_protocol::Id;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub(crate) fn network_model(config: &SandboxConfig) -> Model {
    match config.runtime.internetworking_model {
        NetworkModel::TcFilter => Model::TcFilter,
        NetworkModel::Macvtap => Model::Macvtap,
        NetworkModel::None => Model::None,
    }
}

/// What a machine may have to take in while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Later {
    /// Networks, of which there are few: it is for one container whose root is no disk.
    Networks,
    /// A share, disks, the further containers of a pod.
    Devices,
}

/// The machine to start: the configuration's, of this size; without share and NICs so far, and
/// with the channel that every host has.
pub(crate) fn vm_config(
    config: &SandboxConfig,
    sizing: &Sizing,
    sandbox: &Id,
    later: Later,
) -> Result<VmConfig, SandboxError> {
    let hypervisor = &config.hypervisor;
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
    let grows = !config.runtime.static_sandbox_resource_mgmt;
    let (kernel, kernel_kind) = kernel(config, verdict.accelerator, sizing.vcpus)?;
    let gets_vcpus = grows && kernel_kind != KernelKind::Uniprocessor;
    Ok(VmConfig {
        netns: None,
        id: sandbox.to_string(),
        qemu: hypervisor.path.clone(),
        firmware: hypervisor.firmware.clone(),
        kernel: kernel.to_owned(),
        kernel_kind,
        initrd: hypervisor.initrd.clone(),
        quiet: !hypervisor.enable_debug,
        kernel_params,
        machine_options: hypervisor.machine_accelerators.clone(),
        cpu_options: hypervisor.cpu_features.clone(),
        entropy: entropy(&hypervisor.entropy_source),
        filter: hypervisor.seccompsandbox.clone(),
        machine: machine(config, verdict.accelerator, kernel_kind, later),
        accelerator: verdict.accelerator,
        tsc_khz: verdict.tsc_khz,
        memory_mib: sizing.memory_mib,
        max_memory_mib: sizing.max_memory_mib,
        memory_slots: if grows { hypervisor.memory_slots } else { 0 },
        vcpus: sizing.vcpus,
        max_vcpus: if gets_vcpus { sizing.max_vcpus } else { sizing.vcpus },
        nics: Vec::new(),
        // Under TCG it moves nothing faster.
        vhost_net: verdict.accelerator == kata_hypervisor::Accelerator::Kvm
            && !hypervisor.disable_vhost_net,
        hotplug_ports: NETWORKS - 1,
        share: None,
        channel: ChannelKind::Serial,
        start: Start::Boot,
        jail: true,
        uid: FIRST_UID + std::process::id(),
    })
}

/// The kernel of a machine with so many processors.
fn kernel(
    config: &SandboxConfig,
    accelerator: kata_hypervisor::Accelerator,
    vcpus: u32,
) -> Result<(&Path, KernelKind), SandboxError> {
    // Where the guest is emulated, no processor can be added to it, and none speculates.
    let uniprocessor = accelerator == kata_hypervisor::Accelerator::Tcg && vcpus == 1;
    let kernel = config.hypervisor.kernel_of(uniprocessor);
    let kind = KernelKind::of(kernel)?;
    if kind == KernelKind::Uniprocessor && !uniprocessor {
        return Err(SandboxError::Unsupported(if vcpus > 1 {
            "a machine of several CPUs with a kernel for one (kernel = \"…/vmlinux-up\": leave it out)"
        } else {
            "KVM with a kernel for emulated machines, which defends itself against no processor (kernel = \"…/vmlinux-up\": leave it out)"
        }));
    }
    Ok((kernel, kind))
}

/// Reaches the agent of a machine that is to boot by vsock, where that is wanted and there is.
pub(crate) fn prefer_vsock(vm: &mut VmConfig, wanted: Channel) -> Result<(), SandboxError> {
    if let Some(device) = vsock(wanted, VsockDevice::claim)? {
        vm.kernel_params.push("agent.channel=vsock".to_owned());
        vm.channel = ChannelKind::Vsock(device);
    }
    Ok(())
}

/// The virtual hardware. `auto` is a microvm where that boots much sooner and will do: emulated,
/// with our kernel, which needs no ACPI there, and with nothing to be plugged but networks. KVM
/// is through PCI and ACPI in no time. Options and firmware that the administrator names are for
/// the machine that there always was.
fn machine(
    config: &SandboxConfig,
    accelerator: kata_hypervisor::Accelerator,
    kernel: KernelKind,
    later: Later,
) -> kata_hypervisor::Machine {
    use kata_hypervisor::{Accelerator::Tcg, Machine::Microvm, Machine::Q35};
    let hypervisor = &config.hypervisor;
    let quick = accelerator == Tcg && kernel.is_tuned();
    let usual = hypervisor.machine_accelerators.is_empty() && hypervisor.firmware.is_none();
    // A macvtap is made for the interface that it is on, so its NIC cannot be there before.
    let few = later == Later::Networks && network_model(config) != Model::Macvtap;
    match hypervisor.machine {
        Machine::Microvm => Microvm,
        Machine::Auto if quick && usual && few => Microvm,
        Machine::Q35 | Machine::Auto => Q35,
    }
}

/// Networks that may be connected to a machine at a time.
const NETWORKS: u32 = 4;

/// NICs that it has from the start: those that can be plugged come when they are needed.
pub(crate) fn first_nics(vm: &VmConfig) -> usize {
    match vm.machine {
        kata_hypervisor::Machine::Q35 => 1,
        kata_hypervisor::Machine::Microvm => NETWORKS as usize,
    }
}

/// Users of jailed monitors: this plus the server's pid, so that no two live ones share one
/// (pids are below 2²²). Nobody else has users of so high a number.
const FIRST_UID: u32 = 0x7000_0000;

pub(crate) fn nic(tap: OwnedFd, mac: Mac) -> Nic {
    Nic { tap, mac: kata_hypervisor::Mac(mac.bytes()) }
}

/// The device that random numbers come from, where it is not the kernel: QEMU asks that itself.
fn entropy(source: &Path) -> Option<PathBuf> {
    let kernel = ["/dev/urandom", "/dev/random"].iter().any(|path| source == Path::new(path));
    (!kernel).then(|| source.to_owned())
}

/// Which carrier the agent's channel has: vsock where it is wanted and the host has it, which
/// `claim` finds out; none is the serial port.
fn vsock<T>(
    wanted: Channel,
    claim: impl FnOnce() -> io::Result<T>,
) -> Result<Option<T>, SandboxError> {
    match wanted {
        Channel::Serial => Ok(None),
        Channel::Vsock => claim().map(Some).map_err(SandboxError::io(format!(
            "use {VHOST_VSOCK} for channel = \"vsock\": load the module vhost_vsock, or say \"auto\""
        ))),
        Channel::Auto => match claim() {
            Ok(device) => Ok(Some(device)),
            Err(error) => {
                tracing::debug!(%error, "no vsock: the agent is reached by a serial port");
                Ok(None)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has() -> io::Result<&'static str> {
        Ok("device")
    }

    fn has_not() -> io::Result<&'static str> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn config(text: &str) -> SandboxConfig {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        kata_config::load(Some(file.path())).unwrap()
    }

    /// What a sandbox with this in its configuration file would be, emulated.
    fn machine_of(text: &str, later: Later, kernel: KernelKind) -> kata_hypervisor::Machine {
        machine(&config(text), kata_hypervisor::Accelerator::Tcg, kernel, later)
    }

    #[test]
    fn a_machine_is_a_microvm_where_that_will_do() {
        use kata_hypervisor::Machine::{Microvm, Q35};
        let tuned = |text| machine_of(text, Later::Networks, KernelKind::Tuned);
        assert_eq!(tuned(""), Microvm);
        assert_eq!(machine_of("", Later::Devices, KernelKind::Tuned), Q35);
        assert_eq!(machine_of("", Later::Networks, KernelKind::Distro), Q35);
        assert_eq!(tuned("[hypervisor.qemu]\nmachine_accelerators = \"nvdimm=on\"\n"), Q35);
        assert_eq!(tuned("[hypervisor.qemu]\nmachine_type = \"q35\"\n"), Q35);
        assert_eq!(tuned("[runtime]\ninternetworking_model = \"macvtap\"\n"), Q35);
        let named = "[hypervisor.qemu]\nmachine_type = \"microvm\"\n";
        assert_eq!(machine_of(named, Later::Devices, KernelKind::Distro), Microvm);
        let kvm = kata_hypervisor::Accelerator::Kvm;
        assert_eq!(machine(&config(""), kvm, KernelKind::Tuned, Later::Networks), Q35);
    }

    #[test]
    fn vsock_is_taken_where_the_host_has_it_unless_the_configuration_says_otherwise() {
        assert_eq!(vsock(Channel::Auto, has).unwrap(), Some("device"));
        assert_eq!(vsock(Channel::Auto, has_not).unwrap(), None);
        assert_eq!(vsock(Channel::Vsock, has).unwrap(), Some("device"));
        assert_eq!(vsock(Channel::Serial, || -> io::Result<()> { panic!("tried") }).unwrap(), None);
    }

    #[test]
    fn vsock_that_is_asked_for_and_not_there_is_an_error_that_names_the_device() {
        let error = vsock(Channel::Vsock, has_not).unwrap_err();
        assert!(error.to_string().contains("/dev/vhost-vsock"), "{error}");
    }
}
