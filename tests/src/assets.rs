//! The product under test: where it was built, and installing it in the arena.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;

/// Where `make install` puts the runtime inside the arena, as packages do.
pub const RUNTIME: &str = "/usr/bin/kata-runtime";
/// The engine-less way in.
pub const CTL: &str = "/usr/bin/kata-ctl";
/// The configuration a user edits.
pub const CONFIG: &str = "/etc/kata-containers/configuration.toml";

/// The tuned guest kernel.
pub const ANY_KERNEL: &str = "/usr/share/kata-containers/vmlinux";
/// The one of emulated machines with one processor, as most are.
pub const KERNEL: &str = "/usr/share/kata-containers/vmlinux-up";
/// Its initial file system, with the agent, as installed.
pub const INITRAMFS: &str = "/usr/share/kata-containers/kata-initramfs.cpio";

/// The top of the source tree, or of what `KATA_E2E_SOURCE` says was built elsewhere.
pub fn source() -> PathBuf {
    env::var_os("KATA_E2E_SOURCE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from)
}

/// Scratch space for arenas.
pub fn scratch() -> PathBuf {
    source().join("target")
}

/// A program of this package that was built beside the running one.
pub fn beside(name: &str) -> Result<PathBuf> {
    let program = env::current_exe()?.with_file_name(name);
    fs::metadata(&program).with_context(|| format!("find {}: run make e2e", program.display()))?;
    Ok(program)
}

/// The runtimes asked for by `KATA_E2E_RUNTIME` (`runc` or `kata-runtime`), else both.
pub fn runtimes() -> Result<Vec<&'static str>> {
    match env::var("KATA_E2E_RUNTIME").as_deref() {
        Err(_) | Ok("") => Ok(vec!["runc", "kata-runtime"]),
        Ok("runc") => Ok(vec!["runc"]),
        Ok("kata-runtime") => Ok(vec!["kata-runtime"]),
        Ok(other) => bail!("KATA_E2E_RUNTIME={other}: only runc and kata-runtime are known"),
    }
}

/// `make install PREFIX=/usr` into the arena's own `/usr`.
///
/// The tuned kernel is the one tests use; with none built, the default configuration
/// falls back to the distribution's.
pub fn install() -> Result<()> {
    make("install")?;
    for file in [RUNTIME, CTL] {
        fs::metadata(file).with_context(|| format!("make install left no {file}"))?;
    }
    Ok(())
}

/// `make uninstall PREFIX=/usr`.
pub fn uninstall() -> Result<()> {
    make("uninstall")
}

fn make(target: &str) -> Result<()> {
    let mut make = Command::new("make");
    make.args(["--no-print-directory", "-C"]).arg(source()).args([target, "PREFIX=/usr"]);
    // Under make, its flags would be inherited.
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("DESTDIR");
    command::ok(&mut make).map(drop)
}
