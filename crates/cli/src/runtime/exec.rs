//! `exec`: one more process in a running container.

use super::Call;
use super::create::{self, Console};
use crate::calls::Server;
use crate::console::Pty;
use crate::flags::Parsed;
use crate::foreground::{self, Patience, Signals};
use crate::record::Record;
use crate::stand_in::Netns;
use crate::stand_in::launch::{self, Request};
use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kata_jail::Child;
use kata_oci::{Process, Status};
use kata_protocol::Id;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// What containerd calls the process it sends.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// `exec`.
pub async fn exec(call: &Call) -> Result<u8> {
    create::refuse_fds(call)?;
    if !call.flags.list("cgroup").is_empty() {
        bail!("cgroup is not supported: a process runs in its container's cgroup");
    }
    let id = call.id()?;
    let record = call.global.root.load(id.as_str())?;
    let json = process_json(&call.flags, &record)?;
    let process = Process::parse(&serde_json::to_vec(&json)?)?;
    let server = running(&record, &id, call.flags.on("ignore-paused")).await?;

    let socket = call.flags.text("console-socket").map(Path::new);
    let detach = call.flags.on("detach");
    let console = if detach || socket.is_some() { Console::Socket(socket) } else { Console::Ours };
    let signals = if detach { None } else { Some(Signals::take(Patience::Endless)?) };
    let terminal = create::open_terminal(&process, console)?;
    let exec: Id = new_id()?;
    let stand_in = launch::start(&Request {
        sandbox: &record.sandbox()?,
        container: &id,
        exec: Some(&exec),
        command: &process.args,
        netns: netns(&record),
        root: None,
        terminal: terminal.as_ref(),
    })?;
    let started = async {
        start(&server, &id, &exec, &json, process.terminal).await?;
        create::write_pid_file(call, stand_in.pid())
    };
    if let Err(error) = started.await {
        launch::discard(&stand_in);
        return Err(error);
    }
    match signals {
        None => Ok(0),
        Some(signals) => attend(&stand_in, &signals, terminal, console).await,
    }
}

async fn attend(
    stand_in: &Child,
    signals: &Signals,
    terminal: Option<Pty>,
    console: Console<'_>,
) -> Result<u8> {
    let ours = terminal.filter(|_| matches!(console, Console::Ours));
    foreground::wait(stand_in, signals, ours).await
}

async fn start(server: &Server, id: &Id, exec: &Id, process: &Value, terminal: bool) -> Result<()> {
    let any = Any {
        type_url: PROCESS_TYPE.to_owned(),
        value: serde_json::to_vec(process)?,
        ..Default::default()
    };
    let request = ExecProcessRequest {
        id: id.to_string(),
        exec_id: exec.to_string(),
        terminal,
        spec: Some(any).into(),
        ..Default::default()
    };
    server.call(async |tasks, context| tasks.exec(context, &request).await).await?;
    server.start_process(id, Some(exec)).await
}

/// The server of a container in which a process can be started.
async fn running(record: &Record, id: &Id, ignore_paused: bool) -> Result<Server> {
    let stopped = "cannot exec in a stopped container";
    let server = Server::connect(&record.sandbox()?).await?.context(stopped)?;
    match server.state(id).await?.map(|state| state.status) {
        None | Some(Status::Stopped) => bail!(stopped),
        Some(Status::Paused) if !ignore_paused => {
            bail!("cannot exec in a paused container (use --ignore-paused to override)")
        }
        _ => Ok(server),
    }
}

/// The namespace of the container's own stand-in: hooks and tools that look at an exec's pid
/// see the container's network.
fn netns(record: &Record) -> Netns {
    match record.stand_in.filter(|process| process.alive()) {
        Some(process) => Netns::Path(format!("/proc/{}/ns/net", process.pid).into()),
        None => Netns::Host,
    }
}

fn new_id() -> Result<Id> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("cannot get random bytes")?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(text.parse()?)
}

/// The process to run: `--process`, or the container's own one changed by the flags. JSON, so
/// that no field is lost on the way.
fn process_json(flags: &Parsed, record: &Record) -> Result<Value> {
    if let Some(path) = flags.text("process") {
        let bytes = fs::read(path).with_context(|| format!("cannot read {path}"))?;
        return serde_json::from_slice(&bytes)
            .with_context(|| format!("{path} is not an OCI process"));
    }
    let path = record.bundle.join("config.json");
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let spec: Value = serde_json::from_slice(&bytes)
        .with_context(|| format!("{} is not valid JSON", path.display()))?;
    changed(spec["process"].clone(), flags)
}

