//! Single containers.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::http::page;
use kata_e2e::images::noise;
use kata_e2e::podman::{IMAGE, Podman};
use kata_e2e::pty::Session;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Podman>> {
    trials!["containers":
        Both: exit_codes_and_streams_are_the_processes, kernel_is_the_expected_one,
            options_arrive, detached_container_logs_and_is_waited_for,
            exec_gives_codes_streams_and_a_terminal, run_has_a_terminal_when_asked,
            bytes_in_and_out_are_all_there, stop_kill_restart_and_rm,
            pause_and_unpause, top_and_stats_show_it, volumes_are_seen_from_both_sides,
            published_port_answers, user_network_resolves_names, copy_goes_both_ways,
            limits_are_applied_and_updated, checkpoint_is_refused_or_absent;
    ]
}

fn exit_codes_and_streams_are_the_processes(podman: &Podman) -> Result<()> {
    let line = format!("run --rm {} {IMAGE}", podman.parent());
    let output = podman.shell(&line, "echo out; echo err >&2; exit 3")?.expect_code(3)?;
    ensure!(output.out() == "out" && output.err() == "err", "{output}");
    let output = podman.cmd(&format!("{line} no-such-command"))?.expect_code(127)?;
    ensure!(output.err().contains("no-such-command"), "{output}");
    podman.cmd(&format!("{line} /bin/not-a-program"))?.expect_code(126)?;
    Ok(())
}

fn kernel_is_the_expected_one(podman: &Podman) -> Result<()> {
    let host = command::ok(std::process::Command::new("uname").arg("-r"))?.out();
    let seen = podman.sh("", "uname -r; mount | head -1")?;
    let (kernel, root) = seen.split_once('\n').unwrap_or_default();
    ensure!((kernel != host) == podman.is_kata(), "host {host}, container {kernel}");
    ensure!(root.starts_with("kataShared on / ") == podman.is_kata(), "{root}");
    Ok(())
}

fn options_arrive(podman: &Podman) -> Result<()> {
    let seen = podman.sh(
        "-e COLOUR=green -w /tmp --hostname box -u alice --tmpfs /scratch --read-only \
         --add-host other:192.0.2.77",
        "echo $COLOUR; pwd; hostname; id -u; grep -c ' /scratch tmpfs ' /proc/mounts; \
         grep -c 192.0.2.77 /etc/hosts; touch /x 2>/dev/null || echo read-only",
    )?;
    let lines: Vec<_> = seen.lines().collect();
    ensure!(lines == ["green", "/tmp", "box", "1000", "1", "1", "read-only"], "{lines:?}");
    Ok(())
}

fn detached_container_logs_and_is_waited_for(podman: &Podman) -> Result<()> {
    let container = podman.detached("", "echo one; echo two >&2; sleep 1; echo three; exit 7")?;
    ensure!(podman.ok(&format!("wait {}", container.name))? == "7");
    let output = podman.cmd(&format!("logs {}", container.name))?.expect_code(0)?;
    ensure!(output.out() == "one\nthree" && output.err() == "two", "{output}");
    let state = podman.inspect("container", &container.name)?["State"].clone();
    ensure!(state["Status"] == "exited" && state["ExitCode"] == 7, "{state}");
    Ok(())
}

fn exec_gives_codes_streams_and_a_terminal(podman: &Podman) -> Result<()> {
    let container = podman.detached("", "exec sleep 1000000")?;
    let name = &container.name;
    let line = format!("exec -e A=b -w /tmp -u alice {name}");
    let output = podman.shell(&line, "echo $A $(pwd) $(id -un); echo err >&2; exit 5")?;
    let output = output.expect_code(5)?;
    ensure!(output.out() == "b /tmp alice" && output.err() == "err", "{output}");
    let output = podman.feed(&format!("exec -i {name} wc -c"), vec![b'x'; 70_000], PATIENCE)?;
    ensure!(output.out() == "70000", "{output}");
    podman.cmd(&format!("exec {name} no-such-command"))?.expect_code(127)?;
    let mut session = Session::start(&mut podman.client(&format!("exec -it {name} sh")), 30, 100)?;
    // The size travels on its own; whoever asks at once may be told none.
    session
        .send("until [ \"$(stty size 2>&1)\" = '30 100' ]; do sleep 0.1; done; tty; exit 4\n")?;
    session.expect("/dev/pts/")?;
    ensure!(session.finish(PATIENCE)? == 4);
    Ok(())
}

