//! What one does with containers once they are there.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::{Docker, IMAGE};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["lifecycle":
        Both: detached_container_logs_and_waits, stop_sends_term_then_kills,
            kill_sends_the_signal_asked_for, restart_gives_a_fresh_container,
            restart_policy_restarts_on_failure, pause_stops_and_unpause_goes_on,
            top_lists_the_containers_processes, stats_shows_the_cost,
            copy_works_both_ways_running_and_stopped, rename_diff_and_commit,
            health_check_turns_healthy_and_unhealthy, update_changes_limits,
            attach_sees_what_comes_after, exec_in_stopped_container_is_refused,
            exit_code_of_exec_is_the_processes, exec_takes_user_env_and_workdir,
            events_tell_the_life_of_a_container, many_containers_at_once;
        Kata: no_guest_pid_is_given_out_as_a_host_pid, machine_grows_with_an_update,
            memory_that_is_kept_back_is_out_of_reach, more_cpus_are_no_error;
    ]
}

fn detached_container_logs_and_waits(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "sh -c 'echo out; echo err >&2; exit 7'")?;
    ensure!(docker.ok(&format!("wait {}", container.name))? == "7");
    let logs = docker.cmd(&format!("logs {}", container.name))?.expect_code(0)?;
    ensure!((logs.out().as_str(), logs.err().as_str()) == ("out", "err"), "{logs}");
    Ok(())
}

fn stop_sends_term_then_kills(docker: &Docker) -> Result<()> {
    let polite = docker.detached(
        "",
        "sh -c 'trap \"echo bye; exit 5\" TERM; echo up; while :; do sleep 0.1; done'",
    )?;
    let deaf =
        docker.detached("", "sh -c 'trap \"\" TERM; echo up; while :; do sleep 0.1; done'")?;
    for container in [&polite, &deaf] {
        command::eventually("it is up", PATIENCE, || {
            Ok(docker.ok(&format!("logs {}", container.name))?.contains("up"))
        })?;
    }
    docker.ok(&format!("stop -t 60 {}", polite.name))?;
    docker.until(&polite.name, "{{.State.ExitCode}}", "5")?;
    ensure!(docker.ok(&format!("logs {}", polite.name))?.ends_with("bye"));
    let began = Instant::now();
    docker.ok(&format!("stop -t 1 {}", deaf.name))?;
    ensure!(began.elapsed() < Duration::from_secs(20), "took {:?}", began.elapsed());
    docker.until(&deaf.name, "{{.State.ExitCode}}", "137")
}

fn kill_sends_the_signal_asked_for(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "sh -c 'trap \"echo usr1\" USR1; trap \"echo hup; exit 9\" HUP; echo up; while :; do sleep 0.1; done'")?;
    let said = |text: &str| {
        command::eventually(text, PATIENCE, || {
            Ok(docker.ok(&format!("logs {}", container.name))?.contains(text))
        })
    };
    said("up")?;
    docker.ok(&format!("kill -s USR1 {}", container.name))?;
    said("usr1")?;
    docker.ok(&format!("kill -s 1 {}", container.name))?;
    said("hup")?;
    docker.until(&container.name, "{{.State.ExitCode}}", "9")
}

fn restart_gives_a_fresh_container(docker: &Docker) -> Result<()> {
    let container =
        docker.detached("", "sh -c 'echo run >> /count; wc -l < /count; exec sleep 100000'")?;
    let says = |expected: &str| {
        let mut logs = String::new();
        command::eventually("the file system is kept", PATIENCE, || {
            logs = docker.ok(&format!("logs {}", container.name))?;
            Ok(logs == expected)
        })
        .with_context(|| format!("it said {logs:?}"))
    };
    // Not to be killed before it has said so.
    says("1")?;
    docker.ok(&format!("restart -t 0 {}", container.name))?;
    says("1\n2")?;
    docker.ok(&format!("stop -t 0 {}", container.name))?;
    docker.ok(&format!("start {}", container.name))?;
    says("1\n2\n3")?;
    // It becomes another program right after it has said so.
    command::eventually("it sleeps", PATIENCE, || {
        Ok(container.exec("cat /proc/1/comm")? == "sleep")
    })?;
    Ok(())
}

