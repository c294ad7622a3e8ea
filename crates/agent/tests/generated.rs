//! Specifications nobody thought of, against `runc` and `crun`: whatever they combine, a
//! process must find the same. Runs as root on the machine itself, without a VM.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests.

#[path = "oracle/machine.rs"]
#[allow(dead_code, reason = "the other test that uses it needs all of it")]
mod machine;

use kata_cgroups::{Cgroup, Hierarchy};
use machine::{Bundle, compare};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// What a process is: in every runtime the same.
const PROCESS: &str = "grep -E '^(Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|SigBlk|SigCgt)' \
/proc/self/status; cat /proc/self/limits; env; pwd; cat /proc/self/oom_score_adj; hostname; id; \
mkdir /tmp/made 2>&1; busybox rmdir /tmp/made 2>/dev/null; ls /proc/self/fd | grep -c .; touch /there 2>&1";

/// What surrounds it, which crun does in an order of its own.
const PLACES: &str = "sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //; s/(master|shared):[0-9]+/\\1/' \
/proc/self/mountinfo; cd /dev; for f in *; do stat -c '%n %F %a %u:%g %t:%T %N' $f; done";

const CAPABILITIES: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

fn some<T: Clone + std::fmt::Debug + 'static>(all: &[T]) -> impl Strategy<Value = Vec<T>> + use<T> {
    subsequence(all.to_vec(), 0..=all.len())
}

/// Sets that the kernel accepts: each within the one it comes from.
fn capabilities() -> impl Strategy<Value = Value> {
    some(&CAPABILITIES).prop_flat_map(|bounding| {
        some(&bounding).prop_flat_map(move |permitted| {
            let bounding = bounding.clone();
            (some(&permitted), some(&permitted), some(&permitted)).prop_map(
                move |(effective, inheritable, ambient)| {
                    let ambient: Vec<_> =
                        ambient.into_iter().filter(|c| inheritable.contains(c)).collect();
                    json!({"bounding": bounding, "permitted": permitted, "effective": effective,
                           "inheritable": inheritable, "ambient": ambient})
                },
            )
        })
    })
}

fn user() -> impl Strategy<Value = Value> {
    let id = || select(vec![0u32, 7, 1000, 65534]);
    (id(), id(), some(&[3u32, 10, 4000]), proptest::option::of(select(vec![0u32, 0o22, 0o77])))
        .prop_map(|(uid, gid, more, umask)| {
            let mut user = json!({"uid": uid, "gid": gid, "additionalGids": more});
            if let Some(umask) = umask {
                user["umask"] = json!(umask);
            }
            user
        })
}

fn limits() -> impl Strategy<Value = Value> {
    let limit = |name: &'static str| {
        (50u64..100, 100u64..200)
            .prop_map(move |(soft, hard)| json!({"type": name, "soft": soft, "hard": hard}))
    };
    let all = (limit("RLIMIT_NOFILE"), limit("RLIMIT_CORE"), limit("RLIMIT_MSGQUEUE"));
    (all, any::<[bool; 3]>()).prop_map(|((a, b, c), keep)| {
        let kept = [a, b, c].into_iter().zip(keep).filter(|(_, keep)| *keep);
        kept.map(|(limit, _)| limit).collect()
    })
}

fn process() -> impl Strategy<Value = Value> {
    let cwd = select(vec!["/", "/tmp", "/home/user", "/made/for/it"]);
    let env = some(&["A=1", "B=two words", "A=3", "HOME=/somewhere", "TERM=dumb"]);
    let score = proptest::option::of(0i32..=1000);
    (user(), capabilities(), limits(), any::<bool>(), cwd, env, score).prop_map(
        |(user, capabilities, rlimits, no_new_privileges, cwd, env, score)| {
            let env: Vec<&str> = std::iter::once("PATH=/bin").chain(env).collect();
            let mut process = json!({
                "user": user, "capabilities": capabilities, "rlimits": rlimits,
                "noNewPrivileges": no_new_privileges, "cwd": cwd, "env": env
            });
            if let Some(score) = score {
                process["oomScoreAdj"] = json!(score);
            }
            process
        },
    )
}