fn run_has_a_terminal_when_asked(podman: &Podman) -> Result<()> {
    let line = format!("run --rm -it {} {IMAGE} sh", podman.parent());
    let mut session = Session::start(&mut podman.client(&line), 24, 80)?;
    session
        .send("until [ \"$(stty size 2>&1)\" = '24 80' ]; do sleep 0.1; done; echo si''zed\n")?;
    session.expect("sized")?;
    session.resize(40, 132)?;
    // The size travels on its own; whoever asks at once may be told the old one.
    session.send("while [ \"$(stty size)\" != '40 132' ]; do sleep 0.1; done; echo res''ized\n")?;
    session.expect("resized")?;
    session.send("exit 9\n")?;
    ensure!(session.finish(PATIENCE)? == 9);
    Ok(())
}

fn bytes_in_and_out_are_all_there(podman: &Podman) -> Result<()> {
    let bytes = noise(8 << 20, 7);
    let line = format!("run --rm -i {} {IMAGE} cat", podman.parent());
    let output = podman.feed(&line, bytes.clone(), Duration::from_secs(200))?;
    ensure!(output.code == 0 && output.stdout == bytes, "{} bytes", output.stdout.len());
    Ok(())
}

fn stop_kill_restart_and_rm(podman: &Podman) -> Result<()> {
    const UP: &str = "while [ ! -e /tmp/up ]; do sleep 0.1; done";
    let script = "trap 'exit 9' TERM; touch /tmp/up; while :; do sleep 0.1; done";
    let polite = podman.detached("", script)?;
    polite.exec(UP)?;
    podman.ok(&format!("stop -t 60 {}", polite.name))?;
    let code = |name: &str| -> Result<i64> {
        Ok(podman.inspect("container", name)?["State"]["ExitCode"].as_i64().unwrap_or(-1))
    };
    ensure!(code(&polite.name)? == 9, "{}", code(&polite.name)?);
    let deaf = podman.detached(
        "",
        "trap '' TERM; trap 'exit 12' USR1; touch /tmp/up; while :; do sleep 0.1; done",
    )?;
    podman.ok(&format!("stop -t 1 {}", deaf.name))?;
    ensure!(code(&deaf.name)? == 137, "{}", code(&deaf.name)?);
    podman.ok(&format!("start {}", deaf.name))?;
    deaf.exec(UP)?;
    podman.ok(&format!("kill -s USR1 {}", deaf.name))?;
    podman.until(&deaf.name, "exited")?;
    ensure!(code(&deaf.name)? == 12, "{}", code(&deaf.name)?);
    podman.ok(&format!("restart -t 0 {}", deaf.name))?;
    podman.until(&deaf.name, "running")?;
    ensure!(podman.cmd(&format!("rm {}", deaf.name))?.code != 0, "a running one was removed");
    podman.ok(&format!("rm -f -t 0 {}", deaf.name))?;
    ensure!(podman.cmd(&format!("container exists {}", deaf.name))?.code == 1);
    Ok(())
}

fn pause_and_unpause(podman: &Podman) -> Result<()> {
    let container =
        podman.detached("", "while :; do i=$((i+1)); echo $i > /tmp/now; sleep 0.1; done")?;
    let name = &container.name;
    container.exec("while [ ! -e /tmp/now ]; do sleep 0.1; done")?;
    podman.ok(&format!("pause {name}"))?;
    podman.until(name, "paused")?;
    podman.ok(&format!("unpause {name}"))?;
    podman.until(name, "running")?;
    container
        .exec("a=$(cat /tmp/now); while [ \"$a\" = \"$(cat /tmp/now)\" ]; do sleep 0.1; done")?;
    Ok(())
}

fn top_and_stats_show_it(podman: &Podman) -> Result<()> {
    let container = podman.detached("", "exec sleep 1000000")?;
    let top = podman.ok(&format!("top {} args", container.name))?;
    ensure!(top.contains("sleep 1000000"), "{top}");
    let line = format!("stats --no-stream --format json {}", container.name);
    let stats: serde_json::Value = serde_json::from_str(&podman.ok(&line)?)?;
    let memory = stats[0]["mem_usage"].as_str().unwrap_or_default().to_owned();
    ensure!(!memory.is_empty() && !memory.starts_with("0B"), "{stats}");
    Ok(())
}

