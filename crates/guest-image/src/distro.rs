//! Debian's cloud kernel: downloaded as a package, unpacked, nothing compiled or installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io};

use crate::bzimage::{self, KernelError};
use crate::initramfs;

/// The package that depends on the current kernel's.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistroError {
    /// A program could not be run.
    #[error("cannot run {0}: this needs a Debian system")]
    Run(&'static str, #[source] io::Error),
    /// A program failed.
    #[error("{tool} failed: {output}")]
    Failed {
        /// The program.
        tool: &'static str,
        /// What it said.
        output: String,
    },
    /// apt does not know the package.
    #[error("apt knows no package {META_PACKAGE}: run 'apt-get update' and look at its sources")]
    Unknown,
    /// The package is not what a kernel package looks like.
    #[error("the kernel package holds no {0}")]
    Strange(&'static str),
    /// A file or directory of the cache failed.
    #[error("cannot use {} in the cache of kernels", path.display())]
    Cache {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel could not be unpacked.
    #[error("cannot unpack {}", path.display())]
    Kernel {
        /// The bzImage.
        path: PathBuf,
        /// The cause.
        #[source]
        source: KernelError,
    },
}

/// An unpacked kernel package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DistroKernel {
    /// Where it was unpacked; `lib/modules/<version>` is below.
    pub root: PathBuf,
    /// The kernel's version, as `uname -r` gives it.
    pub version: String,
}

impl DistroKernel {
    /// The newest one that apt knows, from `cache` or downloaded there; says so with `say`.
    pub fn get(cache: &Path, say: &dyn Fn(&str)) -> Result<Self, DistroError> {
        let package = current_package()?;
        let root = cache.join(format!("{}_{}", package.name, package.version));
        if !root.exists() {
            say(&format!(
                "distro kernel: downloading {} {} ({} MB)",
                package.name,
                package.version,
                package.size / 1_000_000
            ));
            download(&package, cache, &root, say)?;
        }
        let version = kernel_version(&root)?;
        Ok(Self { root, version })
    }

    /// Writes the kernel, unpacked, to `out`.
    pub fn write_vmlinux(&self, out: &Path) -> Result<u64, DistroError> {
        let path = self.root.join(format!("boot/vmlinuz-{}", self.version));
        let image = fs::read(&path).map_err(cache(&path))?;
        let kernel =
            bzimage::vmlinux(&image).map_err(|source| DistroError::Kernel { path, source })?;
        initramfs::write_whole(out, &kernel).map_err(cache(out))?;
        Ok(kernel.len() as u64)
    }
}

/// A package, as apt describes it.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
    size: u64,
}

fn current_package() -> Result<Package, DistroError> {
    let meta = run(Command::new("apt-cache").args(["show", "--no-all-versions", META_PACKAGE]))
        .map_err(
            |e| if matches!(e, DistroError::Failed { .. }) { DistroError::Unknown } else { e },
        )?;
    let name = kernel_of(&meta).ok_or(DistroError::Unknown)?;
    let text = run(Command::new("apt-cache").args(["show", "--no-all-versions", &name]))?;
    let version = field(&text, "Version").ok_or(DistroError::Unknown)?.to_owned();
    let size = field(&text, "Size").and_then(|s| s.parse().ok()).unwrap_or(0);
    Ok(Package { name, version, size })
}

/// The package of the kernel itself, from the description of the one that depends on it.
fn kernel_of(meta: &str) -> Option<String> {
    field(meta, "Depends")?
        .split(',')
        .filter_map(|entry| entry.trim().split(' ').next())
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
}

/// A field of the first package of a list in Debian's format.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.split("\n\n").next()?.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then(|| value.trim())
    })
}

/// Downloads and unpacks beside the final name, and takes that name last.
fn download(
    package: &Package,
    cache_dir: &Path,
    root: &Path,
    say: &dyn Fn(&str),
) -> Result<(), DistroError> {
    let work = cache_dir.join(format!("new.{}", std::process::id()));
    fs::create_dir_all(work.join("root")).map_err(cache(&work))?;
    let result = fetch(package, &work, say)
        .and_then(|()| fs::rename(work.join("root"), root).map_err(cache(root)));
    // What is left of it is of no use; the first error is the one to report.
    let _ = fs::remove_dir_all(&work);
    result
}

fn fetch(package: &Package, work: &Path, say: &dyn Fn(&str)) -> Result<(), DistroError> {
    // As root apt would download as its own user, who cannot write here.
    let wanted = format!("{}={}", package.name, package.version);
    run(Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", &wanted])
        .current_dir(work))?;
    let deb = fs::read_dir(work)
        .map_err(cache(work))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or(DistroError::Strange("package file"))?;
    say("distro kernel: unpacking");
    let root = work.join("root");
    run(Command::new("dpkg-deb").arg("-x").args([&deb, &root]))?;
    kernel_version(&root).map(drop)
}

fn kernel_version(root: &Path) -> Result<String, DistroError> {
    let modules = root.join("lib/modules");
    fs::read_dir(&modules)
        .map_err(cache(&modules))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|version| root.join(format!("boot/vmlinuz-{version}")).exists())
        .ok_or(DistroError::Strange("kernel with modules"))
}

/// The program's output.
fn run(command: &mut Command) -> Result<String, DistroError> {
    let tool = match command.get_program().to_str() {
        Some("apt-cache") => "apt-cache",
        Some("apt-get") => "apt-get",
        _ => "dpkg-deb",
    };
    let output = command
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| DistroError::Run(tool, source))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(DistroError::Failed { tool, output })
}

fn cache(path: &Path) -> impl FnOnce(io::Error) -> DistroError {
    let path = path.to_owned();
    move |source| DistroError::Cache { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
        Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription: x\n more: text\n\n\
        Package: linux-image-cloud-amd64\nVersion: 6.1.1-1\nDepends: linux-image-old\n";

    #[test]
    fn the_kernel_is_the_one_that_the_meta_package_needs() {
        assert_eq!(kernel_of(META).unwrap(), "linux-image-6.1.0-56-cloud-amd64");
        assert_eq!(field(META, "Version"), Some("6.1.192-2"));
        assert_eq!(field(META, "Size"), None);
        assert_eq!(kernel_of("Package: x\nDepends: libc6\n"), None);
        assert_eq!(kernel_of(""), None);
    }

    #[test]
    fn a_package_without_a_kernel_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("lib/modules/6.1")).unwrap();
        assert!(matches!(kernel_version(dir.path()), Err(DistroError::Strange(_))));
        fs::create_dir(dir.path().join("boot")).unwrap();
        fs::write(dir.path().join("boot/vmlinuz-6.1"), "").unwrap();
        assert_eq!(kernel_version(dir.path()).unwrap(), "6.1");
    }
}
