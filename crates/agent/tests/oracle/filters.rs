//! seccomp profiles: what a filter of ours lets through, against what libseccomp makes of it.

use super::machine::{self, Bundle, compare, run, run_by};
use super::{BOTH, add_mounts};
use serde_json::{Value, json};

/// Which calls the probe makes, with arguments that do no harm.
const PROBED: &str = "ORACLE_PROBE";

/// Not a test: this program runs in a container and tells what its filter lets through.
#[test]
fn probe() {
    let Ok(list) = std::env::var(PROBED) else { return };
    for line in list.split(';') {
        let numbers: Vec<i64> = line.split(',').map(|n| n.parse::<u64>().unwrap() as i64).collect();
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
        // SAFETY: the test names only calls that fail on such arguments.
        let result = unsafe { libc::syscall(at(0), at(1), at(2), at(3), at(4), at(5), at(6)) };
        let error = std::io::Error::last_os_error().raw_os_error();
        println!("probe {line}: {:?}", if result == -1 { error } else { None });
    }
}

/// A configuration that runs [`probe`] under a filter.
fn probing(bundle: &Bundle, seccomp: Value, calls: &[String]) -> Value {
    let mut config = bundle.config("");
    config["process"]["args"] =
        json!(["/probe", "--exact", "filters::probe", "--nocapture", "--test-threads=1"]);
    let list = calls.join(";");
    config["process"]["env"] = json!(["PATH=/bin", format!("{PROBED}={list}")]);
    config["linux"]["seccomp"] = seccomp;
    add_mounts(
        &mut config,
        &[json!({"destination": "/probe", "type": "bind",
                 "source": std::env::current_exe().unwrap(), "options": ["bind", "ro"]})],
    );
    config
}

/// The answers of a probe, without what the test program says around them.
fn answers(outcome: &machine::Outcome) -> Vec<String> {
    let lines = outcome.output.lines().filter_map(|line| line.split_once("probe "));
    let answers: Vec<_> = lines.map(|(_, answer)| answer.to_owned()).collect();
    assert!(!answers.is_empty(), "{outcome:?}");
    answers
}

async fn compare_filter(seccomp: Value, calls: &[String], runtimes: &[&str]) -> Vec<String> {
    let bundle = Bundle::new();
    let config = probing(&bundle, seccomp, calls);
    let ours = answers(&run(&config).await.unwrap());
    for runtime in runtimes {
        assert_eq!(ours, answers(&run_by(runtime, &bundle, &config)), "we differ from {runtime}");
    }
    ours
}

/// Arguments around every boundary of a 64-bit comparison with `2^32 + 5`.
fn boundaries(call: libc::c_long) -> Vec<String> {
    let half = 1u64 << 32;
    [0, 4, 5, 6, half - 1, half, half + 4, half + 5, half + 6, 2 * half + 5, u64::MAX]
        .iter()
        .map(|value| format!("{call},1,{value},4096"))
        .collect()
}

#[tokio::test]
async fn argument_comparisons_are_as_libseccomp_compiles_them() {
    // Calls that fail on an address of 1, whatever the rest.
    let calls = [
        (libc::SYS_madvise, "madvise", "SCMP_CMP_EQ"),
        (libc::SYS_msync, "msync", "SCMP_CMP_NE"),
        (libc::SYS_mincore, "mincore", "SCMP_CMP_LT"),
        (libc::SYS_mremap, "mremap", "SCMP_CMP_LE"),
        (libc::SYS_remap_file_pages, "remap_file_pages", "SCMP_CMP_GT"),
        (libc::SYS_mbind, "mbind", "SCMP_CMP_GE"),
        (libc::SYS_migrate_pages, "migrate_pages", "SCMP_CMP_MASKED_EQ"),
    ];
    let value = (1u64 << 32) + 5;
    let rules: Vec<Value> = calls
        .iter()
        .map(|(_, name, op)| {
            let masked = *op == "SCMP_CMP_MASKED_EQ";
            let (value, two) =
                if masked { (0x1_0000_0004u64, 0x1_0000_0004u64) } else { (value, 0) };
            json!({"names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": 77,
                   "args": [{"index": 1, "value": value, "valueTwo": two, "op": op}]})
        })
        .collect();
    let probes: Vec<String> = calls.iter().flat_map(|(number, ..)| boundaries(*number)).collect();
    let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
    let ours = compare_filter(seccomp, &probes, &BOTH).await;
    assert!(
        ours.iter().any(|a| a.ends_with("Some(77)"))
            && !ours.iter().all(|a| a.ends_with("Some(77)"))
    );
}

#[tokio::test]
async fn several_conditions_and_rules_are_as_libseccomp_combines_them() {
    let arg = |index: u32, value: u64, op: &str| json!({"index": index, "value": value, "op": op});
    let rules = json!([
        {"names": ["madvise"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71,
         "args": [arg(1, 5, "SCMP_CMP_EQ"), arg(2, 9, "SCMP_CMP_EQ")]},
        {"names": ["msync"], "action": "SCMP_ACT_ERRNO", "errnoRet": 72,
         "args": [arg(1, 5, "SCMP_CMP_EQ"), arg(1, 9, "SCMP_CMP_EQ")]},
        {"names": ["mincore"], "action": "SCMP_ACT_ERRNO", "errnoRet": 73, "args": [arg(1, 5, "SCMP_CMP_EQ")]},
        {"names": ["mincore", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 73, "args": []},
        {"names": ["mremap"], "action": "SCMP_ACT_ALLOW", "args": []}
    ]);
    let mut probes = Vec::new();
    for call in [libc::SYS_madvise, libc::SYS_msync, libc::SYS_mincore, libc::SYS_mremap] {
        for (first, second) in [(5, 9), (5, 8), (9, 5), (9, 9), (1, 1)] {
            probes.push(format!("{call},1,{first},{second}"));
        }
    }
    let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
    compare_filter(seccomp, &probes, &BOTH).await;
}

#[tokio::test]
async fn calls_newer_than_the_profile_do_not_exist_as_with_runc() {
    let allowed: Vec<&str> = (0..=439usize)
        .filter_map(syscalls::x86_64::Sysno::new)
        .map(|call| call.name())
        .filter(|name| !["madvise", "swapon", "msync"].contains(name))
        .collect();
    for no_new_privs in [false, true] {
        let seccomp = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}]
        });
        let probes: Vec<String> = [28, 167, 26, 25, 440, 600, 5000, 0x4000_0000 + 600]
            .map(|number: u64| format!("{number},1,1,1"))
            .to_vec();
        let bundle = Bundle::new();
        let mut config = probing(&bundle, seccomp, &probes);
        config["process"]["noNewPrivileges"] = json!(no_new_privs);
        let ours = answers(&run(&config).await.unwrap());
        assert_eq!(ours, answers(&run_by("runc", &bundle, &config)), "{no_new_privs}");
        assert!(ours[0].ends_with("Some(1)") && ours[5].ends_with("Some(38)"), "{ours:?}");
    }
}

#[tokio::test]
async fn killed_calls_end_the_process() {
    let bundle = Bundle::new();
    let mut config = bundle.config("mkdir /tmp/x");
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS"}]
    });
    assert_eq!(run(&config).await.unwrap().code, 128 + 31);
    assert_eq!(run_by("runc", &bundle, &config).code, 128 + 31);
    config["process"]["args"] =
        json!(["sh", "-c", "exec 2>/dev/null; mkdir /tmp/x; grep ^Seccomp: /proc/self/status"]);
    compare(&bundle, &config, &BOTH).await;
}
