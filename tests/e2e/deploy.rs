//! What is deployed to a Kubernetes node: the installer, on a containerd that knows nothing of us.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use kata_e2e::arena::Arena;
use kata_e2e::assets;
use kata_e2e::command;
use kata_e2e::containerd::{Containerd, Programs};
use kata_e2e::cri::Cri;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["node":
        Kata: installer_gives_a_node_the_runtime_and_takes_it_away,
            manifests_name_what_the_installer_makes;
    ]
}

const CONFIG: &str = "/etc/containerd/config.toml";

/// A containerd without a runtime of ours.
pub fn start(arena: &Arena, probe: &Path) -> Result<Cri> {
    crate::cri::write_default_network()?;
    Cri::new(Containerd::start(
        arena,
        "kata-runtime",
        probe,
        Programs::installed(),
        "    conf_dir = \"/etc/cni/net.d\"\n",
    )?)
}

/// `kata-node verb` with what was built as what it installs.
fn node(cri: &Cri, verb: &str) -> Result<String> {
    let stage = cri.containerd.arena.dir("node-stage")?;
    if !stage.join("opt").exists() {
        let mut make = Command::new("make");
        make.args(["--no-print-directory", "-C"]).arg(assets::source());
        make.args(["install", "PREFIX=/opt/kata"]).arg(format!("DESTDIR={}", stage.display()));
        make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
        command::ok(&mut make)?;
    }
    let mut script = Command::new(assets::source().join("deploy/kubernetes/kata-node"));
    script.arg(verb).env("SOURCE", stage.join("opt/kata")).env("RESTART", "").env_remove("NODE");
    Ok(command::ok(&mut script)?.out())
}

fn installer_gives_a_node_the_runtime_and_takes_it_away(cri: &Cri) -> Result<()> {
    let before = fs::read_to_string(CONFIG)?;
    ensure!(cri.pod().is_err(), "there is a runtime already");
    let said = node(cri, "install")?;
    ensure!(said.contains("restart containerd"), "{said}");
    let configured = fs::read_to_string(CONFIG)?;
    // Again: nothing to do.
    let said = node(cri, "install")?;
    ensure!(!said.contains("restart containerd") && fs::read_to_string(CONFIG)? == configured);
    cri.restart()?;
    let pod = cri.pod()?;
    ensure!(pod.is_ready()?);
    pod.remove(&[])?;
    // What ran before still does.
    cri.run_pod_with(cri.pod_config()?, "runc")?.remove(&[])?;
    node(cri, "remove")?;
    ensure!(fs::read_to_string(CONFIG)? == before, "containerd's configuration is another");
    ensure!(!Path::new("/opt/kata").exists(), "files are left");
    Ok(())
}

fn manifests_name_what_the_installer_makes(_: &Cri) -> Result<()> {
    let read =
        |name: &str| fs::read_to_string(assets::source().join("deploy/kubernetes").join(name));
    let (class, installer, script) =
        (read("runtimeclass.yaml")?, read("installer.yaml")?, read("kata-node")?);
    ensure!(class.contains("handler: kata\n") && script.contains("containerd.runtimes.kata]"));
    let label = "katacontainers.io/kata-runtime";
    ensure!(class.contains(&format!("{label}: \"true\"")) && script.contains(label));
    ensure!(installer.contains("kata-node, stay]"));
    Ok(())
}
