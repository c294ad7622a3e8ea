use super::*;
use crate::{Places, load_from};
use proptest::prelude::*;

const HOST: Host = Host { cpus: 4, memory_mib: 16384 };

fn config() -> SandboxConfig {
    load_from(None, &Places::default()).unwrap()
}

fn resources(json: &str) -> Limits {
    Limits::of_container(Some(&Resources::parse(json.as_bytes()).unwrap()))
}

fn size(limits: Limits) -> (u32, u32) {
    let sizing = Sizing::decide(&config(), limits, HOST);
    (sizing.memory_mib, sizing.vcpus)
}

#[test]
fn without_limits_it_is_the_default() {
    assert_eq!(size(Limits::default()), (2048, 1));
    assert_eq!(size(Limits::of_container(None)), (2048, 1));
    assert_eq!(
        size(resources(r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"shares":2}}"#)),
        (2048, 1)
    );
    assert_eq!(size(resources(r#"{"memory":{"limit":0},"cpu":{"quota":0}}"#)), (2048, 1));
}

#[test]
fn a_memory_limit_is_met_with_what_the_guest_needs_on_top() {
    assert_eq!(size(resources(r#"{"memory":{"limit":536870912}}"#)).0, 512 + 128 + 8);
    assert_eq!(size(resources(r#"{"memory":{"limit":4294967296}}"#)).0, 4096 + 128 + 64);
    assert_eq!(size(resources(r#"{"memory":{"limit":1}}"#)).0, 256);
}

#[test]
fn a_cpu_limit_alone_never_makes_a_tiny_vm() {
    assert_eq!(size(resources(r#"{"cpu":{"quota":50000,"period":100000}}"#)), (2048, 1));
    assert_eq!(size(resources(r#"{"cpu":{"quota":150000,"period":100000}}"#)), (2048, 2));
    assert_eq!(size(resources(r#"{"cpu":{"quota":30000,"period":10000}}"#)), (2048, 3));
    assert_eq!(size(resources(r#"{"cpu":{"quota":300000}}"#)).1, 3);
}

#[test]
fn containers_need_together_what_one_of_all_their_limits_would() {
    let one = |memory: u64, millicpus: Option<u64>| Limits {
        memory: Some(memory << 20),
        millicpus,
        pod: false,
    };
    let free = Limits::default();
    assert_eq!(Sizing::for_containers(&[]), (0, 0));
    assert_eq!(Sizing::for_containers(&[free, free]), (0, 0));
    let both = [one(1024, Some(500)), free, one(1024, Some(700))];
    assert_eq!(Sizing::for_containers(&both), (2048 + 128 + 32, 2));
    assert_eq!(Sizing::for_containers(&both).0, size(one(2048, None)).0);
    let endless = one(u64::MAX >> 20, Some(u64::MAX));
    assert_eq!(Sizing::for_containers(&[endless, endless]), (u32::MAX, u32::MAX));
}

#[test]
fn host_and_configuration_cap_both() {
    let big = Limits { memory: Some(1 << 40), millicpus: Some(64_000), pod: false };
    assert_eq!(size(big), (16384, 4));
    let mut c = config();
    (c.hypervisor.default_maxmemory, c.hypervisor.default_maxvcpus) = (1024, 2);
    let sizing = Sizing::decide(&c, big, HOST);
    assert_eq!((sizing.memory_mib, sizing.vcpus, sizing.max_vcpus), (1024, 2, 2));
    assert_eq!(
        sizing.to_string(),
        "1024 MiB (most that is allowed), 2 vCPUs (most that is allowed)"
    );
}

#[test]
fn minus_one_vcpu_is_as_many_as_the_host_has() {
    let mut c = config();
    c.hypervisor.default_vcpus = -1;
    assert_eq!(Sizing::decide(&c, Limits::default(), HOST).vcpus, 4);
}

#[test]
fn a_pod_gets_at_least_the_default_memory() {
    let annotations = |memory: &str| {
        BTreeMap::from([
            ("io.kubernetes.cri.sandbox-memory".to_owned(), memory.to_owned()),
            ("io.kubernetes.cri.sandbox-cpu-quota".to_owned(), "250000".to_owned()),
            ("io.kubernetes.cri.sandbox-cpu-period".to_owned(), "100000".to_owned()),
        ])
    };
    assert_eq!(size(Limits::of_pod(&annotations("67108864")).unwrap()), (2048, 3));
    assert_eq!(size(Limits::of_pod(&annotations("4294967296")).unwrap()).0, 4096 + 128 + 64);
    assert_eq!(size(Limits::of_pod(&annotations("0")).unwrap()).0, 2048);
    assert_eq!(Limits::of_pod(&BTreeMap::new()), None);
}

#[test]
fn this_machine_has_cpus_and_memory() {
    let host = Host::detect();
    assert!(host.cpus >= 1 && host.memory_mib >= 64, "{host:?}");
}

proptest! {
    #[test]
    fn any_limits_give_a_vm_within_bounds(
        memory: Option<i64>, quota: Option<i64>, period: Option<u64>, pod: bool,
        most_memory in prop_oneof![Just(0), 128_u32..1 << 15], most_vcpus in 0_u32..1024, vcpus in -1_i32..1024,
    ) {
        let memory = memory.map(|limit| kata_oci::Memory { limit: Some(limit), ..Default::default() });
        let cpu = Some(kata_oci::Cpu { quota, period, ..Default::default() });
        let resources = Resources { memory, cpu, ..Default::default() };
        let limits = Limits { pod, ..Limits::of_container(Some(&resources)) };
        let mut c = config();
        c.hypervisor.default_maxmemory = most_memory;
        c.hypervisor.default_maxvcpus = most_vcpus;
        c.hypervisor.default_vcpus = vcpus;
        let sizing = Sizing::decide(&c, limits, HOST);
        prop_assert!(sizing.memory_mib <= HOST.memory_mib && sizing.memory_mib.is_multiple_of(2));
        prop_assert!(most_memory == 0 || sizing.memory_mib <= most_memory);
        prop_assert!(sizing.memory_mib >= 128);
        prop_assert!((1..=HOST.cpus).contains(&sizing.vcpus) && sizing.vcpus <= sizing.max_vcpus);
    }

    #[test]
    fn a_larger_limit_never_gives_a_smaller_vm(a in 1_u64..1 << 36, b in 1_u64..1 << 36) {
        let (low, high) = (a.min(b), a.max(b));
        let of = |memory| size(Limits { memory: Some(memory), ..Limits::default() }).0;
        prop_assert!(of(low) <= of(high));
        prop_assert!(u64::from(of(low)) * MIB >= low.min(u64::from(HOST.memory_mib) * MIB));
    }
}
