//! A pod as containerd describes it to the Sandbox API, in the terms of the OCI.
//!
//! Without that API containerd makes a container that stands for the pod, and files that the
//! pod's containers share. With it the sandbox makes both itself: what is written here to the
//! bundle is what containerd 2's own `podsandbox` controller would have written. So there is
//! one kind of pod, and one way to start it.

use cri::{NamespaceMode, PodSandboxConfig};
use kata_protocol::Id;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    unused,
    non_snake_case,
    trivial_casts
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

pub(crate) use generated::cri;

/// The type of [`PodSandboxConfig`] in an `Any`.
pub(crate) const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Annotations that are for the runtime; the administrator's configuration says which of them
/// count. The others are between the pod's owner and Kubernetes.
const FOR_THE_RUNTIME: &str = "io.katacontainers.";
/// What containerd 2 gives every pod that does not say otherwise.
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")];
/// Files that all containers of the pod have, by the names they have in the bundle.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Writes the pod's files and its `config.json` to `bundle`.
///
/// # Errors
/// A file cannot be read or written.
pub(crate) fn write(
    bundle: &Path,
    id: &Id,
    config: &PodSandboxConfig,
    netns: Option<&Path>,
) -> io::Result<()> {
    fs::create_dir_all(bundle.join("rootfs"))?;
    fs::write(bundle.join("hostname"), format!("{}\n", config.hostname))?;
    fs::copy("/etc/hosts", bundle.join("hosts"))?;
    match config.dns_config.as_ref() {
        Some(dns) => fs::write(bundle.join("resolv.conf"), resolv_conf(dns))?,
        // No wishes: the host's.
        None => fs::copy("/etc/resolv.conf", bundle.join("resolv.conf")).map(drop)?,
    }
    let spec = spec(bundle, id, config, netns);
    fs::write(bundle.join("config.json"), spec.to_string())
}

fn spec(bundle: &Path, id: &Id, config: &PodSandboxConfig, netns: Option<&Path>) -> Value {
    let linux = config.linux.get_or_default();
    let mounts = FILES.map(|name| {
        json!({"destination": format!("/etc/{name}"), "source": bundle.join(name),
               "type": "bind", "options": ["rbind"]})
    });
    let mut sysctls: BTreeMap<&str, &str> = SYSCTLS.into();
    sysctls.extend(linux.sysctls.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let mut own = Map::new();
    own.insert("namespaces".to_owned(), namespaces(config, netns));
    own.insert("sysctl".to_owned(), json!(sysctls));
    if !linux.cgroup_parent.is_empty() {
        own.insert("cgroupsPath".to_owned(), json!(cgroups_path(&linux.cgroup_parent, id)));
    }
    json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs", "readonly": true},
        "hostname": config.hostname,
        "mounts": mounts,
        "annotations": annotations(id, config),
        "linux": own,
    })
}

/// A pod on the host's network has no namespace of its own; that is refused when it starts.
fn namespaces(config: &PodSandboxConfig, netns: Option<&Path>) -> Value {
    let context = config.linux.get_or_default().security_context.get_or_default();
    let network = context.namespace_options.get_or_default().network.enum_value_or_default();
    let mut all = vec![json!({"type": "uts"}), json!({"type": "ipc"}), json!({"type": "pid"})];
    match netns {
        _ if network == NamespaceMode::NODE => {}
        Some(path) => all.push(json!({"type": "network", "path": path})),
        None => all.push(json!({"type": "network"})),
    }
    Value::Array(all)
}

/// A `.slice` is systemd's, and has the sandbox as a scope in it.
fn cgroups_path(parent: &str, id: &Id) -> String {
    let last = parent.rsplit('/').next().unwrap_or_default();
    if last.ends_with(".slice") {
        return format!("{last}:cri-containerd:{id}");
    }
    format!("{}/{id}", parent.trim_end_matches('/'))
}

