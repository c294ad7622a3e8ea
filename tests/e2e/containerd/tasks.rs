//! Tasks: made, looked at, paused, signalled, removed.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::containerd::{Containerd, IMAGE, Task};
use kata_e2e::leaks;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Containerd>> {
    trials!["tasks":
        Both: run_gives_the_processes_exit_code, kernel_is_the_expected_one,
            native_snapshotter_works, rootfs_directory_works,
            missing_command_is_an_error_and_leaves_nothing, options_arrive,
            bind_mounts_are_shared, exec_has_its_own_code_user_and_directory,
            signals_arrive_and_give_their_codes, all_processes_are_killed_with_all,
            pause_and_resume, processes_and_metrics_are_told,
            task_can_be_removed_and_made_again, several_tasks_start_side_by_side,
            interface_put_where_the_task_is_found_is_the_containers;
        Kata: checkpoint_is_refused, host_network_is_refused_with_a_reason;
    ]
}

fn run_gives_the_processes_exit_code(containerd: &Containerd) -> Result<()> {
    for code in [0, 255] {
        containerd.run("", &format!("exit {code}"))?.expect_code(code)?;
    }
    Ok(())
}

fn kernel_is_the_expected_one(containerd: &Containerd) -> Result<()> {
    let host = command::ok(Command::new("uname").arg("-r"))?.out();
    let seen = containerd.run("", "uname -r; mount | head -1")?.expect_code(0)?.out();
    let (kernel, root) = seen.split_once('\n').unwrap_or_default();
    ensure!((kernel != host) == containerd.is_kata(), "host {host}, container {kernel}");
    ensure!(root.starts_with("kataShared on / ") == containerd.is_kata(), "{root}");
    Ok(())
}

fn native_snapshotter_works(containerd: &Containerd) -> Result<()> {
    let output = containerd.run("--snapshotter native", "echo x > /made; cat /made")?;
    ensure!(output.code == 0 && output.out() == "x", "{output}");
    Ok(())
}

fn rootfs_directory_works(containerd: &Containerd) -> Result<()> {
    let root = containerd.arena.dir("containerd-image")?;
    let name = containerd.name();
    let kind = containerd.kind();
    let line =
        format!("run --rm --runtime {kind} --env PATH=/bin --rootfs {} {name} cat", root.display());
    let mut ctr = containerd.ctr(&line);
    let output = command::run(ctr.arg("/var/www/index.html"))?;
    ensure!(output.out() == "hello from the image", "{output}");
    Ok(())
}

fn missing_command_is_an_error_and_leaves_nothing(containerd: &Containerd) -> Result<()> {
    let name = containerd.name();
    let kind = containerd.kind();
    let line = format!("run --rm --runtime {kind} {IMAGE} {name} no-such-command");
    let output = containerd.cmd(&line)?;
    ensure!(output.code != 0, "{output}");
    ensure!(
        output.err().contains("no-such-command")
            && output.err().contains("executable file not found"),
        "{output}"
    );
    // ctr forgets to remove the container, runc or not.
    containerd.cmd(&format!("container rm {name}"))?;
    leaks::expect_no_trace(&[&name])
}

fn options_arrive(containerd: &Containerd) -> Result<()> {
    let flags = "--env COLOUR=green --cwd /tmp --read-only";
    let script = "echo $COLOUR; pwd; touch /x 2>/dev/null || echo read-only";
    let seen = containerd.run(flags, script)?.expect_code(0)?.out();
    ensure!(seen == "green\n/tmp\nread-only", "{seen}");
    Ok(())
}

fn bind_mounts_are_shared(containerd: &Containerd) -> Result<()> {
    let dir = containerd.arena.dir(&containerd.name())?;
    fs::write(dir.join("in"), "from the host\n")?;
    let at = dir.display();
    let flags = format!(
        "--mount type=bind,src={at},dst=/d,options=rbind:rw \
         --mount type=bind,src={at}/in,dst=/file,options=rbind:ro"
    );
    let script = "cat /file; echo inside > /d/out; echo x 2>/dev/null > /file || echo refused";
    let seen = containerd.run(&flags, script)?.expect_code(0)?.out();
    ensure!(seen == "from the host\nrefused", "{seen}");
    ensure!(fs::read_to_string(dir.join("out"))? == "inside\n");
    Ok(())
}

fn exec_has_its_own_code_user_and_directory(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    let flags = "--cwd /tmp --user 1000";
    let output = command::run(&mut task.exec_command(flags, "pwd; id -u; exit 5"))?;
    ensure!(output.expect_code(5)?.out() == "/tmp\n1000");
    let output = task.exec("no-such-command; exit 0")?;
    ensure!(output.code == 0 && output.err().contains("not found"), "{output}");
    let line = format!("task exec --exec-id {} {} no-such-command", containerd.name(), task.name);
    let output = containerd.cmd(&line)?;
    ensure!(output.code != 0 && output.err().contains("executable file not found"), "{output}");
    // Nothing of it is in the way of the next.
    task.exec("true")?.expect_code(0).map(drop)
}

