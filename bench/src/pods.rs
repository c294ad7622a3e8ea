//! Pods by containerd's CRI, as a kubelet would make them: ours and runc's by one containerd.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use kata_e2e::arena::Arena;
use kata_e2e::containerd::{Containerd, Programs};
use kata_e2e::cri::{Cri, Pod};

use crate::memory;
use crate::report::Report;
use crate::{OURS, in_turn};

const IDLE: &str = "exec sleep 1000000";
const NETWORK: &str = r#"{ "cniVersion": "0.4.0", "name": "bench", "plugins": [
    { "type": "bridge", "bridge": "cni-bench", "isGateway": true,
      "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.89.0.0/16" }]] } } ] }"#;
/// Pods that are started one after the other, at least.
const PODS: usize = 20;
/// Pods that are started side by side.
const BURST: usize = 10;
/// Long enough for what runs once after a start.
const SETTLE: Duration = Duration::from_secs(4);

/// Starts containerd and measures its pods.
pub fn measure(arena: &Arena, probe: &Path, runs: usize, report: &mut Report) -> Result<()> {
    let cri = start(arena, probe)?;
    // Few runs have no slowest one in twenty.
    one_pod(&cri, runs.max(PODS), report)?;
    second_container(&cri, runs, report)?;
    shim_memory(&cri, report)?;
    burst(&cri, report)
}

fn start(arena: &Arena, probe: &Path) -> Result<Cri> {
    fs::create_dir_all("/etc/cni/net.d")?;
    fs::write("/etc/cni/net.d/0-bench.conflist", NETWORK).context("write a network")?;
    let plugin = "plugins.\"io.containerd.grpc.v1.cri\"";
    let handler = |name: &str, kind: &str| {
        format!("  [{plugin}.containerd.runtimes.{name}]\n    runtime_type = \"{kind}\"\n")
    };
    let lines = format!(
        "    conf_dir = \"/etc/cni/net.d\"\n{}{}",
        handler("kata", "io.containerd.kata.v2"),
        handler("runc", "io.containerd.runc.v2"),
    );
    Cri::new(Containerd::start(arena, OURS, probe, Programs::installed(), &lines)?)
}

fn handler(runtime: &str) -> &'static str {
    if runtime == OURS { "kata" } else { "runc" }
}

fn pod<'a>(cri: &'a Cri, runtime: &str) -> Result<Pod<'a>> {
    cri.run_pod_with(cri.pod_config()?, handler(runtime))
}

/// `RunPodSandbox`, `CreateContainer`, `StartContainer`; removed unmeasured.
fn one_pod(cri: &Cri, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: a pod with one container, {runs} times each in turn");
    let [ours, theirs] = in_turn(runs, |runtime| {
        let began = Instant::now();
        let pod = pod(cri, runtime)?;
        let container = pod.run("one", IDLE)?;
        let took = began.elapsed();
        pod.remove(&[&container.id])?;
        Ok(took)
    })?;
    report.compare("pod with one container, started by CRI", &ours, &theirs, None);
    Ok(())
}

fn second_container(cri: &Cri, runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("bench: a further container in a running pod");
    let (ours, theirs) = (pod(cri, OURS)?, pod(cri, "runc")?);
    let mut made = [vec![ours.run("first", IDLE)?.id], vec![theirs.run("first", IDLE)?.id]];
    let mut number = 0;
    let [times, their_times] = in_turn(runs, |runtime| {
        let (pod, ids) = if runtime == OURS { (&ours, 0) } else { (&theirs, 1) };
        number += 1;
        let began = Instant::now();
        let container = pod.run(&format!("c{number}"), IDLE)?;
        let took = began.elapsed();
        container.stop(0)?;
        container.remove()?;
        made[ids].push(container.id);
        Ok(took)
    })?;
    report.compare("a further container in a running pod", &times, &their_times, Some(2.0));
    for (pod, ids) in [(&ours, &made[0]), (&theirs, &made[1])] {
        pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// The shim of a pod with one container, and what each further container adds to it.
fn shim_memory(cri: &Cri, report: &mut Report) -> Result<()> {
    const MORE: usize = 5;
    eprintln!("bench: memory of a pod's shim");
    let pod = pod(cri, OURS)?;
    let mut ids = vec![pod.run("one", IDLE)?.id];
    thread::sleep(SETTLE);
    let one = memory::of_shim(&pod.id)?;
    for number in 0..MORE {
        ids.push(pod.run(&format!("more{number}"), IDLE)?.id);
    }
    thread::sleep(SETTLE);
    let each = (memory::of_shim(&pod.id)? - one) / MORE as f64;
    report.value("PSS of the shim of a pod with one container", one, "MiB", Some(13.0));
    report.value("PSS that each further container adds to it", each, "MiB", Some(1.0));
    pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())
}

/// All pods of a burst, against the same number in a row.
fn burst(cri: &Cri, report: &mut Report) -> Result<()> {
    eprintln!("bench: {BURST} pods in a row and side by side");
    for runtime in [OURS, "runc"] {
        let began = Instant::now();
        let mut row = Vec::new();
        for _ in 0..BURST {
            row.push(started(cri, runtime)?);
        }
        let in_a_row = began.elapsed();
        removed(row)?;
        let began = Instant::now();
        let together: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..BURST).map(|_| scope.spawn(|| started(cri, runtime))).collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
                .collect()
        });
        let side_by_side = began.elapsed();
        removed(together.into_iter().collect::<Result<_>>()?)?;
        let ratio = side_by_side.as_secs_f64() / in_a_row.as_secs_f64();
        let name = if runtime == OURS { "ours" } else { "runc" };
        report.value(
            &format!("{BURST} pods side by side, {name}"),
            side_by_side.as_secs_f64(),
            "s",
            None,
        );
        report.value(&format!("    against {BURST} in a row, {name}"), ratio, "x", None);
    }
    Ok(())
}

fn started<'a>(cri: &'a Cri, runtime: &str) -> Result<(Pod<'a>, String)> {
    let pod = pod(cri, runtime)?;
    let id = pod.run("one", IDLE)?.id;
    Ok((pod, id))
}

fn removed(pods: Vec<(Pod<'_>, String)>) -> Result<()> {
    pods.into_iter().try_for_each(|(pod, container)| pod.remove(&[&container]))
}
