//! Where a server listens for containerd.
//!
//! A socket's path may have 107 bytes, a bundle's more; so containerd's shims listen in one
//! short directory, under a hash of what tells them apart.

use sha2::{Digest, Sha256};
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The directory, unless containerd names another.
const SOCKETS: &str = "/run/containerd/s";

/// The address of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    path: PathBuf,
}

/// Why nobody can listen at an address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// A living server does.
    #[error("a server listens at {0} already: the container exists")]
    Taken(PathBuf),
    #[error("cannot listen at {0}")]
    Io(PathBuf, #[source] io::Error),
}

impl Address {
    /// The address of the server of `container` (a pod's sandbox, or alone), for the
    /// containerd whose own socket is `engine`.
    pub(crate) fn of(engine: &str, namespace: &str, container: &str, dir: Option<&Path>) -> Self {
        let named = Path::new(engine).join(namespace).join(container);
        let hash = Sha256::digest(named.as_os_str().as_encoded_bytes());
        Self { path: dir.unwrap_or(Path::new(SOCKETS)).join(format!("{hash:x}")) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// As containerd wants it.
    pub(crate) fn uri(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Whether a living process listens there.
    pub(crate) fn answers(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// Listens there; a socket that a dead server left is removed.
    pub(crate) fn listen(&self) -> Result<UnixListener, ListenError> {
        let failed = |error| ListenError::Io(self.path.clone(), error);
        if let Some(dir) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(failed)?;
        }
        let listener = match UnixListener::bind(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if self.answers() {
                    return Err(ListenError::Taken(self.path.clone()));
                }
                self.remove();
                UnixListener::bind(&self.path)
            }
            other => other,
        }
        .map_err(failed)?;
        std::fs::set_permissions(&self.path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
        Ok(listener)
    }

    /// Nobody is to find it any more.
    pub(crate) fn remove(&self) {
        // What is gone need not be removed; what cannot be shows at the next listen.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(dir: &Path, id: &str) -> Address {
        Address::of("/run/containerd/containerd.sock", "default", id, Some(dir))
    }

    #[test]
    fn address_is_short_and_one_for_each_container() {
        let of = |namespace, id: &str| Address::of("/run/c.sock", namespace, id, None);
        assert!(of("n", &"x".repeat(500)).path.as_os_str().len() < 108);
        assert!(of("n", "a").uri().starts_with("unix:///run/containerd/s/"));
        assert_ne!(of("n", "a"), of("m", "a"));
        // The hash that containerd's own shims would use.
        let hash = Sha256::digest(b"/run/c.sock/n/a");
        assert!(of("n", "a").uri().ends_with(&format!("{hash:x}")));
    }

    #[test]
    fn stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = address(&dir.path().join("s"), "a");
        assert!(!address.answers());
        let first = address.listen().unwrap();
        assert!(address.answers());
        assert!(matches!(address.listen(), Err(ListenError::Taken(_))));
        drop(first);
        assert!(!address.answers());
        let _second = address.listen().unwrap();
        let mode = std::fs::metadata(address.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
