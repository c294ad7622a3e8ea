//! What two machines must have in common for one to go on where the other was saved.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::config::{Accelerator, ChannelKind, Machine, Share, VmConfig};
use crate::error::{HypervisorError, host};
use crate::qemu::find_firmware;

/// A file, as it is now: another one of the same name is another file.
#[derive(Serialize)]
struct FileIdentity<'a> {
    path: &'a Path,
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl<'a> FileIdentity<'a> {
    fn of(path: &'a Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        Ok(Self {
            path,
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

#[derive(Serialize)]
struct Fingerprint<'a> {
    version: &'static str,
    monitor: FileIdentity<'a>,
    firmware: Option<FileIdentity<'a>>,
    kernel: FileIdentity<'a>,
    initrd: FileIdentity<'a>,
    quiet: bool,
    kernel_params: &'a [String],
    machine: Machine,
    options: [&'a str; 2],
    entropy: Option<&'a Path>,
    accelerator: Accelerator,
    tsc_khz: u64,
    /// MiB at first and at most, and slots for the difference.
    memory: (u32, u32, u32),
    vcpus: (u32, u32),
    vhost_net: bool,
    ports: u32,
    nine_p: bool,
    vsock: bool,
}

impl VmConfig {
    /// A text that is the same for machines of which one can go on where the other was saved:
    /// the same virtual hardware, from the same files, by the same version of ours.
    ///
    /// # Errors
    /// When one of the files is not there.
    pub fn fingerprint(&self) -> Result<String, HypervisorError> {
        let identity = |what, path| {
            FileIdentity::of(path).map_err(|source| HypervisorError::File {
                what,
                path: path.to_owned(),
                source,
            })
        };
        let firmware = self.firmware.clone().or_else(|| find_firmware(self.machine));
        let fingerprint = Fingerprint {
            version: env!("CARGO_PKG_VERSION"),
            monitor: identity("qemu", &self.qemu)?,
            firmware: firmware.as_deref().map(|path| identity("the firmware", path)).transpose()?,
            kernel: identity("the guest kernel", &self.kernel)?,
            initrd: identity("the initial file system", &self.initrd)?,
            quiet: self.quiet,
            kernel_params: &self.kernel_params,
            machine: self.machine,
            options: [&self.machine_options, &self.cpu_options],
            entropy: self.entropy.as_deref(),
            accelerator: self.accelerator,
            tsc_khz: self.tsc_khz,
            memory: (self.memory_mib, self.max_memory_mib, self.memory_slots),
            vcpus: (self.vcpus, self.max_vcpus),
            vhost_net: self.vhost_net,
            ports: self.hotplug_ports,
            nine_p: matches!(self.share, Some(Share::NineP { .. })),
            vsock: matches!(self.channel, ChannelKind::Vsock(_)),
        };
        serde_json::to_string(&fingerprint).map_err(host("describe the machine"))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::VmConfig;
    use crate::qemu::sample_config;

    fn config(dir: &std::path::Path) -> VmConfig {
        let mut config = sample_config();
        for (file, field) in [
            ("qemu", &mut config.qemu),
            ("kernel", &mut config.kernel),
            ("initrd", &mut config.initrd),
        ] {
            *field = dir.join(file);
            std::fs::write(&*field, file).unwrap();
        }
        config
    }

    #[test]
    fn a_machine_of_other_hardware_or_other_files_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let first = config(dir.path()).fingerprint().unwrap();
        let mut same = config(dir.path());
        same.id = "another".to_owned();
        same.uid += 1;
        // Written anew by `config`, the files have changed.
        assert_ne!(same.fingerprint().unwrap(), first);
        let first = same.fingerprint().unwrap();
        same.id = "yet-another".to_owned();
        assert_eq!(same.fingerprint().unwrap(), first);
        let changes: [fn(&mut VmConfig); 5] = [
            |config| config.memory_mib += 2,
            |config| config.vcpus += 1,
            |config| config.tsc_khz += 1,
            |config| config.kernel_params.push("x".to_owned()),
            |config| config.cpu_options.push_str("pmu=off"),
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut other = same_again(&same);
            change(&mut other);
            assert_ne!(other.fingerprint().unwrap(), first, "change {index} was not seen");
        }
    }

    fn same_again(config: &VmConfig) -> VmConfig {
        let mut again = sample_config();
        again.qemu.clone_from(&config.qemu);
        again.kernel.clone_from(&config.kernel);
        again.initrd.clone_from(&config.initrd);
        again
    }
}