/// A volume or a tmpfs somewhere.
fn mount(number: usize) -> impl Strategy<Value = Value> {
    let flags = some(&["nosuid", "nodev", "noexec", "noatime", "ro"]);
    let propagation =
        proptest::option::of(select(vec!["private", "rprivate", "slave", "rslave", "shared"]));
    let place = select(vec!["/m", "/tmp/deep/er/m", "/var/link/m"]);
    (any::<bool>(), flags, propagation, place).prop_map(move |(bind, flags, propagation, place)| {
        let mut options: Vec<&str> = if bind { vec!["rbind"] } else { vec!["mode=755", "size=1m"] };
        options.extend(flags);
        options.extend(propagation);
        let kind = if bind { "bind" } else { "tmpfs" };
        json!({"destination": format!("{place}{number}"), "type": kind, "source": kind,
               "options": options})
    })
}

fn linux() -> impl Strategy<Value = Value> {
    let masked = some(&["/proc/acpi", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/none"]);
    let readonly = some(&["/proc/bus", "/proc/fs", "/proc/sys", "/none"]);
    let seccomp = proptest::option::of(select(vec!["SCMP_ACT_ERRNO", "SCMP_ACT_LOG"]));
    (masked, readonly, seccomp, any::<bool>()).prop_map(|(masked, readonly, seccomp, own_ipc)| {
        let mut linux = json!({
            "maskedPaths": masked, "readonlyPaths": readonly,
            "namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "pid"}, {"type": "cgroup"}]
        });
        if own_ipc {
            linux["namespaces"].as_array_mut().unwrap().push(json!({"type": "ipc"}));
        }
        if let Some(action) = seccomp {
            linux["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": action}]
            });
        }
        linux
    })
}

#[derive(Clone, Debug)]
struct Variation {
    process: Value,
    linux: Value,
    mounts: Vec<Value>,
    readonly: bool,
}

fn variation() -> impl Strategy<Value = Variation> {
    let mounts = (mount(0), mount(1), mount(2), 0usize..=3)
        .prop_map(|(a, b, c, count)| [a, b, c].into_iter().take(count).collect());
    (process(), linux(), mounts, any::<bool>()).prop_map(|(process, linux, mounts, readonly)| {
        Variation { process, linux, mounts, readonly }
    })
}

impl Variation {
    fn config(&self, bundle: &Bundle, script: &str) -> Value {
        let mut config = bundle.config(script);
        let args = config["process"]["args"].clone();
        config["process"] = self.process.clone();
        config["process"]["args"] = args;
        config["linux"] = self.linux.clone();
        config["root"]["readonly"] = json!(self.readonly);
        let volume = bundle.path().join("volume");
        std::fs::create_dir_all(volume.join("below")).unwrap();
        let mounts = config["mounts"].as_array_mut().unwrap();
        for mount in &self.mounts {
            let mut mount = mount.clone();
            if mount["type"] == "bind" {
                mount["source"] = json!(volume);
            }
            mounts.push(mount);
        }
        config
    }
}

fn bundle() -> Bundle {
    let bundle = Bundle::new();
    std::os::unix::fs::symlink("/home", bundle.root().join("var/link")).unwrap();
    // Of users without an entry runc and crun think differently.
    let users = "root:x:0:0::/root:/bin/sh\nu7:x:7:7::/home/u7:/bin/sh\n\
                 user:x:1000:1000::/home/user:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
    std::fs::write(bundle.root().join("etc/passwd"), users).unwrap();
    // Other users are to reach the root.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(bundle.path(), open).unwrap();
    bundle
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_specification_gives_what_runc_and_crun_give(variation in variation()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let one = bundle();
            compare(&one, &variation.config(&one, PROCESS), &["runc", "crun"]).await;
            let other = bundle();
            compare(&other, &variation.config(&other, PLACES), &["runc"]).await;
        });
    }
}