fn signals_arrive_and_give_their_codes(containerd: &Containerd) -> Result<()> {
    let script = "trap 'exit 9' USR1; trap '' TERM; touch /tmp/up; while :; do sleep 0.1; done";
    let task = containerd.detached("", script)?;
    task.exec("while [ ! -e /tmp/up ]; do sleep 0.1; done")?.expect_code(0)?;
    task.verb("kill -s SIGTERM")?.expect_code(0)?;
    task.exec("true")?.expect_code(0)?;
    task.verb("kill -s SIGUSR1")?.expect_code(0)?;
    task.until("STOPPED")?;
    ensure!(task.verb("kill -s SIGKILL")?.code != 0, "a dead task took a signal");
    task.expect_removed_with(9)?;
    let task = containerd.detached("", "exec sleep 1000000")?;
    task.verb("kill -s SIGKILL")?.expect_code(0)?;
    task.until("STOPPED")?;
    task.expect_removed_with(137)
}

fn all_processes_are_killed_with_all(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "sleep 1000 & sleep 1000 & wait")?;
    task.verb("kill --all -s SIGKILL")?.expect_code(0)?;
    task.until("STOPPED")
}

fn pause_and_resume(containerd: &Containerd) -> Result<()> {
    let script = "while :; do i=$((i+1)); echo $i > /tmp/now; sleep 0.1; done";
    let task = containerd.detached("", script)?;
    task.exec("while [ ! -e /tmp/now ]; do sleep 0.1; done")?.expect_code(0)?;
    task.verb("pause")?.expect_code(0)?;
    task.until("PAUSED")?;
    ensure!(task.exec("true")?.code != 0, "a paused task took an exec");
    task.verb("resume")?.expect_code(0)?;
    task.until("RUNNING")?;
    let script = "a=$(cat /tmp/now); while [ \"$a\" = \"$(cat /tmp/now)\" ]; do sleep 0.1; done";
    task.exec(script)?.expect_code(0).map(drop)
}

fn processes_and_metrics_are_told(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("--memory-limit 268435456", "exec sleep 1000000")?;
    let (pid, _) = task.state()?;
    ensure!(pid > 1 && fs::exists(format!("/proc/{pid}"))?, "its pid is {pid}");
    let list = task.verb("ps")?.expect_code(0)?.out();
    ensure!(list.split_whitespace().any(|word| word == pid.to_string()), "{list}");
    let text = task.verb("metrics --format json")?.expect_code(0)?.out();
    let metrics: serde_json::Value = serde_json::from_str(&text)?;
    // Version 1 has memory.usage.usage, version 2 memory.usage; JSON has no numbers for some.
    let memory = &metrics["memory"]["usage"];
    let usage = memory["usage"].as_u64().or(memory.as_u64()).context("memory usage")?;
    ensure!((1..=268_435_456).contains(&usage), "{text}");
    let limit = memory["limit"].as_u64().or(metrics["memory"]["usage_limit"].as_u64());
    ensure!(limit == Some(268_435_456), "{text}");
    ensure!(metrics["pids"]["current"].as_u64() == Some(1), "{text}");
    Ok(())
}

fn task_can_be_removed_and_made_again(containerd: &Containerd) -> Result<()> {
    let name = containerd.name();
    containerd.ok(&format!(
        "container create --runtime {} {IMAGE} {name} sleep 1000000",
        containerd.kind()
    ))?;
    let task = Task::of(containerd, name.clone());
    for _ in 0..2 {
        containerd.ok(&format!("task start -d {name}"))?;
        containerd.ok(&format!("task kill -s SIGKILL {name}"))?;
        task.until("STOPPED")?;
        task.expect_removed_with(137)?;
    }
    task.remove()?;
    leaks::expect_no_trace(&[&name])
}

fn several_tasks_start_side_by_side(containerd: &Containerd) -> Result<()> {
    let outputs: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|n| scope.spawn(move || containerd.run("", &format!("echo {n}; exit {n}"))))
            .collect();
        runs.into_iter().map(|run| run.join()).collect()
    });
    for (n, output) in outputs.into_iter().enumerate() {
        let output = output.map_err(|_| anyhow::anyhow!("a run panicked"))??;
        let output = output.expect_code(i32::try_from(n)?)?;
        ensure!(output.out() == n.to_string(), "{output}");
    }
    Ok(())
}

/// As Docker 26 does it: the specification names no namespace, it is found by the task's process.
fn interface_put_where_the_task_is_found_is_the_containers(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    let (pid, _) = task.state()?;
    let ip = |line: String| command::ok(Command::new("ip").args(line.split(' ')));
    ip("link add late-host type veth peer name late".to_owned())?;
    ip(format!("link set late netns {pid}"))?;
    let inside = format!("-t {pid} -n ip");
    for line in ["addr add 192.0.2.9/24 dev late", "link set late up"] {
        let words = inside.split(' ').chain(line.split(' '));
        command::ok(Command::new("nsenter").args(words))?;
    }
    command::eventually("the container has the interface", PATIENCE, || {
        Ok(task.exec("ip -4 addr")?.out().contains("inet 192.0.2.9/24"))
    })?;
    ip("link del late-host".to_owned()).map(drop)
}

fn checkpoint_is_refused(containerd: &Containerd) -> Result<()> {
    let task = containerd.detached("", "exec sleep 1000000")?;
    let output = task.verb("checkpoint")?;
    ensure!(output.code != 0 && output.err().contains("checkpoint"), "{output}");
    // It runs on.
    task.exec("true")?.expect_code(0).map(drop)
}

fn host_network_is_refused_with_a_reason(containerd: &Containerd) -> Result<()> {
    let output = containerd.run("--net-host", "true")?;
    ensure!(output.code != 0 && output.err().contains("network"), "{output}");
    Ok(())
}
