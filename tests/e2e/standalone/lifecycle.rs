//! From `spec` to `delete`.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::oci::Oci;
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::{Value, json};

use super::exec::receive_terminal;

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["lifecycle":
        Both: create_start_kill_delete_go_through_their_states, run_gives_output_and_exit_code,
            run_detached_returns_at_once, stand_in_exits_with_the_containers_code,
            kill_all_and_signal_names_work, delete_force_ends_a_running_container,
            delete_of_a_running_container_is_refused, unknown_container_is_an_error,
            same_id_twice_is_refused, list_shows_containers, ps_lists_processes,
            pause_and_resume_change_the_state, events_with_stats_count, update_changes_the_limits,
            terminal_comes_over_the_console_socket, version_features_and_spec_answer,
            errors_are_logged_as_json_where_asked, other_root_keeps_containers_apart;
        Kata: delete_leaves_no_state, ready_within_time;
    ]
}

const IDLE: &str = "while :; do sleep 0.1; done";

fn create_start_kill_delete_go_through_their_states(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("echo hello; exec sleep 100000")?;
    bundle.create()?.expect_code(0)?;
    let state = bundle.state()?;
    ensure!(state["status"] == "created" && state["id"] == bundle.id.as_str(), "{state}");
    ensure!(state["pid"] == bundle.pid()?, "{state}");
    ensure!(state["bundle"] == bundle.dir.to_string_lossy().as_ref(), "{state}");
    ensure!(bundle.stdout()?.is_empty(), "it runs before start");
    bundle.verb("start")?.expect_code(0)?;
    ensure!(bundle.state()?["status"] == "running");
    command::eventually("it says hello", PATIENCE, || Ok(bundle.stdout()? == "hello"))?;
    let pid = bundle.pid()?;
    oci.ok(&format!("kill {} KILL", bundle.id))?;
    bundle.until("stopped")?;
    bundle.verb("delete")?.expect_code(0)?;
    ensure!(bundle.verb("state")?.code != 0, "it has a state after delete");
    command::eventually("its process is gone", PATIENCE, || {
        Ok(!std::path::Path::new(&format!("/proc/{pid}")).exists())
    })
}

fn run_gives_output_and_exit_code(oci: &Oci) -> Result<()> {
    let output = oci.bundle("echo out; echo err >&2; exit 17")?.run()?.expect_code(17)?;
    ensure!(output.out() == "out" && output.err() == "err", "{output}");
    oci.bundle("sh -c 'kill -TERM $$'; exit $?")?.run()?.expect_code(143)?;
    Ok(())
}

fn run_detached_returns_at_once(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    let line = format!(
        "exec {} run --detach --bundle {1} --pid-file {1}/pid {2} </dev/null >/dev/null 2>&1",
        oci.runtime,
        bundle.dir.display(),
        bundle.id
    );
    command::ok(std::process::Command::new("sh").args(["-c", &line]))?;
    ensure!(bundle.state()?["status"] == "running");
    ensure!(bundle.pid()? > 1);
    Ok(())
}

fn stand_in_exits_with_the_containers_code(oci: &Oci) -> Result<()> {
    // A subreaper, as an engine's shim is one, sees how the process of the pid file ends.
    let bundle = oci.bundle("exit 23")?;
    let script = format!(
        "{0} create --bundle {1} --pid-file {1}/pid {2} </dev/null >/dev/null 2>&1 && {0} start {2}",
        oci.runtime,
        bundle.dir.display(),
        bundle.id
    );
    let code = command::run(
        std::process::Command::new(kata_e2e::assets::beside("kata-e2e-subreaper")?)
            .args([bundle.dir.join("pid").to_string_lossy().as_ref(), &script]),
    )?;
    ensure!(code.out() == "23", "{code}");
    Ok(())
}

fn kill_all_and_signal_names_work(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(
        "trap 'echo one' USR1; trap 'echo two' USR2; echo up; while :; do sleep 0.05; done",
    )?;
    bundle.start()?;
    let said =
        |text: &str| command::eventually(text, PATIENCE, || Ok(bundle.stdout()?.contains(text)));
    said("up")?;
    oci.ok(&format!("kill {} SIGUSR1", bundle.id))?;
    said("one")?;
    oci.ok(&format!("kill {} 12", bundle.id))?;
    said("two")?;
    let wrong = oci.cmd(&format!("kill {} NOSUCH", bundle.id))?;
    ensure!(wrong.code != 0 && !wrong.err().is_empty(), "{wrong}");
    oci.ok(&format!("kill --all {} KILL", bundle.id))?;
    bundle.until("stopped")
}

