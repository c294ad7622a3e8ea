//! Our processes killed: containerd hears of it at once, and nothing stays.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kata_e2e::command;
use kata_e2e::containerd::{Containerd, Task};
use kata_e2e::leaks::{self, Part};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::events::Events;

pub fn trials() -> Vec<Trial<Containerd>> {
    trials!["kills":
        Both: killed_shim_ends_its_task;
        Kata: shim_killed_at_any_moment_leaves_nothing, killed_hypervisor_ends_its_task_at_once, killed_devices_process_ends_its_task_at_once,
            hypervisor_and_devices_killed_at_any_moment_leave_nothing,
            everything_killed_at_once_leaves_nothing;
    ]
}

/// How soon containerd is to know, after the kernel does.
const SOON: Duration = Duration::from_millis(100);

/// Kills this part of a running task; gives how long after its death the exit was told.
fn kill_and_hear(containerd: &Containerd, part: Part) -> Result<Duration> {
    let name = containerd.name();
    let events = Events::of(containerd, &name)?;
    let task = containerd.detached_as(&name, "", "exec sleep 1000000")?;
    task.exec("true")?.expect_code(0)?;
    let pids = leaks::processes_of(&name, part)?;
    ensure!(!pids.is_empty(), "{name} has no {part:?}");
    let died = leaks::kill_and_wait(&pids)?;
    let (mut exit, mut heard) = (None, Instant::now());
    // The exec has an exit of its own.
    while exit.is_none() {
        let event = events.wait("/tasks/exit")?;
        heard = event.at;
        exit = (event.content["id"] == *name).then_some(event.content);
    }
    let exit = exit.context("the exit")?;
    ensure!(exit["exit_status"].as_u64() == Some(137), "{exit}");
    task.remove()?;
    if containerd.is_kata() {
        leaks::expect_no_trace(&[&name])?;
    } else {
        // runc's shim leaves its socket when it is killed.
        fs::remove_file(leaks::socket_of(&containerd.arena.name, &name)?)?;
    }
    Ok(heard.saturating_duration_since(died))
}

/// Three times: the quickest must be soon, each within a second whatever the machine does.
fn hear_soon(containerd: &Containerd, part: Part) -> Result<()> {
    let mut took = Vec::new();
    for _ in 0..3 {
        took.push(kill_and_hear(containerd, part)?);
    }
    took.sort();
    println!("        ({part:?}: containerd tells the end after {took:?})");
    ensure!(took[0] <= SOON && took[2] <= Duration::from_secs(1), "told after {took:?}");
    Ok(())
}

fn killed_shim_ends_its_task(containerd: &Containerd) -> Result<()> {
    // containerd itself notices, runs the shim's clean-up, and tells after that.
    let took = kill_and_hear(containerd, Part::Shim)?;
    println!("        (Shim: containerd tells the end after {took:?})");
    ensure!(took <= Duration::from_secs(1), "told after {took:?}");
    Ok(())
}

fn killed_hypervisor_ends_its_task_at_once(containerd: &Containerd) -> Result<()> {
    hear_soon(containerd, Part::Hypervisor)
}

fn killed_devices_process_ends_its_task_at_once(containerd: &Containerd) -> Result<()> {
    hear_soon(containerd, Part::Devices)
}

/// Starts a task and kills parts of it so many milliseconds later, whatever it is doing then.
/// Gives how many processes were killed.
fn kill_after(containerd: &Containerd, parts: &[Part], delay: u64) -> Result<usize> {
    let name = containerd.name();
    let mut run = containerd.run_command("", &name, "while :; do echo x; sleep 0.05; done");
    let mut run = run
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    std::thread::sleep(Duration::from_millis(delay));
    let mut pids = Vec::new();
    for part in parts {
        pids.extend(leaks::processes_of(&name, *part)?);
    }
    leaks::kill_and_wait(&pids)?;
    // What had not begun yet when we looked goes on, and is ended in the usual way.
    let grace = if pids.is_empty() { Duration::from_millis(100) } else { Duration::from_secs(10) };
    let ended = command::wait(&mut run, grace)?;
    ensure!(ended.is_some() || pids.is_empty(), "ctr did not see the end");
    let task = Task::of(containerd, name.clone());
    task.remove_whatever_there_is()?;
    leaks::expect_no_trace(&[&name])
        .with_context(|| format!("{parts:?} killed after {delay} ms"))?;
    Ok(pids.len())
}

/// Kills these parts, in turn, at each of these moments; most must have been there.
fn kill_at(containerd: &Containerd, parts: &[&[Part]], moments: &[u64]) -> Result<()> {
    let mut killed = 0;
    for (ms, parts) in moments.iter().zip(parts.iter().cycle()) {
        killed += kill_after(containerd, parts, *ms)?;
    }
    ensure!(killed * 2 >= moments.len(), "only {killed} processes were there to be killed");
    Ok(())
}

/// So many moments are tried; more with `KATA_E2E_KILLS`.
fn moments() -> Vec<u64> {
    const LONGEST: u64 = 2500;
    let count = std::env::var("KATA_E2E_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    // Spread over the start, with a different phase each time.
    let phase = u64::from(std::process::id()) % 97;
    (1..=count).map(|n| n * LONGEST / count - phase).collect()
}

fn shim_killed_at_any_moment_leaves_nothing(containerd: &Containerd) -> Result<()> {
    kill_at(containerd, &[&[Part::Shim]], &moments())
}

fn hypervisor_and_devices_killed_at_any_moment_leave_nothing(
    containerd: &Containerd,
) -> Result<()> {
    kill_at(containerd, &[&[Part::Hypervisor], &[Part::Devices]], &moments())
}

fn everything_killed_at_once_leaves_nothing(containerd: &Containerd) -> Result<()> {
    kill_at(containerd, &[&[Part::Shim, Part::Hypervisor, Part::Devices]], &[2000])
}