fn changed(mut process: Value, flags: &Parsed) -> Result<Value> {
    if !process.is_object() {
        process = json!({"cwd": "/"});
    }
    let args = &flags.args[1..];
    if args.is_empty() {
        bail!("process args cannot be empty");
    }
    process["args"] = json!(args);
    process["terminal"] = json!(flags.on("tty"));
    for (flag, field) in
        [("cwd", "cwd"), ("apparmor", "apparmorProfile"), ("process-label", "selinuxLabel")]
    {
        if let Some(value) = flags.text(flag) {
            process[field] = json!(value);
        }
    }
    if flags.on("no-new-privs") {
        process["noNewPrivileges"] = json!(true);
    }
    append(&mut process["env"], flags.list("env"));
    for set in ["bounding", "effective", "permitted", "ambient"] {
        if !flags.list("cap").is_empty() {
            append(&mut process["capabilities"][set], flags.list("cap"));
        }
    }
    set_user(&mut process["user"], flags)?;
    Ok(process)
}

fn append(list: &mut Value, items: &[String]) {
    if items.is_empty() {
        return;
    }
    if !list.is_array() {
        *list = json!([]);
    }
    if let Some(list) = list.as_array_mut() {
        list.extend(items.iter().map(|item| json!(item)));
    }
}

fn set_user(user: &mut Value, flags: &Parsed) -> Result<()> {
    if user.is_null() {
        *user = json!({"uid": 0, "gid": 0});
    }
    if let Some(text) = flags.text("user") {
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (uid, Some(gid)),
            None => (text, None),
        };
        let uid: u32 =
            uid.parse().with_context(|| format!("parsing {uid} as int for uid failed"))?;
        user["uid"] = json!(uid);
        if let Some(gid) = gid {
            let gid: u32 =
                gid.parse().with_context(|| format!("parsing {gid} as int for gid failed"))?;
            user["gid"] = json!(gid);
        }
    }
    let mut groups = Vec::new();
    for text in flags.list("additional-gids") {
        let gid: u32 =
            text.parse().with_context(|| format!("additional gid {text:?} is not a number"))?;
        groups.push(json!(gid));
    }
    if !groups.is_empty() {
        let mut all = user["additionalGids"].as_array().cloned().unwrap_or_default();
        all.extend(groups);
        user["additionalGids"] = Value::Array(all);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::tests::parsed;

    fn base() -> Value {
        json!({"args": ["sh"], "cwd": "/", "terminal": true, "env": ["PATH=/bin"],
               "user": {"uid": 5, "gid": 6}, "rlimits": [{"type": "RLIMIT_CORE"}]})
    }

    #[test]
    fn flags_change_the_containers_own_process() {
        let flags =
            parsed("exec", "-u 1:2 -g 3 -g 4 -e A=1 --cwd /x -c CAP_KILL --no-new-privs c1 ls -l");
        let process = changed(base(), &flags).unwrap();
        assert_eq!(process["args"], json!(["ls", "-l"]));
        assert_eq!(process["user"], json!({"uid": 1, "gid": 2, "additionalGids": [3, 4]}));
        assert_eq!(process["env"], json!(["PATH=/bin", "A=1"]));
        assert_eq!(process["cwd"], "/x");
        assert_eq!(process["terminal"], false);
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_KILL"]));
        assert_eq!(process["rlimits"], base()["rlimits"]);
    }

    #[test]
    fn a_uid_alone_keeps_the_group() {
        let process = changed(base(), &parsed("exec", "--user 0 c1 id")).unwrap();
        assert_eq!(process["user"], json!({"uid": 0, "gid": 6}));
    }

    #[test]
    fn names_are_no_users_here() {
        let error = changed(base(), &parsed("exec", "-u root c1 id")).unwrap_err();
        assert!(error.to_string().contains("parsing root as int for uid failed"), "{error}");
        assert!(changed(base(), &parsed("exec", "c1")).is_err());
    }

    #[test]
    fn ids_of_execs_differ() {
        assert_ne!(new_id().unwrap(), new_id().unwrap());
    }
}
