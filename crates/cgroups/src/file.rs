//! The small files a cgroup is made of.

use crate::CgroupError;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

/// Longest file read; `cgroup.procs` of a machine full of processes is the largest.
const MAX: u64 = 8 << 20;

/// Reads a file whole.
pub(crate) fn read(path: &Path) -> Result<String, CgroupError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX).read_to_string(&mut text))
        .map_err(|source| CgroupError::io("read", path, source))?;
    Ok(text)
}

/// Reads a file; `None` when it is not there or not readable in this kind of cgroup.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, CgroupError> {
    match read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV | libc::EINVAL) => Ok(None),
            _ => Err(error),
        },
    }
}

/// Writes a value with one `write(2)`, without creating the file.
pub(crate) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| CgroupError::io(format!("write {:?} to", value.trim_end()), path, source))
}

/// Makes one directory; one that is there already is fine.
pub(crate) fn mkdir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::io("create cgroup", path, error))
        }
        _ => Ok(()),
    }
}

/// Names of the directories directly below; none when it is not there.
pub(crate) fn children(path: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// `key value` lines; others are left out.
pub(crate) fn flat_keyed(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A number, or `max` for none.
pub(crate) fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(crate::NO_LIMIT),
        digits => digits.parse().ok(),
    }
}
