//! How a machine ended.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::process::ExitStatus;

use tokio::sync::watch;

/// How a machine ended, and why, as far as can be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// How the monitor's process ended; `None` if that could not be learned.
    pub status: Option<ExitStatus>,
    /// Whether we had asked for it.
    pub expected: bool,
    /// Whether the guest's kernel panicked.
    pub panicked: bool,
    /// Why, in words.
    pub cause: String,
    /// The guest's last words on its console.
    pub console: Vec<String>,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)?;
        if !self.expected && !self.console.is_empty() {
            write!(f, "; last lines of the guest's console: {}", self.console.join(" | "))?;
        }
        Ok(())
    }
}

/// Resolves when a machine has ended; to be awaited. May be cloned and asked again.
#[derive(Clone, Debug)]
pub struct Exited(pub(crate) watch::Receiver<Option<VmExit>>);

impl Exited {
    /// Waits for the end.
    pub async fn wait(&mut self) -> VmExit {
        let ended = self.0.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        // Without a value the machine was dropped before it was ever started.
        ended.unwrap_or_else(|| VmExit {
            status: None,
            expected: true,
            panicked: false,
            cause: "it was never started".to_owned(),
            console: Vec::new(),
        })
    }

    /// How it ended, if it has.
    pub fn now(&self) -> Option<VmExit> {
        self.0.borrow().clone()
    }
}

impl IntoFuture for Exited {
    type Output = VmExit;
    type IntoFuture = Pin<Box<dyn Future<Output = VmExit> + Send>>;

    fn into_future(mut self) -> Self::IntoFuture {
        Box::pin(async move { self.wait().await })
    }
}
