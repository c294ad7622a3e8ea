//! The pod itself: what its containers share, and how long it lives.

use anyhow::{Result, ensure};
use k8s_cri::v1;
use kata_e2e::cri::{Cri, share_processes};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["pods":
        Both: pod_without_containers_stays_and_goes_without_trace,
            containers_share_network_name_and_ipc, names_and_resolver_are_the_pods,
            processes_are_shared_on_request, init_containers_run_one_after_the_other,
            container_is_restarted_while_its_pod_lives, containers_are_created_in_parallel,
            stopped_pod_is_not_ready_and_keeps_its_logs, sysctls_are_the_pods,
            pod_can_be_stopped_and_removed_twice;
        Kata: pods_are_machines_of_their_own, configuration_of_the_handler_is_used;
    ]
}

pub const SLEEP: &str = "exec sleep 1000000";

fn pod_without_containers_stays_and_goes_without_trace(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    ensure!(pod.is_ready()?);
    std::thread::sleep(std::time::Duration::from_secs(1));
    ensure!(pod.is_ready()?, "the pod did not stay");
    pod.remove(&[])
}

fn containers_share_network_name_and_ipc(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    pod.run("server", super::networks::SERVE)?;
    let first = pod.run("first", SLEEP)?;
    let second = pod.run("second", SLEEP)?;
    first.exec("echo shared > /dev/shm/x")?;
    let seen = second
        .exec("hostname; fetch http://127.0.0.1/; cat /dev/shm/x; ls /proc | grep -c '^[0-9]*$'")?;
    let lines: Vec<_> = seen.lines().collect();
    ensure!(lines[..3] == [&pod.config.hostname, "hello from the image", "shared"], "{seen}");
    // Its own processes only: sleep, the shell, ls, grep.
    ensure!(lines[3].parse::<u32>()? <= 5, "{seen}");
    pod.remove(&[&first.id, &second.id])
}

fn names_and_resolver_are_the_pods(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let seen = container.exec("hostname; cat /etc/hostname /etc/resolv.conf")?;
    let name = &pod.config.hostname;
    ensure!(seen.starts_with(&format!("{name}\n{name}\n")), "{seen}");
    for part in ["nameserver 192.0.2.53", "search pods.example.test", "options ndots:5"] {
        ensure!(seen.contains(part), "{part:?} is not in {seen}");
    }
    Ok(())
}

fn processes_are_shared_on_request(cri: &Cri) -> Result<()> {
    let mut config = cri.pod_config()?;
    share_processes(&mut config);
    let pod = cri.run_pod(config, "")?;
    let first = pod.run("first", "exec sleep 314159")?;
    let second = pod.run("second", SLEEP)?;
    let seen = second.exec("ps")?;
    ensure!(seen.contains("sleep 314159"), "{seen}");
    let pid = seen.lines().find(|l| l.contains("sleep 314159")).unwrap_or_default();
    let pid = pid.split_whitespace().next().unwrap_or_default();
    ensure!(pid != "1", "no process of the pod's own is first: {seen}");
    second.exec(&format!("kill -9 {pid}"))?;
    ensure!(first.wait()? == 137);
    ensure!(pod.is_ready()?);
    pod.remove(&[&first.id, &second.id])
}

/// The handler's `ConfigPath`.
fn configuration_of_the_handler_is_used(cri: &Cri) -> Result<()> {
    let pod = cri.run_pod_with(cri.pod_config()?, super::SMALL)?;
    let container = pod.run("one", SLEEP)?;
    let total: u64 = container.exec("awk '/MemTotal/ { print $2 }' /proc/meminfo")?.parse()?;
    ensure!(total < super::SMALL_MIB * 1024, "the machine has {total} KiB");
    pod.remove(&[&container.id])
}

fn init_containers_run_one_after_the_other(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    for code in [0, 3] {
        let init = pod.run(&format!("init{code}"), &format!("echo prepared; exit {code}"))?;
        ensure!(init.wait()? == code);
        init.expect_logged("stdout", |text| text == "prepared")?;
        let status = init.status()?;
        let reason = if code == 0 { "Completed" } else { "Error" };
        ensure!(status.reason == reason, "{status:?}");
        init.remove()?;
    }
    let main = pod.run("main", SLEEP)?;
    main.exec("true")?;
    Ok(())
}

fn container_is_restarted_while_its_pod_lives(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let stays = pod.run("stays", super::networks::SERVE)?;
    let mut ids = vec![stays.id.clone()];
    for attempt in 0..3 {
        let mut config =
            pod.container("again", "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done");
        config.metadata = Some(v1::ContainerMetadata { name: "again".to_owned(), attempt });
        config.log_path = format!("again-{attempt}.log");
        let container = pod.run_config(config)?;
        ids.push(container.id.clone());
        container.until_logged("up")?;
        container.exec("fetch http://127.0.0.1/")?;
        container.stop(60)?;
        ensure!(container.wait()? == 5);
        container.remove()?;
    }
    stays.exec("true")?;
    pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())
}

fn containers_are_created_in_parallel(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let names = ["a", "b", "c", "d"];
    let codes: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = names
            .iter()
            .map(|name| {
                let pod = &pod;
                scope.spawn(move || -> Result<String> {
                    let container = pod.run(name, &format!("echo {name} > /dev/shm/{name}"))?;
                    ensure!(container.wait()? == 0);
                    Ok(container.id)
                })
            })
            .collect();
        runs.into_iter().map(|run| run.join()).collect()
    });
    let mut ids = Vec::new();
    for code in codes {
        ids.push(code.map_err(|_| anyhow::anyhow!("a thread panicked"))??);
    }
    let last = pod.run("last", SLEEP)?;
    ensure!(last.exec("cd /dev/shm; cat a b c d")? == "a\nb\nc\nd");
    ids.push(last.id.clone());
    pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())
}

fn stopped_pod_is_not_ready_and_keeps_its_logs(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", "echo said; exec sleep 1000000")?;
    container.until_logged("said")?;
    pod.stop()?;
    ensure!(!pod.is_ready()?);
    ensure!(container.wait()? == 137, "{:?}", container.status()?);
    container.expect_logged("stdout", |text| text == "said")?;
    pod.remove(&[&container.id])
}

fn sysctls_are_the_pods(cri: &Cri) -> Result<()> {
    let mut config = cri.pod_config()?;
    if let Some(linux) = config.linux.as_mut() {
        let pairs =
            [("net.ipv4.ip_unprivileged_port_start", "81"), ("kernel.shm_rmid_forced", "1")];
        linux.sysctls = pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    }
    let pod = cri.run_pod(config, "")?;
    let container = pod.run("one", SLEEP)?;
    let seen = container.exec(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced",
    )?;
    ensure!(seen == "81\n1", "{seen}");
    Ok(())
}

fn pod_can_be_stopped_and_removed_twice(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    pod.stop()?;
    pod.stop()?;
    pod.remove(&[])?;
    // As the CRI demands.
    let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    cri.call("RemovePodSandbox", async |mut c| c.remove_pod_sandbox(request).await).map(drop)
}

fn pods_are_machines_of_their_own(cri: &Cri) -> Result<()> {
    const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";
    let (one, two) = (cri.pod()?, cri.pod()?);
    let (first, second) = (one.run("first", SLEEP)?, one.run("second", SLEEP)?);
    let other = two.run("other", SLEEP)?;
    ensure!(first.exec(BOOT)? == second.exec(BOOT)?, "two machines for one pod");
    ensure!(first.exec(BOOT)? != other.exec(BOOT)?, "one machine for two pods");
    Ok(())
}
