//! What one entry of `mounts` becomes.

use crate::StorageError;
use kata_oci::Mount;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// How a mount gets into the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// The guest's kernel has it: proc, sysfs, tmpfs, or a bind of such a path.
    InGuest,
    /// Memory: of the guest, of the same size.
    Memory {
        /// The tmpfs of the host that it replaces.
        source: PathBuf,
        /// Bytes.
        size: u64,
    },
    /// A host directory or file, through the share.
    Shared {
        /// On the host, absolute, no symbolic links.
        source: PathBuf,
        /// The guest may not write.
        readonly: bool,
        /// Mounts below come along.
        recursive: bool,
    },
}

/// File system types that the guest's kernel mounts by itself.
const GUEST_TYPES: [&str; 10] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "devtmpfs",
    "hugetlbfs",
    "bpf",
];

impl Volume {
    /// Decides what `mount` becomes. Relative sources are below the bundle.
    pub(crate) fn of(mount: &Mount, bundle: &Path) -> Result<Self, StorageError> {
        if !mount.is_bind() {
            if GUEST_TYPES.contains(&mount.kind.as_str()) {
                return Ok(Self::InGuest);
            }
            return Err(StorageError::Unsupported {
                what: format!("a mount of type {:?}", mount.kind),
                remedy: "mount it on the host and bind the directory (-v) instead",
            });
        }
        let named = bundle.join(mount.source.as_deref().unwrap_or(Path::new("")));
        if [Path::new("/proc"), Path::new("/sys")].iter().any(|own| named.starts_with(own)) {
            return Ok(Self::InGuest);
        }
        let missing = |source| StorageError::Path {
            path: named.clone(),
            role: format!("the source of {}", mount.destination.display()),
            source,
        };
        let source = named.canonicalize().map_err(missing)?;
        let kind = std::fs::metadata(&source).map_err(missing)?.file_type();
        // POSIX shared memory, and a pod's volumes of the kind `emptyDir: {medium: Memory}`.
        let memory = mount.destination == Path::new("/dev/shm")
            || source.components().any(|part| part.as_os_str() == "kubernetes.io~empty-dir");
        if memory
            && kind.is_dir()
            && let Some(size) = tmpfs_size(&source)
        {
            return Ok(Self::Memory { source, size });
        }
        if kind.is_char_device() || kind.is_block_device() || source == Path::new("/dev") {
            // The guest's own nodes: a host's device number means nothing there.
            return Ok(Self::InGuest);
        }
        if kind.is_socket() {
            tracing::warn!(path = %source.display(),
                "a socket of the host is visible in the container, but nobody can connect to it there");
        }
        Ok(Self::Shared {
            source,
            readonly: mount.is_readonly(),
            recursive: mount.options.iter().any(|o| o == "rbind"),
        })
    }
}

/// Total size of the tmpfs at `path`, if it is one.
fn tmpfs_size(path: &Path) -> Option<u64> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let stat = rustix::fs::statfs(path).ok()?;
    (stat.f_type == TMPFS_MAGIC).then(|| stat.f_blocks.saturating_mul(stat.f_bsize.unsigned_abs()))
}

/// Whether the guest's kernel offers this device itself, under the same number.
pub(crate) fn guest_has_device(kind: &str, major: i64, minor: i64) -> bool {
    match kind {
        "p" => true,
        "c" | "u" => matches!(
            (major, minor),
            (1, 3 | 5 | 7 | 8 | 9 | 11) // null zero full random urandom kmsg
                | (5, 0..=2) // tty console ptmx
                | (10, 200 | 229 | 237) // net/tun fuse loop-control
                | (136, _) // pts
        ),
        "b" => major == 7, // loop
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: &str, options: &[&str]) -> Mount {
        Mount {
            destination: "/d".into(),
            kind: "bind".into(),
            source: Some(source.into()),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn proc_and_sys_are_the_guests_own() {
        for source in ["/sys/fs/cgroup", "/proc/sys"] {
            let volume = Volume::of(&bind(source, &["rbind"]), Path::new("/")).unwrap();
            assert_eq!(volume, Volume::InGuest);
        }
    }

    #[test]
    fn plain_bind_does_not_take_submounts_along() {
        let volume = Volume::of(&bind("/tmp", &["bind"]), Path::new("/")).unwrap();
        assert!(matches!(volume, Volume::Shared { recursive: false, readonly: false, .. }));
    }

    #[test]
    fn network_file_systems_are_refused_with_a_way_out() {
        let mount = Mount { kind: "nfs".into(), ..Mount::default() };
        let error = Volume::of(&mount, Path::new("/")).unwrap_err().to_string();
        assert!(error.contains("bind the directory"), "{error}");
    }
}
