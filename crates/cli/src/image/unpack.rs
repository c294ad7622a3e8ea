//! Unpacks one layer (OCI image-spec `layer.md`) without ever leaving the target.

use super::Digest;
use super::manifest::hex;
use super::root::{ConfinedRoot, children, remove};
use super::zstd;
use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown,
    fsetxattr, futimens, linkat, mkdirat, mkfifoat, openat, statat, symlinkat, utimensat,
};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use tar::{Entry, EntryType};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const XATTR: &str = "SCHILY.xattr.";

/// What all layers together may take: far above any real image, far below what would take a
/// host down by itself.
pub struct Budget {
    pub bytes: u64,
    pub entries: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { bytes: 128 << 30, entries: 8 << 20 }
    }
}

impl Budget {
    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.entries = self.entries.checked_sub(1).context("it holds too many files")?;
        self.bytes = self.bytes.checked_sub(bytes).context("it is too large")?;
        Ok(())
    }
}

/// Unpacks a layer over those before it.
pub fn layer(
    blob: impl Read + 'static,
    expected: &Digest,
    root: &ConfinedRoot,
    budget: &mut Budget,
) -> Result<()> {
    let plain = plain(blob)?;
    let mut hashed = Hashed { inner: plain, hash: Sha256::new() };
    let mut layer = Layer { root, seen: HashSet::new(), directories: Vec::new() };
    {
        let mut archive = tar::Archive::new(&mut hashed);
        for entry in archive.entries()? {
            let mut entry = entry.context("its archive is malformed")?;
            let path = entry.path().context("its archive is malformed")?.into_owned();
            budget.spend(entry.size())?;
            layer.entry(&path, &mut entry).with_context(|| format!("{}", path.display()))?;
        }
    }
    // What follows the last entry belongs to the digest as well.
    io::copy(&mut hashed, &mut io::sink()).context("its archive is malformed")?;
    let found = hex(&hashed.hash.finalize());
    if found != expected.0 {
        bail!("it was changed: expected sha256:{}, found sha256:{found}", expected.0);
    }
    layer.finish()
}

/// The archive in a blob, by its first bytes.
fn plain(blob: impl Read + 'static) -> Result<Box<dyn Read>> {
    let mut blob = BufReader::with_capacity(64 << 10, blob);
    let start = io::BufRead::fill_buf(&mut blob)?;
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(blob)),
        start if start.starts_with(&zstd::MAGIC) => Box::new(zstd::Frames::new(blob)),
        _ => Box::new(blob),
    })
}

struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.hash.update(&buffer[..length]);
        Ok(length)
    }
}

struct Layer<'a> {
    root: &'a ConfinedRoot,
    /// What this layer brought: an opaque directory keeps that.
    seen: HashSet<PathBuf>,
    /// Directories and their times, set when nothing is written into them any more.
    directories: Vec<(PathBuf, Timestamps)>,
}

/// Owner, mode and time of an entry.
struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    times: Timestamps,
}

