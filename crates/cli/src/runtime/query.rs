//! `state`, `list`, `ps`: what is known, in runc's shapes.

use super::Call;
use crate::calls::Server;
use crate::record::Record;
use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::PidsRequest;
use kata_oci::Status;
use kata_protocol::Id;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

/// A container as runc's `state` and `list` print it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    oci_version: String,
    id: String,
    pid: i32,
    status: Status,
    bundle: PathBuf,
    rootfs: PathBuf,
    created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
    owner: String,
}

/// A status as runc writes it.
pub fn status_text(status: Status) -> &'static str {
    match status {
        Status::Creating => "creating",
        Status::Created => "created",
        Status::Running => "running",
        Status::Stopped => "stopped",
        Status::Paused => "paused",
    }
}

async fn line(record: Record) -> Result<Line> {
    let (status, pid) = status(&record).await?;
    Ok(Line {
        oci_version: record.oci_version,
        id: record.id,
        pid,
        status,
        bundle: record.bundle,
        rootfs: record.rootfs,
        created: record.created,
        annotations: record.annotations,
        owner: record.owner,
    })
}

/// Where a container is, and its stand-in's pid (0 when there is none).
async fn status(record: &Record) -> Result<(Status, i32)> {
    let id: Id = record.id.parse()?;
    let Some(server) = Server::connect(&record.sandbox()?).await? else {
        return Ok((Status::Stopped, 0));
    };
    let pid = record.stand_in.filter(|process| process.alive()).map_or(0, |process| process.pid);
    Ok(match server.state(&id).await? {
        None if !record.created_fully && pid != 0 => (Status::Creating, pid),
        None => (Status::Stopped, 0),
        Some(state) if state.status == Status::Stopped => (Status::Stopped, 0),
        Some(state) => (state.status, if state.pid == 0 { pid } else { state.pid }),
    })
}

/// `state`.
pub async fn state(call: &Call) -> Result<u8> {
    let record = call.global.root.load(call.id()?.as_str())?;
    println!("{}", serde_json::to_string_pretty(&line(record).await?)?);
    Ok(0)
}

/// `list`.
pub async fn list(call: &Call) -> Result<u8> {
    let format = call.flags.text("format").unwrap_or("table");
    if !["table", "json"].contains(&format) {
        bail!("invalid format option");
    }
    let ids = call.global.root.ids()?;
    if call.flags.on("quiet") {
        ids.iter().for_each(|id| println!("{id}"));
        return Ok(0);
    }
    let mut lines = Vec::new();
    for id in ids {
        let line = match call.global.root.load(&id) {
            Ok(record) => line(record).await,
            Err(error) => Err(error),
        };
        match line {
            Ok(line) => lines.push(line),
            // It may have gone since the directory was read; the others are still wanted.
            Err(error) => tracing::warn!("container {id} is left out: {error:#}"),
        }
    }
    if format == "json" {
        // Go writes an empty list as null, and its readers expect either.
        let text =
            if lines.is_empty() { "null".to_owned() } else { serde_json::to_string(&lines)? };
        println!("{text}");
    } else {
        print!("{}", table(&lines));
    }
    Ok(0)
}

fn table(lines: &[Line]) -> String {
    let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
    rows.extend(lines.iter().map(|line| {
        [
            line.id.clone(),
            line.pid.to_string(),
            status_text(line.status).to_owned(),
            line.bundle.display().to_string(),
            line.created.clone(),
            line.owner.clone(),
        ]
    }));
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count() + 3).max().unwrap_or(0).max(12)
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths).take(5) {
            text.push_str(&format!("{cell:width$}"));
        }
        text.push_str(&row[5]);
        text.push('\n');
    }
    text
}

/// `ps`: the host processes that stand for the container's. The guest's own pids mean
/// nothing here and are never shown.
pub async fn ps(call: &Call) -> Result<u8> {
    let id = call.id()?;
    let record = call.global.root.load(id.as_str())?;
    let Some(server) = Server::connect(&record.sandbox()?).await? else {
        bail!("container not running");
    };
    let request = PidsRequest { id: id.to_string(), ..Default::default() };
    let answer = server.call(async |tasks, context| tasks.pids(context, &request).await).await?;
    let pids: Vec<u32> = answer.processes.iter().map(|process| process.pid).collect();
    match call.flags.text("format").unwrap_or("table") {
        "json" => println!("{}", serde_json::to_string(&pids)?),
        "table" => print!("{}", host_ps(&call.flags.args[1..], &pids)?),
        _ => bail!("invalid format option"),
    }
    Ok(0)
}

fn host_ps(args: &[String], pids: &[u32]) -> Result<String> {
    let args = if args.is_empty() { &["-ef".to_owned()][..] } else { args };
    let output = Command::new("ps").args(args).output().context("cannot run ps")?;
    if !output.status.success() {
        bail!("ps failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    only(&String::from_utf8_lossy(&output.stdout), pids)
}

/// The heading of `ps`'s output and the lines of these processes.
fn only(output: &str, pids: &[u32]) -> Result<String> {
    let mut lines = output.lines();
    let heading = lines.next().unwrap_or_default();
    let column = heading
        .split_whitespace()
        .position(|title| title == "PID")
        .context("couldn't find PID field in ps output")?;
    let mut text = format!("{heading}\n");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|field| field.parse().ok());
        if pid.is_some_and(|pid: u32| pids.contains(&pid)) {
            text.push_str(line);
            text.push('\n');
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Line {
        Line {
            oci_version: "1.0.2".into(),
            id: "c1".into(),
            pid: 42,
            status: Status::Running,
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2026-11-23T09:25:41Z".into(),
            annotations: BTreeMap::new(),
            owner: "root".into(),
        }
    }

    #[test]
    fn the_state_has_runcs_fields() {
        let value = serde_json::to_value(example()).unwrap();
        let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(
            keys,
            ["bundle", "created", "id", "ociVersion", "owner", "pid", "rootfs", "status"]
        );
        assert_eq!(value["status"], "running");
    }

    #[test]
    fn the_table_is_aligned_as_runcs() {
        let heading = "ID          PID         STATUS      BUNDLE      CREATED     OWNER\n";
        assert_eq!(table(&[]), heading);
        let text = table(&[example()]);
        let columns: Vec<usize> =
            text.lines().map(|line| line.find("OWNER").or(line.find("root")).unwrap()).collect();
        assert_eq!(columns[0], columns[1]);
    }

    #[test]
    fn only_the_containers_processes_are_listed() {
        let output = "UID   PID  PPID CMD\nroot    1     0 init\nroot   42     1 sleep 42\n";
        assert_eq!(only(output, &[42]).unwrap(), "UID   PID  PPID CMD\nroot   42     1 sleep 42\n");
        assert!(only("no heading\n", &[1]).is_err());
    }
}
