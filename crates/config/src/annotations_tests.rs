use super::*;
use crate::{Places, load_from};
use proptest::prelude::*;
use std::path::Path;

fn config(enabled: &[&str]) -> SandboxConfig {
    let mut config = load_from(None, &Places::default()).unwrap();
    config.hypervisor.enable_annotations = enabled.iter().map(|e| (*e).to_owned()).collect();
    config
}

fn annotate(config: &mut SandboxConfig, name: &str, value: &str) -> Result<(), String> {
    let map = BTreeMap::from([(format!("io.katacontainers.config.{name}"), value.to_owned())]);
    config.annotate(&map).map_err(|error| error.to_string())
}

#[test]
fn an_enabled_annotation_sets_its_key() {
    let mut c = config(&["default_.*", "machine_type"]);
    annotate(&mut c, "hypervisor.default_memory", "4096").unwrap();
    annotate(&mut c, "hypervisor.default_vcpus", "1.5").unwrap();
    annotate(&mut c, "hypervisor.default_max_vcpus", "7").unwrap();
    annotate(&mut c, "hypervisor.machine_type", "microvm").unwrap();
    let h = &c.hypervisor;
    assert_eq!((h.default_memory, h.default_vcpus, h.default_maxvcpus), (4096, 2, 7));
    assert_eq!(h.machine.as_str(), "microvm");
}

#[test]
fn one_that_is_not_enabled_is_an_error_that_says_how_to() {
    let mut c = config(&["default_vcpus"]);
    let error = annotate(&mut c, "hypervisor.default_memory", "4096").unwrap_err();
    assert!(error.contains("add \"default_memory\" to enable_annotations"), "{error}");
    assert!(annotate(&mut c, "runtime.sandbox_cgroup_only", "false").is_err());
    assert!(annotate(&mut c, "hypervisor.unheard_of", "1").is_err());
}

#[test]
fn what_touches_the_guest_alone_needs_no_leave() {
    let mut c = config(&[]);
    annotate(&mut c, "runtime.create_container_timeout", "90").unwrap();
    assert_eq!(c.runtime.create_container_timeout, 90);
    annotate(&mut c, "agent.kernel_modules", "e1000e EEE=1; i915 ;").unwrap();
    assert!(c.warnings[0].contains("kernel_modules"), "{:?}", c.warnings);
}

#[test]
fn a_container_leaves_its_seccomp_profile_out_only_with_leave() {
    assert!(annotate(&mut config(&[]), "runtime.disable_guest_seccomp", "true").is_err());
    let mut c = config(&["disable_guest_seccomp"]);
    annotate(&mut c, "runtime.disable_guest_seccomp", "true").unwrap();
    assert!(c.runtime.disable_guest_seccomp);
}

#[test]
fn bounds_are_those_of_the_file() {
    let mut c = config(&[".*"]);
    for (name, value) in [
        ("hypervisor.default_memory", "1"),
        ("hypervisor.default_vcpus", "many"),
        ("hypervisor.default_vcpus", "inf"),
        ("hypervisor.shared_fs", "nfs"),
        ("runtime.disable_guest_seccomp", "yes"),
        ("runtime.create_container_timeout", "0"),
        ("hypervisor.kernel_params", "a\nb\u{7}"),
    ] {
        let error = annotate(&mut c, name, value);
        if name.ends_with("kernel_params") {
            assert!(error.unwrap_err().contains("control characters"));
        } else {
            assert!(error.unwrap_err().contains(" must be "), "{name}");
        }
    }
}

#[test]
fn kernel_parameters_are_added() {
    let mut c = config(&["kernel_params"]);
    c.hypervisor.kernel_params = vec!["a=1".to_owned()];
    annotate(&mut c, "hypervisor.kernel_params", " b c=2 ").unwrap();
    assert_eq!(c.hypervisor.kernel_params, ["a=1", "b", "c=2"]);
}

#[test]
fn a_host_path_needs_a_glob_that_allows_it() {
    let mut c = config(&[".*"]);
    let error = annotate(&mut c, "hypervisor.path", "/usr/bin/qemu").unwrap_err();
    assert!(error.contains("valid_hypervisor_paths"), "{error}");
    c.hypervisor.valid_hypervisor_paths = vec!["/usr/bin/qemu*".to_owned()];
    annotate(&mut c, "hypervisor.path", "/usr/bin/qemu-7").unwrap();
    assert_eq!(c.hypervisor.path, Path::new("/usr/bin/qemu-7"));
    for bad in ["/usr/bin/qemu/../sh", "/usr/bin/qemux/y", "/usr/bin/qemu,x", "qemu", ""] {
        assert!(annotate(&mut c, "hypervisor.path", bad).is_err(), "{bad}");
    }
    for name in ["kernel", "initrd", "firmware", "entropy_source"] {
        assert!(annotate(&mut c, &format!("hypervisor.{name}"), "/etc/shadow").is_err(), "{name}");
    }
}

#[test]
fn an_annotation_cannot_enable_others() {
    let mut c = config(&[".*"]);
    for name in ["enable_annotations", "valid_hypervisor_paths", "valid_asset_paths"] {
        annotate(&mut c, &format!("hypervisor.{name}"), "/x").unwrap();
    }
    assert_eq!(c.hypervisor.enable_annotations, [".*"]);
    assert!(c.hypervisor.valid_hypervisor_paths.is_empty());
    assert_eq!(c.warnings.len(), 3);
}

#[test]
fn switches_cannot_name_files() {
    let mut c = config(&[".*"]);
    annotate(&mut c, "hypervisor.machine_accelerators", "nosmm,hpet=off,x=3").unwrap();
    annotate(&mut c, "hypervisor.cpu_features", "pmu=off,-avx").unwrap();
    for bad in ["kernel=/etc/shadow", "kernel=shadow", "a b", "x=on,initrd=y"] {
        assert!(annotate(&mut c, "hypervisor.machine_accelerators", bad).is_err(), "{bad}");
    }
}

#[test]
fn the_configuration_file_is_not_a_containers_choice_and_other_annotations_are_not_ours() {
    let mut c = config(&[".*"]);
    let one = |name: &str| BTreeMap::from([(name.to_owned(), "/x".to_owned())]);
    assert!(c.annotate(&one("io.katacontainers.config_path")).is_err());
    c.annotate(&one("io.katacontainers.pkg.oci.bundle_path")).unwrap();
    c.annotate(&one("com.example/x")).unwrap();
    assert_eq!(c.warnings, [""; 0]);
}

proptest! {
    #[test]
    fn nothing_gets_through_that_is_not_enabled(index in 0..ANNOTATIONS.len(), value in ".{0,20}") {
        let annotation = &ANNOTATIONS[index];
        let mut c = config(&[]);
        let before = format!("{:?}", c.hypervisor);
        let map = BTreeMap::from([(annotation.full(), value)]);
        let result = c.annotate(&map);
        prop_assert!(result.is_err() || annotation.gate == Gate::Open);
        prop_assert_eq!(before, format!("{:?}", c.hypervisor));
    }

    #[test]
    fn no_annotation_names_a_path_without_leave(index in 0..ANNOTATIONS.len(), path in "/[a-z/.,]{1,20}") {
        let mut c = config(&[".*"]);
        let map = BTreeMap::from([(ANNOTATIONS[index].full(), path.clone())]);
        let taken = c.annotate(&map).is_ok();
        let h = &c.hypervisor;
        let paths = [&h.path, &h.kernel, &h.initrd, &h.entropy_source];
        prop_assert!(!taken || paths.iter().all(|p| p.as_path() != Path::new(&path)));
        prop_assert!(h.firmware.is_none());
    }
}