impl Layer<'_> {
    fn entry<R: Read>(&mut self, path: &Path, entry: &mut Entry<'_, R>) -> Result<()> {
        let path = inside(path)?;
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            return Ok(());
        }
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return self.own_root(entry);
        };
        let parent_path = path.parent().unwrap_or(Path::new(""));
        let seen = &mut self.seen;
        let parent = self
            .root
            .make_directories(parent_path, |made| {
                seen.insert(made.to_owned());
            })
            .context("cannot open its directory")?;
        if name.as_bytes().starts_with(WHITEOUT) {
            return self.white_out(parent_path, parent.as_fd(), &name);
        }
        self.create(&path, parent.as_fd(), &name, kind, entry)?;
        self.seen.insert(path);
        Ok(())
    }

    fn own_root<R: Read>(&self, entry: &Entry<'_, R>) -> Result<()> {
        let fd = self.root.directory(Path::new(""))?;
        let attributes = attributes(entry)?;
        fchown(&fd, Some(attributes.uid), Some(attributes.gid))?;
        fchmod(&fd, attributes.mode)?;
        Ok(())
    }

    /// Removes what lower layers had.
    fn white_out(&self, path: &Path, parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        if name.as_bytes() == OPAQUE {
            for child in children(parent)? {
                let child = OsString::from_vec(child.into_bytes());
                if !self.seen.contains(&path.join(&child)) {
                    remove(parent, &child)?;
                }
            }
            return Ok(());
        }
        let hidden = &name.as_bytes()[WHITEOUT.len()..];
        // Other names of that kind are notes of aufs; `.` and `..` are an attack.
        if hidden.starts_with(WHITEOUT) || [b"".as_slice(), b".", b".."].contains(&hidden) {
            return Ok(());
        }
        Ok(remove(parent, OsStr::from_bytes(hidden))?)
    }

    fn create<R: Read>(
        &mut self,
        path: &Path,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        kind: EntryType,
        entry: &mut Entry<'_, R>,
    ) -> Result<()> {
        let attributes = attributes(entry)?;
        match kind {
            EntryType::Directory => {
                let fd = make_directory(parent, name)?;
                attributes.set(fd.as_fd())?;
                self.directories.push((path.to_owned(), attributes.times));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                remove(parent, name)?;
                write_file(parent, name, &attributes, entry)?;
            }
            EntryType::Symlink => {
                let target = entry.link_name()?.context("a symbolic link points nowhere")?;
                remove(parent, name)?;
                symlinkat(target.as_os_str(), parent, name)?;
                attributes.set_link(parent, name)?;
            }
            EntryType::Link => {
                let target = entry.link_name()?.context("a hard link points nowhere")?;
                self.hard_link(&target, path, parent, name)?;
            }
            EntryType::Fifo => {
                remove(parent, name)?;
                mkfifoat(parent, name, attributes.mode)?;
                attributes.set_link(parent, name)?;
            }
            EntryType::Char | EntryType::Block => {
                // The container gets its devices from its specification, never from an image.
                remove(parent, name)?;
                tracing::warn!("device node {} of the image is left out", path.display());
            }
            other => bail!("entries of kind {other:?} are not supported"),
        }
        Ok(())
    }

    fn hard_link(
        &self,
        target: &Path,
        path: &Path,
        parent: BorrowedFd<'_>,
        name: &OsStr,
    ) -> Result<()> {
        let target = inside(target).context("a hard link leaves the image")?;
        if target == path {
            return Ok(());
        }
        let target_name = target.file_name().context("a hard link points to the root")?;
        let directory = self
            .root
            .directory(target.parent().unwrap_or(Path::new("")))
            .context("a hard link points to nothing")?;
        // Looked at before anything is removed: the link may name a part of its own way.
        statat(&directory, target_name, AtFlags::SYMLINK_NOFOLLOW)
            .context("a hard link points to nothing")?;
        remove(parent, name)?;
        linkat(&directory, target_name, parent, name, AtFlags::empty())
            .context("cannot make a hard link")?;
        Ok(())
    }

    fn finish(self) -> Result<()> {
        for (path, times) in self.directories.iter().rev() {
            // A later entry may have replaced it.
            if let Ok(fd) = self.root.directory(path) {
                futimens(&fd, times)?;
            }
        }
        Ok(())
    }
}

fn attributes<R: Read>(entry: &Entry<'_, R>) -> Result<Attributes> {
    let header = entry.header();
    let id = |number: u64| u32::try_from(number).ok().filter(|id| *id != u32::MAX);
    let uid = id(header.uid()?).context("its owner is out of range")?;
    let gid = id(header.gid()?).context("its group is out of range")?;
    let seconds = i64::try_from(header.mtime()?).unwrap_or(0);
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    Ok(Attributes {
        uid: Uid::from_raw(uid),
        gid: Gid::from_raw(gid),
        mode: Mode::from_raw_mode(header.mode()? & 0o7777),
        times: Timestamps { last_access: time, last_modification: time },
    })
}

impl Attributes {
    /// The mode last: changing the owner takes set-user-id away.
    fn set(&self, fd: BorrowedFd<'_>) -> Result<()> {
        fchown(fd, Some(self.uid), Some(self.gid)).context("cannot set its owner")?;
        fchmod(fd, self.mode).context("cannot set its mode")?;
        Ok(())
    }

    fn set_link(&self, parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        chownat(parent, name, Some(self.uid), Some(self.gid), nofollow)
            .context("cannot set its owner")?;
        utimensat(parent, name, &self.times, nofollow).context("cannot set its time")?;
        Ok(())
    }
}

fn make_directory(parent: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(parent, name, flags, Mode::empty()) {
        Ok(fd) => return Ok(fd),
        Err(Errno::NOENT) => {}
        Err(_) => remove(parent, name)?,
    }
    mkdirat(parent, name, Mode::RWXU)?;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn write_file<R: Read>(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    attributes: &Attributes,
    entry: &mut Entry<'_, R>,
) -> Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
    let expected = entry.size();
    let written = io::copy(entry, &mut file).context("cannot write its contents")?;
    if written != expected {
        bail!("its contents are cut short");
    }
    attributes.set(file.as_fd())?;
    set_xattrs(&file, entry)?;
    futimens(&file, &attributes.times)?;
    Ok(())
}

/// File capabilities and user attributes; other name spaces are the host's.
fn set_xattrs<R: Read>(file: &File, entry: &mut Entry<'_, R>) -> Result<()> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(()) };
    for extension in extensions {
        let extension = extension.context("its archive is malformed")?;
        let Some(name) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR)) else {
            continue;
        };
        if name != "security.capability" && !name.starts_with("user.") {
            continue;
        }
        match fsetxattr(file, name, extension.value_bytes(), XattrFlags::empty()) {
            // tmpfs has no user attributes; the file is good without.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot set {name}")),
        }
    }
    Ok(())
}

/// An entry's path below the root; refused when it could point elsewhere.
fn inside(path: &Path) -> Result<PathBuf> {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => bail!("its path leaves the image"),
        }
    }
    Ok(parts)
}
