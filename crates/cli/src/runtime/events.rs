//! `events`: statistics and out-of-memory kills, as JSON lines in runc's shape.

use super::{Call, stats};
use crate::calls::Server;
use crate::record::Record;
use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::StatsRequest;
use kata_oci::Status;
use kata_protocol::Id;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;

/// `events`.
pub async fn events(call: &Call) -> Result<u8> {
    let id = call.id()?;
    let record = call.global.root.load(id.as_str())?;
    let text = call.flags.text("interval").unwrap_or("5s");
    let interval = crate::time::go_duration(text)
        .filter(|interval| !interval.is_zero())
        .context("duration interval must be greater than 0")?;
    let server = running(&record, &id).await?;
    if call.flags.on("stats") {
        let stats = ask(&server, &id).await?;
        emit("stats", &id, Some(&stats.data))?;
        return Ok(0);
    }
    stream(&server, &id, interval).await?;
    Ok(0)
}

async fn running(record: &Record, id: &Id) -> Result<Server> {
    let stopped = "container with id {id} is not running";
    let stopped = stopped.replace("{id}", id.as_str());
    let server = Server::connect(&record.sandbox()?).await?.context(stopped.clone())?;
    match server.state(id).await?.map(|state| state.status) {
        None | Some(Status::Stopped) => bail!(stopped),
        Some(_) => Ok(server),
    }
}

/// Lines until the container has stopped.
async fn stream(server: &Server, id: &Id, interval: Duration) -> Result<()> {
    let mut kills = None;
    loop {
        let Ok(stats) = ask(server, id).await else {
            // Stopped, or gone with its sandbox: the stream ends, as runc's does.
            return Ok(());
        };
        let before = kills.replace(stats.oom_kills).unwrap_or(stats.oom_kills);
        for _ in before..stats.oom_kills {
            emit("oom", id, None)?;
        }
        emit("stats", id, Some(&stats.data))?;
        tokio::time::sleep(interval).await;
    }
}

async fn ask(server: &Server, id: &Id) -> Result<stats::Stats> {
    let request = StatsRequest { id: id.to_string(), ..Default::default() };
    let answer = server.call(async |tasks, context| tasks.stats(context, &request).await).await?;
    stats::read(&answer.stats)
}

fn emit(kind: &str, id: &Id, data: Option<&Value>) -> Result<()> {
    let mut line = json!({"type": kind, "id": id.as_str()});
    if let Some(data) = data {
        line["data"] = data.clone();
    }
    writeln!(io::stdout(), "{line}").context("cannot write to the standard output")
}
