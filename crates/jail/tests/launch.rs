//! Starts real processes: this test binary again, in a role that reports what it sees.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kata_jail::role::Invocation;
use kata_jail::{Child, Launch, LaunchError, Role};
use serde_json::{Value, json};

kata_jail::roles_before_main!(play);

/// The roles' names are the product's; what they do here is up to this test.
fn play(invocation: Invocation) -> i32 {
    let args: Value = serde_json::from_str(&invocation.args).unwrap();
    match args["do"].as_str().unwrap() {
        "report" => report(),
        "write" => {
            for text in ["one", "two"] {
                // SAFETY: the test gives these descriptors, each to be used once.
                let fd = unsafe { OwnedFd::from_raw_fd(args[text].as_i64().unwrap() as i32) };
                File::from(fd).write_all(text.as_bytes()).unwrap();
            }
            0
        }
        "exit" => args["code"].as_i64().unwrap() as i32,
        "sleep" => {
            std::thread::sleep(Duration::from_secs(60));
            0
        }
        "parent" => {
            // Starts a child that should die with this process, tells its pid, and dies.
            let child = sleeper().die_with_parent().spawn().unwrap();
            println!("{}", child.pid());
            // SAFETY: always safe; ends this process at once.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            0
        }
        "namespace" => {
            // PID 1 of a namespace: its child must die with it.
            // SAFETY: the test gives this descriptor; whoever holds it keeps the pipe open.
            let held = unsafe { OwnedFd::from_raw_fd(5) };
            let child = sleeper().fd(held, 5).spawn().unwrap();
            let own = std::fs::read_to_string("/proc/self/stat").unwrap();
            println!("{} {}", std::process::id(), own.split(' ').next().unwrap());
            drop(child);
            std::thread::sleep(Duration::from_secs(60));
            0
        }
        other => panic!("{other} is unknown"),
    }
}

fn report() -> i32 {
    // SAFETY: only asks for the flags of a descriptor, if there is one.
    let open: Vec<i32> =
        (0..4096).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0).collect();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    let report = json!({
        "fds": open,
        "env": std::env::vars().map(|(key, _)| key).collect::<Vec<_>>(),
        "argv": std::env::args().collect::<Vec<_>>(),
        "name": field("Name"),
        "ignored": field("SigIgn"),
        "blocked": field("SigBlk"),
        // SAFETY: only asks. It is 0 for a session led from outside this PID namespace.
        "session": unsafe { libc::getsid(0) },
        "pid": std::process::id(),
        "stdin": std::fs::read_link("/proc/self/fd/0").unwrap(),
        "directory": std::env::current_dir().unwrap(),
    });
    println!("{report}");
    0
}

fn role(args: Value) -> Launch {
    Launch::role(Role::StandIn, "title", &args).unwrap()
}

fn sleeper() -> Launch {
    role(json!({"do": "sleep"}))
}

/// Starts it and reads all its output.
fn output(launch: Launch) -> (Child, String) {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let child = launch.stdout(OwnedFd::from(writer)).spawn().unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    (child, text)
}

fn seen(launch: Launch) -> Value {
    serde_json::from_str(&output(launch).1).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn until_gone(pid: i32) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn descriptors_are_mapped_exactly_and_all_others_closed() {
    let kept: Vec<File> = (0..20).map(|_| File::open("/dev/null").unwrap()).collect();
    // Not even one that anybody forgot to mark close-on-exec leaks.
    // SAFETY: a descriptor of this process.
    unsafe { libc::fcntl(kept[7].as_raw_fd(), libc::F_SETFD, 0) };
    let report = seen(
        role(json!({"do": "report"}))
            .fd(File::open("/").unwrap().into(), 200)
            .fd(File::open("/").unwrap().into(), 3)
            .fd(File::open("/").unwrap().into(), 7),
    );
    assert_eq!(report["fds"], json!([0, 1, 2, 3, 7, 200]));
    assert_eq!(report["stdin"], "/dev/null");
}

#[test]
fn descriptors_may_swap_their_numbers() {
    let (mut from_first, first) = std::io::pipe().unwrap();
    let (mut from_second, second) = std::io::pipe().unwrap();
    let (at_first, at_second) = (first.as_raw_fd(), second.as_raw_fd());
    let args = json!({"do": "write", "one": at_second, "two": at_first});
    let child = role(args).fd(first.into(), at_second).fd(second.into(), at_first).spawn().unwrap();
    let (mut one, mut two) = (String::new(), String::new());
    from_first.read_to_string(&mut one).unwrap();
    from_second.read_to_string(&mut two).unwrap();
    assert_eq!((one.as_str(), two.as_str()), ("one", "two"));
    assert!(runtime().block_on(child.wait()).unwrap().success());
}

#[test]
fn a_number_may_be_given_once_and_not_a_standard_one() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let twice = sleeper().fd(null(), 5).fd(null(), 5).spawn();
    assert!(matches!(twice, Err(LaunchError::Descriptor(5))));
    assert!(matches!(sleeper().fd(null(), 2).spawn(), Err(LaunchError::Descriptor(2))));
}

