//! Which QEMU it is: processor properties have names that older ones refuse.
//!
//! To ask costs 20 ms, so the answer is kept for as long as the host is up and the file
//! is the same.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::HypervisorError;

/// Where the answer is kept.
const CACHE: &str = "/run/kata-containers/qemu.json";

/// A QEMU that was asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    path: PathBuf,
    inode: u64,
    modified: (i64, i64),
    major: u32,
}

/// The first number of this QEMU's version.
pub(crate) async fn major(qemu: &Path) -> Result<u32, HypervisorError> {
    let failed = |source| HypervisorError::File { what: "qemu", path: qemu.to_owned(), source };
    major_kept_at(qemu, Path::new(CACHE)).await.map_err(failed)
}

async fn major_kept_at(qemu: &Path, cache: &Path) -> io::Result<u32> {
    let metadata = std::fs::metadata(qemu)?;
    let mut now = Known {
        path: qemu.to_owned(),
        inode: metadata.ino(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        major: 0,
    };
    let kept: Option<Known> =
        std::fs::read(cache).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if let Some(kept) = kept {
        now.major = kept.major;
        if kept == now {
            return Ok(kept.major);
        }
    }
    let output = tokio::process::Command::new(qemu).arg("--version").output().await?;
    let text = String::from_utf8_lossy(&output.stdout);
    now.major = parse(&text).ok_or_else(|| io::Error::other("it does not tell its version"))?;
    // Without the record the next start asks again.
    if let Err(error) = keep(cache, &now) {
        tracing::debug!(path = %cache.display(), %error, "cannot keep qemu's version");
    }
    Ok(now.major)
}

fn keep(cache: &Path, known: &Known) -> io::Result<()> {
    let directory = cache.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!(".qemu.json.{}", std::process::id()));
    std::fs::write(&new, serde_json::to_vec(known)?)?;
    std::fs::rename(&new, cache)
}

/// `QEMU emulator version 7.2.22 (Debian …)`
fn parse(text: &str) -> Option<u32> {
    text.split("version ").nth(1)?.split('.').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read() {
        assert_eq!(parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg)\nCopyright"), Some(7));
        assert_eq!(parse("QEMU emulator version 10.0.13"), Some(10));
        assert_eq!(parse("bash: not found"), None);
        assert_eq!(parse(""), None);
    }

    #[tokio::test]
    async fn another_file_is_asked_again() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let (qemu, cache) = (directory.path().join("qemu"), directory.path().join("cache"));
        for major in [7, 10] {
            // A new file each time: one that was run a moment ago may be busy.
            let new = directory.path().join("new");
            std::fs::write(&new, format!("#!/bin/sh\necho version {major}.1\n")).unwrap();
            std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
            std::fs::rename(&new, &qemu).unwrap();
            assert_eq!(major_kept_at(&qemu, &cache).await.unwrap(), major);
            assert_eq!(major_kept_at(&qemu, &cache).await.unwrap(), major);
        }
    }
}