fn volumes_are_seen_from_both_sides(podman: &Podman) -> Result<()> {
    let dir = podman.arena.dir(&podman.name())?;
    fs::write(dir.join("in"), "from the host\n")?;
    let volume = podman.name();
    let options = format!("-v {0}:/d -v {0}/in:/file:ro -v {volume}:/v", dir.display());
    let seen = podman.sh(
        &options,
        "cat /file; echo from the container > /d/out; echo kept > /v/f; \
         echo x 2>/dev/null > /file || echo refused",
    )?;
    ensure!(seen == "from the host\nrefused", "{seen}");
    ensure!(fs::read_to_string(dir.join("out"))? == "from the container\n");
    let seen = podman.sh(&format!("-v {volume}:/v:ro"), "cat /v/f")?;
    podman.ok(&format!("volume rm {volume}"))?;
    ensure!(seen == "kept", "{seen}");
    Ok(())
}

fn published_port_answers(podman: &Podman) -> Result<()> {
    let _server = podman.detached("-p 18080:80", "exec httpd -f -p 80 -h /var/www")?;
    let seen = page("127.0.0.1:18080")?;
    ensure!(seen.ends_with("hello from the image\n"), "{seen}");
    Ok(())
}

fn user_network_resolves_names(podman: &Podman) -> Result<()> {
    let _alone = podman.named_network();
    let network = podman.name();
    podman.ok(&format!("network create {network}"))?;
    let result = (|| {
        let options = format!("--network {network}");
        let server = podman.detached(&options, "exec httpd -f -p 80 -h /var/www")?;
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9; do wget -qO- http://{}/ && break; sleep 1; done",
            server.name
        );
        let line = format!("run --rm {} {options} {IMAGE}", podman.parent());
        let output = podman.shell(&line, &script)?.expect_code(0)?;
        let answered = output.out() == "hello from the image";
        ensure!(answered, "{output}\n{}", name_server(podman, &network, &server.name));
        Ok(())
    })();
    podman.ok(&format!("network rm -f {network}"))?;
    result
}

/// How Podman's name server is, for who was not answered.
fn name_server(podman: &Podman, network: &str, server: &str) -> String {
    let dir = "/run/containers/networks/aardvark-dns";
    let read = |path: String| fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    let pid = read(format!("{dir}/aardvark.pid"));
    let command = read(format!("/proc/{}/cmdline", pid.trim())).replace('\0', " ");
    let said = |said: Result<String>| said.unwrap_or_else(|error| error.to_string());
    let state = podman.ok(&format!("inspect --format {{{{.State.Status}}}},{{{{.State.ExitCode}}}},{{{{.State.Error}}}} {server}"));
    let logs = podman.ok(&format!("logs {server}"));
    let look = "ip addr; ip route; cat /etc/resolv.conf";
    let other = podman.sh(&format!("--network {network}"), look);
    format!(
        "the name server is {pid} ({command}) and knows:\n{}\nthe container is: {}\nit said: {}\n\
         a further one has:\n{}",
        read(format!("{dir}/{network}")),
        said(state),
        said(logs),
        said(other),
    )
}

fn copy_goes_both_ways(podman: &Podman) -> Result<()> {
    let container = podman.detached("", "exec sleep 1000000")?;
    let dir = podman.arena.dir(&podman.name())?;
    fs::write(dir.join("in"), "carried in")?;
    podman.ok(&format!("cp {}/in {}:/tmp/in", dir.display(), container.name))?;
    ensure!(container.exec("cat /tmp/in; echo carried out > /tmp/out")? == "carried in");
    podman.ok(&format!("cp {}:/tmp/out {}/out", container.name, dir.display()))?;
    ensure!(fs::read_to_string(dir.join("out"))? == "carried out\n");
    Ok(())
}

fn limits_are_applied_and_updated(podman: &Podman) -> Result<()> {
    // The file's place depends on the version of cgroups, which differs between host and guest.
    const READ: &str = "cd /sys/fs/cgroup; for f in memory.max memory/memory.limit_in_bytes \
                        pids.max pids/pids.max; do [ ! -e $f ] || cat $f; done";
    let container = podman.detached("--memory 256m --pids-limit 77", "exec sleep 1000000")?;
    ensure!(container.exec(READ)? == "268435456\n77", "{}", container.exec(READ)?);
    podman.ok(&format!("update --memory 128m {}", container.name))?;
    ensure!(container.exec(READ)? == "134217728\n77", "{}", container.exec(READ)?);
    Ok(())
}

fn checkpoint_is_refused_or_absent(podman: &Podman) -> Result<()> {
    let container = podman.detached("", "exec sleep 1000000")?;
    let output = podman.cmd(&format!("container checkpoint {}", container.name))?;
    ensure!(output.code != 0 && !output.err().is_empty(), "{output}");
    // It runs on.
    container.exec("true").map(drop)
}