fn annotations(id: &Id, config: &PodSandboxConfig) -> BTreeMap<String, String> {
    let known = config.annotations.iter().filter(|(name, _)| name.starts_with(FOR_THE_RUNTIME));
    let mut all: BTreeMap<_, _> = known.map(|(n, v)| (n.clone(), v.clone())).collect();
    let mut set = |name: &str, value: String| {
        all.insert(format!("io.kubernetes.cri.{name}"), value);
    };
    let metadata = config.metadata.get_or_default();
    set("container-type", "sandbox".to_owned());
    set("sandbox-id", id.to_string());
    set("sandbox-name", metadata.name.clone());
    set("sandbox-namespace", metadata.namespace.clone());
    set("sandbox-uid", metadata.uid.clone());
    set("sandbox-log-directory", config.log_directory.clone());
    if let Some(resources) = config.linux.get_or_default().resources.as_ref() {
        set("sandbox-cpu-period", resources.cpu_period.to_string());
        set("sandbox-cpu-quota", resources.cpu_quota.to_string());
        set("sandbox-cpu-shares", resources.cpu_shares.to_string());
        set("sandbox-memory", resources.memory_limit_in_bytes.to_string());
    }
    all
}

/// resolv.conf(5).
fn resolv_conf(dns: &cri::DNSConfig) -> String {
    let line = |keyword: &str, words: &[String]| match words {
        [] => String::new(),
        words => format!("{keyword} {}\n", words.join(" ")),
    };
    let servers = dns.servers.iter().map(|server| format!("nameserver {server}\n"));
    let servers: String = servers.collect();
    line("search", &dns.searches) + &servers + &line("options", &dns.options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::MessageField;
    use kata_oci::{NamespaceKind, Spec};
    use kata_sandbox::PodRole;

    fn config() -> PodSandboxConfig {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".to_owned();
        config.dns_config = MessageField::some(cri::DNSConfig {
            servers: vec!["192.0.2.1".to_owned(), "192.0.2.2".to_owned()],
            searches: vec!["a.test".to_owned(), "b.test".to_owned()],
            ..Default::default()
        });
        config.annotations = [("io.katacontainers.x", "1"), ("owner", "me")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
        config.linux = MessageField::some(cri::LinuxPodSandboxConfig {
            cgroup_parent: "/pods/p".to_owned(),
            resources: MessageField::some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        });
        config
    }

    fn written(config: &PodSandboxConfig, netns: Option<&Path>) -> (tempfile::TempDir, Spec) {
        let bundle = tempfile::tempdir().unwrap();
        write(bundle.path(), &"p1".parse().unwrap(), config, netns).unwrap();
        let raw = fs::read(bundle.path().join("config.json")).unwrap();
        (bundle, Spec::parse(&raw).unwrap())
    }

    #[test]
    fn a_pod_is_written_as_containerd_would_have() {
        let (bundle, spec) = written(&config(), Some(Path::new("/run/netns/n")));
        assert_eq!(PodRole::of(&spec.annotations).unwrap(), PodRole::Sandbox);
        assert_eq!(spec.annotations["io.kubernetes.cri.sandbox-memory"], "67108864");
        assert_eq!(spec.annotations["io.katacontainers.x"], "1");
        assert!(!spec.annotations.contains_key("owner"));
        let linux = spec.linux();
        assert_eq!(linux.cgroups_path.as_deref(), Some("/pods/p/p1"));
        assert_eq!(linux.sysctl["net.ipv4.ip_unprivileged_port_start"], "0");
        let network = linux.namespace(NamespaceKind::Network).unwrap();
        assert_eq!(network.path.as_deref(), Some(Path::new("/run/netns/n")));
        let resolv = fs::read_to_string(bundle.path().join("resolv.conf")).unwrap();
        assert_eq!(resolv, "search a.test b.test\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n");
        assert!(spec.mounts.iter().all(|mount| mount.source.as_ref().unwrap().exists()));
    }

    #[test]
    fn a_pod_on_the_hosts_network_has_no_namespace() {
        let mut on_host = config();
        let context = cri::LinuxSandboxSecurityContext {
            namespace_options: MessageField::some(cri::NamespaceOption {
                network: NamespaceMode::NODE.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        on_host.linux.as_mut().unwrap().security_context = MessageField::some(context);
        let (_bundle, spec) = written(&on_host, None);
        assert!(spec.linux().namespace(NamespaceKind::Network).is_none());
        let (_bundle, spec) = written(&config(), None);
        assert!(spec.linux().namespace(NamespaceKind::Network).unwrap().path.is_none());
    }

    #[test]
    fn a_slice_is_named_as_systemd_does() {
        let id = "p1".parse().unwrap();
        assert_eq!(cgroups_path("/a.slice/a-b.slice", &id), "a-b.slice:cri-containerd:p1");
        assert_eq!(cgroups_path("/pods/", &id), "/pods/p1");
    }
}
