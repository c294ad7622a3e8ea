//! The kernel modules that a guest needs, with what they depend on, in load order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// What a sandbox cannot do without.
pub const REQUIRED: [&str; 7] = [
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "virtiofs",
    "overlay",
];
/// What it uses when the kernel has it (Debian's cloud kernel has no 9p).
pub const OPTIONAL: [&str; 4] = ["vmw_vsock_virtio_transport", "9pnet_virtio", "9p", "af_packet"];

/// A module file, and where it is in the initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file here.
    pub source: PathBuf,
    /// Its path there, relative to the root.
    pub target: PathBuf,
}

/// Why the modules could not be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModulesError {
    /// A file or directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A module is neither there nor built into the kernel.
    #[error("kernel {version} has no module {name}; another kernel package is needed")]
    Missing {
        /// The module.
        name: String,
        /// The kernel.
        version: String,
    },
    /// The file is no module, or a compressed one.
    #[error("{} is no plain kernel module: compressed ones are not supported", .0.display())]
    NoModule(PathBuf),
}

/// The modules of one kernel, in `<root>/lib/modules/<version>`.
#[derive(Debug)]
pub struct ModuleTree {
    version: String,
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// Reads which modules there are.
    pub fn open(root: &Path, version: &str) -> Result<Self, ModulesError> {
        let prefix = Path::new("lib/modules").join(version);
        let dir = root.join(&prefix);
        let mut files = BTreeMap::new();
        collect(root, &prefix.join("kernel"), &mut files)?;
        let path = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&path)
            .map_err(|source| ModulesError::Read { path, source })?
            .lines()
            .map(|line| name_of(Path::new(line)))
            .collect();
        Ok(Self { version: version.to_owned(), root: root.to_owned(), files, builtin })
    }

    /// `wanted` (each must be there) and `optional` ones, after all they depend on.
    pub fn closure<'a>(
        &self,
        wanted: impl IntoIterator<Item = &'a str>,
        optional: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Module>, ModulesError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.add(&normal(name), &mut seen, &mut order)?;
        }
        for name in optional.into_iter().map(normal) {
            if self.files.contains_key(&name) {
                self.add(&name, &mut seen, &mut order)?;
            }
        }
        Ok(order)
    }

    /// Depth first. `seen` also ends a cycle, which a kernel never has.
    fn add(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<(), ModulesError> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(target) = self.files.get(name) else {
            let (name, version) = (name.to_owned(), self.version.clone());
            return Err(ModulesError::Missing { name, version });
        };
        let source = self.root.join(target);
        let bytes = fs::read(&source)
            .map_err(|e| ModulesError::Read { path: source.clone(), source: e })?;
        let Some(dependencies) = dependencies(&bytes) else {
            return Err(ModulesError::NoModule(source));
        };
        for dependency in dependencies {
            self.add(&dependency, seen, order)?;
        }
        order.push(Module { source, target: target.clone() });
        Ok(())
    }
}

fn collect(
    root: &Path,
    dir: &Path,
    files: &mut BTreeMap<String, PathBuf>,
) -> Result<(), ModulesError> {
    let path = root.join(dir);
    let failed = |source| ModulesError::Read { path: path.clone(), source };
    for entry in fs::read_dir(&path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let below = dir.join(entry.file_name());
        if entry.file_type().map_err(failed)?.is_dir() {
            collect(root, &below, files)?;
        } else if below.to_string_lossy().contains(".ko") {
            files.insert(name_of(&below), below);
        }
    }
    Ok(())
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko` is `virtio_rng`.
fn name_of(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    normal(file.split(".ko").next().unwrap_or_default())
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// What the module says it depends on; none if this is no module.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let info = section(module, b".modinfo")?;
    let value = info.split(|b| *b == 0).find_map(|text| text.strip_prefix(b"depends="))?;
    let value = std::str::from_utf8(value).ok()?;
    Some(value.split(',').filter(|name| !name.is_empty()).map(normal).collect())
}

/// A section of a 64-bit little-endian ELF file.
fn section<'a>(file: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = file.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |n, b| n << 8 | usize::from(*b)))
    };
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count, names) =
        (number(40, 8)?, number(58, 2)?, number(60, 2)?, number(62, 2)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let content = |header: usize| -> Option<&'a [u8]> {
        let (at, size) = (number(header.checked_add(24)?, 8)?, number(header.checked_add(32)?, 8)?);
        file.get(at..at.checked_add(size)?)
    };
    let names = content(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let found = names.get(number(header, 4)?..)?.split(|b| *b == 0).next()?;
        if found == name { content(header) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// An ELF file with a section of names and `.modinfo`.
    fn module(depends: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info = format!("license=GPL\0depends={depends}\0name=x\0");
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file.extend(names);
        file.extend(info.as_bytes());
        let table = file.len();
        file[40..48].copy_from_slice(&(table as u64).to_le_bytes());
        file[58] = 64;
        file[60] = 3;
        file[62] = 2;
        for (name, at, size) in
            [(0, 0, 0), (1, 64 + names.len(), info.len()), (10, 64, names.len())]
        {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend(header);
        }
        file
    }

    fn tree(modules: &[(&str, &str)], builtin: &str) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("lib/modules/6.1");
        fs::create_dir_all(base.join("kernel/drivers")).unwrap();
        for (name, depends) in modules {
            fs::write(base.join(format!("kernel/drivers/{name}.ko")), module(depends)).unwrap();
        }
        fs::write(base.join("modules.builtin"), builtin).unwrap();
        let tree = ModuleTree::open(dir.path(), "6.1").unwrap();
        (dir, tree)
    }

    fn names(modules: &[Module]) -> Vec<String> {
        modules.iter().map(|m| name_of(&m.target)).collect()
    }

    #[test]
    fn a_module_comes_after_what_it_depends_on_and_once() {
        let (_dir, tree) = tree(
            &[("virtio-pci", "virtio_ring,virtio"), ("virtio_ring", "virtio"), ("virtio", "")],
            "",
        );
        let order = tree.closure(["virtio_pci", "virtio"], ["not_there"]).unwrap();
        assert_eq!(names(&order), ["virtio", "virtio_ring", "virtio_pci"]);
    }

    #[test]
    fn what_is_built_in_needs_no_file() {
        let (_dir, tree) = tree(&[("a", "b-c")], "kernel/lib/b_c.ko\nkernel/ext4.ko\n");
        assert_eq!(names(&tree.closure(["a", "ext4"], []).unwrap()), ["a"]);
    }

    #[test]
    fn a_missing_module_or_dependency_is_named() {
        let (_dir, tree) = tree(&[("a", "gone")], "");
        let text = tree.closure(["a"], []).unwrap_err().to_string();
        assert!(text.contains("gone") && text.contains("6.1"), "{text}");
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let (dir, tree) = tree(&[("a", "")], "");
        let path = dir.path().join("lib/modules/6.1/kernel/drivers/a.ko");
        fs::write(&path, b"\xfd7zXZ\0").unwrap();
        assert!(matches!(tree.closure(["a"], []), Err(ModulesError::NoModule(_))));
    }

    proptest! {
        #[test]
        fn damaged_modules_do_not_panic(at in 0usize..400, value: u8, cut in 0usize..400) {
            let mut file = module("a,b");
            if let Some(byte) = file.get_mut(at) {
                *byte = value;
            }
            file.truncate(cut.max(1));
            let _ = dependencies(&file);
        }
    }
}
