//! The machine's memory, where it is copied when it is touched (`kata_pager`).
//!
//! The monitor's page faults are the server's to serve; those of this process it serves itself, by
//! a thread that touches nothing of the guest. A monitor that tells of other memory than the guest's
//! gets pages of the template there.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kata_pager::{Faults, Mapping, Origin};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use crate::serve::FD_ORIGIN;

/// Pieces that are remembered: those that the monitor has told of last. Others are not mapped any
/// more.
const MOST: usize = 4096;

/// What is copied, and where this process has it mapped.
pub(crate) struct Pages {
    faults: Faults,
    origin: Origin,
    mapped: Mutex<VecDeque<Mapping>>,
}

impl Pages {
    /// To be called before this process is confined, and once.
    pub(crate) fn of_self() -> io::Result<Self> {
        // SAFETY: the server passes this descriptor where the role's arguments say `touched`, which
        // is where this is called; nobody else takes it.
        let origin = Origin::new(unsafe { OwnedFd::from_raw_fd(FD_ORIGIN) });
        Ok(Self { faults: Faults::of_self()?, origin, mapped: Mutex::default() })
    }

    /// Starts the thread that serves. If it cannot go on, the process ends, and the sandbox.
    pub(crate) fn serve(self) -> io::Result<Arc<Self>> {
        let pages = Arc::new(self);
        let theirs = Arc::clone(&pages);
        std::thread::Builder::new().name("pager".to_owned()).spawn(move || {
            let Self { faults, origin, .. } = &*theirs;
            loop {
                let served = kata_pager::serve(faults, origin, |address| theirs.offset_of(address));
                if let Err(error) = served {
                    log::error!("memory cannot be copied: {error}");
                    std::process::exit(1);
                }
            }
        })?;
        Ok(pages)
    }

    fn offset_of(&self, address: u64) -> Option<u64> {
        // What was told last is where something else was before.
        self.mapped().iter().rev().find_map(|mapping| mapping.offset_of(address))
    }

    fn mapped(&self) -> MutexGuard<'_, VecDeque<Mapping>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of what the monitor has told: the file in which the guest's memory begins is the one that
    /// is copied. Memory that was added is not.
    pub(crate) fn register(&self, memory: &GuestMemoryMmap<BitmapMmapRegion>) -> io::Result<()> {
        let first = memory.find_region(GuestAddress(0)).and_then(|region| region.file_offset());
        let first = first.map(identity).transpose()?;
        for region in memory.iter() {
            let Some(begins) = region.file_offset() else { continue };
            if Some(identity(begins)?) != first {
                continue;
            }
            let (start, length) = (region.as_ptr() as u64, region.len());
            let whole = Mapping { start, length, offset: begins.start() };
            for piece in self.origin.held(&[whole])? {
                self.remember(piece);
                self.faults.register(piece.start, piece.length)?;
            }
        }
        Ok(())
    }

    /// The thread may have to serve it as soon as it is registered.
    fn remember(&self, piece: Mapping) {
        let mut mapped = self.mapped();
        if mapped.len() == MOST {
            mapped.pop_front();
        }
        mapped.push_back(piece);
    }
}

fn identity(of: &FileOffset) -> io::Result<(u64, u64)> {
    let metadata = of.file().metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}
