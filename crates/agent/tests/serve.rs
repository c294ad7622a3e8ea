//! The agent as the host sees it, on this machine: needs root, busybox and cgroups.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod host;

use std::fs;
use std::time::{Duration, Instant};

use host::{Agent, all, container, output, process_id, take, terminal};
use kata_channel::CallError;
use kata_oci::{Pids, Resources, Wire as _};
use kata_protocol::agent::{
    ConnectRequest, Empty, MountRequest, Storage, UpdateRequest, failure::Code,
};
use kata_protocol::call;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

fn code(error: CallError) -> (Code, String) {
    match error {
        CallError::Failed(failure) => (failure.code.enum_value().unwrap(), failure.message),
        other => panic!("not the agent's own: {other}"),
    }
}

#[tokio::test]
async fn connect_answers_with_versions_and_refuses_another() {
    let agent = Agent::start().await;
    let answer = agent.connect().await;
    assert_eq!(answer.protocol_version, kata_protocol::VERSION);
    assert!(answer.ready_ns >= answer.init_ns && answer.init_ns > 0);
    let request = ConnectRequest { protocol_version: 99, ..Default::default() };
    let error = agent.try_call::<call::Connect>(&request).await.unwrap_err();
    let (code, text) = code(error);
    assert_eq!(code, Code::Precondition);
    assert!(text.contains("99"), "{text}");
}

#[tokio::test]
async fn who_is_told_to_leave_unmounts_the_shares_and_hangs_up() {
    let agent = Agent::start().await;
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("share");
    let storage = Storage {
        driver: "tmpfs".to_owned(),
        source: "share".to_owned(),
        mount_point: at.display().to_string(),
        ..Default::default()
    };
    // What cannot be mounted is told, and tried again when it is asked for again. What is mounted
    // stays as it is.
    let mut none = storage.clone();
    none.driver = "none".to_owned();
    let none = MountRequest { storages: vec![none], ..Default::default() };
    agent.try_call::<call::Mount>(&none).await.unwrap_err();
    let share = MountRequest { storages: vec![storage], ..Default::default() };
    for _ in 0..2 {
        agent.call::<call::Mount>(&share).await;
    }
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(&at.display().to_string())
    };
    assert!(is_mounted());
    // Not while somebody uses one; nothing has changed then.
    let held = fs::File::create(at.join("held")).unwrap();
    let error = agent.try_call::<call::Leave>(&Empty::default()).await.unwrap_err();
    assert!(code(error).1.contains("unmount a share"));
    assert!(is_mounted());
    drop(held);
    let nothing = Empty::default();
    let left = agent.channel.call::<call::Leave>(&nothing);
    // Its answer may be lost with the connection.
    let (_, closed) = tokio::join!(left, timeout(Duration::from_secs(10), agent.channel.closed()));
    closed.unwrap();
    assert!(!is_mounted());
}

#[tokio::test]
async fn a_container_echoes_and_its_exit_code_and_bytes_are_told() {
    let agent = Agent::start().await;
    let script = "echo out; echo err >&2; exit 7";
    let mut streams = agent.run("c", &["sh", "-c", script], output()).await;
    let end = agent.wait("c", "").await;
    assert_eq!((end.exit_code, end.stdout_bytes, end.stderr_bytes), (7, 4, 4));
    assert!(!end.oom_killed && end.exited_at_ns > 1_700_000_000_000_000_000);
    assert_eq!(take(&mut streams.stdout, 4).await, b"out\n");
    assert_eq!(take(&mut streams.stderr, 4).await, b"err\n");
    let mut rest = Vec::new();
    streams.stdout.unwrap().read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
    // Remembered until deleted.
    assert_eq!(agent.wait("c", "").await.exit_code, 7);
    agent.delete("c", "").await;
    let error = agent.try_call::<call::Wait>(&process_id("c", "")).await.unwrap_err();
    assert_eq!(code(error).0, Code::NotFound);
}

#[tokio::test]
async fn a_hundred_megabytes_go_through_cat_intact() {
    const TOTAL: usize = 100_000_000;
    let agent = Agent::start().await;
    let mut streams = agent.run("c", &["cat"], all()).await;
    let mut input = streams.stdin.take().unwrap();
    let mut result = streams.stdout.take().unwrap();
    let byte = |at: usize| (at as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0];
    let chunk: Vec<u8> = (0..1 << 20).map(byte).collect();
    let send = async {
        let mut left = TOTAL;
        while left > 0 {
            let count = left.min(chunk.len());
            input.write_all(&chunk[..count]).await.unwrap();
            left -= count;
        }
        input.shutdown().await.unwrap();
    };
    let receive = async {
        let mut buffer = vec![0; 64 << 10];
        let mut at = 0;
        loop {
            let count = result.read(&mut buffer).await.unwrap();
            if count == 0 {
                return at;
            }
            for (index, byte) in buffer[..count].iter().enumerate() {
                assert_eq!(*byte, chunk[(at + index) % chunk.len()], "at {}", at + index);
            }
            at += count;
        }
    };
    let ((), received) = tokio::join!(send, receive);
    assert_eq!(received, TOTAL);
    let end = agent.wait("c", "").await;
    assert_eq!((end.exit_code, end.stdout_bytes), (0, TOTAL as u64));
}

