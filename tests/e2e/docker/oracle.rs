//! The same options on runc and on us, in the same Docker: what a process sees must agree.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use kata_e2e::docker::{Docker, IMAGE};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::Value;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["oracle":
        Both: default_container_agrees_with_runc, unprivileged_user_agrees_with_runc,
            dropped_and_added_capabilities_agree_with_runc, privileged_agrees_with_runc,
            unconfined_seccomp_agrees_with_runc, read_only_with_volumes_agrees_with_runc,
            limits_and_sysctls_agree_with_runc, no_new_privileges_agrees_with_runc,
            tty_agrees_with_runc;
    ]
}

fn default_container_agrees_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "-e A=b -w /tmp")
}

fn unprivileged_user_agrees_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "-u alice --group-add 77")
}

fn dropped_and_added_capabilities_agree_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "--cap-drop ALL --cap-add NET_RAW --cap-add SYS_ADMIN --cap-add SYSLOG")
}

fn privileged_agrees_with_runc(docker: &Docker) -> Result<()> {
    docker.needs_privileged_on_runc()?;
    compare(docker, "--privileged")
}

fn unconfined_seccomp_agrees_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "--security-opt seccomp=unconfined --security-opt systempaths=unconfined")
}

fn read_only_with_volumes_agrees_with_runc(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir("oracle")?;
    std::fs::write(dir.join("file"), "x")?;
    compare(
        docker,
        &format!(
            "--read-only --tmpfs /t:size=1m,nosuid -v {0}:/rw -v {0}:/ro:ro -v {0}/file:/etc/file:ro",
            dir.display()
        ),
    )
}

fn limits_and_sysctls_agree_with_runc(docker: &Docker) -> Result<()> {
    compare(
        docker,
        "--ulimit nofile=500:600 --ulimit core=0 --ulimit nproc=1000 --oom-score-adj 50 --sysctl net.ipv4.ip_forward=0 --shm-size 32m",
    )
}

fn no_new_privileges_agrees_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "--security-opt no-new-privileges -u 1000 --cap-drop NET_RAW")
}

fn tty_agrees_with_runc(docker: &Docker) -> Result<()> {
    compare(docker, "-t")
}

fn compare(docker: &Docker, options: &str) -> Result<()> {
    let see = |runtime: &str| -> Result<BTreeMap<String, String>> {
        let line = format!("run --rm --hostname same --runtime {runtime} {options} {IMAGE} probe");
        let mut seen: Value = serde_json::from_str(&docker.ok(&line)?)
            .with_context(|| format!("what the probe said under {runtime}"))?;
        leave_out_what_differs_by_design(&mut seen, options);
        let mut flat = BTreeMap::new();
        flatten("", &seen, &mut flat);
        Ok(flat)
    };
    let (theirs, ours) = (see("runc")?, see(docker.runtime)?);
    let missing = missing_in_a_kernel(&theirs, &ours);
    let mut lines = Vec::new();
    for key in theirs.keys().chain(ours.keys().filter(|key| !theirs.contains_key(*key))) {
        let show = |side: &BTreeMap<String, String>| {
            side.get(key).map_or("absent", String::as_str).to_owned()
        };
        let (a, b) = (show(&theirs), show(&ours));
        let about_kernels = missing.iter().any(|path| key.contains(path.as_str()));
        if a != b && !about_kernels && !unknown_to_a_kernel(key, &a, &b) {
            lines.push(format!("  {key}: runc {a}, we {b}"));
        }
    }
    if !lines.is_empty() {
        bail!("{} differences under {options}\n{}", lines.len(), lines.join("\n"));
    }
    Ok(())
}

/// Paths below `/proc` and `/sys` that one of the two kernels does not have at all.
fn missing_in_a_kernel(
    theirs: &BTreeMap<String, String>,
    ours: &BTreeMap<String, String>,
) -> Vec<String> {
    let missing = |(key, is): (&String, &String)| {
        let path = key.strip_prefix("paths.")?.split(' ').nth(1)?;
        ["absent", "entity not found"].iter().any(|no| is.contains(no)).then(|| path.to_owned())
    };
    theirs.iter().chain(ours).filter_map(missing).collect()
}

/// A call that one of the kernels was built without; `clone3` is unknown by profile.
fn unknown_to_a_kernel(key: &str, theirs: &str, ours: &str) -> bool {
    key.starts_with("calls.") && key != "calls.clone3" && [theirs, ours].contains(&"\"unknown\"")
}

/// A VM has a kernel, a cgroup version, devices and file systems of its own.
fn leave_out_what_differs_by_design(seen: &mut Value, options: &str) {
    let Some(top) = seen.as_object_mut() else { return };
    // The host's cgroup version decides there; the guest has version 2.
    top.remove("cgroup");
    if let Some(limits) = top.get_mut("limits").and_then(Value::as_object_mut) {
        // What nobody asked for is inherited: there from the engine, here from the guest's PID 1.
        let asked = [
            ("core", "Max core file size"),
            ("nofile", "Max open files"),
            ("nproc", "Max processes"),
        ];
        limits.retain(|name, _| {
            asked.iter().any(|(flag, row)| row == name && options.contains(&format!("{flag}=")))
        });
    }
    if let Some(ignored) = top.get_mut("status").and_then(|status| status.get_mut("SigIgn")) {
        // Signals 32 and 33 belong to the C library of whoever started the engine.
        let mask = ignored.as_str().and_then(|text| u64::from_str_radix(text, 16).ok());
        *ignored = mask.map(|mask| mask & !(3 << 31)).into();
    }
    if let Some(mounts) = top.get_mut("mounts").and_then(Value::as_object_mut) {
        mounts.retain(|point, _| !point.starts_with("/sys/fs/cgroup"));
        mounts.iter_mut().for_each(|(point, mount)| leave_out_of_mount(point, mount));
        if options.contains("--privileged") {
            mounts.retain(|point, _| !point.starts_with("/sys/") && !point.starts_with("/dev/"));
        }
    }
    if options.contains("--privileged") {
        // All devices of the machine, which is another one.
        top.remove("dev");
    }
    if let Some(paths) = top.get_mut("paths").and_then(Value::as_object_mut) {
        paths.remove("write /sys/fs/cgroup/probe");
    }
}

fn leave_out_of_mount(point: &str, mount: &mut Value) {
    let Some(mount) = mount.as_object_mut() else { return };
    // What the engine hands in lies on a share instead of on the host's disk.
    let kinds = ["overlay", "ext4", "xfs", "btrfs", "virtiofs", "9p"];
    if kinds.iter().any(|kind| mount["type"] == *kind) {
        for key in ["type", "source", "data", "propagation"] {
            mount.remove(key);
        }
    }
    if point == "/sys" {
        // The guest's sysfs is there already; only the mount can be read-only.
        mount.remove("data");
    }
    if let Some(data) = mount.get_mut("data").and_then(Value::as_array_mut) {
        data.retain(|option| {
            let option = option.as_str().unwrap_or_default();
            // Sizes by default are a share of the machine's memory.
            !["nr_inodes=", "inode64"].iter().any(|prefix| option.starts_with(prefix))
        });
    }
}

fn flatten(path: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                flatten(&format!("{path}.{key}"), value, into);
            }
        }
        other => {
            into.insert(path.trim_start_matches('.').to_owned(), other.to_string());
        }
    }
}
