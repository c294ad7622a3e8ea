use super::*;
use crate::types::{FsCache, Machine, SharedFs};
use proptest::prelude::*;

/// A configuration file in a directory of its own, with drop-ins.
struct Files(tempfile::TempDir);

impl Files {
    fn new(main: &str, drop_ins: &[(&str, &str)]) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        std::fs::write(files.main(), main).unwrap();
        std::fs::create_dir(files.0.path().join("config.d")).unwrap();
        for (name, text) in drop_ins {
            std::fs::write(files.0.path().join("config.d").join(name), text).unwrap();
        }
        files
    }

    fn main(&self) -> PathBuf {
        self.0.path().join("configuration.toml")
    }

    fn load(&self) -> Result<SandboxConfig, ConfigError> {
        load_from(Some(&self.main()), &Places::default())
    }
}

fn load_text(text: &str) -> Result<SandboxConfig, ConfigError> {
    Files::new(text, &[]).load()
}

fn problem(text: &str) -> String {
    load_text(text).unwrap_err().to_string()
}

#[test]
fn values_get_to_their_places() {
    let config = load_text(
        r#"
        [hypervisor.qemu]
        path = "/opt/qemu"
        firmware = "/opt/fw"
        machine_type = "microvm"
        kernel_params = "a=b  c"
        default_vcpus = 1.5
        shared_fs = "virtio-9p"
        virtio_fs_cache = "never"
        enable_annotations = ["default_.*"]
        [agent.kata]
        dial_timeout = 7
        [runtime]
        internetworking_model = "none"
        disable_new_netns = true
        "#,
    )
    .unwrap();
    assert_eq!(config.warnings, [""; 0]);
    let h = &config.hypervisor;
    assert_eq!(
        (h.path.as_path(), h.firmware.as_deref()),
        (Path::new("/opt/qemu"), Some(Path::new("/opt/fw")))
    );
    assert_eq!(
        (h.machine, h.shared_fs, h.virtio_fs_cache),
        (Machine::Microvm, SharedFs::Virtio9p, FsCache::Never)
    );
    assert_eq!(h.kernel_params, ["a=b", "c"]);
    assert_eq!((h.default_vcpus, h.default_memory), (2, 2048));
    assert_eq!(config.agent.dial_timeout, 7);
    assert!(config.runtime.disable_new_netns);
}

#[test]
fn drop_ins_win_in_the_order_of_their_names() {
    let files = Files::new(
        "[hypervisor.qemu]\ndefault_memory = 512\ndefault_vcpus = 3\n",
        &[
            ("20.toml", "[hypervisor.qemu]\ndefault_memory = 2000\n"),
            ("10.toml", "[hypervisor.qemu]\ndefault_memory = 1000\n"),
            ("30.txt", "not toml at all ["),
        ],
    );
    let config = files.load().unwrap();
    assert_eq!((config.hypervisor.default_memory, config.hypervisor.default_vcpus), (2000, 3));
    let names: Vec<_> = config.sources.iter().map(|p| p.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["configuration.toml", "10.toml", "20.toml"]);
}

#[test]
fn drop_ins_beside_the_file_that_is_linked_to_count_too() {
    let files = Files::new("", &[("a.toml", "[hypervisor.qemu]\ndefault_memory = 1000\n")]);
    let other = Files::new("", &[("b.toml", "[hypervisor.qemu]\ndefault_vcpus = 2\n")]);
    std::fs::remove_file(other.main()).unwrap();
    std::os::unix::fs::symlink(files.main(), other.main()).unwrap();
    let hypervisor = other.load().unwrap().hypervisor;
    assert_eq!((hypervisor.default_memory, hypervisor.default_vcpus), (1000, 2));
}

#[test]
fn no_file_at_all_gives_the_defaults_and_a_named_one_must_be_there() {
    let config = load_from(None, &Places::default()).unwrap();
    assert_eq!(config.sources, [""; 0].map(PathBuf::from));
    assert_eq!(config.hypervisor.default_memory, 2048);
    let error = load_from(Some(Path::new("/nonexistent.toml")), &Places::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read configuration /nonexistent.toml");
}

#[test]
fn the_administrators_file_comes_before_the_installations() {
    let dir = tempfile::tempdir().unwrap();
    let places = Places {
        share: vec![dir.path().join("share")],
        etc: dir.path().join("etc"),
        bin: Vec::new(),
    };
    let write = |path: &str, memory: u32| {
        let path = dir.path().join(path).join("kata-containers/configuration.toml");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("[hypervisor.qemu]\ndefault_memory = {memory}")).unwrap();
    };
    write("share/defaults", 300);
    assert_eq!(load_from(None, &places).unwrap().hypervisor.default_memory, 300);
    write("etc", 400);
    assert_eq!(load_from(None, &places).unwrap().hypervisor.default_memory, 400);
}