/// Files of a cgroup that hold limits, in version 1 and 2.
const LIMITS: [&str; 20] = [
    "cpu.shares",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.limit_in_bytes",
    "memory.soft_limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "pids.max",
    "devices.list",
    "blkio.throttle.read_bps_device",
    "cpu.weight",
    "cpu.max",
    "memory.max",
    "memory.low",
    "memory.swap.max",
    "io.max",
    "hugetlb.2MB.limit_in_bytes",
];

fn limits_of(cgroup: &Cgroup) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::new();
    for directory in cgroup.directories() {
        for name in LIMITS {
            if let Ok(text) = std::fs::read_to_string(directory.join(name)) {
                let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
                lines.sort();
                found.insert(name.to_owned(), lines);
            }
        }
    }
    found
}

fn resources() -> impl Strategy<Value = Value> {
    const MIB: i64 = 1 << 20;
    let memory = proptest::option::of((64i64..512, 0i64..64, 0u64..=100)).prop_map(|memory| {
        memory.map_or(json!({}), |(limit, less, swappiness)| {
            json!({"limit": limit * MIB, "reservation": (limit - less) * MIB,
                   "swap": limit * 2 * MIB, "swappiness": swappiness})
        })
    });
    let cpu = (2u64..5000, proptest::option::of(10_000i64..200_000), any::<bool>()).prop_map(
        |(shares, quota, set)| {
            let mut cpu = json!({"shares": shares});
            if let Some(quota) = quota {
                cpu["quota"] = json!(quota);
                cpu["period"] = json!(100_000);
            }
            if set {
                cpu["cpus"] = json!("0");
            }
            cpu
        },
    );
    let devices = some(&[
        json!({"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}),
        json!({"allow": true, "type": "c", "major": 10, "access": "r"}),
        json!({"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm"}),
    ]);
    (memory, cpu, -1i64..5000, devices).prop_map(|(memory, cpu, pids, allowed)| {
        let deny = json!({"allow": false, "access": "rwm"});
        let devices: Vec<Value> = std::iter::once(deny).chain(allowed).collect();
        json!({"memory": memory, "cpu": cpu, "pids": {"limit": pids}, "devices": devices})
    })
}

/// The limits that runc sets for a container that waits for its start.
fn by_runc(
    bundle: &Bundle,
    hierarchy: &Hierarchy,
    resources: &Value,
) -> BTreeMap<String, Vec<String>> {
    let id = machine::fresh_id();
    let mut config = bundle.config("true");
    config["linux"]["resources"] = resources.clone();
    config["linux"]["cgroupsPath"] = json!(format!("/{id}"));
    std::fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
    let state = tempfile::tempdir().unwrap();
    let runc = |arguments: &[&str]| {
        let mut command = Command::new("runc");
        command.arg("--root").arg(state.path()).args(arguments).current_dir(bundle.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).status().unwrap().success()
    };
    assert!(runc(&["create", &id]), "{resources}");
    let limits = limits_of(&Cgroup::open(hierarchy, &format!("/{id}")).unwrap());
    assert!(runc(&["delete", "--force", &id]));
    limits
}

fn by_us(hierarchy: &Hierarchy, resources: &Value) -> BTreeMap<String, Vec<String>> {
    let resources = kata_oci::Resources::parse(resources.to_string().as_bytes()).unwrap();
    let cgroup = Cgroup::create(hierarchy, &format!("/{}", machine::fresh_id())).unwrap();
    let applied = cgroup.apply(&resources, true);
    let limits = limits_of(&cgroup);
    cgroup.delete().unwrap();
    applied.unwrap();
    limits
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_limits_are_in_the_cgroup_as_runc_puts_them(resources in resources()) {
        let hierarchy = Hierarchy::detect().unwrap();
        let bundle = bundle();
        prop_assert_eq!(by_us(&hierarchy, &resources), by_runc(&bundle, &hierarchy, &resources));
    }
}
