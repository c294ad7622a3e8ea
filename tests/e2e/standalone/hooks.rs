//! Hooks: each kind at its time, with the state on its input.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::oci::{Bundle, Oci};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::{Value, json};

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["hooks":
        Both: host_hooks_run_in_order_with_the_state, network_namespace_is_reachable_through_the_pid,
            failing_hook_fails_create_with_its_words, slow_hook_is_stopped_at_its_timeout,
            container_hooks_run_inside;
    ]
}

/// A script that notes its name and the state it was given.
fn hook(bundle: &Bundle<'_>, name: &str, body: &str) -> Result<Value> {
    let path = bundle.dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{body}\n"))?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
    Ok(
        json!({ "path": path, "args": [name, "argument"], "env": ["MARK=set", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }),
    )
}

fn host_hooks_run_in_order_with_the_state(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let dir = bundle.dir.display().to_string();
    let body =
        |name: &str| format!("cat > {dir}/{name}.state; echo {name} $0 $1 $MARK >> {dir}/order");
    let mut hooks = json!({});
    for kind in ["prestart", "createRuntime", "poststart", "poststop"] {
        hooks[kind] = json!([hook(&bundle, kind, &body(kind))?]);
    }
    let bundle = bundle.with(|spec| spec["hooks"] = hooks)?;
    bundle.start()?;
    bundle.until("stopped")?;
    bundle.verb("delete")?.expect_code(0)?;
    let order = fs::read_to_string(bundle.dir.join("order"))?;
    let names: Vec<_> = order.lines().filter_map(|l| l.split(' ').next()).collect();
    ensure!(names == ["prestart", "createRuntime", "poststart", "poststop"], "{order}");
    ensure!(order.lines().all(|l| l.ends_with("argument set")), "{order}");
    for (kind, status) in
        [("prestart", "creating"), ("createRuntime", "creating"), ("poststop", "stopped")]
    {
        let state: Value =
            serde_json::from_slice(&fs::read(bundle.dir.join(format!("{kind}.state")))?)?;
        ensure!(state["id"] == bundle.id.as_str() && state["bundle"] == dir, "{state}");
        let is = state["status"].as_str().unwrap_or_default();
        // runc 1.1 says "created" already where the specification says "creating".
        ensure!(is == status || (status == "creating" && is == "created"), "{kind}: {state}");
    }
    Ok(())
}

fn network_namespace_is_reachable_through_the_pid(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("ip -4 -o addr; exec sleep 100000")?;
    let body = "pid=$(sed -E 's/.*\"pid\": ?([0-9]+).*/\\1/'); \
        ip link add ve$pid type veth peer name eth7 netns $pid && \
        nsenter -t $pid -n ip addr add 10.98.7.6/24 dev eth7 && \
        nsenter -t $pid -n ip link set eth7 up && ip link set ve$pid up";
    let hook = hook(&bundle, "prestart", body)?;
    let bundle = bundle.with(|spec| spec["hooks"] = json!({ "prestart": [hook] }))?;
    bundle.start()?;
    command::eventually("the container has the interface", PATIENCE, || {
        Ok(bundle.stdout()?.contains("10.98.7.6/24"))
    })
    .with_context(|| bundle.stdout().unwrap_or_default())
}

fn failing_hook_fails_create_with_its_words(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let hook = hook(&bundle, "createRuntime", "echo the reason >&2; exit 3")?;
    let bundle = bundle.with(|spec| spec["hooks"] = json!({ "createRuntime": [hook] }))?;
    let output = bundle.create()?;
    ensure!(output.code == 1 && output.err().contains("the reason"), "{output}");
    ensure!(bundle.verb("state")?.code != 0, "a container is left");
    Ok(())
}

fn slow_hook_is_stopped_at_its_timeout(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let mut hook = hook(&bundle, "createRuntime", "exec sleep 1000")?;
    hook["timeout"] = json!(1);
    let bundle = bundle.with(|spec| spec["hooks"] = json!({ "createRuntime": [hook] }))?;
    let output = bundle.create()?;
    ensure!(output.code == 1, "{output}");
    Ok(())
}

fn container_hooks_run_inside(oci: &Oci) -> Result<()> {
    // createContainer: container's namespaces, host's root; startContainer: the container's root.
    let bundle = oci.bundle("cat /tmp/mark; exec sleep 1000")?.with(|spec| {
        let mount = json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"] });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
        spec["hooks"] = json!({ "startContainer": [
            { "path": "/bin/sh", "args": ["sh", "-c", "hostname > /tmp/mark"], "env": ["PATH=/bin"] }
        ] });
        spec["hostname"] = json!("inside");
    })?;
    bundle.start()?;
    command::eventually("the hook left its mark", PATIENCE, || Ok(bundle.stdout()? == "inside"))
}