#[test]
fn errors_say_file_line_and_column() {
    let text = "[hypervisor.qemu]\ndefault_memory = \"much\"\n";
    let files = Files::new(text, &[]);
    let error = files.load().unwrap_err().to_string();
    let at =
        format!("{}:2:18: hypervisor.qemu.default_memory must be 0 or", files.main().display());
    assert!(error.starts_with(&at), "{error}");
    assert!(error.ends_with("not \"much\""), "{error}");
    assert!(
        problem("[runtime\n").contains("configuration.toml:1:9: "),
        "{}",
        problem("[runtime\n")
    );
    let error = problem("[runtime]\nx = \"é\" y\n");
    assert!(error.contains(":2:9: "), "{error}");
}

#[test]
fn values_out_of_bounds_say_what_would_be_right() {
    for (line, expects) in [
        ("default_maxvcpus = -2", "a whole number from 0 to 1024"),
        ("default_memory = 64", "from 128"),
        ("machine_type = \"pc\"", "one of auto, q35, microvm"),
        ("kernel = \"vmlinux\"", "an absolute path"),
        ("firmware = \"x\"", "an absolute path"),
        ("virtio_fs_queue_size = 100", "a power of two"),
        ("enable_annotations = [\"(\"]", "a list of regular expressions"),
        ("enable_annotations = [1]", "a list of regular expressions"),
        ("enable_debug = 1", "true or false"),
        ("cpu_features = \"a\\u0000b\"", "without control characters"),
    ] {
        let error = problem(&format!("[hypervisor.qemu]\n{line}\n"));
        assert!(error.contains(expects), "{line}: {error}");
    }
}

#[test]
fn unknown_keys_are_warned_of_with_the_nearest_known_one() {
    let text = "[hypervisor.qemu]\ndefault_memry = 1\nzzz = 1\n[runtme]\n[agent]\nx = 1\n";
    let warnings = load_text(text).unwrap().warnings;
    assert_eq!(warnings.len(), 4, "{warnings:#?}");
    let has =
        |text: &str| assert!(warnings.iter().any(|w| w.contains(text)), "{text} {warnings:#?}");
    has(
        "configuration.toml:2:1: unknown key hypervisor.qemu.default_memry has no effect; did you mean hypervisor.qemu.default_memory?",
    );
    has("did you mean runtime?");
    has("agent.x has no effect");
    assert!(warnings.iter().any(|w| w.contains("zzz") && !w.contains("did you mean")));
}

#[test]
fn what_kata_has_and_we_have_not_warns_only_when_it_is_asked_for() {
    let text = "[hypervisor.qemu]\nimage = \"/x.img\"\nenable_hugepages = false\nhot_plug_vfio = \"no-port\"\n\
                rootfs_type = \"ext4\"\nvirtio_fs_daemon = \"/usr/libexec/virtiofsd\"\n";
    let warnings = load_text(text).unwrap().warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("initramfs"), "{warnings:?}");
    let error = problem("[hypervisor.qemu]\nconfidential_guest = true\n");
    assert!(error.contains("guests are not encrypted"), "{error}");
    load_text("[hypervisor.qemu]\nconfidential_guest = false\n").unwrap();
}

#[test]
fn another_hypervisor_alone_is_refused_and_beside_ours_ignored() {
    let error = problem("[hypervisor.clh]\npath = \"/x\"\n");
    assert!(error.contains("hypervisor.clh is not supported"), "{error}");
    let config = load_text("[hypervisor.clh]\npath = \"/x\"\n[hypervisor.qemu]\n").unwrap();
    assert_eq!(config.warnings.len(), 1);
    assert!(problem("[runtime]\nhypervisor_name = \"dragonball\"\n").contains("one of qemu"));
}

#[test]
fn templates_are_off_unless_they_or_ready_machines_are_asked_for() {
    assert!(!load_text("").unwrap().factory.makes_templates());
    for text in ["enable_template = true", "vm_cache_number = 3"] {
        let config = load_text(&format!("[factory]\n{text}\n")).unwrap();
        assert!(config.factory.makes_templates() && config.warnings.is_empty(), "{text}");
    }
    assert!(problem("[factory]\nvm_cache_number = 65\n").contains("vm_cache_number"));
}

#[test]
fn the_hosts_interfaces_cannot_be_moved_into_a_vm() {
    let error = problem("[runtime]\ndisable_new_netns = true\n");
    assert!(error.contains("exclude each other"), "{error}");
}

#[test]
fn missing_assets_are_named_with_the_way_out() {
    let error = load_text("").unwrap().check_files().unwrap_err().to_string();
    assert!(error.starts_with("hypervisor ") && error.contains("qemu-system-x86"), "{error}");
    let text = "[hypervisor.qemu]\npath = \"/bin/sh\"\nkernel = \"/no/kernel\"\n";
    let error = load_text(text).unwrap().check_files().unwrap_err().to_string();
    assert!(error.starts_with("guest kernel /no/kernel does not exist: `make install`"), "{error}");
}

