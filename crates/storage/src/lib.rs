//! From `config.json` to what host and guest each do for a container's file systems.
//!
//! [`plan`] takes the specification as the engine wrote it and gives back the one that
//! the guest gets (paths in the guest's terms, host-only parts taken out) together with
//! the list of host paths to attach to the share. It touches nothing: the sandbox acts
//! on the [`Plan`]. What the engine named is trusted as far as `runc` would trust it.

mod disk;
mod pod;
mod volume;

use kata_oci::{BlockIo, Cpu, Hooks, Mount, NamespaceKind, Resources, Root, Spec};
use kata_protocol::agent::Storage;
use kata_protocol::{Id, SHARE_MOUNT};
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
    /// The specification for the guest.
    pub spec: Spec,
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

/// Plans the file systems of `container`. Its root is mounted from `rootfs`; when that names
/// nothing, it is in the bundle. `pod` is what it joins. In the share all is below `share`, which
/// no container had before: guests remember for some time what was in a directory.
///
/// # Errors
/// [`StorageError`] when a path does not exist or cannot be shared with a VM.
pub fn plan(
    container: &Id,
    share: &Path,
    bundle: &Path,
    spec: &Spec,
    rootfs: &[FileSystem],
    pod: Option<&Pod>,
) -> Result<Plan, StorageError> {
    refuse_what_no_vm_can_have(spec, pod)?;
    let mut guest = spec.clone();
    let mut attachments = Vec::new();
    let mut resolv_conf = None;
    let mut shared_storages = Vec::new();

    let disk = match rootfs {
        [mount] => disk::of(container, mount),
        _ => None,
    };
    let at = share.join(ROOT);
    root_at(
        &mut guest,
        match &disk {
            Some(disk) => PathBuf::from(&disk.storage.mount_point),
            None => Path::new(SHARE_MOUNT).join(&at),
        },
    );
    if disk.is_none() {
        attachments.push(Attachment { at, ..root_of(bundle, spec, rootfs)? });
    }

    guest.mounts.extend(pod.into_iter().flat_map(|pod| pod.lacking(&spec.mounts)).cloned());
    for (index, mount) in guest.mounts.iter_mut().enumerate() {
        if mount.destination == Path::new("/etc/resolv.conf") {
            resolv_conf = mount.source.clone();
        }
        let at = share.join(format!("m{index}"));
        match place(mount, Volume::of(mount, bundle)?, spec, pod, at)? {
            Needs::Nothing => {}
            Needs::Storage(storage) => shared_storages.push(storage),
            Needs::Attachment(attachment) => attachments.push(attachment),
        }
    }
    leave_out_what_is_the_hosts(container, &mut guest);
    if let Some(pod) = pod {
        pod.join(&mut guest);
    }
    Ok(Plan { spec: guest, attachments, disk, shared_storages, resolv_conf })
}

/// What a mount needs beside its entry in the guest's specification.
enum Needs {
    Nothing,
    Storage(Storage),
    Attachment(Attachment),
}

/// Makes a mount the guest's; `at` is where it would be in the share.
fn place(
    mount: &mut Mount,
    volume: Volume,
    spec: &Spec,
    pod: Option<&Pod>,
    at: PathBuf,
) -> Result<Needs, StorageError> {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Ok(match volume {
        Volume::InGuest if pod.is_some() && Pod::shares_memory(spec, mount) => {
            let storage = pod::shared_memory(mount);
            mount.kind = "bind".to_owned();
            mount.source = Some(PathBuf::from(&storage.mount_point));
            mount.options = texts(&["bind"]);
            Needs::Storage(storage)
        }
        Volume::InGuest => Needs::Nothing,
        Volume::Memory { size, .. } if pod.is_none() => {
            mount.kind = "tmpfs".to_owned();
            mount.source = Some("shm".into());
            let size = format!("size={size}");
            mount.options = texts(&["nosuid", "noexec", "nodev", "mode=1777", &size]);
            Needs::Nothing
        }
        Volume::Memory { source, size } => {
            let storage = pod::memory(&source, size)?;
            mount.source = Some(PathBuf::from(&storage.mount_point));
            mount.kind = "bind".to_owned();
            Needs::Storage(storage)
        }
        Volume::Shared { source, readonly, recursive } => {
            mount.source = Some(Path::new(SHARE_MOUNT).join(&at));
            let source = Source::Path(source);
            Needs::Attachment(Attachment { source, at, readonly, recursive })
        }
    })
}

