//! Noticing that an engine changed a namespace's network.

use std::time::Duration;

use kata_netlink::{Groups, Watch};
use tokio::time::{Instant, timeout_at};

use crate::{Netns, NetworkError};

/// An engine makes a network by several changes; when none came for so long, it is done.
const QUIET: Duration = Duration::from_millis(10);
/// But no longer than this after the first one.
const LONGEST: Duration = Duration::from_millis(200);

/// Tells when interfaces, addresses or routes of a namespace change, from its making on:
/// make it, then [`crate::scan()`], and no change is missed.
#[derive(Debug)]
pub struct Changes {
    watch: Watch,
    netns: std::path::PathBuf,
}

impl Changes {
    /// Begins to watch; call it in a tokio runtime.
    ///
    /// # Errors
    /// When the namespace cannot be entered or watched.
    pub fn watch(netns: &Netns) -> Result<Self, NetworkError> {
        let subscribed = netns.run(|| Watch::subscribe(Groups::All))?;
        let watch = subscribed.and_then(Watch::new).map_err(|e| netns.netlink(e))?;
        Ok(Self { watch, netns: netns.path().to_owned() })
    }

    /// Returns when something changed and then was quiet for a moment: time to scan.
    /// Our own joining counts as a change too, so compare what was scanned. Cancelling it
    /// may lose a change that was just being made.
    ///
    /// # Errors
    /// When the namespace can no longer be watched.
    pub async fn next(&mut self) -> Result<(), NetworkError> {
        self.changed().await?;
        let end = Instant::now() + LONGEST;
        while let Ok(changed) = timeout_at(end.min(Instant::now() + QUIET), self.changed()).await {
            changed?;
        }
        Ok(())
    }

    async fn changed(&mut self) -> Result<(), NetworkError> {
        let result = self.watch.changed().await;
        result.map_err(|e| NetworkError::Netlink(self.netns.clone(), e))
    }
}
