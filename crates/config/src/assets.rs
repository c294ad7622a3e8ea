//! Where things are when the configuration does not say: beside the running program, so
//! that each installation uses its own, then in the usual places.

use std::path::{Path, PathBuf};

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
    pub(crate) fn guest(&self) -> (PathBuf, PathBuf) {
        let pair = |share: &PathBuf, suffix: &str| {
            let dir = share.join("kata-containers");
            let initrd = format!("kata-initramfs{suffix}.cpio");
            (dir.join(format!("vmlinux{suffix}")), dir.join(initrd))
        };
        let there = |(kernel, initrd): &(PathBuf, PathBuf)| kernel.is_file() && initrd.is_file();
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
        assert_eq!(places.guest().0, dir.path().join(tuned[0]));
        let (dir, places) = place(&distro);
        assert_eq!(places.guest().1, dir.path().join(distro[1]));
        let ours =
            ["a/kata-containers/vmlinux-distro", "a/kata-containers/kata-initramfs-distro.cpio"];
        let (dir, places) = place(&[tuned, ours].concat());
        assert_eq!(places.guest().0, dir.path().join(ours[0]));
    }

    #[test]
    fn half_a_pair_is_none_and_nothing_is_the_usual_names() {
        let (dir, places) = place(&["a/kata-containers/vmlinux"]);
        assert_eq!(places.guest().0, dir.path().join("b/kata-containers/vmlinux"));
        assert_eq!(places.qemu(), dir.path().join("bin/qemu-system-x86_64"));
    }
}
