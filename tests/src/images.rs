//! The images: made here from what Debian's packages hold, as no registry is needed or asked.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;

const BUSYBOX: &str = "/bin/busybox";

/// Fills `root` with a small Linux: busybox under all its names, our probe, users, `/etc`.
///
/// `probe` is the program of this package that says what it sees.
pub fn busybox_rootfs(root: &Path, probe: &Path) -> Result<()> {
    for dir in ["bin", "dev", "etc", "home", "proc", "root", "sys", "tmp", "var/www", "mnt", "run"]
    {
        fs::create_dir_all(root.join(dir)).with_context(|| format!("make {dir} of the image"))?;
    }
    fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    fs::copy(BUSYBOX, root.join("bin/busybox")).context("copy busybox (package busybox-static)")?;
    fs::copy(probe, root.join("bin/probe")).context("copy the probe")?;
    let names = command::ok(Command::new(BUSYBOX).arg("--list"))?.out();
    for name in names.lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n",
        ),
        ("etc/group", "root:x:0:\nalice:x:1000:\naudio:x:29:alice\nextra:x:3000:alice\n"),
        ("etc/os-release", "ID=busybox\nPRETTY_NAME=\"busybox\"\n"),
        ("var/www/index.html", "hello from the image\n"),
    ];
    for (path, text) in files {
        fs::write(root.join(path), text)?;
    }
    fs::create_dir_all(root.join("home/alice"))?;
    std::os::unix::fs::chown(root.join("home/alice"), Some(1000), Some(1000))?;
    fs::write(root.join("bin/not-a-program"), "no program\n")?;
    Ok(())
}

/// Writes `root` as a tar archive, as `docker import` takes it.
pub fn archive(root: &Path, tar: &Path) -> Result<PathBuf> {
    let mut builder = tar::Builder::new(File::create(tar)?);
    builder.follow_symlinks(false);
    builder.append_dir_all(".", root).with_context(|| format!("pack {}", root.display()))?;
    builder.finish()?;
    Ok(tar.to_owned())
}

/// SHA-256 of a reader's bytes, in hexadecimal.
pub fn sha256(mut reader: impl Read) -> Result<String> {
    use sha2::{Digest, Sha256};
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Bytes that compress badly and repeat late, the same for the same `seed`.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
