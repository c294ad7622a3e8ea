//! Many pods, and long use of one; each leaves the machine as it was.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use kata_e2e::cri::{Cri, Pod};
use kata_e2e::leaks::Snapshot;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["load":
        Both: pods_start_and_go_in_parallel, soak_of_create_exec_delete,
            containerd_is_restarted_under_a_pod;
    ]
}

/// `name` from the environment, or `usual`.
fn count(name: &str, usual: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// Twenty with `KATA_E2E_PODS=20`.
fn pods_start_and_go_in_parallel(cri: &Cri) -> Result<()> {
    let pods = count("KATA_E2E_PODS", 6);
    let before = Snapshot::take(&cri.containerd.arena)?;
    let began = Instant::now();
    let made: Vec<Result<(Pod<'_>, String)>> = together(pods, |n| {
        let pod = cri.pod()?;
        let container = pod.run("one", SLEEP)?;
        let seen = container.exec(&format!("echo {n}; hostname"))?;
        ensure!(seen == format!("{n}\n{}", pod.config.hostname), "{seen}");
        Ok((pod, container.id))
    });
    let made = made.into_iter().collect::<Result<Vec<_>>>()?;
    let started = began.elapsed();
    let removed: Vec<Result<()>> = together(pods, |n| made[n].0.remove(&[&made[n].1]));
    removed.into_iter().collect::<Result<()>>()?;
    println!("        ({pods} pods: up after {started:?}, gone after {:?})", began.elapsed());
    drop(made);
    before.expect_again(&cri.containerd.arena)
}

fn together<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Vec<Result<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|n| scope.spawn(move || work(n))).collect();
        let join = |t: std::thread::ScopedJoinHandle<'_, Result<T>>| {
            t.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
        };
        threads.into_iter().map(join).collect()
    })
}

/// Two hundred rounds with `KATA_E2E_SOAK=200`.
fn soak_of_create_exec_delete(cri: &Cri) -> Result<()> {
    let rounds = count("KATA_E2E_SOAK", 12);
    let before = Snapshot::take(&cri.containerd.arena)?;
    let pod = cri.pod()?;
    let keeps = pod.run("keeps", SLEEP)?;
    let settled = Snapshot::take(&cri.containerd.arena)?;
    let mut ids = vec![keeps.id.clone()];
    for round in 0..rounds {
        let container = pod.run(&format!("c{round}"), SLEEP)?;
        ensure!(container.exec(&format!("echo {round}"))? == round.to_string());
        container.stop(0)?;
        container.remove()?;
        ids.push(container.id);
    }
    // Nothing piles up while the pod lives, either.
    settled.expect_again(&cri.containerd.arena)?;
    keeps.exec("true")?;
    pod.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())?;
    before.expect_again(&cri.containerd.arena)
}

fn containerd_is_restarted_under_a_pod(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", "while :; do echo tick; sleep 0.2; done")?;
    container.until_logged("tick")?;
    cri.restart()?;
    ensure!(pod.is_ready()?, "the pod was lost");
    let logged = container.logged("stdout")?.len();
    container.exec("true")?;
    kata_e2e::command::eventually("its log goes on", Duration::from_secs(20), || {
        Ok(container.logged("stdout")?.len() > logged)
    })?;
    let other = pod.run("two", "exit 4")?;
    ensure!(other.wait()? == 4);
    pod.remove(&[&container.id, &other.id])
}
