//! Limits, their updates, and what was used.

use anyhow::{Context, Result, ensure};
use k8s_cri::v1;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::cri::Cri;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["resources":
        Both: limits_are_applied_and_updated, exhausted_memory_kills_and_says_so,
            container_stats_are_told, pod_stats_are_told;
        Kata: machine_has_the_size_of_its_pod, machine_grows_with_a_second_container;
    ]
}

const MIB: i64 = 1 << 20;
/// The files' places depend on the version of cgroups, which differs between host and guest.
const READ: &str = "cd /sys/fs/cgroup; for f in memory.max memory/memory.limit_in_bytes; do \
                    [ ! -e $f ] || cat $f; done; [ ! -e cpu.max ] || cat cpu.max; \
                    [ ! -e cpu/cpu.cfs_quota_us ] || cat cpu/cpu.cfs_quota_us";

fn limits(memory: i64, quota: i64) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_period: 100_000,
        cpu_quota: quota,
        cpu_shares: 512,
        ..Default::default()
    }
}

fn limits_are_applied_and_updated(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let mut config = pod.container("one", SLEEP);
    if let Some(linux) = config.linux.as_mut() {
        linux.resources = Some(limits(256 * MIB, 50_000));
    }
    let container = pod.run_config(config)?;
    let read = || -> Result<(i64, i64)> {
        let seen = container.exec(READ)?;
        let mut numbers = seen.split_whitespace().filter_map(|word| word.parse().ok());
        Ok((numbers.next().context("memory")?, numbers.next().context("cpu")?))
    };
    ensure!(read()? == (256 * MIB, 50_000), "{:?}", read()?);
    let request = v1::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: Some(limits(128 * MIB, 70_000)),
        ..Default::default()
    };
    cri.call("UpdateContainerResources", async |mut c| {
        c.update_container_resources(request).await
    })?;
    ensure!(read()? == (128 * MIB, 70_000), "{:?}", read()?);
    Ok(())
}

fn machine_grows_with_a_second_container(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let first = pod.run("one", SLEEP)?;
    let total = || -> Result<i64> {
        let info = first.exec("cat /proc/meminfo")?;
        Ok(info.split_whitespace().nth(1).context("MemTotal")?.parse::<i64>()? / 1024)
    };
    let before = total()?;
    let mut config = pod.container("two", SLEEP);
    if let Some(linux) = config.linux.as_mut() {
        linux.resources = Some(limits(3072 * MIB, 50_000));
    }
    let second = pod.run_config(config)?;
    let grown = total()? - before;
    ensure!((1000..=1400).contains(&grown), "{before} MiB, and {grown} more");
    let request = v1::UpdateContainerResourcesRequest {
        container_id: second.id.clone(),
        linux: Some(limits(3584 * MIB, 50_000)),
        ..Default::default()
    };
    cri.call("UpdateContainerResources", async |mut c| {
        c.update_container_resources(request).await
    })?;
    let again = total()? - before - grown;
    ensure!((450..=650).contains(&again), "{grown} MiB more, then {again}");
    Ok(())
}

fn exhausted_memory_kills_and_says_so(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    // `tail` keeps what it reads: a line without an end.
    let mut config = pod.container("one", "sleep 1; tail /dev/zero; exit $?");
    if let Some(linux) = config.linux.as_mut() {
        linux.resources = Some(limits(32 * MIB, 100_000));
    }
    let container = pod.run_config(config)?;
    ensure!(container.wait()? == 137);
    command::eventually("the reason is told", PATIENCE, || {
        Ok(container.status()?.reason == "OOMKilled")
    })?;
    // The pod is not drawn in.
    pod.run("two", SLEEP)?.exec("true").map(drop)
}

fn container_stats_are_told(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let script = "x=$(head -c 3000000 /dev/zero | tr '\\0' x); while :; do :; done";
    let container = pod.run("one", script)?;
    let stats = |what: &'static str| -> Result<v1::ContainerStats> {
        let request = v1::ContainerStatsRequest { container_id: container.id.clone() };
        let answer = cri.call(what, async |mut c| c.container_stats(request).await)?;
        answer.stats.context("no stats")
    };
    let used = |stats: &v1::ContainerStats| -> Option<(u64, u64)> {
        let cpu = stats.cpu.as_ref()?.usage_core_nano_seconds.as_ref()?.value;
        Some((cpu, stats.memory.as_ref()?.working_set_bytes.as_ref()?.value))
    };
    let (before, _) = used(&stats("ContainerStats")?).context("incomplete stats")?;
    command::eventually("its memory is counted", PATIENCE, || {
        Ok(used(&stats("ContainerStats")?).is_some_and(|(_, memory)| memory > 3_000_000))
    })?;
    command::eventually("its time goes on", PATIENCE, || {
        Ok(used(&stats("ContainerStats")?).is_some_and(|(after, _)| after > before + 100_000_000))
    })?;
    let request = v1::ListContainerStatsRequest::default();
    let list =
        cri.call("ListContainerStats", async |mut c| c.list_container_stats(request).await)?;
    let id = |stats: &v1::ContainerStats| stats.attributes.as_ref().map(|a| a.id.clone());
    ensure!(list.stats.iter().any(|s| id(s).as_ref() == Some(&container.id)), "not in the list");
    Ok(())
}

fn pod_stats_are_told(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let answer = cri.call("PodSandboxStats", async |mut c| c.pod_sandbox_stats(request).await)?;
    let linux = answer.stats.and_then(|stats| stats.linux).context("no stats")?;
    let memory = linux.memory.and_then(|m| m.usage_bytes).context("no memory")?.value;
    ensure!(memory > 0, "no memory is used");
    let network = linux.network.and_then(|n| n.default_interface).context("no network")?;
    ensure!(network.name == "eth0", "{network:?}");
    ensure!(
        linux.containers.iter().filter_map(|c| c.attributes.as_ref()).any(|a| a.id == container.id),
        "the container is not among them"
    );
    Ok(())
}

fn machine_has_the_size_of_its_pod(cri: &Cri) -> Result<()> {
    let mut config = cri.pod_config()?;
    if let Some(linux) = config.linux.as_mut() {
        // What a kubelet gives since 1.23: the sum of the containers' limits.
        linux.resources = Some(limits(3072 * MIB, 200_000));
    }
    let pod = cri.run_pod(config, "")?;
    let container = pod.run("one", SLEEP)?;
    let seen = container.exec("nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
    let (cpus, memory) = seen.split_once('\n').context("two lines")?;
    ensure!(cpus.parse::<u32>()? >= 2, "{seen}");
    ensure!(memory.parse::<i64>()? >= 3072 * 1024 * 9 / 10, "{seen}");
    Ok(())
}
