use super::*;
use kata_oci::{HugepageLimit, Pids};
use proptest::prelude::*;

fn parse(json: &str) -> Resources {
    Resources::parse(json.as_bytes()).unwrap()
}

fn lines(json: &str, now: &[(&str, &str)]) -> Vec<String> {
    let read = |name: &str| now.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    let settings = settings(&parse(json), &read).unwrap();
    settings.iter().map(|s| format!("{}={}", s.file, s.value)).collect()
}

fn problem(json: &str) -> String {
    settings(&parse(json), &|_| None).unwrap_err().to_string()
}

#[test]
fn cpu_shares_convert_as_runc_does() {
    // From runc's own test of the conversion.
    for (shares, weight) in [(0, None), (2, Some(1)), (1024, Some(39)), (262_144, Some(10_000))] {
        assert_eq!(shares_to_weight(shares), weight);
    }
}

#[test]
fn block_weight_converts_as_runc_does() {
    for (from, to) in [(0, None), (10, Some(1)), (500, Some(4950)), (1000, Some(10_000))] {
        assert_eq!(blkio_to_io_weight(from), to);
    }
}

#[test]
fn quota_and_period_become_cpu_max() {
    let json = r#"{"cpu":{"quota":50000,"period":100000}}"#;
    assert_eq!(lines(json, &[]), ["cpu.max=50000 100000"]);
    assert_eq!(lines(r#"{"cpu":{"quota":-1}}"#, &[]), ["cpu.max=max 100000"]);
}

#[test]
fn an_update_of_one_half_of_cpu_max_keeps_the_other() {
    let now = [("cpu.max", "20000 50000\n")];
    assert_eq!(lines(r#"{"cpu":{"quota":30000}}"#, &now), ["cpu.max=30000 50000"]);
    assert_eq!(lines(r#"{"cpu":{"period":40000}}"#, &now), ["cpu.max=20000 40000"]);
}

#[test]
fn burst_is_written_where_the_kernel_takes_it() {
    let json = r#"{"cpu":{"quota":30000,"burst":100}}"#;
    let down = [("cpu.max.burst", "200")];
    assert_eq!(lines(json, &down), ["cpu.max.burst=100", "cpu.max=30000 100000"]);
    assert_eq!(lines(json, &[]), ["cpu.max=30000 100000", "cpu.max.burst=100"]);
}

#[test]
fn an_idle_cgroup_gets_no_weight() {
    assert_eq!(lines(r#"{"cpu":{"idle":1,"shares":512}}"#, &[]), ["cpu.idle=1"]);
    assert_eq!(lines(r#"{"cpu":{"shares":512}}"#, &[("cpu.idle", "1\n")]), [""; 0]);
}

#[test]
fn swap_is_what_exceeds_memory() {
    let case = |json| lines(json, &[]);
    assert_eq!(
        case(r#"{"memory":{"limit":1000,"swap":3000,"reservation":500}}"#),
        ["memory.swap.max=2000", "memory.max=1000", "memory.low=500"]
    );
    assert_eq!(
        case(r#"{"memory":{"limit":1000,"swap":1000}}"#),
        ["memory.swap.max=0", "memory.max=1000"]
    );
    assert_eq!(
        case(r#"{"memory":{"limit":1000,"swap":-1}}"#),
        ["memory.swap.max=max", "memory.max=1000"]
    );
    assert_eq!(case(r#"{"memory":{"limit":-1}}"#), ["memory.swap.max=max", "memory.max=max"]);
    assert_eq!(case(r#"{"memory":{"limit":0,"swap":0}}"#), [""; 0]);
}

#[test]
fn an_update_of_swap_alone_counts_from_the_limit_in_force() {
    let now = [("memory.max", "1000\n")];
    assert_eq!(lines(r#"{"memory":{"swap":1500}}"#, &now), ["memory.swap.max=500"]);
}

#[test]
fn swap_below_or_without_memory_is_refused() {
    assert!(problem(r#"{"memory":{"limit":1000,"swap":500}}"#).contains("below memory.limit"));
    assert!(problem(r#"{"memory":{"swap":500}}"#).contains("needs memory.limit"));
    assert!(problem(r#"{"memory":{"limit":-5}}"#).contains("-1 for no limit"));
}

#[test]
fn pids_limit_of_zero_or_less_is_none() {
    assert_eq!(lines(r#"{"pids":{"limit":7}}"#, &[]), ["pids.max=7"]);
    assert_eq!(lines(r#"{"pids":{"limit":0}}"#, &[]), ["pids.max=max"]);
    assert_eq!(lines(r#"{"pids":{"limit":-1}}"#, &[]), ["pids.max=max"]);
}

#[test]
fn block_io_becomes_io_weight_and_io_max() {
    let json = r#"{"blockIO":{"weight":500,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1024}],
        "throttleWriteIOPSDevice":[{"major":8,"minor":16,"rate":0}]}}"#;
    assert_eq!(
        lines(json, &[]),
        ["io.weight=4950", "io.max=8:0 rbps=1024", "io.max=8:16 wiops=max"]
    );
    assert_eq!(lines(json, &[("io.bfq.weight", "default 100")])[0], "io.bfq.weight=500");
}

#[test]
fn huge_page_sizes_cannot_name_other_files() {
    let json = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4096}]}"#;
    assert_eq!(lines(json, &[]), ["hugetlb.2MB.max=4096", "hugetlb.2MB.rsvd.max=4096"]);
    for bad in ["../2MB", "MB", "2M", "1234567MB"] {
        assert!(page_size(bad).is_err(), "{bad}");
    }
}

#[test]
fn unified_takes_controller_files_only() {
    let json = r#"{"unified":{"memory.high":"1000"}}"#;
    assert_eq!(lines(json, &[]), ["memory.high=1000"]);
    for bad in ["../x.y", "cgroup.procs", "cgroup.kill", "memory"] {
        assert!(problem(&format!(r#"{{"unified":{{"{bad}":"1"}}}}"#)).contains("no file"), "{bad}");
    }
}

#[test]
fn a_missing_controller_matters_only_when_something_is_limited() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Resources { pids: Some(Pids { limit: 5 }), ..Resources::default() };
    let error = apply(dir.path(), &limited).unwrap_err().to_string();
    assert!(error.contains("pids.max = 5 needs the pids cgroup controller"), "{error}");
    let unlimited = Resources { pids: Some(Pids { limit: -1 }), ..Resources::default() };
    apply(dir.path(), &unlimited).unwrap();
    let swap = r#"{"memory":{"swap":-1}}"#;
    apply(dir.path(), &parse(swap)).unwrap();
}

#[test]
fn a_limit_below_the_use_is_refused_when_asked_to_check() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("memory.current"), "5000\n").unwrap();
    std::fs::write(dir.path().join("memory.max"), "max").unwrap();
    let checked = parse(r#"{"memory":{"limit":1000,"checkBeforeUpdate":true}}"#);
    assert!(apply(dir.path(), &checked).unwrap_err().to_string().contains("5000 bytes"));
    apply(dir.path(), &parse(r#"{"memory":{"limit":1000}}"#)).unwrap();
}

#[test]
fn a_cgroup_that_is_gone_is_not_blamed_on_a_controller() {
    let limited = Resources { pids: Some(Pids { limit: 5 }), ..Resources::default() };
    let error = apply(Path::new("/nonexistent/cgroup"), &limited).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
}

proptest! {
    #[test]
    fn weights_stay_in_range_and_order(a: u64, b: u64, c: u16) {
        let (low, high) = (a.min(b), a.max(b));
        if let (Some(low), Some(high)) = (shares_to_weight(low), shares_to_weight(high)) {
            prop_assert!((1..=10_000).contains(&low) && low <= high && high <= 10_000);
        }
        prop_assert!(blkio_to_io_weight(c).is_none_or(|w| (1..=10_000).contains(&w)));
    }

    #[test]
    fn any_memory_numbers_are_written_or_refused(limit: Option<i64>, swap: Option<i64>, low: Option<i64>) {
        let memory = Memory { limit, swap, reservation: low, ..Memory::default() };
        let resources = Resources { memory: Some(memory), ..Resources::default() };
        if let Ok(settings) = settings(&resources, &|_| None) {
            for setting in settings {
                prop_assert!(setting.value == "max" || setting.value.parse::<u64>().is_ok());
            }
        }
    }

    #[test]
    fn no_page_size_leaves_the_directory(size in ".{0,12}") {
        let limit = HugepageLimit { page_size: size, limit: 1 };
        let resources = Resources { hugepage_limits: vec![limit], ..Resources::default() };
        if let Ok(settings) = settings(&resources, &|_| None) {
            prop_assert!(settings.iter().all(|s| !s.file.contains('/')));
        }
    }
}

#[test]
fn device_weights_need_a_scheduler_that_knows_them() {
    let json = r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":200}]}}"#;
    let resources = Resources::parse(json.as_bytes()).unwrap();
    let bfq = |name: &str| (name == "io.bfq.weight").then(|| "default 100".to_owned());
    let written = settings(&resources, &bfq).unwrap();
    assert_eq!((written[0].file.as_str(), written[0].value.as_str()), ("io.bfq.weight", "8:0 200"));
    let error = settings(&resources, &|_| None).unwrap_err().to_string();
    assert!(error.contains("blockIO.weightDevice"), "{error}");
    let json = r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"leafWeight":200}]}}"#;
    let error = settings(&Resources::parse(json.as_bytes()).unwrap(), &bfq).unwrap_err();
    assert!(error.to_string().contains("leafWeight"), "{error}");
}
