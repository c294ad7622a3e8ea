//! What happens without being asked for: out-of-memory kills.

use kata_cgroups::Cgroup;
use kata_channel::FdIo;
use kata_protocol::Id;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Reports each time that the kernel kills in the container for want of memory. None where
/// the kernel cannot tell.
pub fn watch_oom(id: Id, cgroup: Cgroup, ooms: mpsc::Sender<Id>) -> Option<AbortHandle> {
    let changes = match cgroup.memory_events_inotify() {
        Ok(fd) => FdIo::new(fd).ok()?,
        Err(error) => {
            tracing::debug!(container = %id, %error, "out-of-memory kills are not watched");
            return None;
        }
    };
    let task = tokio::spawn(async move {
        let mut buffer = [0; 1024];
        let mut seen = cgroup.oom_kills().unwrap_or(0);
        while changes.read_some(&mut buffer).await.is_ok_and(|count| count > 0) {
            let Ok(kills) = cgroup.oom_kills() else { return };
            if kills > seen {
                seen = kills;
                tracing::info!(container = %id, "out of memory: a process was killed");
                // When nobody takes events, the newest are lost, not the guest's memory.
                let _ = ooms.try_send(id.clone());
            }
        }
    });
    Some(task.abort_handle())
}