#[tokio::test]
async fn a_process_that_writes_and_exits_at_once_loses_nothing() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    for round in 0..300 {
        let exec = format!("e{round}");
        let script = format!("echo {round}; echo x{round} >&2");
        let mut streams = agent.exec("c", &exec, &["sh", "-c", &script], output()).await;
        let end = agent.wait("c", &exec).await;
        let out = take(&mut streams.stdout, end.stdout_bytes).await;
        let err = take(&mut streams.stderr, end.stderr_bytes).await;
        assert_eq!(String::from_utf8(out).unwrap(), format!("{round}\n"));
        assert_eq!(String::from_utf8(err).unwrap(), format!("x{round}\n"));
        agent.delete("c", &exec).await;
    }
}

#[tokio::test]
async fn a_terminal_that_writes_and_exits_at_once_loses_nothing() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    let script = "seq 1 2000";
    let wanted: String = (1..=2000).map(|n| format!("{n}\r\n")).collect();
    for round in 0..50 {
        let exec = format!("e{round}");
        let mut streams = agent.exec("c", &exec, &["sh", "-c", script], terminal()).await;
        // Not read before the exit is known, as long as the terminal holds it.
        let end = agent.wait("c", &exec).await;
        let out = take(&mut streams.stdout, end.stdout_bytes).await;
        assert_eq!(String::from_utf8(out).unwrap(), wanted, "round {round}");
        agent.delete("c", &exec).await;
    }
}

#[tokio::test]
async fn the_exit_does_not_wait_for_a_reader_nor_for_children() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    let script = "echo parent; sleep 1000 & exit 0";
    let mut streams = agent.exec("c", "e", &["sh", "-c", script], output()).await;
    let end = timeout(Duration::from_secs(10), agent.wait("c", "e")).await.unwrap();
    assert_eq!(end.stdout_bytes, 7);
    assert_eq!(take(&mut streams.stdout, 7).await, b"parent\n");
    agent.delete("c", "e").await;
}

#[tokio::test]
async fn a_writer_waits_for_its_reader_in_bounded_memory() {
    let agent = Agent::start().await;
    let script = "head -c 1000000000 /dev/zero";
    let mut streams = agent.run("c", &["sh", "-c", script], output()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 40_000, "{peak} kB");
    // Others go on meanwhile.
    let mut other = agent.exec("c", "e", &["echo", "hi"], output()).await;
    let end = timeout(Duration::from_secs(10), agent.wait("c", "e")).await.unwrap();
    assert_eq!(take(&mut other.stdout, end.stdout_bytes).await, b"hi\n");
    // A reader that goes away is a broken pipe.
    streams.stdout.take();
    let end = timeout(Duration::from_secs(10), agent.wait("c", "")).await.unwrap();
    assert_ne!(end.exit_code, 0);
}

#[tokio::test]
async fn a_terminal_has_its_size_echoes_and_follows_a_resize() {
    let agent = Agent::start().await;
    let script = "stty size; read line; echo got $line; stty size";
    let mut streams = agent.run("c", &["sh", "-c", script], terminal()).await;
    let mut seen = String::new();
    let stdout = streams.stdout.as_mut().unwrap();
    until(stdout, &mut seen, "24 80\r\n").await;
    agent.resize("c", "", 50, 132).await;
    streams.stdin.as_mut().unwrap().write_all(b"hello\n").await.unwrap();
    until(stdout, &mut seen, "got hello\r\n").await;
    until(stdout, &mut seen, "50 132\r\n").await;
    assert!(seen.contains("hello\r\n"), "no echo in {seen:?}");
    assert_eq!(agent.wait("c", "").await.exit_code, 0);
}

async fn until(stream: &mut kata_channel::Stream, seen: &mut String, wanted: &str) {
    let mut buffer = [0; 1024];
    while !seen.contains(wanted) {
        let read = timeout(Duration::from_secs(20), stream.read(&mut buffer)).await;
        let count = read.unwrap_or_else(|_| panic!("{wanted:?} not in {seen:?}")).unwrap();
        assert!(count > 0, "ended without {wanted:?}: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
}

#[tokio::test]
async fn signals_end_processes_and_then_find_none() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    agent.exec("c", "e", &["sleep", "1000"], output()).await;
    agent.signal("c", "e", 15, false).await.unwrap();
    assert_eq!(agent.wait("c", "e").await.exit_code, 143);
    let (status, text) = code(agent.signal("c", "e", 15, false).await.unwrap_err());
    assert_eq!((status, text.as_str()), (Code::NotFound, "process already finished"));
    let (status, _) = code(agent.signal("c", "", 99, false).await.unwrap_err());
    assert_eq!(status, Code::Invalid);
    agent.exec("c", "e2", &["sleep", "1000"], output()).await;
    agent.signal("c", "", 9, true).await.unwrap();
    assert_eq!(agent.wait("c", "").await.exit_code, 137);
    assert_eq!(agent.wait("c", "e2").await.exit_code, 137);
    let error = agent.try_exec("c", "e3", &["true"], output()).await.err().unwrap();
    assert_eq!(code(error).0, Code::Precondition);
}

#[tokio::test]
async fn what_cannot_run_is_told_and_leaves_nothing() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    let error = agent.try_exec("c", "e", &["nonsense"], output()).await.err().unwrap();
    let (_, text) = code(error);
    assert!(text.contains("executable file not found"), "{text}");
    // The id is free again.
    agent.exec("c", "e", &["true"], output()).await;
    let error = agent.try_exec("c", "e", &["true"], output()).await.err().unwrap();
    assert_eq!(code(error).0, Code::Exists);
    let error = agent.try_exec("no", "e", &["true"], output()).await.err().unwrap();
    assert_eq!(code(error).0, Code::NotFound);
}