#[test]
fn nearest_is_near() {
    let known = ["default_memory", "kernel"].map(str::to_owned);
    assert_eq!(nearest("default_memroy", known.clone().into_iter()).unwrap(), known[0]);
    assert_eq!(nearest("xyz", known.into_iter()), None);
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let config = SandboxConfig::built_in(&Places::default());
        let mut reader = Reader { config, ours: false, other: None };
        let _ = reader.read(Path::new("x"), &text);
    }

    #[test]
    fn any_value_of_any_key_is_taken_or_refused(
        index in 0..KEYS.len(),
        value in prop_oneof![
            any::<i64>().prop_map(|n| n.to_string()),
            any::<f64>().prop_filter("finite", |n| n.is_finite()).prop_map(|n| format!("{n:?}")),
            any::<bool>().prop_map(|b| b.to_string()),
            "[a-z/ ]{0,10}".prop_map(|s| format!("\"{s}\"")),
            "[a-z(]{0,10}".prop_map(|s| format!("[\"{s}\"]")),
            Just("{ a = 1 }".to_owned()),
        ],
    ) {
        let key = &KEYS[index];
        let text = format!("[{}]\n{} = {value}\n", key.section.name(), key.name);
        let config = SandboxConfig::built_in(&Places::default());
        let mut reader = Reader { config, ours: false, other: None };
        if let Err(error) = reader.read(Path::new("x"), &text) {
            prop_assert!(error.to_string().starts_with("x:2:"), "{}", error);
        }
    }

    #[test]
    fn distance_is_a_distance(a in "[a-c]{0,6}", b in "[a-c]{0,6}") {
        prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        prop_assert_eq!(distance(&a, &b) == 0, a == b);
    }
}

/// As an installation of Kata 3 has it, with its values.
const KATA_3: &str = r#"
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/usr/share/kata-containers/vmlinux.container"
image = "/usr/share/kata-containers/kata-containers.img"
machine_type = "q35"
rootfs_type = "ext4"
enable_annotations = ["enable_iommu", "virtio_fs_extra_args", "kernel_params"]
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
kernel_params = ""
firmware = ""
firmware_volume = ""
machine_accelerators = ""
cpu_features = "pmu=off"
default_vcpus = 1
default_maxvcpus = 0
default_bridges = 1
default_memory = 2048
default_maxmemory = 0
disable_block_device_use = false
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
valid_virtio_fs_daemon_paths = ["/usr/libexec/virtiofsd"]
virtio_fs_cache_size = 0
virtio_fs_queue_size = 1024
virtio_fs_extra_args = ["--thread-pool-size=1", "--announce-submounts"]
virtio_fs_cache = "auto"
block_device_driver = "virtio-scsi"
block_device_aio = "io_uring"
enable_iothreads = false
enable_vhost_user_store = false
vhost_user_store_path = "/var/run/kata-containers/vhost-user"
valid_vhost_user_store_paths = ["/var/run/kata-containers/vhost-user"]
vhost_user_reconnect_timeout_sec = 0
valid_file_mem_backends = [""]
pflashes = []
disable_image_nvdimm = false
valid_entropy_sources = ["/dev/urandom", "/dev/random", ""]
disable_selinux = false
disable_guest_selinux = true
[factory]
[agent.kata]
kernel_modules = []
dial_timeout = 45
[agent.kata.mem_agent]
[runtime]
internetworking_model = "tcfilter"
name = "virt_container"
hypervisor_name = "qemu"
agent_name = "kata"
disable_guest_seccomp = true
sandbox_cgroup_only = false
static_sandbox_resource_mgmt = false
sandbox_bind_mounts = []
vfio_mode = "guest-kernel"
disable_guest_empty_dir = false
experimental = []
create_container_timeout = 60
dan_conf = "/run/kata-containers/dans"
"#;

#[test]
fn a_configuration_of_kata_is_taken_as_it_is() {
    let config = load_text(KATA_3).unwrap();
    assert_eq!(config.warnings.len(), 2, "{:#?}", config.warnings);
    assert!(config.warnings.iter().any(|w| w.contains("hypervisor.qemu.image")));
    assert!(config.warnings.iter().any(|w| w.contains("virtio_fs_extra_args")));
}

#[test]
fn one_processor_has_the_kernel_for_one_unless_a_kernel_is_named() {
    let share = tempfile::tempdir().unwrap();
    let dir = share.path().join("kata-containers");
    std::fs::create_dir(&dir).unwrap();
    for name in ["vmlinux", "vmlinux-up", "kata-initramfs.cpio"] {
        std::fs::write(dir.join(name), "").unwrap();
    }
    let places = Places { share: vec![share.path().to_owned()], ..Places::default() };
    let load = |text: &str| load_from(Some(&Files::new(text, &[]).main()), &places).unwrap();
    let usual = load("").hypervisor;
    assert_eq!(usual.kernel_of(true), dir.join("vmlinux-up"));
    assert_eq!(usual.kernel_of(false), dir.join("vmlinux"));
    for kernel in [Path::new("/opt/vmlinux"), &usual.kernel] {
        let named = format!("[hypervisor.qemu]\nkernel = \"{}\"\n", kernel.display());
        assert_eq!(load(&named).hypervisor.kernel_of(true), kernel);
    }
}
