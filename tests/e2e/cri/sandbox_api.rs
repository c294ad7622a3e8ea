//! What containerd's Sandbox API is: pods for which no container stands.

use anyhow::{Result, ensure};
use kata_e2e::cri::Cri;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["sandbox":
        Kata: no_container_stands_for_the_pod;
    ]
}

fn no_container_stands_for_the_pod(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let container = pod.run("one", SLEEP)?;
    let seen = cri.containerd.in_cri("containers list -q")?;
    ensure!(seen.contains(&container.id) && !seen.contains(&pod.id), "{seen}");
    ensure!(cri.containerd.in_cri("sandboxes list")?.contains(&pod.id));
    pod.remove(&[&container.id])
}
