//! From `config.json` to what host and guest each do for a container's file systems.
//!
//! [`plan`] takes the specification as the engine wrote it and gives back the one that
//! the guest gets (paths in the guest's terms, host-only parts taken out) together with
//! the list of host paths to attach to the share. It touches nothing: the sandbox acts
//! on the [`Plan`]. What the engine named is trusted as far as `runc` would trust it.

mod disk;
mod pod;
mod volume;

use kata_oci::{Mount, NamespaceKind, Spec};
use kata_protocol::agent::Storage;
use kata_protocol::{Id, SHARE_MOUNT};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

pub use disk::Disk;
pub use pod::Pod;
pub use volume::Volume;

/// A file system that the host is to mount, in the words of `mount(8)`; what an engine
/// hands over instead of a mounted root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// `overlay`, `bind`, `ext4`
    pub kind: String,
    /// A path, a device, or just a name.
    pub source: String,
    /// Mount options.
    pub options: Vec<String>,
}

impl FileSystem {
    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|o| o == option)
    }
}

/// What is to appear in the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory or file of the host: an absolute path.
    Path(PathBuf),
    /// Something to mount there.
    FileSystem(FileSystem),
}

/// Something of the host that is to appear in the share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// On the host.
    pub source: Source,
    /// Below the share's root.
    pub at: PathBuf,
    /// The guest may not write, whatever it tries.
    pub readonly: bool,
    /// Mounts below the source come along.
    pub recursive: bool,
}

/// What is to be done for one container.
#[derive(Clone, Debug)]
pub struct Plan {
    /// `config.json` for the guest.
    pub spec: Vec<u8>,
    /// What the share must hold before the guest is asked to create the container.
    pub attachments: Vec<Attachment>,
    /// The disk that is the container's root, if it is one.
    pub disk: Option<Disk>,
    /// What the guest mounts for all containers of the pod, unless it is there already.
    pub shared_storages: Vec<Storage>,
    /// The host's file that the container has as `/etc/resolv.conf`.
    pub resolv_conf: Option<PathBuf>,
}

/// Why a container's file systems cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The specification is not JSON (it was parsed before, so this is rare).
    #[error("config.json cannot be rewritten for the guest: {0}")]
    Json(#[from] serde_json::Error),
    /// A path that the engine named is not there.
    #[error("cannot use {path} as {role}: {source}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What it is for.
        role: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Something that a virtual machine cannot have.
    #[error("{what} cannot be passed into a virtual machine: {remedy}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        remedy: &'static str,
    },
}

/// Plans the file systems of `container`, whose `config.json` is `raw`. Its root is mounted
/// from `rootfs`; when that names nothing, it is in the bundle. `pod` is what it joins.
/// In the share all is below `share`, which no container had before: guests remember for
/// some time what was in a directory.
///
/// # Errors
/// [`StorageError`] when a path does not exist or cannot be shared with a VM.
pub fn plan(
    container: &Id,
    share: &Path,
    bundle: &Path,
    raw: &[u8],
    spec: &Spec,
    rootfs: &[FileSystem],
    pod: Option<&Pod>,
) -> Result<Plan, StorageError> {
    refuse_what_no_vm_can_have(spec, pod)?;
    let mut guest: Value = serde_json::from_slice(raw)?;
    let mut attachments = Vec::new();
    let mut resolv_conf = None;
    let mut shared_storages = Vec::new();

    let disk = match rootfs {
        [mount] => disk::of(container, mount),
        _ => None,
    };
    let at = share.join(ROOT);
    guest["root"]["path"] = match &disk {
        Some(disk) => json!(disk.storage.mount_point),
        None => json!(Path::new(SHARE_MOUNT).join(&at)),
    };
    if disk.is_none() {
        attachments.push(Attachment { at, ..root_of(bundle, spec, rootfs)? });
    }

    let mounts = mounts_of(spec, pod, &mut guest)?;
    for (index, mount) in mounts.into_iter().enumerate() {
        if mount.destination == Path::new("/etc/resolv.conf") {
            resolv_conf = mount.source.clone();
        }
        let at = share.join(format!("m{index}"));
        let entry = &mut guest["mounts"][index];
        match place(mount, Volume::of(mount, bundle)?, spec, pod, at, entry)? {
            Needs::Nothing => {}
            Needs::Storage(storage) => shared_storages.push(storage),
            Needs::Attachment(attachment) => attachments.push(attachment),
        }
    }
    leave_out_what_is_the_hosts(container, &mut guest);
    if let Some(pod) = pod {
        pod.join(spec, &mut guest);
    }
    Ok(Plan { spec: serde_json::to_vec(&guest)?, attachments, disk, shared_storages, resolv_conf })
}

