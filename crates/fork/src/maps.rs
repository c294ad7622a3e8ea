//! What a process has mapped.

use std::fs;

use crate::error::{ForkError, step};

/// A range of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub start: u64,
    pub end: u64,
    /// `PROT_*` of mmap(2).
    pub protection: i32,
    pub shared: bool,
    /// Where in the file it begins.
    pub offset: u64,
    /// Of the file; 0 when there is none.
    pub inode: u64,
    pub path: String,
    /// A fork would not have it.
    pub not_forked: bool,
}

impl Mapping {
    pub(crate) fn length(&self) -> u64 {
        self.end - self.start
    }

    /// As a piece of its file.
    pub(crate) fn piece(&self) -> kata_pager::Mapping {
        kata_pager::Mapping { start: self.start, length: self.length(), offset: self.offset }
    }
}

/// All of them, in the order of their addresses (proc_pid_smaps(5)).
pub(crate) fn read(pid: i32) -> Result<Vec<Mapping>, ForkError> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"));
    Ok(parse(&text.map_err(step("read the mappings", pid))?))
}

fn parse(text: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = found.last_mut() {
                last.not_forked = flags.split_ascii_whitespace().any(|flag| flag == "dc");
            }
        } else if let Some(mapping) = header(line) {
            found.push(mapping);
        }
    }
    found
}

/// `start-end rwxs offset major:minor inode path`
fn header(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let modes = words.next()?;
    let protection = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)]
        .into_iter()
        .filter(|(mode, _)| modes.contains(*mode))
        .fold(0, |all, (_, protection)| all | protection);
    let offset = hexadecimal(words.next()?)?;
    let inode = words.nth(1)?.parse().ok()?;
    let path = words.collect::<Vec<_>>().join(" ");
    let shared = modes.ends_with('s');
    Some(Mapping { start, end, protection, shared, offset, inode, path, not_forked: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read_with_their_flags() {
        let text = "\
7f0000000000-7f0000200000 rw-s 00001000 00:01 77   /memfd:guest memory (deleted)
Rss:                 100 kB
VmFlags: rd wr sh mr mw me ms dc nh
7fff00000000-7fff00001000 r-xp 00000000 00:00 0                          [vdso]
VmFlags: rd ex mr mw me de sd
";
        let found = parse(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].length(), found[0].offset), (2 << 20, 0x1000));
        assert_eq!(found[0].path, "/memfd:guest memory (deleted)");
        assert_eq!((found[0].inode, found[1].inode), (77, 0));
        assert_eq!(found[0].protection, libc::PROT_READ | libc::PROT_WRITE);
        assert!(found[0].shared && found[0].not_forked);
        assert!(!found[1].shared && !found[1].not_forked);
    }
}
