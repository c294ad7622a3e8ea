//! The keeper of a stem, as who wants a fork sees it.

use super::client::own_oom_score;
use super::spare::set_oom_score;
use super::wire::{FromStem, Order};
use crate::packets::Packets;
use kata_hypervisor::{ForkOrder, Touches};
use kata_jail::Child;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// How long a fork may take. It takes some milliseconds, and others may be first.
const PATIENCE: Duration = Duration::from_secs(10);

/// A line to the process that holds a stem. It is there for one fork, which ends with it.
#[derive(Debug)]
pub(crate) struct Keeper {
    line: Arc<Packets>,
}

impl Keeper {
    pub(super) fn new(line: OwnedFd) -> io::Result<Self> {
        Ok(Self { line: Arc::new(Packets::new(line)?) })
    }

    /// Has a fork made.
    pub(crate) async fn fork(&self, order: ForkOrder) -> io::Result<(Child, Option<Touches>)> {
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        tokio::time::timeout(PATIENCE, self.ask(order)).await.unwrap_or_else(|_| Err(late()))
    }

    async fn ask(&self, order: ForkOrder) -> io::Result<(Child, Option<Touches>)> {
        let ForkOrder { id, memory, fds } = order;
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.line.send(&serde_json::to_vec(&Order { id, memory })?, &fds).await?;
        let ended = || io::Error::other("its keeper ended; the factory's log says why");
        let (bytes, fds) = self.line.receive().await?.ok_or_else(ended)?;
        let mut fds = fds.into_iter();
        match (serde_json::from_slice(&bytes)?, fds.next()) {
            (FromStem::Forked { pid, pieces }, Some(pidfd)) => {
                // What it has inherited is the stem's.
                set_oom_score(pid, own_oom_score());
                let (sender, told) = watch::channel(None);
                tokio::spawn(hear_of_end(Arc::clone(&self.line), sender));
                let touches = fds.next().map(|faults| Touches { faults: faults.into(), pieces });
                Ok((Child::of_another(pid, pidfd, told), touches))
            }
            (FromStem::Failed(why), _) => Err(io::Error::other(why)),
            (other, _) => Err(io::Error::other(format!("its keeper answered {other:?}"))),
        }
    }
}

/// Holds the line until the fork has ended. Without a word from the keeper, that has ended, and
/// the fork with it.
async fn hear_of_end(line: Arc<Packets>, told: watch::Sender<Option<ExitStatus>>) {
    if let Ok(Some((bytes, _))) = line.receive().await
        && let Ok(FromStem::Ended(status)) = serde_json::from_slice(&bytes)
    {
        told.send_replace(Some(ExitStatus::from_raw(status)));
    }
}
