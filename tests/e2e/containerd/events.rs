//! What containerd publishes about a task, and in which order.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kata_e2e::command::PATIENCE;
use kata_e2e::containerd::{Containerd, Task};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::Value;

pub fn trials() -> Vec<Trial<Containerd>> {
    trials!["events":
        Both: life_of_a_task_is_told_in_order, exits_carry_id_pid_and_code,
            short_lived_task_is_told_in_order;
    ]
}

/// One event: its topic, its content, and when it was read.
pub struct Event {
    pub topic: String,
    pub content: Value,
    pub at: Instant,
}

/// `ctr events`, of one container.
pub struct Events {
    child: Child,
    events: mpsc::Receiver<Event>,
}

impl Events {
    /// Listens from now on to what concerns the container `name`.
    pub fn of(containerd: &Containerd, name: &str) -> Result<Self> {
        let mut child = containerd
            .ctr("events")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start ctr events")?;
        let lines = BufReader::new(child.stdout.take().context("its output")?).lines();
        let (send, events) = mpsc::channel();
        let name = name.to_owned();
        thread::spawn(move || {
            for event in lines.map_while(Result::ok).filter_map(|line| parse(&line)) {
                let id = &event.content["container_id"];
                if *id == *name && send.send(event).is_err() {
                    break;
                }
            }
        });
        // There is no sign that it has subscribed.
        thread::sleep(Duration::from_millis(300));
        Ok(Self { child, events })
    }

    /// The next event.
    pub fn next(&self) -> Result<Event> {
        self.events.recv_timeout(PATIENCE).context("no further event came")
    }

    /// The topics up to this one.
    pub fn until(&self, topic: &str) -> Result<Vec<String>> {
        let mut topics = Vec::new();
        loop {
            let event = self.next().with_context(|| format!("seen so far: {topics:?}"))?;
            topics.push(event.topic);
            if topics.last().is_some_and(|last| last == topic) {
                return Ok(topics);
            }
        }
    }

    /// The next event of this topic.
    pub fn wait(&self, topic: &str) -> Result<Event> {
        loop {
            let event = self.next().with_context(|| format!("waiting for {topic}"))?;
            if event.topic == topic {
                return Ok(event);
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A line is: date, time, zone, zone name, namespace, topic, JSON.
fn parse(line: &str) -> Option<Event> {
    let (head, content) = line.split_once(" {")?;
    let topic = head.split_whitespace().find(|word| word.starts_with("/tasks/"))?;
    let content = serde_json::from_str(&format!("{{{content}")).ok()?;
    Some(Event { topic: topic.to_owned(), content, at: Instant::now() })
}

fn life_of_a_task_is_told_in_order(containerd: &Containerd) -> Result<()> {
    let name = containerd.name();
    let events = Events::of(containerd, &name)?;
    let kind = containerd.kind();
    let image = kata_e2e::containerd::IMAGE;
    containerd.ok(&format!("container create --runtime {kind} {image} {name} sleep 1000000"))?;
    let task = Task::of(containerd, name.clone());
    containerd.ok(&format!("task start -d {name}"))?;
    containerd.ok(&format!("task exec --exec-id e1 {name} true"))?;
    containerd.ok(&format!("task pause {name}"))?;
    containerd.ok(&format!("task resume {name}"))?;
    containerd.ok(&format!("task kill -s SIGKILL {name}"))?;
    let topics = events.until("/tasks/exit")?;
    // The first exit is that of the exec.
    let rest = events.until("/tasks/exit")?;
    task.expect_removed_with(137)?;
    task.remove()?;
    let last = events.until("/tasks/delete")?;
    let all: Vec<_> = [topics, rest, last].concat();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(all == expected, "{all:?}");
    Ok(())
}

fn exits_carry_id_pid_and_code(containerd: &Containerd) -> Result<()> {
    let name = containerd.name();
    let events = Events::of(containerd, &name)?;
    let mut run = containerd.run_command("", &name, "sleep 0.2; exit 5").spawn()?;
    let created = events.wait("/tasks/create")?;
    let started = events.wait("/tasks/start")?;
    let exited = events.wait("/tasks/exit")?;
    let status = run.wait()?;
    ensure!(status.code() == Some(5), "{status}");
    let pid = created.content["pid"].as_u64().context("pid")?;
    ensure!(created.content["bundle"].as_str().is_some_and(|b| b.ends_with(&name)));
    ensure!(created.content["rootfs"].as_array().is_some_and(|mounts| !mounts.is_empty()));
    ensure!(started.content["pid"].as_u64() == Some(pid), "{}", started.content);
    let exit = &exited.content;
    ensure!(exit["id"] == *name && exit["pid"].as_u64() == Some(pid), "{exit}");
    ensure!(exit["exit_status"] == 5 && exit["exited_at"].is_string(), "{exit}");
    Ok(())
}

fn short_lived_task_is_told_in_order(containerd: &Containerd) -> Result<()> {
    for _ in 0..2 {
        let name = containerd.name();
        let events = Events::of(containerd, &name)?;
        containerd.run_command("", &name, "true").status()?;
        let topics = events.until("/tasks/delete")?;
        let expected = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
        if topics != expected {
            bail!("{topics:?}");
        }
    }
    Ok(())
}
