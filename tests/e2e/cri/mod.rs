//! Pods by containerd's CRI, driven as a kubelet would.

mod containers;
mod failures;
mod load;
mod networks;
mod pods;
mod resources;
mod sandbox_api;
mod streaming;
mod volumes;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kata_e2e::arena::Arena;
use kata_e2e::assets;
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

/// What only the Sandbox API shows.
pub fn trials_of_the_sandbox_api() -> Vec<Trial<Cri>> {
    let mut all = sandbox_api::trials();
    all.extend(trials());
    all
}

/// Those of the life of pods and their containers, and of their deaths.
pub fn trials_of_pods() -> Vec<Trial<Cri>> {
    let mut all = pods::trials();
    all.extend(containers::trials());
    all.extend(failures::trials());
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

/// A handler with a configuration of its own: its machines have [`SMALL_MIB`].
const SMALL: &str = "kata-small";
const SMALL_MIB: u64 = 384;

/// The handler, in this table of containerd's configuration. Its configuration is named by an
/// option; where the Sandbox API is used containerd 2.1 knows no options, and the shim's name
/// does it.
fn small(table: &str, daemon: Daemon) -> Result<String> {
    let path = Path::new(assets::CONFIG).with_file_name("configuration-small.toml");
    fs::create_dir_all(path.with_file_name(""))?;
    fs::write(&path, format!("[hypervisor.qemu]\ndefault_memory = {SMALL_MIB}\n"))?;
    if daemon == Daemon::SandboxApi {
        let shim = Path::new("/usr/bin/containerd-shim-kata-small-v2");
        if !shim.exists() {
            std::os::unix::fs::symlink("containerd-shim-kata-v2", shim)?;
        }
        return Ok(format!(
            "  [{table}]\n    runtime_type = \"io.containerd.kata-small.v2\"\n    sandboxer = \"shim\"\n"
        ));
    }
    Ok(format!(
        "  [{table}]\n    runtime_type = \"io.containerd.kata.v2\"\n  [{table}.options]\n    \
         ConfigPath = \"{}\"\n",
        path.display()
    ))
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
    if runtime != "runc" {
        lines.push_str(&small(&format!("{plugin}.containerd.runtimes.{SMALL}"), daemon)?);
    }
    Cri::new(Containerd::start(arena, runtime, probe, programs, &lines)?)
}
