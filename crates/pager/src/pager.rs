//! Who waits for a page is given it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::faults::{Faults, Handed, PAGE};
use crate::origin::{Mapping, Origin};

/// How long a process waits that cannot be given a page for want of memory, until it looks again.
const PAUSE: Duration = Duration::from_millis(10);

/// Serves all faults that there are, or the next ones: `offset_of` tells where in the file an address
/// is, if the copy is mapped there. False when the process has ended.
///
/// # Errors
/// The origin cannot be read, or the kernel refuses a page.
pub fn serve(
    faults: &Faults,
    origin: &Origin,
    offset_of: impl Fn(u64) -> Option<u64>,
) -> io::Result<bool> {
    for address in faults.read()? {
        let address = address & !(PAGE as u64 - 1);
        // What else a process has registered by itself is not ours to answer.
        let Some(offset) = offset_of(address) else { continue };
        if !give(faults, origin, address, offset)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives a process a page, if it has none there. False when it has ended.
fn give(faults: &Faults, origin: &Origin, address: u64, offset: u64) -> io::Result<bool> {
    let mut page = [0; PAGE];
    origin.read(offset, &mut page)?;
    match faults.hand_over(address, &page)? {
        Handed::Copied => return Ok(true),
        Handed::Found | Handed::Unmapped => {}
        Handed::Later => std::thread::sleep(PAUSE),
        Handed::Ended => return Ok(false),
    }
    // Who waits looks again.
    faults.wake(address)?;
    Ok(true)
}

/// A thread that serves the faults of a process.
///
/// When it is dropped, nobody serves them any more.
#[derive(Debug)]
pub struct Pager {
    what: Arc<What>,
    thread: Option<JoinHandle<()>>,
}

/// Whose pages come from where.
#[derive(Debug)]
struct What {
    faults: Faults,
    origin: Origin,
    pieces: Vec<Mapping>,
    /// Tells the thread to end.
    end: OwnedFd,
}

impl Pager {
    /// Begins to serve the faults in these pieces, which wait in no read. `failed` is told when
    /// that is not possible any more: who touches a page from then on waits for ever.
    ///
    /// # Errors
    /// Those of eventfd(2) and of making a thread.
    pub fn start(
        faults: Faults,
        origin: Origin,
        pieces: Vec<Mapping>,
        failed: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let end = eventfd(0, EventfdFlags::CLOEXEC)?;
        let what = Arc::new(What { faults, origin, pieces, end });
        let theirs = Arc::clone(&what);
        let run = move || {
            if let Err(error) = theirs.run() {
                failed(error);
            }
        };
        let thread = std::thread::Builder::new().name("pager".to_owned()).spawn(run)?;
        Ok(Self { what, thread: Some(thread) })
    }

    /// Copies all that has not been touched yet: afterwards nothing that the origin holds is
    /// missing, for whoever maps the copy.
    ///
    /// # Errors
    /// The origin cannot be read, the kernel refuses a page, or there is no memory for it.
    pub fn complete(&self) -> io::Result<()> {
        let What { faults, origin, pieces, .. } = &*self.what;
        let mut page = [0; PAGE];
        for (address, offset) in origin.pages(pieces)? {
            origin.read(offset, &mut page)?;
            match faults.hand_over(address, &page)? {
                Handed::Copied | Handed::Found => {}
                Handed::Later => return Err(io::ErrorKind::OutOfMemory.into()),
                Handed::Unmapped | Handed::Ended => return Err(io::ErrorKind::NotConnected.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.what.end, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl What {
    fn offset_of(&self, address: u64) -> Option<u64> {
        self.pieces.iter().find_map(|piece| piece.offset_of(address))
    }

    fn run(&self) -> io::Result<()> {
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(self.faults.as_fd(), PollFlags::IN),
                PollFd::new(&self.end, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let ends = !ready[1].revents().is_empty();
            if ends || !serve(&self.faults, &self.origin, |address| self.offset_of(address))? {
                return Ok(());
            }
        }
    }
}
