//! The files of an image, whether they lie in a directory or in a tar archive.

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Largest index, manifest or configuration, bytes.
const MAX_DOCUMENT: u64 = 4 << 20;

/// Most files in an archive: an image has a few per layer.
const MAX_FILES: usize = 100_000;

/// How often a link in an archive may point to another one.
const MAX_LINKS: usize = 8;

pub enum Blobs {
    Directory(super::ConfinedRoot),
    Archive { file: Arc<File>, members: HashMap<String, Member> },
}

pub enum Member {
    File { offset: u64, length: u64 },
    Link(String),
}

impl Blobs {
    pub fn directory(path: &Path) -> Result<Self> {
        Ok(Self::Directory(super::ConfinedRoot::open(path)?))
    }

    /// Lists an archive's members; a compressed archive is decompressed first.
    pub fn archive(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        if is_gzip(&mut file)? {
            file = decompressed(file).context("cannot decompress")?;
        }
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(BufReader::new(&file));
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            let Some(name) = normal(&entry.path()?) else { continue };
            if members.len() >= MAX_FILES {
                bail!("it has more than {MAX_FILES} members");
            }
            let member = match entry.header().entry_type() {
                kind if kind.is_file() => {
                    Member::File { offset: entry.raw_file_position(), length: entry.size() }
                }
                kind if kind.is_symlink() || kind.is_hard_link() => {
                    let target = entry.link_name()?.context("a link points nowhere")?;
                    let base = if kind.is_symlink() { parent(&name) } else { "" };
                    let target = Path::new(base).join(target);
                    match lexical(&target) {
                        Some(target) => Member::Link(target),
                        None => continue,
                    }
                }
                _ => continue,
            };
            members.insert(name, member);
        }
        Ok(Self::Archive { file: Arc::new(file), members })
    }

    pub fn contains(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    /// A file's bytes, as a stream.
    pub fn open(&self, name: &str) -> Result<Box<dyn Read>> {
        match self {
            Self::Directory(root) => {
                let file =
                    root.read(Path::new(name)).with_context(|| format!("{name} is missing"))?;
                Ok(Box::new(file))
            }
            Self::Archive { file, members } => {
                let mut name = name;
                for _ in 0..MAX_LINKS {
                    match members.get(name).with_context(|| format!("{name} is missing"))? {
                        Member::Link(target) => name = target,
                        Member::File { offset, length } => {
                            let part = Part { file: Arc::clone(file), at: *offset, left: *length };
                            return Ok(Box::new(part));
                        }
                    }
                }
                bail!("{name} is a link to a link to a link")
            }
        }
    }

    /// A small file's bytes.
    pub fn document(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(name)?
            .take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("cannot read {name}"))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            bail!("{name} is larger than {MAX_DOCUMENT} bytes");
        }
        Ok(bytes)
    }
}

/// A part of a file, read without moving the file's own position.
struct Part {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let length = self.file.read_at(&mut buffer[..want], self.at)?;
        if length == 0 && want > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut short"));
        }
        self.at += length as u64;
        self.left -= length as u64;
        Ok(length)
    }
}

fn is_gzip(file: &mut File) -> io::Result<bool> {
    let mut magic = [0; 2];
    let read = file.read(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(read == 2 && magic == [0x1f, 0x8b])
}

fn decompressed(file: File) -> io::Result<File> {
    let mut plain = unnamed_file()?;
    io::copy(&mut MultiGzDecoder::new(BufReader::new(file)), &mut plain)?;
    plain.seek(SeekFrom::Start(0))?;
    Ok(plain)
}

/// A file that is gone when it is closed.
fn unnamed_file() -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open(std::env::temp_dir(), flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// A member's name as one spelling; none for names that leave the archive.
fn normal(path: &Path) -> Option<String> {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    parts.into_os_string().into_string().ok().filter(|name| !name.is_empty())
}

/// The same for link targets, where `..` is common.
fn lexical(path: &Path) -> Option<String> {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::ParentDir => {
                if !parts.pop() {
                    return None;
                }
            }
            Component::CurDir => {}
            _ => return None,
        }
    }
    parts.into_os_string().into_string().ok()
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}
