//! `delete`: everything of a container goes, whatever state it is in.

use super::{Call, Global};
use crate::calls::Server;
use crate::record::{NOT_FOUND, Record};
use anyhow::{Context, Result, bail};
use kata_oci::Status;
use kata_protocol::Id;
use kata_sandbox::SandboxDir;
use std::time::Duration;

/// How long a container may take to end and be forgotten before its whole sandbox is ended.
const STOP: Duration = Duration::from_secs(8);

/// `delete [--force]`.
pub async fn delete(call: &Call) -> Result<u8> {
    let (id, force) = (call.id()?, call.flags.on("force"));
    if force {
        destroy(&call.global, &id).await?;
        return Ok(0);
    }
    let record = call.global.root.load(id.as_str())?;
    let sandbox = record.sandbox()?;
    let server = Server::connect(&sandbox).await?;
    let state = match &server {
        Some(server) => server.state(&id).await?,
        None => None,
    };
    match state.map(|state| state.status) {
        // A container that never ran is ended, as runc does.
        None | Some(Status::Stopped | Status::Created) => {}
        Some(status) => bail!(
            "cannot delete container {id} that is not stopped: {}",
            super::query::status_text(status)
        ),
    }
    remove(&call.global, &record, server.as_ref()).await?;
    Ok(0)
}

/// Deletes a container by force; fine when it is gone already.
///
/// # Errors
/// When something of it cannot be removed.
pub async fn destroy(global: &Global, id: &Id) -> Result<()> {
    let record = match global.root.load(id.as_str()) {
        Ok(record) => record,
        Err(error) if error.to_string() == NOT_FOUND => {
            // A directory without a record: its making was interrupted.
            global.root.remove(id.as_str())?;
            return Ok(());
        }
        Err(_) => {
            // The record is damaged. A sandbox of the container's own has the same id.
            clean_up(id)?;
            global.root.remove(id.as_str())?;
            return Ok(());
        }
    };
    // A server that hangs must not stop us: the clean-up works without it.
    let server = Server::connect(&record.sandbox()?).await.ok().flatten();
    remove(global, &record, server.as_ref()).await
}

/// Ends and forgets a container, with its sandbox when that is left empty.
async fn remove(global: &Global, record: &Record, server: Option<&Server>) -> Result<()> {
    let (id, sandbox): (Id, Id) = (record.id.parse()?, record.sandbox()?);
    let alone = id == sandbox;
    let mut helped = false;
    if let Some(server) = server {
        match tokio::time::timeout(STOP, end(server, &id)).await {
            Ok(Ok(())) => helped = true,
            Ok(Err(error)) if !alone => return Err(error),
            Err(_) if !alone => bail!("container {id} does not end"),
            Ok(Err(error)) => {
                tracing::warn!("container {id} is removed without its server's help: {error:#}");
            }
            Err(_) => tracing::warn!("container {id} does not end: its sandbox is removed"),
        }
    }
    let kept = match server {
        // Containers of a pod that are still there keep their sandbox, whichever goes first.
        Some(server) if helped => matches!(server.shut_down(false).await, Ok(false)),
        _ => !alone,
    };
    if !kept {
        clean_up(&sandbox)?;
    }
    if let Some(stand_in) = record.stand_in {
        stand_in.kill();
    }
    global.root.remove(id.as_str())?;
    Ok(())
}

/// Kills a container's processes if it has any, and makes the server forget it.
async fn end(server: &Server, id: &Id) -> Result<()> {
    use containerd_shim_protos::api::WaitRequest;
    let Some(state) = server.state(id).await? else { return Ok(()) };
    if state.status != Status::Stopped {
        if state.status == Status::Paused {
            // A frozen process takes no signal.
            super::lifecycle::resume_task(server, id).await?;
        }
        server.kill(id, libc::SIGKILL, true).await?;
        let request = WaitRequest { id: id.to_string(), ..Default::default() };
        server.call(async |tasks, context| tasks.wait(context, &request).await).await?;
    }
    server.delete(id).await
}

/// Undoes a creation that failed.
pub async fn undo(server: &Server, id: &Id, alone: bool) {
    let _ = server.delete(id).await;
    if alone {
        if let Err(error) = server.shut_down(true).await {
            tracing::warn!("{error:#}");
        }
        if let Err(error) = clean_up(id) {
            tracing::warn!("{error:#}");
        }
    }
}

/// Removes what is left of a sandbox, from its state file alone.
fn clean_up(sandbox: &Id) -> Result<()> {
    kata_sandbox::cleanup(&SandboxDir::of(sandbox))
        .with_context(|| format!("cannot remove what is left of sandbox {sandbox}"))
}
