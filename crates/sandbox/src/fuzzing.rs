//! A way in for the fuzz target (`fuzz/`), compiled for it only.

use crate::ProcessRef;
use crate::agent::{Agent, Hello};
use kata_channel::HostChannel;
use std::time::Duration;

/// Makes calls to whatever is at the other end of the channel, as to an agent.
pub async fn calls(channel: HostChannel) {
    const PATIENCE: Duration = Duration::from_millis(20);
    let agent = Agent::new(channel);
    let Ok(container) = "c1".parse() else { return };
    let process = ProcessRef { container, exec: None };
    let calls = async {
        let _ = agent.connect(Hello::default(), PATIENCE).await;
        let _ = agent.wait(&process).await;
        let _ = agent.delete(&process).await;
        let _ = agent.stats(&process.container).await;
        let _ = agent.next_oom().await;
    };
    let _ = tokio::time::timeout(PATIENCE, calls).await;
}