/// Says where the guest has the container's root.
fn root_at(guest: &mut Spec, path: PathBuf) {
    guest.root = Some(Root { path, ..guest.root.take().unwrap_or_default() });
}

/// What the root is called in a container's part of the share.
const ROOT: &str = "rootfs";

impl Plan {
    /// Has the root that is a disk mounted on the host instead, and shared. `share` is the
    /// directory in the share that [`plan`] was given.
    pub fn share_root(&mut self, share: &Path) {
        let Some(disk) = self.disk.take() else { return };
        let at = share.join(ROOT);
        root_at(&mut self.spec, Path::new(SHARE_MOUNT).join(&at));
        let (source, readonly) = (Source::FileSystem(disk.mount), disk.readonly);
        self.attachments.insert(0, Attachment { source, at, readonly, recursive: true });
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
        let Some(path) = namespace.joined() else { continue };
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

/// Takes out of the guest's specification what only means something on the host.
fn leave_out_what_is_the_hosts(container: &Id, guest: &mut Spec) {
    if let Some(hooks) = guest.hooks.take() {
        let Hooks { create_container, start_container, .. } = hooks;
        guest.hooks = Some(Hooks { create_container, start_container, ..Hooks::default() });
    }
    let Some(linux) = &mut guest.linux else { return };
    linux.cgroups_path = Some(format!("/kata/{container}"));
    linux
        .devices
        .retain(|device| volume::guest_has_device(&device.kind, device.major, device.minor));
    if let Some(resources) = linux.resources.take() {
        linux.resources = Some(guest_resources(resources));
    }
}

/// Limits without what numbers the host's CPUs, memory nodes and disks.
pub fn guest_resources(resources: Resources) -> Resources {
    let cpu = resources.cpu.map(|cpu| Cpu { cpus: None, mems: None, ..cpu });
    let block_io =
        resources.block_io.map(|BlockIo { weight, .. }| BlockIo { weight, ..BlockIo::default() });
    Resources { cpu, block_io, ..resources }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(extra: &str, setup: impl FnOnce(&Path)) -> Result<Plan, StorageError> {
        let bundle = tempfile::tempdir().unwrap();
        std::fs::create_dir(bundle.path().join("rootfs")).unwrap();
        setup(bundle.path());
        let text = format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs","readonly":true}},{extra}}}"#
        );
        let spec = Spec::parse(text.as_bytes()).unwrap();
        let share = Path::new("c1");
        plan(&"c1".parse().unwrap(), share, bundle.path(), &spec, &[], None)
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
    fn rootfs_is_attached_and_renamed() {
        let plan = planned(r#""mounts":[]"#, |_| {}).unwrap();
        let root = plan.spec.root.unwrap();
        assert_eq!(root.path, Path::new(SHARE_MOUNT).join("c1/rootfs"));
        assert!(root.readonly);
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
        let resources = plan.spec.linux.unwrap().resources.unwrap();
        let cpu = resources.cpu.unwrap();
        assert_eq!((cpu.shares, cpu.cpus), (Some(512), None));
        let block_io = resources.block_io.unwrap();
        assert_eq!(block_io.weight, Some(100));
        assert!(block_io.throttle_read_bps_device.is_empty());
    }

    #[test]
    fn privileged_container_gets_the_devices_that_the_guest_has() {
        let devices = r#""devices":[{"type":"c","path":"/dev/fuse","major":10,"minor":229},
            {"type":"b","path":"/dev/vda","major":254,"minor":0}]"#;
        let rule = r#""resources":{"devices":[{"allow":true,"access":"rwm"}]}"#;
        let privileged = format!(r#""linux":{{{devices},{rule}}}"#);
        let guest = planned(&privileged, |_| {}).unwrap().spec;
        assert_eq!(guest.linux.unwrap().devices.len(), 1);
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
