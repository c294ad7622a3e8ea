//! Memory that a process has for nothing: pages that hold zeros only.
//!
//! A process that has worked leaves some: tables that were cleared, and buffers that were never
//! filled. Where such a page is given back, the process and each of its forks read zeros as
//! before, and the host has one for whoever is the first to write there.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{ForkError, step};
use crate::maps::{self, Mapping};
use crate::puppet::Puppet;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Pages that are looked at together.
const BATCH: usize = 512;
/// Bits of what is known of a page: it is there, and is a file's (pagemap, Linux's
/// `Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

/// Gives all of them back of a process that stands still.
pub(crate) fn give_back(first: &Puppet<'_>) -> Result<(), ForkError> {
    let pid = first.tracee.0;
    let failed = || step("open what is known of the pages", pid);
    let pages = File::open(format!("/proc/{pid}/pagemap")).map_err(failed())?;
    let own = |mapping: &Mapping| {
        let writable = mapping.protection & libc::PROT_WRITE != 0;
        writable && !mapping.shared && mapping.inode == 0
    };
    for mapping in maps::read(pid)?.iter().filter(|mapping| own(mapping)) {
        let mut at = mapping.start;
        while at < mapping.end {
            let count = BATCH.min(number(mapping.end - at) / PAGE);
            let zeros = zeros(first, &pages, at, count)?;
            for alike in zeros.chunk_by(PartialEq::eq) {
                let length = (alike.len() * PAGE) as u64;
                if alike[0] {
                    let arguments = [at, length, libc::MADV_DONTNEED as u64];
                    // What the process has locked stays.
                    let _ = first.ask("give back memory", libc::SYS_madvise, arguments);
                }
                at += length;
            }
        }
    }
    Ok(())
}

/// Which of so many pages from this address on are there for nothing.
fn zeros(first: &Puppet<'_>, pages: &File, at: u64, count: usize) -> Result<Vec<bool>, ForkError> {
    const ENTRY: usize = size_of::<u64>();
    let mut known = [0; BATCH * ENTRY];
    let place = at / PAGE as u64 * ENTRY as u64;
    let known = &mut known[..count * ENTRY];
    let read = pages.read_exact_at(known, place);
    read.map_err(step("read what is known of the pages", first.tracee.0))?;
    let mut page = [0; PAGE];
    let found = known.as_chunks().0.iter().enumerate().map(|(index, entry)| {
        let there = u64::from_ne_bytes(*entry) & (PRESENT | OF_FILE) == PRESENT;
        if there {
            first.memory.read(at + (index * PAGE) as u64, &mut page)?;
        }
        Ok(there && page == [0; PAGE])
    });
    found.collect()
}

/// More than there are bytes is as good.
fn number(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