fn restart_policy_restarts_on_failure(docker: &Docker) -> Result<()> {
    let container = docker.detached("--restart on-failure:2", "sh -c 'exit 4'")?;
    docker.until(
        &container.name,
        "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}",
        "2 exited 4",
    )
}

fn pause_stops_and_unpause_goes_on(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "sh -c 'while :; do echo x; sleep 0.1; done'")?;
    let count = || Ok::<_, anyhow::Error>(docker.ok(&format!("logs {}", container.name))?.len());
    command::eventually("it writes", PATIENCE, || Ok(count()? > 0))?;
    docker.ok(&format!("pause {}", container.name))?;
    docker.until(&container.name, "{{.State.Status}}", "paused")?;
    let before = count()?;
    std::thread::sleep(Duration::from_millis(700));
    // What was on its way when it was paused may still arrive.
    ensure!(count()? <= before + 2, "it goes on writing");
    docker.ok(&format!("unpause {}", container.name))?;
    command::eventually("it writes again", PATIENCE, || Ok(count()? > before + 4))
}

fn top_lists_the_containers_processes(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "sleep 54321")?;
    let top = docker.ok(&format!("top {}", container.name))?;
    ensure!(top.contains("PID") && top.contains("sleep 54321"), "{top}");
    let columns = docker.ok(&format!("top {} -o pid,args", container.name))?;
    ensure!(columns.contains("sleep 54321"), "{columns}");
    Ok(())
}

fn no_guest_pid_is_given_out_as_a_host_pid(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "sleep 54322")?;
    let top = docker.ok(&format!("top {} -o pid,args", container.name))?;
    for line in top.lines().skip(1) {
        let (pid, args) = line.trim().split_once(char::is_whitespace).context("a line of top")?;
        let host = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .with_context(|| format!("{pid} of {line:?} is no process of the host"))?;
        ensure!(host.replace('\0', " ").trim() == args.trim(), "{line:?} is {host:?} on the host");
    }
    let pid = docker.ok(&format!("inspect --format '{{{{.State.Pid}}}}' {}", container.name))?;
    let comm = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    ensure!(comm.replace('\0', " ").trim() == "sleep 54322", "pid {pid} is {comm:?}");
    Ok(())
}

fn stats_shows_the_cost(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--memory 256m")?;
    let line = docker.ok(&format!(
        "stats --no-stream --format '{{{{.MemUsage}}}}|{{{{.PIDs}}}}|{{{{.CPUPerc}}}}' {}",
        container.name
    ))?;
    let fields: Vec<_> = line.split('|').collect();
    let used = fields.first().and_then(|f| f.split('/').next()).unwrap_or_default().trim();
    ensure!(!used.starts_with("0B"), "no memory in {line}");
    ensure!(
        fields.get(1).is_some_and(|pids| *pids != "0" && *pids != "--"),
        "no processes in {line}"
    );
    Ok(())
}

fn copy_works_both_ways_running_and_stopped(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    std::fs::write(dir.join("f"), "copied\n")?;
    let container = docker.sleeper("")?;
    let name = &container.name;
    docker.ok(&format!("cp {}/f {name}:/root/f", dir.display()))?;
    ensure!(container.exec("cat /root/f; echo more >> /root/f")? == "copied");
    docker.ok(&format!("cp {name}:/root/f {}/g", dir.display()))?;
    ensure!(std::fs::read_to_string(dir.join("g"))? == "copied\nmore\n");
    docker.ok(&format!("stop -t 0 {name}"))?;
    docker.ok(&format!("cp {name}:/root/f {}/h", dir.display()))?;
    ensure!(std::fs::read_to_string(dir.join("h"))? == "copied\nmore\n");
    Ok(())
}

