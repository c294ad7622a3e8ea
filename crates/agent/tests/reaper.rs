//! The reaper takes every child of its process, so it is tested in a process of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;
use std::time::Duration;

use kata_agent::reaper::Reaper;

fn sh(script: &str) -> i32 {
    #[expect(clippy::zombie_processes, reason = "the reaper is what waits")]
    let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
    child.id().cast_signed()
}

#[tokio::test]
async fn exits_are_told_whether_watched_before_or_after() {
    let reaper = Reaper::start().unwrap();
    let early = sh("exit 3");
    let killed = sh("kill -9 $$");
    assert_eq!(reaper.watch(killed).await.unwrap().code, 137);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(reaper.watch(early).await.unwrap().code, 3);

    let sleeper = sh("exec sleep 60");
    let end = reaper.watch(sleeper);
    assert!(reaper.signal(sleeper, libc::SIGTERM).unwrap());
    assert_eq!(end.await.unwrap().code, 128 + 15);
    assert!(!reaper.signal(sleeper, libc::SIGTERM).unwrap(), "a reaped pid was signalled");
    assert!(!reaper.signal(1, 0).unwrap(), "a pid that is no child was signalled");
}