/// What a mount needs beside its entry in the guest's specification.
enum Needs {
    Nothing,
    Storage(Storage),
    Attachment(Attachment),
}

/// Rewrites the guest's `entry` of a mount; `at` is where it would be in the share.
fn place(
    mount: &Mount,
    volume: Volume,
    spec: &Spec,
    pod: Option<&Pod>,
    at: PathBuf,
    entry: &mut Value,
) -> Result<Needs, StorageError> {
    Ok(match volume {
        Volume::InGuest if pod.is_some() && Pod::shares_memory(spec, mount) => {
            let storage = pod::shared_memory(mount);
            *entry = json!({
                "destination": mount.destination, "type": "bind",
                "source": storage.mount_point, "options": ["bind"],
            });
            Needs::Storage(storage)
        }
        Volume::InGuest => Needs::Nothing,
        Volume::Memory { size, .. } if pod.is_none() => {
            *entry = json!({
                "destination": mount.destination, "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={size}")],
            });
            Needs::Nothing
        }
        Volume::Memory { source, size } => {
            let storage = pod::memory(&source, size)?;
            entry["source"] = json!(storage.mount_point);
            entry["type"] = json!("bind");
            Needs::Storage(storage)
        }
        Volume::Shared { source, readonly, recursive } => {
            entry["source"] = json!(Path::new(SHARE_MOUNT).join(&at));
            let source = Source::Path(source);
            Needs::Attachment(Attachment { source, at, readonly, recursive })
        }
    })
}

/// The container's mounts: its own, and the files of its pod that it lacks, which the guest's
/// specification gets as well.
fn mounts_of<'a>(
    spec: &'a Spec,
    pod: Option<&'a Pod>,
    guest: &mut Value,
) -> Result<Vec<&'a Mount>, StorageError> {
    let mut mounts: Vec<_> = spec.mounts.iter().collect();
    let lacking: Vec<_> = pod.into_iter().flat_map(|pod| pod.lacking(&spec.mounts)).collect();
    if lacking.is_empty() {
        return Ok(mounts);
    }
    let entries = lacking.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    match guest["mounts"].as_array_mut() {
        Some(own) => own.extend(entries),
        None => guest["mounts"] = Value::Array(entries),
    }
    mounts.extend(lacking);
    Ok(mounts)
}

/// What the root is called in a container's part of the share.
const ROOT: &str = "rootfs";

impl Plan {
    /// Has the root that is a disk mounted on the host instead, and shared. `share` is the
    /// directory in the share that [`plan`] was given.
    ///
    /// # Errors
    /// The specification is not JSON (it was parsed before, so this is rare).
    pub fn share_root(&mut self, share: &Path) -> Result<(), StorageError> {
        let Some(disk) = self.disk.take() else { return Ok(()) };
        let at = share.join(ROOT);
        let mut guest: Value = serde_json::from_slice(&self.spec)?;
        guest["root"]["path"] = json!(Path::new(SHARE_MOUNT).join(&at));
        self.spec = serde_json::to_vec(&guest)?;
        let (source, readonly) = (Source::FileSystem(disk.mount), disk.readonly);
        self.attachments.insert(0, Attachment { source, at, readonly, recursive: true });
        Ok(())
    }
}

