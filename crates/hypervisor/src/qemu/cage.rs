//! What QEMU sees of the host: its libraries and data, the files it loads, nothing else.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_jail::{Bind, Capability, Jail, Network};

use crate::config::{Accelerator, Machine, Share, VmConfig};
use crate::error::HypervisorError;
use crate::image;
use crate::qemu::args::Paths;

/// Public data of the host that a dynamically linked QEMU needs; those that exist.
const SYSTEM: &[&str] = &[
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/share/qboot",
];
/// Where firmware is looked for, the fastest first.
const FIRMWARE: &[&str] = &[
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qboot/qboot.rom",
    "/usr/share/qemu/bios-microvm.bin",
];
/// Where the jailed QEMU has what its 9p server shows.
pub(crate) const SHARE: &str = "/share";
/// The rights of root that its 9p server needs.
pub(crate) const FOR_9P: [Capability; 6] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Mknod,
    Capability::Setfcap,
];
/// On the way into its jail QEMU's network namespace is this descriptor.
pub(crate) const NETNS_FD: RawFd = 9;
/// Descriptors that QEMU may have open.
const NOFILE: u64 = 4096;

/// The firmware that starts the kernel soonest, of those on this host. Without one QEMU
/// takes its own default, which is slower.
pub fn find_firmware(machine: Machine) -> Option<PathBuf> {
    FIRMWARE.iter().map(PathBuf::from).find(|path| {
        // Its name says that it is for the other machine only.
        let fits = machine == Machine::Microvm || !path.ends_with("bios-microvm.bin");
        fits && path.is_file()
    })
}

/// `/opt/kata` of `/opt/kata/bin/qemu-system-x86_64`.
fn prefix(qemu: &Path) -> Option<&Path> {
    qemu.parent()?.parent().filter(|prefix| prefix.parent().is_some())
}

/// The files that QEMU loads, where they are on the host.
pub(crate) fn paths(config: &VmConfig) -> Result<Paths, HypervisorError> {
    usable("qemu", &config.qemu, false)?;
    let firmware = config.firmware.clone().or_else(|| find_firmware(config.machine));
    usable("the guest kernel", &config.kernel, config.jail)?;
    usable("the initial file system", &config.initrd, config.jail)?;
    image::check_initrd(&config.initrd)?;
    if let Some(firmware) = &firmware {
        usable("the firmware", firmware, config.jail)?;
    }
    let (kernel, initrd) = (config.kernel.clone(), config.initrd.clone());
    // A link leads to where its data is.
    let qemu = std::fs::canonicalize(&config.qemu).map_err(|source| HypervisorError::File {
        what: "qemu",
        path: config.qemu.clone(),
        source,
    })?;
    Ok(Paths { qemu, kernel, initrd, firmware })
}

/// Whether the file is there, and for everyone to read where QEMU runs as a nobody.
fn usable(what: &'static str, path: &Path, by_everyone: bool) -> Result<(), HypervisorError> {
    let check = || {
        let metadata = File::open(path)?.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is no file"));
        }
        if by_everyone && metadata.mode() & 0o004 == 0 {
            return Err(io::Error::other("the jailed qemu cannot read it; make it world-readable"));
        }
        Ok(())
    };
    check().map_err(|source| HypervisorError::File { what, path: path.to_owned(), source })
}

/// QEMU's jail, and where it sees the files there. `opens_memory`: the guest's memory is a file
/// that it inherits.
pub(crate) fn build(config: &VmConfig, host: &Paths, opens_memory: bool) -> (Jail, Paths) {
    let mut binds: Vec<Bind> =
        SYSTEM.iter().filter(|path| Path::new(path).exists()).map(Bind::same).collect();
    // Under its own path, from which it finds its data.
    match prefix(&host.qemu) {
        Some(prefix) if prefix != Path::new("/usr") => binds.push(Bind::same(prefix)),
        _ => {}
    }
    if !binds.iter().any(|bind| host.qemu.starts_with(&bind.target)) {
        binds.push(Bind::same(&host.qemu));
    }
    let mut file = |source: &Path, target: &str| {
        let target = PathBuf::from(target);
        binds.push(Bind { source: source.to_owned(), target: target.clone(), readonly: true });
        target
    };
    let kernel = file(&host.kernel, "/kernel");
    let initrd = file(&host.initrd, "/initrd");
    let firmware = host.firmware.as_ref().map(|firmware| file(firmware, "/firmware"));
    let mut capabilities = Vec::new();
    let mut directories = Vec::new();
    if let Some(Share::NineP { .. }) = &config.share {
        // What the guest sees is mounted in it once QEMU runs.
        directories.push(PathBuf::from(SHARE));
        // It does for the guest what the guest's users may do to their files.
        capabilities = FOR_9P.to_vec();
    }
    let mut devices = match config.accelerator {
        Accelerator::Kvm => vec![PathBuf::from("/dev/kvm")],
        Accelerator::Tcg => Vec::new(),
    };
    devices.extend(config.entropy.clone());
    let jail = Jail {
        uid: config.uid,
        gid: config.uid,
        groups: Vec::new(),
        binds,
        directories,
        devices,
        nofile: NOFILE,
        network: match config.netns {
            Some(_) => Network::Joined(NETNS_FD),
            None => Network::Empty,
        },
        // Its 9p server changes modes by way of /proc/self/fd, and by it a monitor opens the
        // memory that it inherits.
        proc: !capabilities.is_empty() || opens_memory,
        capabilities,
        // QEMU's own: it knows best what this build of it needs.
        seccomp: None,
    };
    (jail, Paths { qemu: host.qemu.clone(), kernel, initrd, firmware })
}