fn delete_force_ends_a_running_container(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    bundle.start()?;
    let pid = bundle.pid()?;
    bundle.verb("delete --force")?.expect_code(0)?;
    ensure!(bundle.verb("state")?.code != 0);
    command::eventually("its process is gone", PATIENCE, || {
        Ok(!std::path::Path::new(&format!("/proc/{pid}")).exists())
    })?;
    // Once more is no error.
    bundle.verb("delete --force")?.expect_code(0)?;
    Ok(())
}

fn delete_of_a_running_container_is_refused(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    bundle.start()?;
    let output = bundle.verb("delete")?;
    ensure!(output.code != 0 && output.err().contains("not stopped"), "{output}");
    ensure!(bundle.state()?["status"] == "running");
    Ok(())
}

fn unknown_container_is_an_error(oci: &Oci) -> Result<()> {
    for verb in ["state", "start", "delete", "pause", "resume", "ps"] {
        let output = oci.cmd(&format!("{verb} no-such"))?;
        ensure!(output.code == 1 && output.err().contains("does not exist"), "{output}");
    }
    Ok(())
}

fn same_id_twice_is_refused(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    bundle.start()?;
    let output = bundle.create()?;
    ensure!(output.code == 1, "{output}");
    ensure!(bundle.state()?["status"] == "running", "the first one is disturbed");
    Ok(())
}

fn list_shows_containers(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    bundle.start()?;
    let table = oci.ok("list")?;
    let row =
        table.lines().find(|line| line.starts_with(&bundle.id)).with_context(|| table.clone())?;
    ensure!(table.starts_with("ID ") && row.contains("running"), "{table}");
    let listed: Value = serde_json::from_str(&oci.ok("list --format json")?)?;
    let listed = listed.as_array().context("a list")?;
    ensure!(
        listed.iter().any(|c| c["id"] == bundle.id.as_str() && c["status"] == "running"),
        "{listed:?}"
    );
    ensure!(oci.ok("list -q")?.lines().any(|line| line == bundle.id));
    Ok(())
}

fn ps_lists_processes(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("exec sleep 43210")?;
    bundle.start()?;
    let table = oci.ok(&format!("ps {}", bundle.id))?;
    ensure!(table.contains("PID") && table.contains("sleep 43210"), "{table}");
    let pids: Vec<i32> =
        serde_json::from_str(&oci.ok(&format!("ps --format json {}", bundle.id))?)?;
    ensure!(pids.contains(&bundle.pid()?), "{pids:?}");
    Ok(())
}

fn pause_and_resume_change_the_state(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("while :; do echo x; sleep 0.05; done")?;
    bundle.start()?;
    command::eventually("it writes", PATIENCE, || Ok(!bundle.stdout()?.is_empty()))?;
    bundle.verb("pause")?.expect_code(0)?;
    ensure!(bundle.state()?["status"] == "paused");
    std::thread::sleep(Duration::from_millis(200));
    let before = bundle.stdout()?.len();
    std::thread::sleep(Duration::from_millis(500));
    ensure!(bundle.stdout()?.len() == before, "it goes on writing");
    bundle.verb("resume")?.expect_code(0)?;
    ensure!(bundle.state()?["status"] == "running");
    command::eventually("it writes again", PATIENCE, || Ok(bundle.stdout()?.len() > before))
}

fn events_with_stats_count(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(IDLE)?;
    bundle.start()?;
    let stats: Value = serde_json::from_str(&oci.ok(&format!("events --stats {}", bundle.id))?)?;
    ensure!(stats["type"] == "stats" && stats["id"] == bundle.id.as_str(), "{stats}");
    ensure!(stats["data"]["cpu"]["usage"]["total"].as_u64() > Some(0), "{stats}");
    ensure!(stats["data"]["memory"]["usage"]["usage"].as_u64() > Some(0), "{stats}");
    ensure!(stats["data"]["pids"]["current"].as_u64() > Some(0), "{stats}");
    Ok(())
}

