//! `delete`: undoes what is left of a container whose server containerd has lost.
//!
//! containerd calls it whenever a connection to a server ends, also after a container was
//! deleted in order while its pod lives on. A server that answers is therefore only ended
//! when nobody else is connected to it; of one that is dead everything is undone from its
//! state file. Doing it twice does no harm.

use super::address::Address;
use super::flags::Flags;
use super::{sandbox_id, start};
use crate::client::{Client, ClientError};
use crate::server::runtime;
use crate::task;
use anyhow::Context;
use containerd_shim_protos::api::{DeleteResponse, ShutdownRequest};
use containerd_shim_protos::protobuf::{Message, MessageField};
use kata_protocol::Id;
use kata_sandbox::{LOST, MACHINE_ROLE, PodRole, SandboxDir, cleanup, pid_of};
use std::time::{Duration, SystemTime};

/// How long a living server may take to end; containerd waits for five seconds.
const PATIENCE: Duration = Duration::from_secs(4);

/// Undoes; gives the `DeleteResponse` to print.
pub(crate) fn delete(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    let id: Id = flags.id.parse().context("flag -id")?;
    // Without a bundle nothing says that there is a pod.
    let pod = start::bundle(flags)
        .and_then(|bundle| start::spec(&bundle))
        .and_then(|spec| start::role(spec.as_ref()));
    let group = match pod {
        Ok(PodRole::Container { sandbox }) => sandbox,
        Ok(PodRole::Alone | PodRole::Sandbox) | Err(_) => id.clone(),
    };
    let sandbox = sandbox_id(&flags.namespace, &group)?;
    let dir = SandboxDir::of(&sandbox);
    let machine = pid_of(&dir, MACHINE_ROLE).unwrap_or(0);
    let alive = runtime()?.block_on(give_up(&sandbox, &id));
    if !alive {
        cleanup(&dir).with_context(|| format!("cannot undo sandbox {sandbox}"))?;
        // A `start` that was killed before it wrote down that it listens.
        let address = Address::of(&flags.address, &flags.namespace, group.as_str(), None);
        if !address.answers() {
            address.remove();
        }
    }
    response(machine).write_to_bytes().context("cannot answer containerd")
}

/// Asks a living server to end if nobody else uses it. Whether it lives on.
async fn give_up(sandbox: &Id, container: &Id) -> bool {
    let client = match Client::connect(sandbox).await {
        Ok(client) => client,
        Err(ClientError::NotRunning(_)) => return false,
        Err(_) => return true,
    };
    let request =
        ShutdownRequest { id: container.to_string(), now: true, ..ShutdownRequest::default() };
    let context = ttrpc::context::with_duration(PATIENCE);
    match client.tasks().shutdown(context, &request).await {
        // It stays, or is about to end, having undone everything itself.
        Ok(_) => Client::connect(sandbox).await.is_ok(),
        // It ended before it could answer, or hangs: then nobody is served by it.
        Err(_) => false,
    }
}

fn response(machine: i32) -> DeleteResponse {
    DeleteResponse {
        pid: task::pid(machine),
        exit_status: LOST.into(),
        exited_at: MessageField::some(task::timestamp(SystemTime::now())),
        ..DeleteResponse::default()
    }
}