fn rename_diff_and_commit(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    container.exec("echo changed > /etc/changed; rm /var/www/index.html")?;
    let other = docker.name();
    docker.ok(&format!("rename {} {other}", container.name))?;
    let diff = docker.ok(&format!("diff {other}"));
    let image = docker.ok(&format!("commit {other} {other}-image"));
    docker.ok(&format!("rename {other} {}", container.name))?;
    let diff = diff?;
    ensure!(diff.contains("A /etc/changed") && diff.contains("D /var/www/index.html"), "{diff}");
    image?;
    let seen = docker.ok(&format!("run --rm {other}-image cat /etc/changed"));
    docker.ok(&format!("rmi {other}-image"))?;
    ensure!(seen? == "changed");
    Ok(())
}

fn health_check_turns_healthy_and_unhealthy(docker: &Docker) -> Result<()> {
    let container =
        docker.sleeper("--health-cmd 'test ! -e /sick' --health-interval 1s --health-retries 1")?;
    docker.until(&container.name, "{{.State.Health.Status}}", "healthy")?;
    container.exec("touch /sick")?;
    docker.until(&container.name, "{{.State.Health.Status}}", "unhealthy")
}

fn update_changes_limits(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--memory 128m --memory-swap 128m")?;
    let limit = "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes";
    ensure!(container.exec(limit)? == (128 << 20).to_string());
    docker.ok(&format!("update --memory 96m --memory-swap 96m {}", container.name))?;
    let seen = container.exec(limit)?;
    ensure!(seen == (96 << 20).to_string(), "{seen}");
    Ok(())
}

fn machine_grows_with_an_update(docker: &Docker) -> Result<()> {
    let out = docker.arena.dir("grown")?;
    let volume = format!(
        "--memory 256m --memory-swap 256m --tmpfs /big:size=600m -v {}:/out",
        out.display()
    );
    let container = docker.sleeper(&volume)?;
    let total = || -> Result<u64> {
        let info = container.exec("cat /proc/meminfo")?;
        Ok(info.split_whitespace().nth(1).context("MemTotal")?.parse::<u64>()? / 1024)
    };
    let before = total()?;
    docker.ok(&format!("update --memory 768m --memory-swap 768m {}", container.name))?;
    let grown = total()? - before;
    ensure!((450..=650).contains(&grown), "{before} MiB, and {grown} more");
    // The share's process reaches what came: the first memory is full of zeros by then.
    let fill = "dd if=/dev/zero of=/big/zeros bs=1M count=400 2>/dev/null";
    let copy = "dd if=/dev/urandom of=/big/data bs=1M count=16 2>/dev/null && cp /big/data /out/";
    let guest = container.exec(&format!("{fill} && {copy} && md5sum < /big/data"))?;
    let host = command::ok(Command::new("md5sum").arg(out.join("data")))?.out();
    let sum = |text: &str| text.split_whitespace().next().map(str::to_owned);
    ensure!(sum(&guest) == sum(&host), "in the guest {guest}, on the host {host}");
    // A smaller limit is the guest's affair.
    docker.ok(&format!("update --memory 512m --memory-swap 512m {}", container.name))?;
    ensure!(total()? - before == grown);
    Ok(())
}

/// A guest that disregards what it was told finds nothing there.
fn memory_that_is_kept_back_is_out_of_reach(docker: &Docker) -> Result<()> {
    // The first block above all devices: of memory that it has, the kernel takes the highest first.
    let script = "echo 0x100000000 > /sys/devices/system/memory/probe && echo added; \
        dd if=/dev/zero of=/dev/shm/x bs=1M count=32; echo used";
    let container = docker.detached("--privileged", &format!("sh -c '{script}'"))?;
    let code = docker.ok(&format!("wait {}", container.name))?;
    let said = docker.ok(&format!("logs {}", container.name))?;
    ensure!(code == "137" && !said.contains("used"), "{code}: {said}");
    Ok(())
}

