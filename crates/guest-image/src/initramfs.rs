//! The initramfs: a newc cpio archive, uncompressed, for unpacking costs boot time.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{self, Builder, ModeFileType};

use crate::modules::Module;

/// Where the agent finds the modules to load, in order, one path in a line.
pub const MODULE_LIST: &str = "etc/kata/modules";
/// Why no initramfs was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitramfsError {
    /// A file that belongs in it cannot be read.
    #[error("cannot read {} for the initramfs", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write the initramfs {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The agent is no program that the guest can run.
    #[error("{} is no static x86-64 program: build it as the Makefile does", .0.display())]
    Agent(PathBuf),
    /// A file is too large for the archive's format.
    #[error("{} is larger than 4 GiB", .0.display())]
    TooLarge(PathBuf),
}

/// Writes the initramfs with `agent` as its init and `modules` (in load order) to `out`.
pub fn write(agent: &Path, modules: &[Module], out: &Path) -> Result<u64, InitramfsError> {
    let program = read(agent)?;
    if !is_static_program(&program) {
        return Err(InitramfsError::Agent(agent.to_owned()));
    }
    let mut archive = Archive::default();
    // What the kernel opens for init, which opens the console itself if it has something to say.
    archive.file(Path::new("dev/console"), 0o600, Vec::new());
    archive.file(Path::new("init"), 0o755, program);
    if !modules.is_empty() {
        let mut list = String::new();
        for module in modules {
            list.push_str(&format!("/{}\n", module.target.display()));
            archive.file(&module.target, 0o644, read(&module.source)?);
        }
        archive.file(Path::new(MODULE_LIST), 0o644, list.into_bytes());
    }
    let bytes = archive.finish().map_err(|_| InitramfsError::TooLarge(out.to_owned()))?;
    let failed = |source| InitramfsError::Write { path: out.to_owned(), source };
    write_whole(out, &bytes).map_err(failed)?;
    Ok(bytes.len() as u64)
}

fn read(path: &Path) -> Result<Vec<u8>, InitramfsError> {
    fs::read(path).map_err(|source| InitramfsError::Read { path: path.to_owned(), source })
}

/// Replaces `path` in one step: a VM that starts meanwhile sees the old or the new one.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let mut file = fs::File::create(&new)?;
    file.write_all(bytes)?;
    drop(file);
    fs::rename(&new, path)
}

/// An ELF program for x86-64 that asks for no interpreter.
fn is_static_program(bytes: &[u8]) -> bool {
    const EM_X86_64: u64 = 62;
    const PT_INTERP: u64 = 3;
    let number = |at: usize, size: usize| -> Option<u64> {
        let bytes = bytes.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    let interpreters = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut interpreters = 0;
        for index in 0..count {
            let at = usize::try_from(table.checked_add(index * size)?).ok()?;
            interpreters += usize::from(number(at, 4)? == PT_INTERP);
        }
        Some(interpreters)
    };
    bytes.starts_with(b"\x7fELF\x02\x01")
        && number(18, 2) == Some(EM_X86_64)
        && interpreters() == Some(0)
}

/// The archive's entries, in the order they were added; parents come before children.
#[derive(Default)]
struct Archive {
    entries: Vec<(Builder, Vec<u8>)>,
    directories: BTreeSet<PathBuf>,
}

impl Archive {
    fn directory(&mut self, path: &Path) {
        let mut chain: Vec<_> =
            path.ancestors().filter(|p| !p.as_os_str().is_empty()).map(Path::to_owned).collect();
        chain.reverse();
        for path in chain {
            if self.directories.insert(path.clone()) {
                let entry = self.entry(&path, 0o755).nlink(2);
                self.entries.push((entry.set_mode_file_type(ModeFileType::Directory), Vec::new()));
            }
        }
    }

    fn file(&mut self, path: &Path, mode: u32, content: Vec<u8>) {
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        let entry = self.entry(path, mode).set_mode_file_type(ModeFileType::Regular);
        self.entries.push((entry, content));
    }

    /// Root's, without a time, numbered in order: nothing of the machine that builds it.
    fn entry(&self, path: &Path, mode: u32) -> Builder {
        let number = u32::try_from(self.entries.len()).map_or(u32::MAX, |n| n.saturating_add(1));
        Builder::new(&path.to_string_lossy()).ino(number).mode(mode).nlink(1)
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (entry, content) in self.entries {
            let size = u32::try_from(content.len()).map_err(io::Error::other)?;
            let mut writer = entry.write(&mut bytes, size);
            writer.write_all(&content)?;
            writer.finish()?;
        }
        newc::trailer(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// The smallest thing that passes for a static program: no program headers.
    fn program() -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf
    }

    fn list(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut rest = bytes;
        let mut entries = Vec::new();
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let entry = reader.entry();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            entries.push((entry.name().to_owned(), entry.mode(), content));
            rest = reader.finish().unwrap();
        }
    }

    fn build(modules: &[Module], dir: &Path) -> Vec<u8> {
        let agent = dir.join("agent");
        fs::write(&agent, program()).unwrap();
        let out = dir.join("out.cpio");
        let size = write(&agent, modules, &out).unwrap();
        let bytes = fs::read(&out).unwrap();
        assert_eq!(size, bytes.len() as u64);
        bytes
    }

    #[test]
    fn the_agent_is_init_and_parents_come_first() {
        let dir = tempfile::tempdir().unwrap();
        let module = dir.path().join("x.ko");
        fs::write(&module, "module").unwrap();
        let target = PathBuf::from("lib/modules/6.1/kernel/x.ko");
        let bytes = build(&[Module { source: module, target }], dir.path());
        let entries = list(&bytes);
        let find = |name: &str| entries.iter().position(|e| e.0 == name).unwrap();
        assert_eq!(entries[find("init")].1, 0o100_755);
        assert_eq!(entries[find("dev/console")].1, 0o100_600);
        assert_eq!(entries[find("etc/kata/modules")].2, b"/lib/modules/6.1/kernel/x.ko\n");
        assert_eq!(entries[find("lib/modules/6.1/kernel/x.ko")].2, b"module");
        for (index, (name, ..)) in entries.iter().enumerate() {
            if let Some(parent) = Path::new(name).parent().filter(|p| !p.as_os_str().is_empty()) {
                assert!(find(parent.to_str().unwrap()) < index, "{name}");
            }
        }
    }

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(build(&[], a.path()), build(&[], b.path()));
        assert!(list(&build(&[], a.path())).iter().all(|e| e.0 != "etc/kata/modules"));
    }

    #[test]
    fn a_program_with_an_interpreter_is_no_agent() {
        let mut elf = program();
        assert!(is_static_program(&elf));
        elf[32] = 64; // program headers at
        elf[54] = 56; // size of each
        elf[56] = 1; // number
        elf.extend([0; 56]);
        assert!(is_static_program(&elf));
        elf[64] = 3;
        assert!(!is_static_program(&elf));
        elf[56] = 2; // the second one is not there
        assert!(!is_static_program(&elf));
        assert!(!is_static_program(b"#!/bin/sh\n"));
        assert!(!is_static_program(&fs::read("/bin/sh").unwrap()));
    }

    #[test]
    fn a_missing_agent_is_named() {
        let error = write(Path::new("/nonexistent/agent"), &[], Path::new("/tmp/x")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/agent"), "{error}");
    }
}
