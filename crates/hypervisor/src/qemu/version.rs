//! Which QEMU it is: asked once per file, because asking takes as long as a container may.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::HypervisorError;
use crate::accelerator::cache;

const CACHE: &str = "qemu.json";

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    path: PathBuf,
    /// Size and time of change of the file, which an update changes.
    size: u64,
    changed: i64,
    major: u32,
}

/// The major version of the QEMU at `path`.
pub(super) fn major(path: &Path) -> Result<u32, HypervisorError> {
    use std::os::unix::fs::MetadataExt;
    let file = |source| HypervisorError::File { what: "qemu", path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(file)?;
    if let Some(known) = cache::read::<Known>(CACHE) {
        if (known.path.as_path(), known.size, known.changed)
            == (path, metadata.size(), metadata.ctime())
        {
            return Ok(known.major);
        }
    }
    let output = Command::new(path).arg("--version").output().map_err(file)?;
    let major = parse(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
        file(std::io::Error::new(std::io::ErrorKind::InvalidData, "it does not tell a version"))
    })?;
    let known =
        Known { path: path.to_owned(), size: metadata.size(), changed: metadata.ctime(), major };
    cache::write(CACHE, &known);
    Ok(major)
}

/// `QEMU emulator version 7.2.22 (Debian …)`
fn parse(text: &str) -> Option<u32> {
    text.split_once(" version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debians_version_line_is_understood() {
        assert_eq!(parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\n"), Some(7));
        assert_eq!(parse("QEMU emulator version 10.0.13"), Some(10));
        assert_eq!(parse("nothing of the kind"), None);
    }
}
