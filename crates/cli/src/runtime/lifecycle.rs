//! `start`, `kill`, `pause`, `resume`, `update`: one call each.

use super::{Call, resources};
use crate::calls::Server;
use crate::signal;
use anyhow::{Result, bail};
use containerd_shim_protos::api::{PauseRequest, ResumeRequest, UpdateTaskRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kata_oci::Status;
use kata_protocol::Id;

/// runc's words; containerd takes them for "already finished".
const NOT_RUNNING: &str = "container not running";

/// What containerd calls the resources it sends.
const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// A known container, its server if that runs, and its status.
async fn find(call: &Call) -> Result<(Id, Option<Server>, Status)> {
    let id = call.id()?;
    let record = call.global.root.load(id.as_str())?;
    let server = Server::connect(&record.sandbox()?).await?;
    let status = match &server {
        Some(server) => server.state(&id).await?.map_or(Status::Stopped, |state| state.status),
        None => Status::Stopped,
    };
    Ok((id, server, status))
}

/// `start`.
pub async fn start(call: &Call) -> Result<u8> {
    match find(call).await? {
        (id, Some(server), Status::Created) => {
            server.start_process(&id, None).await?;
            Ok(0)
        }
        (_, _, Status::Stopped) => bail!("cannot start a container that has stopped"),
        (_, _, Status::Running) => bail!("cannot start an already running container"),
        (_, _, status) => {
            bail!("cannot start a container in the {} state", super::query::status_text(status))
        }
    }
}

/// `kill`.
pub async fn kill(call: &Call) -> Result<u8> {
    let signal = signal::parse(call.flags.args.get(1).map_or("SIGTERM", String::as_str))?;
    let all = call.flags.on("all");
    match find(call).await? {
        (_, _, Status::Stopped) if all => Ok(0),
        (_, None, _) | (_, _, Status::Stopped) => bail!(NOT_RUNNING),
        (id, Some(server), _) => match server.kill(&id, signal, all).await {
            Ok(()) => Ok(0),
            // It ended between the question and the signal.
            Err(_) if stopped(&server, &id).await => bail!(NOT_RUNNING),
            Err(error) => Err(error),
        },
    }
}

async fn stopped(server: &Server, id: &Id) -> bool {
    server.state(id).await.is_ok_and(|state| state.is_none_or(|s| s.status == Status::Stopped))
}

/// `pause`.
pub async fn pause(call: &Call) -> Result<u8> {
    match find(call).await? {
        (id, Some(server), Status::Running | Status::Created) => {
            let request = PauseRequest { id: id.to_string(), ..Default::default() };
            server.call(async |tasks, context| tasks.pause(context, &request).await).await?;
            Ok(0)
        }
        (_, _, Status::Paused) => bail!("container already paused"),
        _ => bail!(NOT_RUNNING),
    }
}

/// `resume`.
pub async fn resume(call: &Call) -> Result<u8> {
    match find(call).await? {
        (id, Some(server), Status::Paused) => {
            resume_task(&server, &id).await?;
            Ok(0)
        }
        _ => bail!("container not paused"),
    }
}

/// Lets a container's processes run again.
///
/// # Errors
/// As the server says.
pub async fn resume_task(server: &Server, id: &Id) -> Result<()> {
    let request = ResumeRequest { id: id.to_string(), ..Default::default() };
    server.call(async |tasks, context| tasks.resume(context, &request).await).await?;
    Ok(())
}

/// `update`.
pub async fn update(call: &Call) -> Result<u8> {
    let value = resources::read(&call.flags)?;
    let (id, server, status) = find(call).await?;
    let Some(server) = server.filter(|_| status != Status::Stopped) else { bail!(NOT_RUNNING) };
    let any = Any { type_url: RESOURCES_TYPE.to_owned(), value, ..Default::default() };
    let request =
        UpdateTaskRequest { id: id.to_string(), resources: Some(any).into(), ..Default::default() };
    server.call(async |tasks, context| tasks.update(context, &request).await).await?;
    Ok(0)
}
