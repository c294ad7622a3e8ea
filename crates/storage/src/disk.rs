//! Roots that come as block devices or images of one (devmapper, blockfile, erofs): the
//! guest gets the disk itself and mounts it.

use crate::FileSystem;
use kata_protocol::agent::Storage;
use kata_protocol::{DISK_ROOTS, Id};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// File systems on disks that the guest's kernel knows.
const KNOWN: [&str; 5] = ["ext4", "ext3", "ext2", "xfs", "erofs"];
/// Options that tell the host how to mount; the guest mounts what it is given.
const OF_THE_HOST: [&str; 2] = ["loop", "discard"];

/// A disk with a container's root.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// The block device or image on the host.
    pub path: PathBuf,
    /// It is an image.
    pub is_file: bool,
    /// The guest may not write to it.
    pub readonly: bool,
    /// What the guest mounts, and where.
    pub storage: Storage,
    /// As the engine described it.
    pub mount: FileSystem,
}

/// The disk that `mount` describes; none if it is something else.
pub(crate) fn of(container: &Id, mount: &FileSystem) -> Option<Disk> {
    if !KNOWN.contains(&mount.kind.as_str()) {
        return None;
    }
    let path = Path::new(&mount.source).canonicalize().ok()?;
    let kind = std::fs::metadata(&path).ok()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return None;
    }
    let readonly = mount.has("ro") || mount.kind == "erofs";
    let mut options: Vec<String> =
        mount.options.iter().filter(|o| !OF_THE_HOST.contains(&o.as_str())).cloned().collect();
    if readonly && !mount.has("ro") {
        options.push("ro".to_owned());
    }
    // A disk is found by its serial, which has room for 20 characters.
    let mut name = DefaultHasher::new();
    container.hash(&mut name);
    let storage = Storage {
        driver: "blk".to_owned(),
        source: format!("root{:016x}", name.finish()),
        fstype: mount.kind.clone(),
        options,
        mount_point: format!("{DISK_ROOTS}/{container}"),
        ..Storage::default()
    };
    Some(Disk { path, is_file: kind.is_file(), readonly, storage, mount: mount.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &Path, options: &[&str]) -> FileSystem {
        let options = options.iter().map(|o| (*o).to_owned()).collect();
        FileSystem { kind: kind.to_owned(), source: source.display().to_string(), options }
    }

    #[test]
    fn an_image_becomes_a_disk_that_the_guest_finds_by_its_serial() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let id = "c1".parse().unwrap();
        let disk = of(&id, &mount("ext4", image.path(), &["loop", "noatime"])).unwrap();
        assert!(disk.is_file && !disk.readonly);
        assert_eq!(disk.storage.options, ["noatime"]);
        assert_eq!(disk.storage.source.len(), 20);
        assert!(disk.storage.mount_point.ends_with("/c1"));
        assert!(of(&id, &mount("erofs", image.path(), &["loop"])).unwrap().readonly);
    }

    #[test]
    fn what_is_no_disk_is_left_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let id = "c1".parse().unwrap();
        assert_eq!(of(&id, &mount("ext4", dir.path(), &[])), None);
        assert_eq!(of(&id, &mount("ext4", Path::new("/no/such"), &[])), None);
        assert_eq!(of(&id, &mount("overlay", Path::new("overlay"), &[])), None);
    }
}
