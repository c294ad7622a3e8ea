//! The configuration of a sandbox, in types.

use crate::Places;
use crate::assets::Guest;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// An enumeration that is written as text.
macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every value, as it is written.
            pub const TEXTS: &'static [&'static str] = &[$($text),+];

            /// As it is written.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            pub(crate) fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

text_enum! {
    /// What the VM is.
    Machine {
        /// The one that suits what runs in it, and on.
        Auto = "auto",
        /// A PC with PCI Express: devices can be plugged.
        Q35 = "q35",
        /// Few devices, none can be plugged; boots faster.
        Microvm = "microvm",
    }
}

text_enum! {
    /// How guest code is run.
    Accelerator {
        /// KVM where it works well (measured), else TCG.
        Auto = "auto",
        /// KVM or an error.
        Kvm = "kvm",
        /// Binary translation.
        Tcg = "tcg",
    }
}

text_enum! {
    /// What carries the agent's channel.
    Channel {
        /// vsock where the host has it, else the serial port.
        Auto = "auto",
        /// A virtio-serial port.
        Serial = "serial",
        /// vsock.
        Vsock = "vsock",
    }
}

text_enum! {
    /// How root file systems and volumes get into the guest.
    SharedFs {
        /// virtio-fs from a process of its own.
        VirtioFs = "virtio-fs",
        /// 9p from QEMU.
        Virtio9p = "virtio-9p",
        /// Not at all: block devices only.
        None = "none",
    }
}

text_enum! {
    /// What the guest may keep of a virtio-fs share.
    FsCache {
        /// Nothing.
        Never = "never",
        /// Names and attributes, not data.
        Metadata = "metadata",
        /// Names and attributes for a second, data while open.
        Auto = "auto",
        /// Everything.
        Always = "always",
    }
}

text_enum! {
    /// How a network interface gets into the VM.
    NetworkModel {
        /// A tap, joined by traffic control rules.
        TcFilter = "tcfilter",
        /// A macvtap on the interface.
        Macvtap = "macvtap",
        /// Not at all.
        None = "none",
    }
}

/// Everything a sandbox is started with.
#[derive(Clone, Debug, Serialize)]
pub struct SandboxConfig {
    /// `[hypervisor.qemu]`
    pub hypervisor: HypervisorConfig,
    /// `[agent.kata]`
    pub agent: AgentConfig,
    /// `[runtime]`
    pub runtime: RuntimeConfig,
    /// `[factory]`
    pub factory: FactoryConfig,
    /// Files this came from, in the order they were read; none: built-in defaults.
    pub sources: Vec<PathBuf>,
    /// What was not understood or is not done, one line each, for the log.
    pub warnings: Vec<String>,
}

/// `[hypervisor.qemu]`
#[derive(Clone, Debug, Serialize)]
pub struct HypervisorConfig {
    /// QEMU.
    pub path: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// What runs instead where there is one processor for good; none when a kernel was named.
    #[serde(skip)]
    pub(crate) uniprocessor: Option<PathBuf>,
    /// Guest initramfs, with the agent in it.
    pub initrd: PathBuf,
    /// Firmware; by default one that suits the machine.
    pub firmware: Option<PathBuf>,
    /// What the VM is.
    pub machine: Machine,
    /// Additional machine options, comma-separated.
    pub machine_accelerators: String,
    /// How guest code is run.
    pub accelerator: Accelerator,
    /// Additional CPU features, comma-separated.
    pub cpu_features: String,
    /// Additional kernel parameters.
    pub kernel_params: Vec<String>,
    /// vCPUs without a limit; checked against the host in [`crate::Sizing`].
    pub default_vcpus: i32,
    /// Most vCPUs; 0: as many as the host has.
    pub default_maxvcpus: u32,
    /// MiB without a limit.
    pub default_memory: u32,
    /// Most MiB; 0: as much as the host has.
    pub default_maxmemory: u32,
    /// How many times memory can be added to a running VM.
    pub memory_slots: u32,
    /// What carries the agent's channel.
    pub channel: Channel,
    /// How root file systems and volumes get into the guest.
    pub shared_fs: SharedFs,
    /// What the guest may keep of it.
    pub virtio_fs_cache: FsCache,
    /// Length of the share's queues.
    pub virtio_fs_queue_size: u32,
    /// Largest 9p message.
    pub msize_9p: u32,
    /// Where the guest's random numbers come from.
    pub entropy_source: PathBuf,
    /// Do not use vhost-net.
    pub disable_vhost_net: bool,
    /// QEMU's own `-sandbox` options; empty: the strictest.
    pub seccompsandbox: String,
    /// Let the guest's kernel say more, and log its console.
    pub enable_debug: bool,
    /// Annotations that are taken, as regular expressions of whole names.
    pub enable_annotations: Vec<String>,
    /// Hypervisors an annotation may name, as globs.
    pub valid_hypervisor_paths: Vec<String>,
    /// Kernels, initramfs and firmware an annotation may name, as globs.
    pub valid_asset_paths: Vec<String>,
    /// Entropy sources an annotation may name, as globs.
    pub valid_entropy_sources: Vec<String>,
}

