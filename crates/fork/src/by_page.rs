//! Mapped files of which a process has what it touches, and nothing around it.
//!
//! Who reads a page of a mapped file is given the fifteen around it as well, as far as the host has
//! them: the kernel's "fault-around" (`mm/memory.c`). That is for programs, which are read in
//! order. A guest's memory is not, and what was around was more than half of what a fork had of
//! it. The kernel leaves that be in mappings whose pages are watched by userfaultfd(2) for writes
//! (`uffd_disable_fault_around`). So they are; but no page is write-protected, so nothing is ever
//! told, and nobody has to listen.

use crate::error::ForkError;
use crate::maps::Mapping;
use crate::puppet::Puppet;

/// `UFFD_USER_MODE_ONLY`: what any process may ask for. Here and below: linux/userfaultfd.h.
const USER_MODE_ONLY: i32 = 1;
/// `UFFDIO_API` and its first argument.
const API: (u64, u64) = (0xc018_aa3f, 0xaa);
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP` and `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`.
const FEATURES: u64 = 1 << 0 | 1 << 12;
/// `UFFDIO_REGISTER`.
const REGISTER: u64 = 0xc020_aa00;
/// `UFFDIO_REGISTER_MODE_WP`.
const FOR_WRITES: u64 = 1 << 1;

/// Has the pages of these mappings come one by one. Where the kernel cannot (before Linux 5.19)
/// they do as usual: that costs memory, nothing else.
pub(crate) fn come(born: &Puppet<'_>, mappings: &[Mapping]) {
    let _ = register(born, mappings);
}

/// The descriptor stays open, as long as which it holds.
fn register(born: &Puppet<'_>, mappings: &[Mapping]) -> Result<(), ForkError> {
    const STEP: &str = "have pages come one by one";
    let flags = (libc::O_CLOEXEC | USER_MODE_ONLY).unsigned_abs();
    let watch = born.ask(STEP, libc::SYS_userfaultfd, [flags.into()])?;
    let (request, api) = API;
    // Of each request the last word is what the kernel answers.
    let at = born.write_words(0, &[api, FEATURES, 0])?;
    born.ask(STEP, libc::SYS_ioctl, [watch, request, at])?;
    for mapping in mappings {
        let at = born.write_words(0, &[mapping.start, mapping.length(), FOR_WRITES, 0])?;
        born.ask(STEP, libc::SYS_ioctl, [watch, REGISTER, at])?;
    }
    Ok(())
}
