//! `kata-guest-image`: builds what the guest boots from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use kata_guest_image::distro::DistroKernel;
use kata_guest_image::modules::{Module, ModuleTree, OPTIONAL, REQUIRED};
use kata_guest_image::{bzimage, initramfs, returns};

/// Build what the guest boots from.
#[derive(Parser)]
#[command(name = "kata-guest-image", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Write an initramfs with the agent in it
    Initramfs(Initramfs),
    /// Get Debian's cloud kernel; write it and its initramfs
    Distro(Distro),
    /// Get Debian's cloud kernel; write it alone, as DIR/vmlinux-distro
    DistroKernel(DistroKernelOnly),
    /// Unpack a bzImage into an uncompressed kernel with a PVH entry
    Vmlinux(Vmlinux),
    /// Make the returns of the tuned kernel plain, in place
    Returns(Returns),
}

#[derive(Args)]
struct Initramfs {
    /// The agent, a static program
    #[arg(long)]
    agent: PathBuf,
    /// Add modules from DIR/lib/modules/VERSION; the tuned kernel needs none
    #[arg(long, value_name = "DIR", requires = "kernel_version")]
    modules_from: Option<PathBuf>,
    /// The kernel they belong to
    #[arg(long, value_name = "VERSION", requires = "modules_from")]
    kernel_version: Option<String>,
    /// One more module (may be given several times)
    #[arg(long, value_name = "NAME", requires = "modules_from")]
    module: Vec<String>,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct Distro {
    /// The agent, a static program
    #[arg(long)]
    agent: PathBuf,
    /// Where downloaded kernels are kept
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// The kernel to write
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// The initramfs to write
    #[arg(long, value_name = "FILE")]
    initrd: PathBuf,
    /// One more module (may be given several times)
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,
}

#[derive(Args)]
struct DistroKernelOnly {
    /// Where downloaded kernels are kept
    #[arg(long, value_name = "DIR")]
    cache: PathBuf,
    /// The directory to write to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

#[derive(Args)]
struct Vmlinux {
    /// The bzImage
    image: PathBuf,
    /// The file to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Args)]
struct Returns {
    /// The kernel, from guest/kernel/build.sh
    vmlinux: PathBuf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kata-guest-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match CommandLine::parse().command {
        Task::Initramfs(task) => {
            let modules = match (&task.modules_from, &task.kernel_version) {
                (Some(root), Some(version)) => modules(root, version, &task.module)?,
                _ => Vec::new(),
            };
            write_initramfs(&task.agent, &modules, &task.out)
        }
        Task::Distro(task) => {
            let kernel = distro_kernel(&task.cache, &task.kernel)?;
            let modules = modules(&kernel.root, &kernel.version, &task.module)?;
            write_initramfs(&task.agent, &modules, &task.initrd)
        }
        Task::DistroKernel(task) => {
            fs::create_dir_all(&task.out).context("make the output directory")?;
            distro_kernel(&task.cache, &task.out.join("vmlinux-distro")).map(drop)
        }
        Task::Vmlinux(task) => {
            let image = fs::read(&task.image)
                .with_context(|| format!("cannot read {}", task.image.display()))?;
            let kernel = bzimage::vmlinux(&image)?;
            fs::write(&task.out, kernel)
                .with_context(|| format!("cannot write {}", task.out.display()))
        }
        Task::Returns(task) => make_returns_plain(&task.vmlinux),
    }
}

/// The file is replaced, not written to: who reads it meanwhile has one of the two.
fn make_returns_plain(path: &Path) -> anyhow::Result<()> {
    let old = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut kernel = old.clone();
    let count = returns::make_plain(&mut kernel)
        .with_context(|| format!("cannot change the returns of {}", path.display()))?;
    if kernel != old {
        let new = path.with_extension("new");
        fs::write(&new, kernel)
            .and_then(|()| fs::rename(&new, path))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("kernel: {} ({count} plain returns)", path.display());
    Ok(())
}

fn distro_kernel(cache: &Path, out: &Path) -> anyhow::Result<DistroKernel> {
    let kernel = DistroKernel::get(cache, &|line| println!("{line}"))?;
    let size = kernel.write_vmlinux(out)?;
    println!("distro kernel: {} ({size} bytes, Linux {})", out.display(), kernel.version);
    Ok(kernel)
}

fn modules(root: &Path, version: &str, more: &[String]) -> anyhow::Result<Vec<Module>> {
    if version.contains('/') {
        bail!("{version:?} is no kernel version");
    }
    let tree = ModuleTree::open(root, version)?;
    let wanted = REQUIRED.into_iter().chain(more.iter().map(String::as_str));
    Ok(tree.closure(wanted, OPTIONAL)?)
}

fn write_initramfs(agent: &Path, modules: &[Module], out: &Path) -> anyhow::Result<()> {
    let size = initramfs::write(agent, modules, out)?;
    println!("initramfs: {} ({size} bytes, {} modules)", out.display(), modules.len());
    Ok(())
}