/// The container's root; where it goes is not said yet.
fn root_of(bundle: &Path, spec: &Spec, rootfs: &[FileSystem]) -> Result<Attachment, StorageError> {
    let path = |path: PathBuf| {
        let found = path.canonicalize().map_err(|source| StorageError::Path {
            path,
            role: "the root file system".to_owned(),
            source,
        });
        found.map(Source::Path)
    };
    let whole =
        |source| Attachment { source, at: PathBuf::new(), readonly: false, recursive: true };
    match rootfs {
        [] => {
            let root = spec.root.as_ref().map(|root| bundle.join(&root.path));
            Ok(whole(path(root.unwrap_or_default())?))
        }
        [bind] if bind.kind == "bind" || bind.has("bind") || bind.has("rbind") => Ok(Attachment {
            readonly: bind.has("ro"),
            recursive: bind.has("rbind"),
            ..whole(path(PathBuf::from(&bind.source))?)
        }),
        [mount] => {
            let readonly = mount.has("ro");
            Ok(Attachment { readonly, ..whole(Source::FileSystem(mount.clone())) })
        }
        several => Err(StorageError::Unsupported {
            what: format!("a root file system made of {} mounts", several.len()),
            remedy: "use a snapshotter that gives one (overlayfs, native, devmapper)",
        }),
    }
}

fn refuse_what_no_vm_can_have(spec: &Spec, pod: Option<&Pod>) -> Result<(), StorageError> {
    let unsupported =
        |what: String, remedy: &'static str| Err(StorageError::Unsupported { what, remedy });
    let linux = spec.linux();
    for namespace in &linux.namespaces {
        let Some(path) = namespace.path.as_ref().filter(|p| !p.as_os_str().is_empty()) else {
            continue;
        };
        let of_pod = pod.is_some_and(|pod| pod.has(path));
        if !of_pod && !matches!(namespace.kind, NamespaceKind::Network) {
            return unsupported(
                format!("the {:?} namespace {} of the host", namespace.kind, path.display()),
                "containers that share it must be in one pod, that is in one virtual machine",
            );
        }
    }
    for device in linux.devices.iter().filter(|_| !may_use_every_device(spec)) {
        if !volume::guest_has_device(&device.kind, device.major, device.minor) {
            return unsupported(
                format!("the device {}", device.path.display()),
                "use a bind mount of a directory, or a device that the guest kernel itself has \
                 (such as /dev/fuse or /dev/net/tun)",
            );
        }
    }
    Ok(())
}

/// Whether the engine lets the container use every device (`--privileged`). It then names
/// all that the host has, and means all that there are.
fn may_use_every_device(spec: &Spec) -> bool {
    let linux = spec.linux();
    let rules = linux.resources.as_ref().map(|resources| resources.devices.as_slice());
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rules.unwrap_or_default().iter().any(|rule| {
        let every_kind = rule.kind.as_deref().is_none_or(|kind| kind == "a" || kind.is_empty());
        rule.allow && every_kind && any(rule.major) && any(rule.minor)
    })
}

/// Takes out of the guest's `config.json` what only means something on the host.
fn leave_out_what_is_the_hosts(container: &Id, guest: &mut Value) {
    if let Some(hooks) = guest.get_mut("hooks").and_then(Value::as_object_mut) {
        hooks.retain(|name, _| name == "startContainer" || name == "createContainer");
    }
    let Some(linux) = guest.get_mut("linux").and_then(Value::as_object_mut) else { return };
    linux.insert("cgroupsPath".to_owned(), json!(format!("/kata/{container}")));
    linux.remove("intelRdt");
    if let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) {
        let number = |device: &Value, name: &str| device[name].as_i64().unwrap_or(-1);
        devices.retain(|device| {
            let kind = device["type"].as_str().unwrap_or_default();
            volume::guest_has_device(kind, number(device, "major"), number(device, "minor"))
        });
    }
    let Some(resources) = linux.get_mut("resources").and_then(Value::as_object_mut) else {
        return;
    };
    guest_resources(resources);
}

