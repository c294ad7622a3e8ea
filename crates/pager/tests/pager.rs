//! Memory of this process that is copied as it is touched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use kata_pager::{Faults, Mapping, Origin, Pager};
use rustix::fs::{MemfdFlags, memfd_create};

const PAGE: usize = 4096;
const LENGTH: usize = 12 << 20;

fn file() -> File {
    let file = File::from(memfd_create("pager", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(LENGTH as u64).unwrap();
    file
}

/// Every third page of the first and the last part has its number in it.
fn origin() -> File {
    let origin = file();
    for page in (0..LENGTH / PAGE).filter(|page| holds(*page)) {
        origin.write_all_at(&(page as u64 + 1).to_ne_bytes(), (page * PAGE) as u64).unwrap();
    }
    origin
}

fn holds(page: usize) -> bool {
    page.is_multiple_of(3) && !(LENGTH / 3..LENGTH / 3 * 2).contains(&(page * PAGE))
}

fn expected(page: usize) -> u64 {
    if holds(page) { page as u64 + 1 } else { 0 }
}

/// A mapping of a file; it stays.
fn map(file: &File) -> (&'static [AtomicU64], Mapping) {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (nowhere, fd) = (std::ptr::null_mut(), file.as_raw_fd());
    // SAFETY: a new mapping of a file that is as long.
    let at = unsafe { libc::mmap(nowhere, LENGTH, protection, libc::MAP_SHARED, fd, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: it is never unmapped, begins at a page, and is only used by way of atomics.
    let words = unsafe { std::slice::from_raw_parts(at.cast(), LENGTH / 8) };
    (words, Mapping { start: at as u64, length: LENGTH as u64, offset: 0 })
}

/// Has these mappings served; the numbers are of pages that hold something there.
fn serve(origin: &File, mappings: &[Mapping]) -> Pager {
    let fd = |file: &File| OwnedFd::from(file.try_clone().unwrap());
    let faults = Faults::of_self().unwrap();
    let flags = rustix::fs::fcntl_getfl(faults.as_fd()).unwrap() | rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(faults.as_fd(), flags).unwrap();
    let origin = Origin::new(fd(origin));
    let held = origin.held(mappings).unwrap();
    // Its middle part holds nothing.
    assert_eq!(held.len(), 2 * mappings.len(), "{held:?}");
    for part in &held {
        faults.register(part.start, part.length).unwrap();
    }
    Pager::start(faults, origin, held, |error| panic!("{error}")).unwrap()
}

#[test]
fn what_is_touched_is_copied_and_nothing_else() {
    let (origin, copy) = (origin(), file());
    let (words, mapping) = map(&copy);
    let _pager = serve(&origin, &[mapping]);
    let touched = [0, 3, 4, 1000, 2047, LENGTH / PAGE - 1, LENGTH / PAGE - 3];
    for page in touched {
        let word = &words[page * PAGE / 8];
        assert_eq!(word.load(Ordering::Relaxed), expected(page), "{page}");
    }
    // The page in the middle is a hole to both.
    let pages = copy.metadata().unwrap().blocks() as usize * 512 / PAGE;
    assert!((touched.len() - 1..=touched.len()).contains(&pages), "{pages}");
    // What was written stays, and comes from the copy.
    words[3 * PAGE / 8].store(7, Ordering::Relaxed);
    let mut bytes = [0; 8];
    copy.read_exact_at(&mut bytes, 3 * PAGE as u64).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 7);
    assert_eq!(words[3 * PAGE / 8].load(Ordering::Relaxed), 7);
}

#[test]
fn the_rest_is_copied_when_that_is_asked_for() {
    let (origin, copy) = (origin(), file());
    let (words, mapping) = map(&copy);
    let pager = serve(&origin, &[mapping]);
    words[3 * PAGE / 8].store(7, Ordering::Relaxed);
    pager.complete().unwrap();
    // Who maps it now, and has nobody to serve it.
    let (others, _) = map(&copy);
    for page in 0..LENGTH / PAGE {
        let expected = if page == 3 { 7 } else { expected(page) };
        assert_eq!(others[page * PAGE / 8].load(Ordering::Relaxed), expected, "{page}");
    }
}

#[test]
fn the_kernel_is_given_pages_as_well() {
    let (origin, copy) = (origin(), file());
    let (words, mapping) = map(&copy);
    let _pager = serve(&origin, &[mapping]);
    let page = |page: usize| words[page * PAGE / 8..].as_ptr().cast::<u8>();
    // SAFETY: pages of the mapping, which stays; nobody writes to them.
    let bytes = unsafe { std::slice::from_raw_parts(page(30), 4 * PAGE) };
    let mut written = tempfile::tempfile().unwrap();
    written.write_all(bytes).unwrap();
    let mut read = vec![0; 4 * PAGE];
    written.read_exact_at(&mut read, 0).unwrap();
    let number = |index: usize| u64::from_ne_bytes(read[index * PAGE..][..8].try_into().unwrap());
    assert_eq!([0, 1, 2, 3].map(number), [31, 0, 0, 34]);
    // The kernel writes a part of a page that nobody has touched: the rest is the origin's.
    // SAFETY: a page of the mapping, which stays; nobody else uses it.
    let half = unsafe { std::slice::from_raw_parts_mut(page(60).add(PAGE / 2).cast_mut(), 512) };
    written.read_exact_at(half, 0).unwrap();
    assert_eq!(words[60 * PAGE / 8].load(Ordering::Relaxed), 61);
    assert_eq!(words[(60 * PAGE + PAGE / 2) / 8].load(Ordering::Relaxed), 31);
}

#[test]
fn many_who_touch_the_same_pages_meet_in_one_copy() {
    let (origin, copy) = (origin(), file());
    let mapped = [map(&copy), map(&copy)];
    let _pagers = mapped.each_ref().map(|(_, mapping)| serve(&origin, &[*mapping]));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let words = mapped[thread % 2].0;
            scope.spawn(move || {
                for page in 0..LENGTH / PAGE {
                    let word = &words[page * PAGE / 8];
                    word.fetch_add(1 << 32, Ordering::Relaxed);
                }
            });
        }
    });
    for page in 0..LENGTH / PAGE {
        let word = mapped[1].0[page * PAGE / 8].load(Ordering::Relaxed);
        assert_eq!((word >> 32, word & 0xffff_ffff), (4, expected(page)), "{page}");
    }
}
