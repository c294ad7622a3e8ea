//! Brings the streams that the host opens together with the processes they are for,
//! whichever comes first.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kata_channel::Stream;
use kata_protocol::{Id, StreamHeader};
use tokio::sync::oneshot;

/// How long a stream may be ahead of its process. The host opens it right before the call.
const PATIENCE: Duration = Duration::from_secs(60);

/// Streams without a process and processes without a stream.
#[derive(Debug, Default)]
pub struct Streams {
    slots: Mutex<HashMap<StreamHeader, Slot>>,
}

#[derive(Debug)]
enum Slot {
    Arrived(Stream, Instant),
    Wanted(oneshot::Sender<Stream>),
}

impl Streams {
    fn slots(&self) -> MutexGuard<'_, HashMap<StreamHeader, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream came. A second one of the same name takes the place of the first.
    pub fn arrived(&self, header: StreamHeader, stream: Stream) {
        let mut slots = self.slots();
        slots.retain(|_, slot| match slot {
            Slot::Arrived(_, since) => since.elapsed() < PATIENCE,
            Slot::Wanted(taker) => !taker.is_closed(),
        });
        let stream = match slots.remove(&header) {
            Some(Slot::Wanted(taker)) => match taker.send(stream) {
                Ok(()) => return,
                Err(stream) => stream,
            },
            _ => stream,
        };
        slots.insert(header, Slot::Arrived(stream, Instant::now()));
    }

    /// The stream of that name, when it comes; none when it is given up.
    pub async fn wanted(&self, header: StreamHeader) -> Option<Stream> {
        let waiting = {
            let mut slots = self.slots();
            if let Some(Slot::Arrived(stream, _)) = slots.remove(&header) {
                return Some(stream);
            }
            let (taker, waiting) = oneshot::channel();
            slots.insert(header, Slot::Wanted(taker));
            waiting
        };
        waiting.await.ok()
    }

    /// Drops what there is of a process that was not started, or is deleted.
    pub fn forget(&self, container: &Id, exec: Option<&Id>) {
        self.slots().retain(|header, _| {
            header.container.as_ref() != Some(container) || header.exec.as_ref() != exec
        });
    }

    /// The channel is gone, and with it every stream that nobody took.
    pub fn channel_lost(&self) {
        self.slots().retain(|_, slot| matches!(slot, Slot::Wanted(_)));
    }
}
