//! A fork's memory comes page by page.
//!
//! *Private* memory has, in a fork, what that touches, and nothing around it. Who reads a page of a
//! mapped file is given the fifteen around it as well, as far as the host has them: the kernel's
//! "fault-around" (`mm/memory.c`). That is for programs, which are read in order. A guest's memory is
//! not, and what was around was half of what a fork had of it. The kernel leaves that be in
//! mappings whose pages are watched by userfaultfd(2) for writes (`uffd_disable_fault_around`). So
//! they are; but no page is write-protected, so nothing is ever told, and nobody has to listen.
//!
//! *Shared* memory of a fork's own begins empty, where its caller copies what it touches
//! (`kata_pager`). The fork has no descriptor of its faults: who could read them could also stop the
//! kernel where it likes.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use kata_pager::{Faults, Mapping as Piece, NEW, USER_MODE_ONLY};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use crate::descriptors::Descriptors;
use crate::error::{ForkError, step};
use crate::maps::Mapping;
use crate::puppet::{Puppet, number_of, word};

/// Has the pages of these mappings come one by one. Where the kernel cannot (before Linux 5.19)
/// they do as usual: that costs memory, nothing else.
pub(crate) fn come(born: &Puppet<'_>, pidfd: &OwnedFd, mappings: &[Mapping]) {
    let _ = watch(born, pidfd, mappings);
}

/// The fork's own descriptor stays open, as long as which it holds.
fn watch(born: &Puppet<'_>, pidfd: &OwnedFd, mappings: &[Mapping]) -> Result<(), ForkError> {
    const STEP: &str = "have pages come one by one";
    let flags = word(libc::O_CLOEXEC | USER_MODE_ONLY);
    let made = number_of(born.ask(STEP, libc::SYS_userfaultfd, [flags])?);
    let watched = || {
        let faults = Faults::watching(pidfd_getfd(pidfd, made, PidfdGetfdFlags::empty())?)?;
        mappings.iter().try_for_each(|mapping| faults.watch(mapping.start, mapping.length()))
    };
    watched().map_err(step(STEP, born.tracee.0))
}

/// The page faults of a fork in these pieces of its memory. `device` is that of `kata_pager`.
pub(crate) fn faults(
    born: &Puppet<'_>,
    pidfd: &OwnedFd,
    descriptors: &Descriptors,
    device: BorrowedFd<'_>,
    pieces: &[Piece],
) -> Result<Faults, ForkError> {
    const STEP: &str = "be told of the pages that a fork touches";
    let device = descriptors.lend(born, device)?;
    let flags = word(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let made = number_of(born.ask(STEP, libc::SYS_ioctl, [word(device), NEW, flags])?);
    let told = || {
        let faults = Faults::of_another(pidfd_getfd(pidfd, made, PidfdGetfdFlags::empty())?)?;
        pieces.iter().try_for_each(|piece| faults.register(piece.start, piece.length))?;
        Ok::<_, io::Error>(faults)
    };
    let faults = told().map_err(step(STEP, born.tracee.0))?;
    [device, made].into_iter().try_for_each(|number| born.close(number))?;
    Ok(faults)
}
