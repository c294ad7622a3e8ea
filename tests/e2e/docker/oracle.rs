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
    let see = |runtime: &str| -> Result<Value> {
        let line = format!("run --rm --hostname same --runtime {runtime} {options} {IMAGE} probe");
        let mut seen: Value = serde_json::from_str(&docker.ok(&line)?)
            .with_context(|| format!("what the probe said under {runtime}"))?;
        leave_out_what_differs_by_design(&mut seen, options);
        Ok(seen)
    };
    let (theirs, ours) = (see("runc")?, see(docker.runtime)?);
    let (mut left, mut right) = (BTreeMap::new(), BTreeMap::new());
    flatten("", &theirs, &mut left);
    flatten("", &ours, &mut right);
    let mut lines = Vec::new();
    for key in left.keys().chain(right.keys().filter(|key| !left.contains_key(*key))) {
        let (a, b) = (left.get(key), right.get(key));
        if a != b {
            let show = |value: Option<&String>| value.map_or("absent", String::as_str).to_owned();
            lines.push(format!("  {key}: runc {}, we {}", show(a), show(b)));
        }
    }
    if !lines.is_empty() {
        bail!("{} differences under {options}\n{}", lines.len(), lines.join("\n"));
    }
    Ok(())
}

/// A VM has a kernel, a cgroup version, devices and file systems of its own.
fn leave_out_what_differs_by_design(seen: &mut Value, options: &str) {
    let Some(top) = seen.as_object_mut() else { return };
    // The host's cgroup version decides there; the guest has version 2.
    top.remove("cgroup");
    if let Some(mounts) = top.get_mut("mounts").and_then(Value::as_object_mut) {
        mounts.retain(|point, _| !point.starts_with("/sys/fs/cgroup/"));
        for (point, mount) in mounts.iter_mut() {
            let Some(mount) = mount.as_object_mut() else { continue };
            // What the engine hands in lies on a share instead of on the host's disk.
            let shared = ["overlay", "ext4", "xfs", "btrfs", "virtiofs", "9p"]
                .iter()
                .any(|kind| mount["type"] == *kind);
            if shared || point == "/sys/fs/cgroup" {
                for key in ["type", "source", "data"] {
                    mount.remove(key);
                }
            }
            // Sizes by default are a share of the machine's memory.
            if let Some(data) = mount.get_mut("data").and_then(Value::as_array_mut) {
                data.retain(|option| {
                    let option = option.as_str().unwrap_or_default();
                    !["nr_inodes=", "inode64", "resv_strict", "resuid="]
                        .iter()
                        .any(|p| option.starts_with(p))
                });
            }
        }
    }
    if options.contains("--privileged") {
        // All devices of the machine, which is another one.
        top.remove("dev");
        if let Some(mounts) = top.get_mut("mounts").and_then(Value::as_object_mut) {
            mounts.retain(|point, _| !point.starts_with("/sys/") && !point.starts_with("/dev/"));
        }
    }
    if let Some(paths) = top.get_mut("paths").and_then(Value::as_object_mut) {
        // Whether the kernel has such a file at all is the kernel's business.
        paths.retain(|_, is| is != "absent");
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