/// `[agent.kata]`
#[derive(Clone, Debug, Serialize)]
pub struct AgentConfig {
    /// Let the agent log in detail.
    pub enable_debug: bool,
    /// Seconds the agent may take to answer first.
    pub dial_timeout: u32,
}

/// `[runtime]`
#[derive(Clone, Debug, Serialize)]
pub struct RuntimeConfig {
    /// How a network interface gets into the VM.
    pub internetworking_model: NetworkModel,
    /// Keep the VM in the host's network namespace.
    pub disable_new_netns: bool,
    /// Leave seccomp profiles out in the guest.
    pub disable_guest_seccomp: bool,
    /// A VM keeps the size that it starts with.
    pub static_sandbox_resource_mgmt: bool,
    /// Seconds the creation of a container may take in the guest.
    pub create_container_timeout: u32,
}

/// `[factory]`
#[derive(Clone, Debug, Serialize)]
pub struct FactoryConfig {
    /// Start VMs from a template.
    pub enable_template: bool,
    /// VMs kept ready: clones of a template.
    pub vm_cache_number: u32,
}

impl FactoryConfig {
    /// Whether there are to be templates.
    pub fn makes_templates(&self) -> bool {
        self.enable_template || self.vm_cache_number > 0
    }
}

impl HypervisorConfig {
    /// The kernel of a machine; of one that has one processor and never another, if that is
    /// what it is. A kernel that was named runs whatever the machine is.
    pub fn kernel_of(&self, uniprocessor: bool) -> &Path {
        self.uniprocessor.as_ref().filter(|_| uniprocessor).unwrap_or(&self.kernel)
    }
}

impl SandboxConfig {
    /// What holds when no file says otherwise.
    pub(crate) fn built_in(places: &Places) -> Self {
        let Guest { kernel, uniprocessor, initrd } = places.guest();
        Self {
            hypervisor: HypervisorConfig {
                path: places.qemu(),
                kernel,
                uniprocessor,
                initrd,
                firmware: None,
                machine: Machine::Auto,
                machine_accelerators: String::new(),
                accelerator: Accelerator::Auto,
                cpu_features: String::new(),
                kernel_params: Vec::new(),
                default_vcpus: 1,
                default_maxvcpus: 0,
                default_memory: 2048,
                default_maxmemory: 0,
                memory_slots: 10,
                channel: Channel::Auto,
                shared_fs: SharedFs::VirtioFs,
                virtio_fs_cache: FsCache::Auto,
                virtio_fs_queue_size: 1024,
                msize_9p: 8192,
                entropy_source: "/dev/urandom".into(),
                disable_vhost_net: false,
                seccompsandbox: String::new(),
                enable_debug: false,
                enable_annotations: Vec::new(),
                valid_hypervisor_paths: Vec::new(),
                valid_asset_paths: Vec::new(),
                valid_entropy_sources: Vec::new(),
            },
            agent: AgentConfig { enable_debug: false, dial_timeout: 45 },
            runtime: RuntimeConfig {
                internetworking_model: NetworkModel::TcFilter,
                disable_new_netns: false,
                disable_guest_seccomp: false,
                static_sandbox_resource_mgmt: false,
                create_container_timeout: 60,
            },
            factory: FactoryConfig { enable_template: false, vm_cache_number: 0 },
            sources: Vec::new(),
            warnings: Vec::new(),
        }
    }
}