#[test]
fn a_role_sees_only_the_environment_named_and_its_own_title() {
    let report = seen(role(json!({"do": "report"})).env("A", "1").env("A", "2"));
    assert_eq!(report["env"], json!(["PATH", "A"]));
    assert_eq!(report["argv"], json!(["title"]));
    assert_eq!(report["name"], "stand-in");
    let argv = vec!["sleep".into(), "100 s".into()];
    assert_eq!(seen(role(json!({"do": "report"})).argv(argv))["argv"], json!(["sleep", "100 s"]));
}

#[test]
fn signals_are_as_new_though_the_parent_ignores_and_blocks_them() {
    // Rust ignores SIGPIPE already.
    let report = seen(role(json!({"do": "report"})));
    // The role runs before Rust's start-up in this test, so nothing is ignored yet.
    assert_eq!(report["ignored"], "0000000000000000");
    assert_eq!(report["blocked"], "0000000000000000");
}

#[test]
fn a_new_session_is_led_by_the_process() {
    let report = seen(role(json!({"do": "report"})).new_session().directory(Path::new("/")));
    assert_eq!(report["session"], report["pid"]);
    assert_eq!(report["directory"], "/");
}

#[test]
fn a_program_that_is_not_there_is_an_error() {
    let error = Launch::program(Path::new("/nonexistent"), Vec::new()).spawn().unwrap_err();
    assert_eq!(error.to_string(), "cannot start /nonexistent: execute");
}

#[test]
fn the_exit_is_reported_to_every_waiter_again_and_again() {
    runtime().block_on(async {
        let child = role(json!({"do": "exit", "code": 42})).spawn().unwrap();
        let (one, two) = tokio::join!(child.wait(), child.wait());
        assert_eq!(one.unwrap().code(), Some(42));
        assert_eq!(two.unwrap().code(), Some(42));
        assert_eq!(child.wait().await.unwrap().code(), Some(42));
        assert_eq!(child.try_wait().unwrap().unwrap().code(), Some(42));
        assert_eq!(child.kill(9).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    });
}

#[test]
fn a_killed_process_is_reported_with_its_signal() {
    runtime().block_on(async {
        let child = sleeper().spawn().unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        child.kill(libc::SIGKILL).unwrap();
        assert_eq!(child.wait().await.unwrap().signal(), Some(libc::SIGKILL));
    });
}

#[test]
fn no_signal_is_no_signal() {
    let child = sleeper().spawn().unwrap();
    for signal in [0, -1, 65, i32::MAX] {
        assert_eq!(child.kill(signal).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
    child.kill(libc::SIGKILL).unwrap();
    runtime().block_on(child.wait()).unwrap();
}

#[test]
fn a_child_dies_with_its_parent() {
    let (parent, text) = output(role(json!({"do": "parent"})));
    let pid: i32 = text.trim().parse().unwrap();
    assert!(until_gone(pid), "the child outlived its parent");
    assert_eq!(runtime().block_on(parent.wait()).unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn what_lives_in_a_pid_namespace_dies_with_its_first_process() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let (mut probe, held) = std::io::pipe().unwrap();
    let child = role(json!({"do": "namespace"}))
        .pid_namespace()
        .stdout(writer.into())
        .fd(held.into(), 5)
        .spawn()
        .unwrap();
    let mut line = [0u8; 64];
    let length = reader.read(&mut line).unwrap();
    let text = String::from_utf8_lossy(&line[..length]).into_owned();
    assert_eq!(text.trim(), format!("1 {}", child.pid()));
    child.kill(libc::SIGKILL).unwrap();
    assert_eq!(runtime().block_on(child.wait()).unwrap().signal(), Some(libc::SIGKILL));
    // The end of the pipe is seen only when the grandchild, too, is gone.
    assert_eq!(probe.read(&mut line).unwrap(), 0);
}

#[test]
fn many_processes_from_many_threads_leave_no_descriptor() {
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let garbage: Vec<Vec<u8>> = (0..100).map(|n| vec![0; n]).collect();
                for _ in 0..25 {
                    let child = Launch::program(Path::new("/bin/true"), Vec::new());
                    let child = child.spawn().unwrap();
                    while child.try_wait().unwrap().is_none() {
                        std::thread::yield_now();
                    }
                }
                drop(garbage);
            });
        }
    });
    // Other tests of this binary open some meanwhile.
    assert!(count() < before + 100, "{before} descriptors became {}", count());
}