fn update_changes_the_limits(oci: &Oci) -> Result<()> {
    let limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    let bundle = oci.bundle(IDLE)?.with(|spec| {
        spec["linux"]["resources"] =
            json!({ "memory": { "limit": 128 << 20 }, "pids": { "limit": 99 } });
    })?;
    bundle.start()?;
    let read = || -> Result<String> {
        let mut exec = oci.command(&format!("exec {} sh -c", bundle.id));
        Ok(command::ok(exec.arg(limit))?.out())
    };
    ensure!(read()? == (128 << 20).to_string(), "{}", read()?);
    oci.ok(&format!("update --memory {} {}", 96 << 20, bundle.id))?;
    ensure!(read()? == (96 << 20).to_string(), "{}", read()?);
    Ok(())
}

fn terminal_comes_over_the_console_socket(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("tty; stty size; read line; echo got $line; exit 4")?.with(|spec| {
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({ "height": 31, "width": 97 });
    })?;
    let refused = bundle.create()?;
    ensure!(refused.code == 1, "a terminal with nowhere to send it: {refused}");
    bundle.verb("delete --force")?;
    let path = bundle.dir.join("tty.sock");
    let listener = UnixListener::bind(&path)?;
    bundle.create_with(&format!("--console-socket {}", path.display()))?.expect_code(0)?;
    let mut terminal = receive_terminal(&listener)?;
    bundle.verb("start")?.expect_code(0)?;
    terminal.expect("/dev/pts/0")?;
    terminal.expect("31 97")?;
    terminal.send("words\r")?;
    terminal.expect("got words")?;
    bundle.until("stopped")
}

fn version_features_and_spec_answer(oci: &Oci) -> Result<()> {
    let version = oci.ok("--version")?;
    ensure!(version.starts_with(oci.runtime) && version.contains("spec: 1."), "{version}");
    let features: Value = serde_json::from_str(&oci.ok("features")?)?;
    ensure!(features["ociVersionMax"].is_string(), "{features}");
    ensure!(
        features["mountOptions"].as_array().is_some_and(|o| o.iter().any(|o| o == "rslave")),
        "{features}"
    );
    let dir = oci.arena.dir(&format!("spec-{}", oci.runtime))?;
    oci.ok(&format!("spec --bundle {}", dir.display()))?;
    let again = oci.cmd(&format!("spec --bundle {}", dir.display()))?;
    ensure!(again.code == 1 && again.err().contains("exists"), "{again}");
    Ok(())
}

fn errors_are_logged_as_json_where_asked(oci: &Oci) -> Result<()> {
    let log = oci.arena.work.join(format!("log-{}.json", oci.runtime));
    let output = oci.cmd(&format!("--log {} --log-format json start no-such", log.display()))?;
    ensure!(output.code == 1, "{output}");
    let text = std::fs::read_to_string(&log)?;
    let last: Value = serde_json::from_str(text.lines().last().context("an empty log")?)?;
    ensure!(
        last["level"] == "error" && last["msg"].is_string() && last["time"].is_string(),
        "{last}"
    );
    Ok(())
}

fn other_root_keeps_containers_apart(oci: &Oci) -> Result<()> {
    let root = oci.arena.dir(&format!("root-{}", oci.runtime))?;
    let bundle = oci.bundle(IDLE)?;
    let line = format!(
        "exec {} --root {} run --detach --bundle {} {} </dev/null >/dev/null 2>&1",
        oci.runtime,
        root.display(),
        bundle.dir.display(),
        bundle.id
    );
    command::ok(std::process::Command::new("sh").args(["-c", &line]))?;
    let there = oci.ok(&format!("--root {} list -q", root.display()))?;
    let here = oci.ok("list -q")?;
    oci.ok(&format!("--root {} delete --force {}", root.display(), bundle.id))?;
    ensure!(there == bundle.id && !here.contains(&bundle.id), "there {there}, here {here}");
    Ok(())
}

fn delete_leaves_no_state(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    bundle.start()?;
    bundle.until("stopped")?;
    ensure!(std::path::Path::new("/run/kata-containers").join(&bundle.id).exists());
    bundle.verb("delete")?.expect_code(0)?;
    ensure!(!std::path::Path::new("/run/kata-containers").join(&bundle.id).exists());
    Ok(())
}

fn ready_within_time(oci: &Oci) -> Result<()> {
    // A loose bound against hangs and polling; the benchmark has the figures.
    let began = Instant::now();
    oci.bundle("true")?.run()?.expect_code(0)?;
    ensure!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    Ok(())
}