/// Takes out of `resources` what numbers the host's CPUs, memory nodes and disks.
pub fn guest_resources(resources: &mut serde_json::Map<String, Value>) {
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        for name in ["cpus", "mems", "realtimeRuntime", "realtimePeriod"] {
            cpu.remove(name);
        }
    }
    if let Some(block) = resources.get_mut("blockIO").and_then(Value::as_object_mut) {
        block.retain(|name, _| name == "weight");
    }
    resources.remove("network");
    resources.remove("rdma");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(extra: &str, setup: impl FnOnce(&Path)) -> Result<Plan, StorageError> {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("rootfs")).unwrap();
        setup(bundle.path());
        let text = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"x":{{"kept":1}},{extra}}}"#
        );
        let spec = Spec::parse(text.as_bytes()).unwrap();
        let share = Path::new("c1");
        plan(&"c1".parse().unwrap(), share, bundle.path(), text.as_bytes(), &spec, &[], None)
    }

    fn root(rootfs: &[FileSystem]) -> Result<Attachment, StorageError> {
        root_of(Path::new("/no/such/bundle"), &Spec::default(), rootfs)
    }

    fn mounted(kind: &str, source: &str, options: &[&str]) -> FileSystem {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        FileSystem { kind: kind.to_owned(), source: source.to_owned(), options }
    }

    #[test]
    fn root_that_is_bound_is_shared_as_it_is() {
        let root = root(&[mounted("bind", "/usr/../usr", &["rbind", "ro"])]).unwrap();
        assert_eq!(root.source, Source::Path("/usr".into()));
        assert!(root.readonly && root.recursive);
    }

    #[test]
    fn root_of_layers_is_mounted_for_the_share() {
        let overlay = mounted("overlay", "overlay", &["lowerdir=/a:/b"]);
        let root = root(std::slice::from_ref(&overlay)).unwrap();
        assert_eq!(root.source, Source::FileSystem(overlay.clone()));
        assert!(
            super::root_of(Path::new("/"), &Spec::default(), &[overlay.clone(), overlay]).is_err()
        );
    }

    #[test]
    fn rootfs_is_attached_and_renamed_and_unknown_fields_survive() {
        let plan = planned(r#""mounts":[]"#, |_| {}).unwrap();
        let guest: Value = serde_json::from_slice(&plan.spec).unwrap();
        assert_eq!(guest["root"]["path"], format!("{SHARE_MOUNT}/c1/rootfs"));
        assert_eq!(guest["x"]["kept"], 1);
        assert_eq!(plan.attachments.len(), 1);
    }

    #[test]
    fn readonly_bind_is_attached_readonly() {
        let plan = planned(
            r#""mounts":[{"destination":"/v","type":"bind","source":"vol","options":["rbind","ro"]}]"#,
            |bundle| std::fs::create_dir(bundle.join("vol")).unwrap(),
        )
        .unwrap();
        let volume = &plan.attachments[1];
        assert!(volume.readonly && volume.recursive);
        assert_eq!(volume.at, Path::new("c1/m0"));
    }

    #[test]
    fn missing_bind_source_is_named() {
        let error =
            planned(r#""mounts":[{"destination":"/v","type":"bind","source":"/no/such"}]"#, |_| {})
                .unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }

    #[test]
    fn host_cpus_and_disks_stay_on_the_host() {
        let plan = planned(
            r#""linux":{"resources":{"cpu":{"cpus":"0-7","shares":512},
               "blockIO":{"weight":100,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}}"#,
            |_| {},
        )
        .unwrap();
        let guest: Value = serde_json::from_slice(&plan.spec).unwrap();
        let resources = &guest["linux"]["resources"];
        assert_eq!(resources["cpu"], json!({"shares": 512}));
        assert_eq!(resources["blockIO"], json!({"weight": 100}));
    }

    #[test]
    fn privileged_container_gets_the_devices_that_the_guest_has() {
        let devices = r#""devices":[{"type":"c","path":"/dev/fuse","major":10,"minor":229},
            {"type":"b","path":"/dev/vda","major":254,"minor":0}]"#;
        let rule = r#""resources":{"devices":[{"allow":true,"access":"rwm"}]}"#;
        let privileged = format!(r#""linux":{{{devices},{rule}}}"#);
        let guest: Value =
            serde_json::from_slice(&planned(&privileged, |_| {}).unwrap().spec).unwrap();
        assert_eq!(guest["linux"]["devices"].as_array().unwrap().len(), 1);
        let asked_for = format!(r#""linux":{{{devices}}}"#);
        let error = planned(&asked_for, |_| {}).unwrap_err().to_string();
        assert!(error.contains("/dev/vda"), "{error}");
    }

    #[test]
    fn joining_a_host_pid_namespace_is_refused() {
        let error =
            planned(r#""linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#, |_| {})
                .unwrap_err();
        assert!(error.to_string().contains("one pod"), "{error}");
    }
}
