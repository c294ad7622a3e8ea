//! Where things are when the configuration does not say: beside the running program, so
//! that each installation uses its own, then in the usual places.

use std::path::{Path, PathBuf};

/// What a guest is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Guest {
    pub kernel: PathBuf,
    /// The same kernel for machines with one processor, where it is installed.
    pub uniprocessor: Option<PathBuf>,
    pub initrd: PathBuf,
}

/// Directories that are searched.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// `share` directories, the best first.
    pub share: Vec<PathBuf>,
    /// Where the administrator's configuration is.
    pub etc: PathBuf,
    /// Directories with hypervisors.
    pub bin: Vec<PathBuf>,
}

impl Places {
    /// Those of the running program.
    pub fn of_this_program() -> Self {
        let program = std::env::current_exe().ok();
        let prefix = program.as_deref().and_then(Path::parent).and_then(Path::parent);
        let mut share: Vec<PathBuf> = prefix.map(|p| p.join("share")).into_iter().collect();
        let usual = PathBuf::from("/usr/share");
        if !share.contains(&usual) {
            share.push(usual);
        }
        Self {
            share,
            etc: "/etc".into(),
            bin: ["/usr/bin", "/usr/local/bin", "/opt/kata/bin"].map(PathBuf::from).into(),
        }
    }

    /// Configuration files, the best first.
    pub(crate) fn configurations(&self) -> impl Iterator<Item = PathBuf> {
        let defaults = self.share.iter().map(|share| share.join("defaults"));
        std::iter::once(self.etc.clone())
            .chain(defaults)
            .map(|dir| dir.join("kata-containers/configuration.toml"))
    }

    /// The configuration file of a runtime variant (`configuration-<variant>.toml`), if there
    /// is one in any of the usual places.
    pub fn variant(&self, variant: &str) -> Option<PathBuf> {
        let name = format!("configuration-{variant}.toml");
        self.configurations().map(|path| path.with_file_name(&name)).find(|path| path.is_file())
    }

    /// Kernel and initramfs that belong together: the tuned pair, else the distribution's.
    /// When neither is there, the tuned names, for the message that says so.
    pub(crate) fn guest(&self) -> Guest {
        let pair = |share: &PathBuf, suffix: &str| {
            let dir = share.join("kata-containers");
            let initrd = dir.join(format!("kata-initramfs{suffix}.cpio"));
            let uniprocessor = dir.join(format!("vmlinux{suffix}-up"));
            let uniprocessor = Some(uniprocessor).filter(|kernel| kernel.is_file());
            Guest { kernel: dir.join(format!("vmlinux{suffix}")), uniprocessor, initrd }
        };
        let there = |guest: &Guest| guest.kernel.is_file() && guest.initrd.is_file();
        let mut pairs = self.share.iter().flat_map(|s| [pair(s, ""), pair(s, "-distro")]);
        let usual = || self.share.last().map(|share| pair(share, ""));
        pairs.find(there).or_else(usual).unwrap_or_default()
    }

    /// QEMU; when there is none, where it would be.
    pub(crate) fn qemu(&self) -> PathBuf {
        let mut paths = self.bin.iter().map(|dir| dir.join("qemu-system-x86_64"));
        let usual = paths.clone().next().unwrap_or_default();
        paths.find(|path| path.is_file()).unwrap_or(usual)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(files: &[&str]) -> (tempfile::TempDir, Places) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let at = |name: &str| dir.path().join(name);
        let places = Places { share: vec![at("a"), at("b")], etc: at("etc"), bin: vec![at("bin")] };
        (dir, places)
    }

    #[test]
    fn a_pair_beside_the_program_comes_first_and_tuned_before_distro() {
        let tuned = ["b/kata-containers/vmlinux", "b/kata-containers/kata-initramfs.cpio"];
        let distro =
            ["b/kata-containers/vmlinux-distro", "b/kata-containers/kata-initramfs-distro.cpio"];
        let (dir, places) = place(&[tuned, distro].concat());
        let guest = places.guest();
        assert_eq!((guest.kernel, guest.uniprocessor), (dir.path().join(tuned[0]), None));
        let (dir, places) = place(&distro);
        assert_eq!(places.guest().initrd, dir.path().join(distro[1]));
        let ours =
            ["a/kata-containers/vmlinux-distro", "a/kata-containers/kata-initramfs-distro.cpio"];
        let (dir, places) = place(&[tuned, ours].concat());
        assert_eq!(places.guest().kernel, dir.path().join(ours[0]));
        let uniprocessor = ["b/kata-containers/vmlinux-up"];
        let (dir, places) = place(&[&tuned[..], &uniprocessor].concat());
        assert_eq!(places.guest().uniprocessor, Some(dir.path().join(uniprocessor[0])));
    }

    #[test]
    fn half_a_pair_is_none_and_nothing_is_the_usual_names() {
        let (dir, places) = place(&["a/kata-containers/vmlinux"]);
        assert_eq!(places.guest().kernel, dir.path().join("b/kata-containers/vmlinux"));
        assert_eq!(places.qemu(), dir.path().join("bin/qemu-system-x86_64"));
    }
}
