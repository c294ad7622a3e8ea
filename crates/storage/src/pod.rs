//! What a container shares with the others of its pod.
//!
//! A pod is one virtual machine, and what its containers share is the machine's own: network,
//! host name, IPC. Engines name those namespaces by the process that stands for the pod on
//! the host, `/proc/<pid>/ns/…`; in the guest nothing is to be joined then.

use crate::StorageError;
use kata_oci::{Mount, Namespace, NamespaceKind, Spec};
use kata_protocol::agent::Storage;
use kata_protocol::{POD_MOUNTS, SHARED_PID_NAMESPACE};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The pod that a container joins.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Host processes that stand for its containers.
    pub pids: Vec<i32>,
    /// Kernel parameters of its sandbox.
    pub sysctls: BTreeMap<String, String>,
    /// Files of its sandbox, which every container has that does not say otherwise.
    pub files: Vec<Mount>,
}

/// What a pod's containers have in common, by where they have it.
const COMMON_FILES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
/// POSIX shared memory: part of what an IPC namespace is.
pub(crate) const SHARED_MEMORY: &str = "/dev/shm";

impl Pod {
    /// The pod whose sandbox has this specification, and whose containers these processes stand
    /// for.
    pub fn of(sandbox: Option<&Spec>, pids: Vec<i32>) -> Self {
        let common =
            |mount: &&Mount| COMMON_FILES.iter().any(|at| mount.destination == Path::new(at));
        let files = sandbox.map(|spec| spec.mounts.iter().filter(common).cloned().collect());
        let sysctls = sandbox.map(|spec| spec.linux().sysctl.clone());
        Self { pids, sysctls: sysctls.unwrap_or_default(), files: files.unwrap_or_default() }
    }

    /// The pod's files that a container with these mounts lacks. Engines that leave pods to the
    /// runtime leave the files to it too.
    pub(crate) fn lacking<'a>(&'a self, mounts: &'a [Mount]) -> impl Iterator<Item = &'a Mount> {
        let has = |file: &Mount| mounts.iter().any(|mount| mount.destination == file.destination);
        self.files.iter().filter(move |file| !has(file))
    }

    /// Whether this mount is memory that the pod's containers share: its own, of a container
    /// that shares the pod's IPC.
    pub(crate) fn shares_memory(spec: &Spec, mount: &Mount) -> bool {
        let own_ipc = spec.linux().namespace(NamespaceKind::Ipc).is_some_and(|n| n.path.is_none());
        mount.kind == "tmpfs" && mount.destination == Path::new(SHARED_MEMORY) && !own_ipc
    }

    /// Whether a namespace's path is one of this pod's.
    pub(crate) fn has(&self, path: &Path) -> bool {
        let Ok(rest) = path.strip_prefix("/proc") else { return false };
        let mut parts = rest.iter();
        let pid = parts.next().and_then(|pid| pid.to_str()?.parse().ok());
        let in_ns = parts.next().is_some_and(|dir| dir == "ns") && parts.count() == 1;
        in_ns && pid.is_some_and(|pid| self.pids.contains(&pid))
    }

