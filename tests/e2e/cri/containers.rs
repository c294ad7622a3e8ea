//! One container of a pod: its process, its logs, what is executed in it.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_cri::v1;
use kata_e2e::cri::Cri;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["containers":
        Both: exit_codes_and_logs_are_the_processes, environment_directory_and_user_arrive,
            security_context_is_applied, commands_executed_give_codes_and_streams,
            command_that_takes_too_long_is_ended, stop_is_polite_and_then_is_not,
            missing_command_is_an_error_and_the_pod_lives, many_commands_are_executed_at_once,
            long_lines_are_logged, container_can_be_created_and_never_started;
        // Debian 12's containerd closes its end of the output when it hears of an exit. With
        // runc it loses what it has not read by then.
        Kata: much_output_of_a_process_that_ends_at_once_is_logged;
    ]
}

fn exit_codes_and_logs_are_the_processes(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    for code in [0, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let container = pod.run(&format!("c{code}"), &script)?;
        ensure!(container.wait()? == code);
        container.expect_logged("stdout", |text| text == "out")?;
        container.expect_logged("stderr", |text| text == "err")?;
    }
    Ok(())
}

fn environment_directory_and_user_arrive(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let mut config = pod.container("one", "echo $COLOUR; pwd; id -u; id -G; exec sleep 1000000");
    config.envs = vec![v1::KeyValue { key: "COLOUR".to_owned(), value: "green".to_owned() }];
    config.working_dir = "/tmp".to_owned();
    if let Some(security) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        security.run_as_user = Some(v1::Int64Value { value: 1000 });
        security.run_as_group = Some(v1::Int64Value { value: 1000 });
        security.supplemental_groups = vec![77];
    }
    let container = pod.run_config(config)?;
    container.until_logged("77")?;
    let logged = container.logged("stdout")?;
    let lines: Vec<_> = logged.lines().collect();
    ensure!(lines[..3] == ["green", "/tmp", "1000"], "{logged}");
    ensure!(container.exec("id -u; pwd")? == "1000\n/tmp");
    Ok(())
}

fn security_context_is_applied(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let mut config = pod.container("one", SLEEP);
    if let Some(security) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()) {
        security.readonly_rootfs = true;
        security.no_new_privs = true;
        security.capabilities = Some(v1::Capability {
            drop_capabilities: vec!["ALL".to_owned()],
            add_capabilities: vec!["NET_BIND_SERVICE".to_owned()],
            ..Default::default()
        });
        security.masked_paths = vec!["/proc/keys".to_owned()];
        security.readonly_paths = vec!["/proc/sys".to_owned()];
        security.seccomp = Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
    }
    let container = pod.run_config(config)?;
    let seen = container.exec(
        "touch /x 2>/dev/null || echo read-only; cat /proc/keys | wc -c; \
         grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; \
         (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo protected",
    )?;
    let words: Vec<_> = seen.split_whitespace().collect();
    let expected = [
        "read-only",
        "0",
        "CapBnd:",
        "0000000000000400",
        "NoNewPrivs:",
        "1",
        "Seccomp:",
        "2",
        "protected",
    ];
    let kept: Vec<_> = words
        .iter()
        .enumerate()
        // As root the effective set is that of the bounding set.
        .filter(|(n, word)| **word != "CapEff:" && !(*n > 0 && words[n - 1] == "CapEff:"))
        .map(|(_, word)| *word)
        .collect();
    ensure!(kept == expected, "{seen}");
    Ok(())
}

fn commands_executed_give_codes_and_streams(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let done = container.execute("echo out; echo err >&2; exit 7")?;
    ensure!(done.code == 7 && done.out == "out" && done.err == "err", "{done:?}");
    let big = container.execute("head -c 2000000 /dev/zero | tr '\\0' x")?;
    ensure!(big.out.len() == 2_000_000, "{} bytes", big.out.len());
    let request = v1::ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: vec!["no-such-command".to_owned()],
        timeout: 0,
    };
    let refused = cri.call("ExecSync", async |mut c| c.exec_sync(request).await);
    ensure!(refused.is_err_and(|e| e.to_string().contains("executable file not found")));
    container.exec("true")?;
    Ok(())
}

fn command_that_takes_too_long_is_ended(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let said = container.execute_for("sleep 271828", 1).err();
    let said = said.map(|error| error.to_string()).unwrap_or_default();
    ensure!(said.contains("timeout"), "{said}");
    let seen = container.exec("ps")?;
    ensure!(!seen.contains("sleep 271828"), "{seen}");
    Ok(())
}

fn stop_is_polite_and_then_is_not(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let polite = pod.run("polite", "trap 'exit 4' TERM; echo up; while :; do sleep 0.1; done")?;
    let deaf = pod.run("deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done")?;
    polite.until_logged("up")?;
    deaf.until_logged("up")?;
    polite.stop(60)?;
    ensure!(polite.wait()? == 4);
    let began = std::time::Instant::now();
    deaf.stop(1)?;
    ensure!(deaf.wait()? == 137 && began.elapsed() < Duration::from_secs(20));
    // It can be stopped again, as the CRI demands.
    deaf.stop(1)
}

fn missing_command_is_an_error_and_the_pod_lives(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let mut config = pod.container("bad", "");
    config.command = vec!["no-such-command".to_owned()];
    let container = pod.create(config)?;
    let said = container.start().err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(
        said.contains("no-such-command") && said.contains("executable file not found"),
        "{said}"
    );
    // What a kubelet reads when a start failed.
    let status = container.status()?;
    ensure!(status.exit_code == 128 && status.reason == "StartError", "{status:?}");
    container.remove()?;
    pod.run("good", SLEEP)?.exec("true")?;
    pod.remove(&[&container.id])
}

fn many_commands_are_executed_at_once(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    std::thread::scope(|scope| {
        let container = &container;
        let runs: Vec<_> = (0..8)
            .map(|n| {
                scope.spawn(move || -> Result<()> {
                    let done = container.execute(&format!("sleep 0.2; echo {n}; exit {n}"))?;
                    ensure!(done.code == n && done.out == n.to_string(), "{done:?}");
                    Ok(())
                })
            })
            .collect();
        runs.into_iter()
            .try_for_each(|run| run.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })
}

fn long_lines_are_logged(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", "head -c 50000 /dev/zero | tr '\\0' x; echo; sleep 300")?;
    container.expect_logged("stdout", |text| text == "x".repeat(50_000))
}

fn much_output_of_a_process_that_ends_at_once_is_logged(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    for round in 0..3 {
        let container = pod.run(&format!("round{round}"), "seq 20000")?;
        ensure!(container.wait()? == 0);
        container
            .expect_logged("stdout", |text| text.lines().eq((1..=20_000).map(|n| n.to_string())))?;
    }
    Ok(())
}

fn container_can_be_created_and_never_started(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.create(pod.container("never", SLEEP))?;
    container.remove()?;
    let other = pod.create(pod.container("never-either", SLEEP))?;
    pod.remove(&[&container.id, &other.id])
}
