//! How fast bytes go in and out of a running container.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kata_e2e::command;
use kata_e2e::docker::Docker;

use crate::report::Report;
use crate::{OURS, THEIRS};

const MEGABYTES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(300);

/// 100 MB each way through `docker exec`.
pub fn measure(docker: &Docker, report: &mut Report) -> Result<()> {
    eprintln!("bench: {MEGABYTES} MB in and out");
    for runtime in [OURS, THEIRS] {
        let container = docker.sleeper(&format!("--runtime {runtime}"))?;
        let name = &container.name;
        // Busybox's `head -c` handles every byte by itself: that would be what is measured.
        let source = format!("dd if=/dev/zero bs=100000 count={}", MEGABYTES * 10);
        let out = rate(&mut docker.client(&format!("exec {name} {source}")), None)?;
        report.value(&format!("output of docker exec, {runtime}"), out, "MB/s", None);
        let mut client = docker.client(&format!("exec -i {name} sh -c 'cat > /dev/null'"));
        let into = rate(&mut client, Some(vec![0; MEGABYTES * 1_000_000]))?;
        report.value(&format!("input of docker exec, {runtime}"), into, "MB/s", None);
    }
    Ok(())
}

fn rate(client: &mut Command, input: Option<Vec<u8>>) -> Result<f64> {
    let began = Instant::now();
    if input.is_some() {
        command::run_with(client, input, PATIENCE)?.expect_code(0)?;
    } else {
        // Thrown away by the kernel: what is measured is not our reader.
        let mut child =
            client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let status = command::wait(&mut child, PATIENCE)?;
        ensure!(status.is_some_and(|status| status.success()), "exec ended with {status:?}");
    }
    Ok(MEGABYTES as f64 / began.elapsed().as_secs_f64())
}
