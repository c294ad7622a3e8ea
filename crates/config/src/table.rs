//! Every key of `configuration.toml`: one row each.

use crate::keys::Section::{self, Agent, Factory, Hypervisor, Runtime};
use crate::keys::{Key, Kind, words};
use crate::types::*;
use crate::value::Value;

const fn key(
    section: Section,
    name: &'static str,
    default: &'static str,
    kind: Kind,
    doc: &'static str,
) -> Key {
    Key { section, name, default, kind, doc }
}

const fn hypervisor(n: &'static str, default: &'static str, kind: Kind, doc: &'static str) -> Key {
    key(Section::Hypervisor, n, default, kind, doc)
}

const fn moot(section: Section, name: &'static str, doc: &'static str) -> Key {
    key(section, name, "", Kind::Moot, doc)
}

const fn missing(section: Section, name: &'static str, doc: &'static str) -> Key {
    key(section, name, "", Kind::Missing, doc)
}

/// A choice of an enumeration of ours.
macro_rules! choice {
    ($kind:ident, $($place:ident).+) => {
        Kind::Choice($kind::TEXTS, |c, text| {
            if let Some(value) = $kind::parse(text) {
                c.$($place).+ = value;
            }
        })
    };
}

/// vCPUs: newer configurations have fractions, which are rounded up.
fn vcpus(config: &mut SandboxConfig, value: &Value) -> bool {
    let number = match value {
        Value::Integer(n) => i32::try_from(*n).ok(),
        Value::Float(n) if n.is_finite() && n.abs() <= 1024.0 => Some(n.ceil() as i32),
        _ => None,
    };
    number
        .filter(|n| (-1..=1024).contains(n))
        .map(|n| config.hypervisor.default_vcpus = n)
        .is_some()
}

/// What [`memory`] takes.
const MEMORY: &str = "0 or a number of MiB from 128 to 16777216";

/// Memory of a VM; with less than 128 MiB no guest boots.
fn memory(place: &mut u32, value: &Value) -> bool {
    let Value::Integer(n) = value else { return false };
    let mib = u32::try_from(*n).ok().filter(|n| *n == 0 || (128..=1 << 24).contains(n));
    mib.map(|mib| *place = mib).is_some()
}

