//! The images: made here from what Debian's packages hold, as no registry is needed or asked.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

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
    let fetch = root.join("bin/fetch");
    fs::write(&fetch, FETCH)?;
    fs::set_permissions(&fetch, PermissionsExt::from_mode(0o755))?;
    Ok(())
}

/// `fetch URL`: the page, from a server that may just be starting.
const FETCH: &str = "#!/bin/sh
for i in $(seq 300); do wget -qO- \"$1\" 2>/dev/null && exit; sleep 0.1; done
exec wget -qO- \"$1\"
";

/// Writes `root` as a tar archive, as `docker import` takes it.
pub fn archive(root: &Path, tar: &Path) -> Result<PathBuf> {
    let mut builder = tar::Builder::new(File::create(tar)?);
    builder.follow_symlinks(false);
    builder.append_dir_all(".", root).with_context(|| format!("pack {}", root.display()))?;
    builder.finish()?;
    Ok(tar.to_owned())
}

/// Writes `root` as an image of one layer, as `docker save` would; `config` is what is in
/// the image's `config` object.
pub fn saved_image(root: &Path, tag: &str, config: &Value, out: &Path) -> Result<PathBuf> {
    let layer = archive(root, &out.with_extension("layer"))?;
    let digest = sha256(File::open(&layer)?)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"] }]);
    let mut builder = tar::Builder::new(File::create(out)?);
    for (name, value) in [("config.json", config), ("manifest.json", manifest)] {
        let bytes = serde_json::to_vec(&value)?;
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &bytes[..])?;
    }
    builder.append_path_with_name(&layer, "layer.tar")?;
    builder.finish()?;
    fs::remove_file(layer)?;
    Ok(out.to_owned())
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