#[tokio::test]
async fn a_running_container_is_deleted_with_everything_in_it() {
    let agent = Agent::start().await;
    agent.run("c", &["sh", "-c", "sleep 1000 & sleep 1000"], output()).await;
    let waiting = agent.wait("c", "");
    let deleting = agent.delete("c", "");
    let (end, ()) = tokio::join!(waiting, deleting);
    assert_eq!(end.exit_code, 137);
    // And again under the same id.
    let mut streams = agent.run("c", &["echo", "again"], output()).await;
    let end = agent.wait("c", "").await;
    assert_eq!(take(&mut streams.stdout, end.stdout_bytes).await, b"again\n");
    agent.delete("c", "").await;
}

#[tokio::test]
async fn processes_are_listed_counted_frozen_and_limited() {
    let agent = Agent::start().await;
    agent.run("c", &["sh", "-c", "sleep 1000 & wait"], output()).await;
    agent.exec("c", "e", &["sleep", "500"], output()).await;
    let wanted = async {
        loop {
            let list = agent.call::<call::ListProcesses>(&container("c")).await;
            let mut seen: Vec<_> = list
                .processes
                .iter()
                .map(|p| (p.known, p.exec_id.clone(), p.command.join(" ")))
                .collect();
            seen.sort();
            if seen.len() == 3 && seen[0].2 == "sleep 1000" {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let seen = timeout(Duration::from_secs(10), wanted).await.unwrap();
    assert_eq!(seen[0], (false, String::new(), "sleep 1000".to_owned()));
    assert_eq!(seen[2], (true, "e".to_owned(), "sleep 500".to_owned()));
    let stats = agent.call::<call::Stats>(&container("c")).await;
    assert_eq!(stats.pids.current, 3);
    let update = UpdateRequest {
        container_id: "c".into(),
        resources: Resources { pids: Some(Pids { limit: 77 }), ..Resources::default() }
            .to_wire()
            .unwrap(),
        ..UpdateRequest::default()
    };
    agent.call::<call::Update>(&update).await;
    let stats = agent.call::<call::Stats>(&container("c")).await;
    assert_eq!(stats.pids.limit, 77);
    agent.call::<call::Pause>(&container("c")).await;
    let error = agent.try_exec("c", "e2", &["true"], output()).await.err().unwrap();
    assert!(code(error).1.contains("paused"));
    agent.call::<call::Resume>(&container("c")).await;
    agent.exec("c", "e2", &["true"], output()).await;
    assert_eq!(agent.wait("c", "e2").await.exit_code, 0);
    agent.call::<call::Sync>(&Empty::default()).await;
    agent.delete("c", "").await;
}

#[tokio::test]
async fn a_thousand_execs_leave_no_descriptor_zombie_or_thread() {
    let agent = Agent::start().await;
    agent.run("c", &["sleep", "1000"], output()).await;
    let run = async |round: usize| {
        let exec = format!("e{round}");
        // An orphan each, which the agent has to reap.
        let mut streams = agent.exec("c", &exec, &["sh", "-c", "true & echo x"], all()).await;
        let end = agent.wait("c", &exec).await;
        assert_eq!(take(&mut streams.stdout, end.stdout_bytes).await, b"x\n");
        agent.delete("c", &exec).await;
    };
    for round in 0..20 {
        run(round).await;
    }
    let before = usage(agent.pid());
    let start = Instant::now();
    for round in 20..1020 {
        run(round).await;
    }
    println!("{:.2} ms per exec", start.elapsed().as_secs_f64());
    let limit = Instant::now() + Duration::from_secs(5);
    let mut after = usage(agent.pid());
    while after != before && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(20)).await;
        after = usage(agent.pid());
    }
    assert_eq!(after, before, "(descriptors, threads, children)");
}

fn usage(pid: u32) -> (usize, usize, usize) {
    let count = |name: &str| fs::read_dir(format!("/proc/{pid}/{name}")).unwrap().count();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    (count("fd"), count("task"), children.split_whitespace().count())
}