/// Every key, in the order of the default file.
#[rustfmt::skip]
pub(crate) static KEYS: &[Key] = &[
    hypervisor("path", "", Kind::Path(|c| &mut c.hypervisor.path),
        "QEMU. By default `qemu-system-x86_64` in /usr/bin, /usr/local/bin or /opt/kata/bin."),
    hypervisor("kernel", "", Kind::Path(|c| {
            // Who names one gets that one.
            c.hypervisor.uniprocessor = None;
            &mut c.hypervisor.kernel
        }),
        "Guest kernel: an uncompressed `vmlinux` with a PVH entry, or a bzImage. By default the \
         tuned one in share/kata-containers beside the program or in /usr (for an emulated VM with \
         one CPU, `vmlinux-up` there), else the distribution's."),
    hypervisor("initrd", "", Kind::Path(|c| &mut c.hypervisor.initrd),
        "Guest initramfs, which holds the agent. By default the one that belongs to the kernel."),
    missing(Hypervisor, "image",
        "The guest's root is an initramfs (`initrd`): there is no disk image to tamper with."),
    hypervisor("firmware", "", Kind::Special("an absolute path", |c, value| match value {
            Value::Text(text) if text.is_empty() => true,
            Value::Text(text) => {
                c.hypervisor.firmware = Some(text.into());
                text.starts_with('/')
            }
            _ => false,
        }), "Firmware. By default the one that suits the machine (qboot where it is installed)."),
    hypervisor("machine_type", "\"auto\"", choice!(Machine, hypervisor.machine),
        "What the VM is. `microvm` boots sooner, but no disk can be plugged into it. `auto` is \
         `microvm` where TCG runs the tuned kernel for a single container, else `q35`."),
    hypervisor("machine_accelerators", "\"\"", Kind::Text(|c| &mut c.hypervisor.machine_accelerators),
        "Additional options of the machine, separated by commas."),
    hypervisor("accelerator", "\"auto\"", choice!(Accelerator, hypervisor.accelerator),
        "How guest code is run. `auto` takes KVM where a self-test finds that it works at full \
         speed, else QEMU's binary translation (TCG)."),
    hypervisor("cpu_features", "\"\"", Kind::Text(|c| &mut c.hypervisor.cpu_features),
        "Additional features of the virtual CPU, separated by commas, as in `pmu=off`."),
    hypervisor("kernel_params", "\"\"", Kind::Special("a text", |c, value| match value {
            Value::Text(text) => {
                c.hypervisor.kernel_params = words(text);
                true
            }
            _ => false,
        }), "Additional kernel parameters, separated by blanks. They come last, so they win."),
    hypervisor("default_vcpus", "1", Kind::Special("a number from -1 to 1024", vcpus),
        "vCPUs of a sandbox without a CPU limit, and the least of any. 0 is the default, -1 as \
         many as the host has. Fractions are rounded up."),
    hypervisor("default_maxvcpus", "0",
        Kind::Number(|c| &mut c.hypervisor.default_maxvcpus, 0, 1024),
        "Most vCPUs of any sandbox. 0: as many as the host has."),
    hypervisor("default_memory", "2048",
        Kind::Special(MEMORY, |c, value| memory(&mut c.hypervisor.default_memory, value)),
        "Memory, in MiB, of a sandbox without a memory limit. It is taken from the host only as \
         the guest touches it. 0 is the default."),
    hypervisor("default_maxmemory", "0",
        Kind::Special(MEMORY, |c, value| memory(&mut c.hypervisor.default_maxmemory, value)),
        "Most memory, in MiB, of any sandbox. 0: as much as the host has."),
    hypervisor("memory_slots", "10", Kind::Number(|c| &mut c.hypervisor.memory_slots, 0, 256),
        "How many times memory can be added to a running VM, which is done when limits rise. \
         0: never."),
    hypervisor("channel", "\"auto\"", choice!(Channel, hypervisor.channel),
        "What carries the agent's channel: vsock, or a virtio-serial port. `auto`: vsock where \
         the host has /dev/vhost-vsock."),
    hypervisor("shared_fs", "\"virtio-fs\"", choice!(SharedFs, hypervisor.shared_fs),
        "How root file systems and volumes get into the guest. `virtio-fs`: a jailed process \
         of its own. `virtio-9p`: QEMU, slower; the tuned kernel has it, Debian's has not. `none` \
         is refused so far: it is for root file systems on block devices."),
    hypervisor("virtio_fs_cache", "\"auto\"", choice!(FsCache, hypervisor.virtio_fs_cache),
        "What the guest may keep of a virtio-fs share. `auto`: names and attributes for a \
         second, data while a file is open. `always`: faster, but changes made on the host are \
         not seen."),
    hypervisor("virtio_fs_queue_size", "1024",
        Kind::Special("a power of two from 16 to 1024", |c, value| match value {
            Value::Integer(n) => u32::try_from(*n)
                .ok()
                .filter(|n| n.is_power_of_two() && (16..=1024).contains(n))
                .map(|n| c.hypervisor.virtio_fs_queue_size = n)
                .is_some(),
            _ => false,
        }), "Length of the share's queues."),
    hypervisor("msize_9p", "8192", Kind::Number(|c| &mut c.hypervisor.msize_9p, 4096, 1 << 20),
        "Bytes in one 9p message."),
    hypervisor("disable_vhost_net", "false", Kind::Flag(|c| &mut c.hypervisor.disable_vhost_net),
        "Let QEMU move network packets under KVM, too, instead of the host's kernel: slower, \
         smaller attack surface."),
    hypervisor("entropy_source", "\"/dev/urandom\"", Kind::Path(|c| &mut c.hypervisor.entropy_source),
        "Where the guest's random numbers come from: the kernel (/dev/urandom, /dev/random), or a \
         device such as /dev/hwrng."),
    hypervisor("seccompsandbox", "\"\"", Kind::Special("a text that begins with \"on\"", |c, value| {
            let Value::Text(text) = value else { return false };
            c.hypervisor.seccompsandbox.clone_from(text);
            text.is_empty() || text == "on" || text.starts_with("on,")
        }),
        "QEMU's own `-sandbox` options. Empty: the strictest that work. It cannot be turned off."),
    hypervisor("enable_debug", "false", Kind::Flag(|c| &mut c.hypervisor.enable_debug),
        "Let the guest's kernel say more, and write its console to the sandbox's log at its end."),
    hypervisor("enable_annotations", "[]", Kind::Special("a list of regular expressions", |c, value| {
            match value {
                Value::Texts(list) if list.iter().all(|e| crate::glob::name_regex(e).is_some()) => {
                    c.hypervisor.enable_annotations.clone_from(list);
                    true
                }
                _ => false,
            }
        }), "Annotations that containers may use, by their last part (`default_vcpus`). Each is a \
         regular expression of the whole name."),
    hypervisor("valid_hypervisor_paths", "[]",
        Kind::Texts(|c| &mut c.hypervisor.valid_hypervisor_paths),
        "Hypervisors that the `path` annotation may name, as globs."),
    hypervisor("valid_asset_paths", "[]", Kind::Texts(|c| &mut c.hypervisor.valid_asset_paths),
        "Files that the annotations `kernel`, `initrd` and `firmware` may name, as globs."),
    hypervisor("valid_entropy_sources", "[]",
        Kind::Texts(|c| &mut c.hypervisor.valid_entropy_sources),
        "Sources that the `entropy_source` annotation may name, as globs."),

    key(Agent, "enable_debug", "false", Kind::Flag(|c| &mut c.agent.enable_debug),
        "Let the agent log in detail."),
    key(Agent, "dial_timeout", "45", Kind::Number(|c| &mut c.agent.dial_timeout, 1, 3600),
        "Seconds the agent may take until it first answers."),

    key(Runtime, "internetworking_model", "\"tcfilter\"",
        choice!(NetworkModel, runtime.internetworking_model),
        "How a network interface gets into the VM. `tcfilter`: a tap that gets and gives all \
         packets. `macvtap`: a macvtap on the interface; Docker's own name server then finds \
         containers only. `none`: not at all."),
    key(Runtime, "disable_new_netns", "false", Kind::Flag(|c| &mut c.runtime.disable_new_netns),
        "Taken only with `internetworking_model = \"none\"`. QEMU has no network of its own in any \
         case."),
    key(Runtime, "disable_guest_seccomp", "false",
        Kind::Flag(|c| &mut c.runtime.disable_guest_seccomp),
        "Leave the containers' seccomp profiles out in the guest."),
    key(Runtime, "static_sandbox_resource_mgmt", "false",
        Kind::Flag(|c| &mut c.runtime.static_sandbox_resource_mgmt),
        "A VM keeps the size that it starts with, also when limits rise."),
    key(Runtime, "create_container_timeout", "60",
        Kind::Number(|c| &mut c.runtime.create_container_timeout, 1, 86_400),
        "Seconds the creation of a container may take in the guest."),

    key(Factory, "enable_template", "false", Kind::Flag(|c| &mut c.factory.enable_template),
        "Clone VMs from one that was booted once and saved. The first sandbox of its size boots while \
         the template is made."),
    key(Factory, "vm_cache_number", "0", Kind::Number(|c| &mut c.factory.vm_cache_number, 0, 64),
        "VMs to keep ready for sandboxes that state no limits: clones of a template, which there is then \
         whatever `enable_template` says. Each takes some 80 MiB."),

    // Known, without effect.
    moot(Hypervisor, "disable_block_device_use",
        "A root that an engine describes as a disk goes to the guest as one where there is room, else \
         it is shared."),
    moot(Hypervisor, "rootless", "QEMU always runs as a user of its own where we are root."),
    missing(Agent, "kernel_modules", "The guest's kernel has built in what it needs."),
    moot(Runtime, "enable_debug",
        "Say --debug on the command line; KATA_LOG=debug in the engine's environment is for the \
         sandbox's server."),
    moot(Runtime, "sandbox_cgroup_only",
        "All processes of a sandbox are always in the pod's cgroup."),
    moot(Runtime, "disable_guest_empty_dir", "An `emptyDir` volume is the host's directory, or, where it is memory, the guest's memory."),
    moot(Runtime, "vfio_mode", "Host devices are not handed to VMs yet."),
    missing(Runtime, "sandbox_bind_mounts",
        "The guest runs containers only, and these name what they mount."),
    missing(Runtime, "experimental", "There are no unstable features."),
    moot(Factory, "template_path", "Templates are kept in memory, without a name."),
    moot(Factory, "vm_cache_endpoint", "The factory that keeps VMs is found by itself."),
    key(Hypervisor, "confidential_guest", "", Kind::Refused,
        "guests are not encrypted; remove it only if the host may read the guest's memory"),
    key(Hypervisor, "sev_snp_guest", "", Kind::Refused,
        "guests are not encrypted; remove it only if the host may read the guest's memory"),
    moot(Hypervisor, "rootfs_type", "The guest's root is an initramfs."),
    moot(Hypervisor, "vm_rootfs_driver", "The guest's root is an initramfs."),
    moot(Hypervisor, "disable_image_nvdimm", "The guest's root is an initramfs."),
    moot(Hypervisor, "kernel_verity_params", "The guest's root is an initramfs."),
    missing(Hypervisor, "firmware_volume", "Only `firmware` is used."),
    missing(Hypervisor, "pflashes", "Only `firmware` is used."),
    moot(Hypervisor, "default_bridges", "Devices are plugged into PCI Express root ports."),
    missing(Hypervisor, "pcie_root_port", "The number of root ports is fixed."),
    missing(Hypervisor, "pcie_switch_port", "There are no switch ports."),
    missing(Hypervisor, "memory_offset", "There is no NVDIMM."),
    missing(Hypervisor, "enable_virtio_mem", "Memory is not plugged by virtio-mem yet."),
    missing(Hypervisor, "enable_mem_prealloc", "Memory is taken as the guest touches it."),
    missing(Hypervisor, "enable_hugepages", "Guest memory is not put on huge pages yet."),
    missing(Hypervisor, "reclaim_guest_freed_memory", "There is no balloon yet."),
    missing(Hypervisor, "enable_guest_swap", "The guest has no swap yet."),
    missing(Hypervisor, "file_mem_backend", "Guest memory is anonymous."),
    moot(Hypervisor, "valid_file_mem_backends", "Guest memory is anonymous."),
    moot(Hypervisor, "virtio_fs_daemon", "The share is served by a process of our own."),
    moot(Hypervisor, "valid_virtio_fs_daemon_paths", "The share is served by a process of our own."),
    moot(Hypervisor, "virtio_fs_cache_size", "There is no DAX window."),
    moot(Hypervisor, "virtio_fs_inode_file_handles", "The share is served by a process of our own."),
    missing(Hypervisor, "virtio_fs_extra_args",
        "The share is served by a process of our own, which has no command line."),
    moot(Hypervisor, "block_device_driver", "Block devices are virtio-blk."),
    moot(Hypervisor, "block_device_aio", "Block devices are virtio-blk."),
    moot(Hypervisor, "block_device_num_queues", "Block devices are virtio-blk."),
    moot(Hypervisor, "block_device_queue_size", "Block devices are virtio-blk."),
    moot(Hypervisor, "block_device_logical_sector_size", "Block devices are virtio-blk."),
    moot(Hypervisor, "block_device_physical_sector_size", "Block devices are virtio-blk."),
    missing(Hypervisor, "block_device_cache_set", "Block devices use QEMU's default caching."),
    missing(Hypervisor, "block_device_cache_direct", "Block devices use QEMU's default caching."),
    missing(Hypervisor, "block_device_cache_noflush", "Block devices use QEMU's default caching."),
    moot(Hypervisor, "enable_iothreads", "Block devices need none yet."),
    moot(Hypervisor, "indep_iothreads", "Block devices need none yet."),
    missing(Hypervisor, "enable_vhost_user_store", "There are no vhost-user block devices yet."),
    moot(Hypervisor, "vhost_user_store_path", "There are no vhost-user block devices yet."),
    moot(Hypervisor, "valid_vhost_user_store_paths", "There are no vhost-user block devices yet."),
    moot(Hypervisor, "vhost_user_reconnect_timeout_sec", "There are no vhost-user block devices yet."),
    missing(Hypervisor, "enable_iommu", "The VM has no IOMMU yet."),
    missing(Hypervisor, "enable_iommu_platform", "The VM has no IOMMU yet."),
    missing(Hypervisor, "hot_plug_vfio", "Host devices are not handed to VMs yet."),
    missing(Hypervisor, "cold_plug_vfio", "Host devices are not handed to VMs yet."),
    missing(Hypervisor, "hotplug_vfio_on_root_bus", "Host devices are not handed to VMs yet."),
    missing(Hypervisor, "extra_monitor_socket", "QEMU's only monitor is ours."),
    moot(Hypervisor, "use_vsock", "Say `channel`."),
    moot(Hypervisor, "disable_nesting_checks", "What the host can do is measured."),
    missing(Hypervisor, "guest_hook_path", "The guest holds no hooks."),
    missing(Hypervisor, "rx_rate_limiter_max_rate", "Network rates are not limited."),
    missing(Hypervisor, "tx_rate_limiter_max_rate", "Network rates are not limited."),
    missing(Hypervisor, "guest_memory_dump_path", "Guest memory is not dumped."),
    moot(Hypervisor, "guest_memory_dump_paging", "Guest memory is not dumped."),
    moot(Hypervisor, "use_legacy_serial", "The console is a virtio console."),
    moot(Hypervisor, "disable_selinux", "QEMU is confined by its jail."),
    moot(Hypervisor, "disable_guest_selinux", "The guest has no SELinux."),
    moot(Hypervisor, "selinux_label", "QEMU is confined by its jail."),
    moot(Hypervisor, "guest_selinux_label", "The guest has no SELinux."),
    moot(Hypervisor, "default_gpus", "For remote hypervisors."),
    moot(Hypervisor, "default_gpu_model", "For remote hypervisors."),
    moot(Hypervisor, "enable_balloon_f_reporting", "There is no balloon yet."),
    moot(Hypervisor, "log_level", "Say `enable_debug`."),
    moot(Hypervisor, "tdx_quote_generation_service_socket_port", "There is no confidential guest."),
    missing(Hypervisor, "initdata", "There is no confidential guest."),
    missing(Hypervisor, "cc_init_data", "There is no confidential guest."),
    missing(Agent, "enable_tracing", "There are no traces yet."),
    missing(Agent, "debug_console_enabled", "There is no debug console yet."),
    moot(Agent, "debug_console_vport", "There is no debug console yet."),
    moot(Agent, "container_pipe_size", "Each stream has its own flow control."),
    moot(Agent, "cdh_api_timeout", "There is no Confidential Data Hub."),
    moot(Agent, "cdh_api_timeout_ms", "There is no Confidential Data Hub."),
    moot(Agent, "dial_timeout_ms", "A connection is not retried: `dial_timeout` bounds all."),
    moot(Agent, "reconnect_timeout_ms", "A connection is not retried: `dial_timeout` bounds all."),
    moot(Agent, "request_timeout_ms", "Each call has a bound of its own."),
    moot(Agent, "create_container_timeout", "Say it in `[runtime]`."),
    moot(Agent, "image_request_timeout", "Images are not pulled in the guest."),
    moot(Agent, "server_port", "The port is fixed."),
    moot(Agent, "log_port", "The agent's log is in its channel."),
    moot(Agent, "launch_process_timeout", "Each call has a bound of its own."),
    missing(Agent, "policy", "There are no agent policies yet."),
    missing(Agent, "mem_agent", "There is no memory agent."),
    moot(Runtime, "name", "There is one runtime."),
    key(Runtime, "hypervisor_name", "\"qemu\"", Kind::Choice(&["qemu"], |_, _| {}),
        "Which hypervisor; there is one so far."),
    key(Runtime, "agent_name", "\"kata\"", Kind::Choice(&["kata"], |_, _| {}),
        "Which agent; there is one."),
    moot(Runtime, "log_level", "Say `enable_debug`."),
    moot(Runtime, "kubelet_root_dir", "Volumes are told apart by their mounts."),
    missing(Runtime, "enable_vcpus_pinning", "vCPU threads are not pinned yet."),
    moot(Runtime, "guest_selinux_label", "The guest has no SELinux."),
    missing(Runtime, "enable_tracing", "There are no traces yet."),
    moot(Runtime, "jaeger_endpoint", "There are no traces yet."),
    moot(Runtime, "jaeger_user", "There are no traces yet."),
    moot(Runtime, "jaeger_password", "There are no traces yet."),
    moot(Runtime, "enable_pprof", "That is a tool for Go programs."),
    moot(Runtime, "keep_abnormal", "A sandbox that fails is removed; its console is in the error."),
    moot(Runtime, "dan_conf", "Network devices are found in the network namespace."),
    moot(Runtime, "use_passfd_io", "Streams have a channel of their own."),
    moot(Runtime, "passfd_listener_port", "Streams have a channel of their own."),
    moot(Runtime, "shared_mounts", "Each mount is shared by itself."),
    moot(Runtime, "emptydir_mode", "Say `disable_guest_empty_dir`."),
    moot(Runtime, "pod_resource_api_sock", "Host devices are not handed to VMs yet."),
    missing(Runtime, "experimental_force_guest_pull", "Images are not pulled in the guest."),
];
