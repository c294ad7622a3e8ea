//! Parts of a pod killed: the CRI tells, and can clean up.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kata_e2e::command::PATIENCE;
use kata_e2e::cri::Cri;
use kata_e2e::leaks::{self, Part};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["failures":
        Kata: killed_hypervisor_ends_pod_and_containers, killed_devices_process_ends_the_pod,
            killed_shim_ends_the_pod, parts_killed_at_any_moment_leave_nothing;
    ]
}

fn end_by(cri: &Cri, part: Part) -> Result<()> {
    let pod = cri.pod()?;
    let first = pod.run("first", SLEEP)?;
    let second = pod.run("second", SLEEP)?;
    let pids = leaks::processes_of(&pod.id, part)?;
    ensure!(!pids.is_empty(), "the pod has no {part:?}");
    leaks::kill_and_wait(&pids)?;
    let began = Instant::now();
    for container in [&first, &second] {
        let code = container.wait_for(Duration::from_secs(10))?;
        ensure!(code != 0, "{} ended with {code}", container.name);
    }
    let told = began.elapsed();
    while pod.is_ready()? {
        ensure!(began.elapsed() < Duration::from_secs(10), "the pod is still ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!(
        "        ({part:?}: containers ended after {told:?}, pod after {:?})",
        began.elapsed()
    );
    pod.remove(&[&first.id, &second.id])
}

fn killed_hypervisor_ends_pod_and_containers(cri: &Cri) -> Result<()> {
    end_by(cri, Part::Hypervisor)
}

fn killed_devices_process_ends_the_pod(cri: &Cri) -> Result<()> {
    end_by(cri, Part::Devices)
}

fn killed_shim_ends_the_pod(cri: &Cri) -> Result<()> {
    end_by(cri, Part::Shim)
}

/// So many moments are tried; more with `KATA_E2E_KILLS`.
fn parts_killed_at_any_moment_leave_nothing(cri: &Cri) -> Result<()> {
    let rounds = std::env::var("KATA_E2E_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let phase = u64::from(std::process::id()) % 97;
    for round in 0..rounds {
        let part = [Part::Hypervisor, Part::Shim, Part::Devices][round % 3];
        let delay = (round as u64 * 700 + phase) % 2500;
        killed_while_it_works(cri, part, Duration::from_millis(delay))
            .with_context(|| format!("{part:?} killed after {delay} ms"))?;
    }
    Ok(())
}

fn killed_while_it_works(cri: &Cri, part: Part, delay: Duration) -> Result<()> {
    let pod = cri.pod()?;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Until something fails, which it is bound to.
            let mut ids = Vec::new();
            for n in 0..1000 {
                let Ok(container) = pod.create(pod.container(&format!("c{n}"), SLEEP)) else {
                    break;
                };
                ids.push(container.id.clone());
                if container.start().is_err() || container.exec("true").is_err() {
                    break;
                }
                container.stop(0).ok();
                container.remove().ok();
            }
            ids
        });
        std::thread::sleep(delay);
        leaks::kill_and_wait(&leaks::processes_of(&pod.id, part)?)?;
        let deadline = Instant::now() + PATIENCE;
        while !worker.is_finished() {
            ensure!(Instant::now() < deadline, "work on the dead pod goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
        let ids = worker.join().map_err(|_| anyhow::anyhow!("the worker panicked"))?;
        pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())
    })
}
