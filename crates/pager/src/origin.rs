//! What is copied from, and where processes have the copy mapped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::faults::PAGE;

/// Around what is held, so many bytes are told of as one: each piece is a mapping of its own to
/// the kernel. What is not held in them is told of, too, and is zeros.
const PIECE: u64 = 2 << 20;

/// A piece of a file that a process has mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where in the file it begins.
    pub offset: u64,
}

impl Mapping {
    /// Where in the file this address is, if it is in the mapping.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        let within = address.checked_sub(self.start).filter(|within| *within < self.length)?;
        self.offset.checked_add(within)
    }

    /// The part of it that has these bytes of the file, if it has some.
    fn part(&self, of: &Range<u64>) -> Option<Self> {
        let start = of.start.max(self.offset);
        let end = of.end.min(self.offset.checked_add(self.length)?);
        let length = end.checked_sub(start).filter(|length| *length > 0)?;
        Some(Self { start: self.start + (start - self.offset), length, offset: start })
    }
}

/// A file that nobody changes any more.
#[derive(Debug)]
pub struct Origin(File);

impl Origin {
    /// Of this file.
    pub fn new(file: OwnedFd) -> Self {
        Self(file.into())
    }

    /// The parts of these mappings in whose place the file holds something.
    ///
    /// # Errors
    /// Those of lseek(2).
    pub fn held(&self, mappings: &[Mapping]) -> io::Result<Vec<Mapping>> {
        let pieces = self.pieces()?;
        let parts = |mapping| pieces.iter().filter_map(move |piece| Mapping::part(mapping, piece));
        Ok(mappings.iter().flat_map(parts).collect())
    }

    /// What the file holds, in whole pieces.
    fn pieces(&self) -> io::Result<Vec<Range<u64>>> {
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while let Some(held) = held_from(self.0.as_fd(), at)? {
            let (start, end) = (held.start / PIECE * PIECE, held.end.next_multiple_of(PIECE));
            match pieces.last_mut().filter(|last| last.end >= start) {
                Some(last) => last.end = end,
                None => pieces.push(start..end),
            }
            at = held.end;
        }
        Ok(pieces)
    }

    /// The addresses of all pages of these mappings in whose place the file holds something.
    pub(crate) fn pages(&self, mappings: &[Mapping]) -> io::Result<Vec<(u64, u64)>> {
        let mut pages = Vec::new();
        let mut at = 0;
        while let Some(held) = held_from(self.0.as_fd(), at)? {
            at = held.end;
            for part in mappings.iter().filter_map(|mapping| mapping.part(&held)) {
                let offsets = (0..part.length).step_by(PAGE);
                pages.extend(offsets.map(|within| (part.start + within, part.offset + within)));
            }
        }
        Ok(pages)
    }

    /// The page in which this place is.
    pub(crate) fn read(&self, offset: u64, page: &mut [u8; PAGE]) -> io::Result<()> {
        self.0.read_exact_at(page, offset)
    }
}

/// The next bytes that a file holds from this place on; what is between them are holes.
///
/// # Errors
/// Those of lseek(2).
pub fn held_from(file: BorrowedFd<'_>, at: u64) -> io::Result<Option<Range<u64>>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some(start..seek(file, SeekFrom::Hole(start))?)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_place_in_the_file() {
        let mapping = Mapping { start: 0x7000, length: 0x2000, offset: 0x100_0000 };
        let of = |address| mapping.offset_of(address);
        assert_eq!((of(0x7000), of(0x8fff)), (Some(0x100_0000), Some(0x100_1fff)));
        assert_eq!((of(0x6fff), of(0x9000), of(u64::MAX)), (None, None, None));
    }

    #[test]
    fn the_part_of_a_mapping_is_inside_it() {
        let mapping = Mapping { start: 0x7000_0000, length: 4 << 20, offset: 1 << 20 };
        let part = |start: u64, end: u64| mapping.part(&(start << 20..end << 20));
        let is = |start: u64, length: u64, offset: u64| {
            let start = 0x7000_0000 + (start << 20);
            Some(Mapping { start, length: length << 20, offset: offset << 20 })
        };
        assert_eq!((part(0, 2), part(2, 4), part(4, 6)), (is(0, 1, 1), is(1, 2, 2), is(3, 1, 4)));
        assert_eq!((part(0, 8), part(0, 1), part(5, 8)), (is(0, 4, 1), None, None));
    }
}
