//! Pods by containerd's CRI, driven as a kubelet would.

mod containers;
mod failures;
mod load;
mod networks;
mod pods;
mod resources;
mod streaming;
mod volumes;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kata_e2e::arena::Arena;
use kata_e2e::containerd::{Containerd, Programs};
use kata_e2e::cri::Cri;
use kata_e2e::runner::Trial;

/// All that may run side by side.
pub fn trials() -> Vec<Trial<Cri>> {
    let mut all = pods::trials();
    all.extend(containers::trials());
    all.extend(volumes::trials());
    all.extend(resources::trials());
    all.extend(streaming::trials());
    all.extend(networks::trials());
    all.extend(failures::trials());
    all
}

/// Those of the life of pods and their containers.
pub fn trials_of_pods() -> Vec<Trial<Cri>> {
    let mut all = pods::trials();
    all.extend(containers::trials());
    all
}

/// Which containerd, and who makes its pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// The system's.
    Installed,
    /// containerd 2, which makes a container that stands for the pod, as the older ones do.
    Two,
    /// containerd 2, which leaves pods to the runtime by its Sandbox API.
    SandboxApi,
}

/// Those that want the machine for themselves, to see whether it is as it was.
pub fn lonely_trials() -> Vec<Trial<Cri>> {
    load::trials()
}

/// The default network, for a containerd that is configured by somebody else.
pub fn write_default_network() -> Result<()> {
    let network = &networks::NETWORKS[0];
    write_network(network, "/etc/cni/net.d")
}

fn write_network(network: &networks::Network, dir: &str) -> Result<()> {
    fs::create_dir_all(dir)?;
    for (n, text) in network.files.iter().enumerate() {
        let path = format!("{dir}/{n}-e2e.conflist");
        fs::write(&path, text).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

/// Starts containerd with one runtime handler for each network.
pub fn start(arena: &Arena, runtime: &'static str, probe: &Path, daemon: Daemon) -> Result<Cri> {
    let programs = match daemon {
        Daemon::Installed => Programs::installed(),
        Daemon::Two | Daemon::SandboxApi => Programs::containerd_2()?,
    };
    let sandboxer = match daemon {
        Daemon::SandboxApi => "    sandboxer = \"shim\"\n",
        Daemon::Installed | Daemon::Two => "",
    };
    networks::make_uplink()?;
    let kind = if runtime == "runc" { "io.containerd.runc.v2" } else { "io.containerd.kata.v2" };
    let name = if runtime == "runc" { "runc" } else { "kata" };
    let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
    let mut lines = format!(
        "    conf_dir = \"/etc/cni/net.d\"\n  [{plugin}.containerd]\n    default_runtime_name = \"{name}\"\n"
    );
    for network in networks::NETWORKS {
        let handler = if network.name.is_empty() {
            name.to_owned()
        } else {
            format!("{name}-{}", network.name)
        };
        let dir =
            format!("/etc/cni/{}.d", if network.name.is_empty() { "net" } else { network.name });
        write_network(&network, &dir)?;
        let count = network.files.len();
        lines.push_str(&format!(
            "  [{plugin}.containerd.runtimes.{handler}]\n    runtime_type = \"{kind}\"\n    \
             pod_annotations = [\"io.katacontainers.*\"]\n    privileged_without_host_devices = true\n    \
             cni_conf_dir = \"{dir}\"\n    cni_max_conf_num = {count}\n{sandboxer}"
        ));
    }
    Cri::new(Containerd::start(arena, runtime, probe, programs, &lines)?)
}