fn more_cpus_are_no_error(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--cpus 1")?;
    docker.ok(&format!("update --cpus 2 {}", container.name))?;
    // An emulated guest takes no further processors.
    let expected = if crate::kvm::is_expected() { "2" } else { "1" };
    let seen = container.exec("nproc")?;
    ensure!(seen == expected, "{seen} CPUs");
    Ok(())
}

fn attach_sees_what_comes_after(docker: &Docker) -> Result<()> {
    let container = docker.detached("-i", "sh -c 'read line; echo got $line; sleep 1; exit 6'")?;
    std::thread::scope(|scope| {
        let watch = format!("attach --no-stdin {}", container.name);
        let watcher = scope.spawn(move || docker.cmd(&watch));
        std::thread::sleep(Duration::from_millis(500));
        docker.feed(&format!("attach {}", container.name), b"word\n".to_vec(), PATIENCE)?;
        let output = watcher.join().map_err(|_| anyhow::anyhow!("panicked"))??;
        ensure!(output.out() == "got word" && output.code == 6, "{output}");
        Ok(())
    })?;
    docker.until(&container.name, "{{.State.ExitCode}}", "6")
}

fn exec_in_stopped_container_is_refused(docker: &Docker) -> Result<()> {
    let container = docker.detached("", "true")?;
    docker.ok(&format!("wait {}", container.name))?;
    let output = docker.cmd(&format!("exec {} true", container.name))?;
    ensure!(output.code != 0 && output.err().contains("not running"), "{output}");
    Ok(())
}

fn exit_code_of_exec_is_the_processes(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("")?;
    for (command, code) in [("true", 0), ("sh -c 'exit 9'", 9), ("sh -c 'kill -15 $$'", 143)] {
        docker.cmd(&format!("exec {} {command}", container.name))?.expect_code(code)?;
    }
    let missing = docker.cmd(&format!("exec {} no-such-command", container.name))?;
    ensure!(missing.code == 127 || missing.code == 126, "{missing}");
    let said = missing.err() + &missing.out();
    ensure!(said.contains("executable file not found"), "{missing}");
    Ok(())
}

fn exec_takes_user_env_and_workdir(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("-e FROM=run")?;
    let seen = docker.exec(
        "-u alice -e MORE=exec -w /tmp",
        &container.name,
        "id -u; echo $FROM $MORE; pwd",
    )?;
    ensure!(seen == "1000\nrun exec\n/tmp", "{seen}");
    if docker.needs_privileged().is_err() {
        return Ok(());
    }
    let privileged =
        docker.exec("--privileged", &container.name, "grep CapEff /proc/self/status")?;
    ensure!(privileged.contains("ffffffff"), "{privileged}");
    Ok(())
}

fn events_tell_the_life_of_a_container(docker: &Docker) -> Result<()> {
    let began = docker.ok("system info --format '{{.SystemTime}}'")?;
    let name = docker.name();
    docker.ok(&format!("run --rm --name {name} {IMAGE} true"))?;
    let until = docker.ok("system info --format '{{.SystemTime}}'")?;
    let events = docker.ok(&format!("events --since {began} --until {until} --filter container={name} --format '{{{{.Status}}}}'"))?;
    for event in ["create", "start", "die"] {
        ensure!(events.lines().any(|line| line == event), "{event} is not among {events:?}");
    }
    Ok(())
}

fn many_containers_at_once(docker: &Docker) -> Result<()> {
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..6)
            .map(|n| scope.spawn(move || docker.sh("", &format!("echo {n}; sleep 0.2"))))
            .collect();
        for (n, run) in runs.into_iter().enumerate() {
            let seen = run.join().map_err(|_| anyhow::anyhow!("panicked"))??;
            ensure!(seen == n.to_string(), "{seen}");
        }
        Ok(())
    })
}
