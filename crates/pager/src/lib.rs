//! Memory that is copied when it is touched.
//!
//! A fork of a machine begins with the memory of the one that stands still: a sealed file of which
//! some tens of megabytes are held, and of which it touches a sixth before its container runs.
//! Where other processes share its memory that has to be a file of its own. That begins empty, and
//! each page is copied when a process that has it mapped touches it first: the process waits in a
//! page fault, of which the kernel tells by userfaultfd(2).
//!
//! ```text
//! monitor      touches a page that is not there ──► kernel ──► Pager: reads the page of the
//! (or devices                ◄── goes on with it ◄── copies ◄──       origin, hands it over
//!  process)
//! ```
//!
//! [`Faults`] are what a process is told of by the kernel, one for each process; [`Origin`] is
//! what is copied from; [`Pager`] does it. What must never happen is that a process reads zeros
//! where the origin holds something. So only the kernel puts a page in, and only where there is none
//! yet (`UFFDIO_COPY`); and a descriptor of the faults stays open as long as the process lives: when
//! the last one is closed, who waits goes on with zeros.
//!
//! Linux gives root all this since 6.1 (`/dev/userfaultfd`); who finds that it cannot be had
//! ([`is_available`]) copies everything beforehand.

mod faults;
mod origin;
mod pager;

pub use faults::{Faults, NEW, REQUESTS, USER_MODE_ONLY, device, is_available};
pub use origin::{Mapping, Origin, held_from};
pub use pager::{Pager, serve};