    /// Rewrites the guest's specification of a container: it shares what it does not have
    /// of its own.
    pub(crate) fn join(&self, guest: &mut Spec) {
        let Some(linux) = &mut guest.linux else { return };
        linux.namespaces.retain(|namespace| namespace.joined().is_none());
        // Also when the pod has the host's: that would be the agent's own.
        if linux.namespace(NamespaceKind::Pid).is_none() {
            let path = Some(SHARED_PID_NAMESPACE.into());
            linux.namespaces.push(Namespace { kind: NamespaceKind::Pid, path });
        }
        for (name, value) in &self.sysctls {
            linux.sysctl.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
}

/// The memory that a pod's containers share where nobody made one on the host.
pub(crate) fn shared_memory(mount: &Mount) -> Storage {
    Storage {
        driver: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: mount.options.clone(),
        mount_point: format!("{POD_MOUNTS}/shm"),
        ..Storage::default()
    }
}

/// The guest's memory that stands for the host's tmpfs at `source`: the same for every
/// container that has it.
pub(crate) fn memory(source: &Path, size: u64) -> Result<Storage, StorageError> {
    let metadata = std::fs::metadata(source).map_err(|error| StorageError::Path {
        path: source.to_owned(),
        role: "a volume of memory".to_owned(),
        source: error,
    })?;
    let mut name = DefaultHasher::new();
    source.hash(&mut name);
    Ok(Storage {
        driver: "tmpfs".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: vec![
            "nosuid,nodev".to_owned(),
            format!("mode={:o}", metadata.mode() & 0o7777),
            format!("uid={},gid={}", metadata.uid(), metadata.gid()),
            format!("size={size}"),
        ],
        mount_point: format!("{POD_MOUNTS}/{:016x}", name.finish()),
        ..Storage::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_oci::Linux;

    fn pod() -> Pod {
        let sysctls = [("net.x".to_owned(), "1".to_owned())].into();
        Pod { pids: vec![42], sysctls, files: Vec::new() }
    }

    #[test]
    fn only_namespaces_of_the_pods_processes_are_its_own() {
        let has = |path: &str| pod().has(Path::new(path));
        assert!(has("/proc/42/ns/ipc"));
        for other in ["/proc/1/ns/ipc", "/proc/42/ns", "/proc/42/ns/a/b", "/proc/42/root", "/x"] {
            assert!(!has(other), "{other}");
        }
    }

    fn joined(namespaces: &str) -> Linux {
        let text = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"r"}},"linux":{{"namespaces":[{namespaces}],
               "sysctl":{{"net.y":"2"}}}}}}"#
        );
        let mut guest = Spec::parse(text.as_bytes()).unwrap();
        pod().join(&mut guest);
        guest.linux.unwrap()
    }

    #[test]
    fn shared_namespaces_are_the_guests_and_own_ones_stay() {
        let linux = joined(
            r#"{"type":"pid"},{"type":"ipc","path":"/proc/42/ns/ipc"},{"type":"mount"},
               {"type":"network","path":"/proc/42/ns/net"}"#,
        );
        let kinds = linux.namespaces.iter().map(|n| (n.kind, n.path.is_none()));
        assert!(kinds.eq([(NamespaceKind::Pid, true), (NamespaceKind::Mount, true)]));
        let sysctl = [("net.x", "1"), ("net.y", "2")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        assert_eq!(linux.sysctl, sysctl.into());
    }

    #[test]
    fn pids_are_shared_on_request_and_instead_of_the_hosts() {
        for namespaces in [r#"{"type":"pid","path":"/proc/42/ns/pid"}"#, ""] {
            let linux = joined(namespaces);
            let [shared] = linux.namespaces.as_slice() else { panic!("{linux:?}") };
            assert_eq!(shared.kind, NamespaceKind::Pid);
            assert_eq!(shared.path.as_deref(), Some(Path::new(SHARED_PID_NAMESPACE)));
        }
    }

    #[test]
    fn a_container_has_the_pods_files_unless_it_has_its_own() {
        let mount = |at: &str| Mount { destination: at.into(), ..Mount::default() };
        let sandbox = Spec {
            mounts: vec![mount("/etc/hosts"), mount("/etc/resolv.conf"), mount("/proc")],
            ..Spec::default()
        };
        let pod = Pod::of(Some(&sandbox), vec![42]);
        let lacking = |mounts: &[Mount]| -> Vec<_> {
            pod.lacking(mounts).map(|file| file.destination.clone()).collect()
        };
        assert_eq!(lacking(&[mount("/etc/hosts")]), [Path::new("/etc/resolv.conf")]);
        assert_eq!(lacking(&[]).len(), 2);
    }

    #[test]
    fn shared_memory_goes_with_the_ipc_namespace() {
        let shares = |namespaces: &str, at: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"r"}},
                   "linux":{{"namespaces":[{namespaces}]}}}}"#
            );
            let mount = Mount { kind: "tmpfs".into(), destination: at.into(), ..Mount::default() };
            Pod::shares_memory(&Spec::parse(text.as_bytes()).unwrap(), &mount)
        };
        assert!(shares(r#"{"type":"ipc","path":"/proc/42/ns/ipc"}"#, "/dev/shm"));
        assert!(!shares(r#"{"type":"ipc"}"#, "/dev/shm"));
        assert!(!shares("", "/run"));
    }

    #[test]
    fn memory_of_one_volume_is_one_mount() {
        let dir = tempfile::tempdir().unwrap();
        let one = memory(dir.path(), 4096).unwrap();
        assert_eq!(one, memory(dir.path(), 4096).unwrap());
        assert_ne!(one.mount_point, memory(Path::new("/tmp"), 4096).unwrap().mount_point);
        assert!(one.mount_point.starts_with(POD_MOUNTS));
        assert!(one.options.contains(&"size=4096".to_owned()));
    }
}
