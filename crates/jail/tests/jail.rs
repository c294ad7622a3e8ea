//! Locks up a real process, which reports what it sees. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use kata_jail::role::Invocation;
use kata_jail::{Bind, Capability, Jail, Launch, Network, Role, Seccomp, Violation};
use serde_json::{Value, json};

kata_jail::roles_before_main!(play);

fn play(invocation: Invocation) -> i32 {
    match invocation.role {
        Role::JailExec => kata_jail::exec::main(&invocation.args),
        // Starts a jailed process that should die with it, tells its pid, and dies.
        Role::StandIn => {
            // SAFETY: the descriptor is the one that the test gave.
            let says = unsafe { OwnedFd::from_raw_fd(6) };
            let child = probe("sleep", jail()).die_with_parent().fd(says, 6).spawn().unwrap();
            println!("{}", child.pid());
            // The child is in its jail when it says so.
            // SAFETY: the descriptor is the one that the test gave.
            let mut ready = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(5) });
            ready.read_exact(&mut [0]).unwrap();
            // SAFETY: always safe; ends this process at once.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            0
        }
        other => panic!("{other} is unknown"),
    }
}

/// This binary is also the jailed program: it is static, so it needs nothing but itself.
#[used]
#[unsafe(link_section = ".init_array")]
static PROBE_BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn run() {
        // Before it is in its jail this process has another command line.
        if std::env::args().next().as_deref() != Some("/probe") {
            return;
        }
        match std::env::var("PROBE").as_deref() {
            Err(_) => return,
            Ok("report") => report(),
            Ok("sleep") => {
                // SAFETY: writes one byte of a constant, where there is such a descriptor.
                unsafe { libc::write(6, b"x".as_ptr().cast(), 1) };
                std::thread::sleep(Duration::from_secs(60));
            }
            Ok("write") => {
                println!("{:?}", std::fs::write("/data/file", "x").map_err(|e| e.kind()))
            }
            Ok("open") => {
                let opened = std::fs::File::options().read(true).write(true).open("/dev/null");
                println!("{}", opened.is_ok());
            }
            Ok("mkdir") => {
                println!("{:?}", std::fs::create_dir("/x").map_err(|e| e.raw_os_error()))
            }
            Ok("abort") => std::process::abort(),
            Ok(other) => panic!("{other} is unknown"),
        }
        std::process::exit(0);
    }
    run
};

fn report() {
    let mut names = Vec::new();
    list(Path::new("/"), &mut names);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let status: serde_json::Map<String, Value> = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().into()))
        .collect();
    let interfaces = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    let report = json!({
        "pid": std::process::id(),
        "names": names,
        "status": status,
        "interfaces": interfaces.lines().skip(2).count(),
        "nofile": limit.unwrap().1,
        "env": std::env::vars().map(|(key, _)| key).collect::<Vec<_>>(),
        "mounts": std::fs::read_to_string("/proc/self/mounts").unwrap_or_default().lines().count(),
    });
    println!("{report}");
}

fn list(directory: &Path, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten() {
        let path = entry.unwrap().path();
        names.push(path.to_string_lossy().into_owned());
        if path.is_dir() && !path.is_symlink() && path != Path::new("/proc") {
            list(&path, names);
        }
    }
    names.sort();
}

fn jail() -> Jail {
    let own = std::fs::read_link("/proc/self/exe").unwrap();
    let probe = Bind { source: own, target: "/probe".into(), readonly: true };
    Jail { uid: 123_456, gid: 234_567, binds: vec![probe], ..Jail::default() }
}

fn probe(what: &str, jail: Jail) -> Launch {
    Launch::program(Path::new("/probe"), Vec::new()).env("PROBE", what).jail(jail)
}

/// Runs it to its end; standard output, standard error, and how it ended.
fn run(launch: Launch) -> (String, String, std::process::ExitStatus) {
    let (mut out, out_writer) = std::io::pipe().unwrap();
    let (mut err, err_writer) = std::io::pipe().unwrap();
    let child = launch.stdout(out_writer.into()).stderr(err_writer.into()).spawn().unwrap();
    let (mut stdout, mut stderr) = (String::new(), String::new());
    out.read_to_string(&mut stdout).unwrap();
    err.read_to_string(&mut stderr).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    (stdout, stderr, runtime.block_on(child.wait()).unwrap())
}

fn seen(jail: Jail) -> Value {
    let (stdout, stderr, status) = run(probe("report", jail));
    assert!(status.success(), "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn the_root_holds_only_what_was_named() {
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("file"), "x").unwrap();
    let mut jail = jail();
    jail.binds.push(Bind { source: data.path().into(), target: "/a/b".into(), readonly: true });
    jail.devices.push("/dev/null".into());
    let report = seen(jail);
    let expected = ["/a", "/a/b", "/a/b/file", "/dev", "/dev/null", "/probe"];
    assert_eq!(report["names"], json!(expected));
    assert_eq!(report["pid"], 1);
    assert_eq!(report["env"], json!(["PATH", "PROBE"]));
}

#[test]
fn nobody_special_is_inside_and_nothing_can_be_gained() {
    let mut jail = jail();
    (jail.proc, jail.groups, jail.nofile) = (true, vec![77], 99);
    let report = seen(jail);
    let status = &report["status"];
    assert_eq!(status["Uid"], "123456\t123456\t123456\t123456");
    assert_eq!(status["Gid"], "234567\t234567\t234567\t234567");
    assert_eq!(status["Groups"], "77");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["NSpid"], "1");
    assert_eq!(report["nofile"], 99);
    assert_eq!(report["interfaces"], 1, "only a loopback");
    // The root, the program and /proc.
    assert_eq!(report["mounts"], 3);
}

#[test]
fn listed_capabilities_survive_the_change_of_user_and_the_exec() {
    let mut jail = jail();
    (jail.proc, jail.capabilities) = (true, vec![Capability::Chown, Capability::SysChroot]);
    let status = &seen(jail)["status"];
    for set in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000040001", "{set}");
    }
}

#[test]
fn the_network_namespace_is_the_one_that_was_handed_over() {
    const AT: i32 = 9;
    let mut jail = jail();
    (jail.proc, jail.network) = (true, Network::Joined(AT));
    let own = std::fs::File::open("/proc/self/ns/net").unwrap();
    let (stdout, stderr, status) = run(probe("report", jail).fd(own.into(), AT));
    assert!(status.success(), "{stderr}");
    let here = std::fs::read_to_string("/proc/self/net/dev").unwrap().lines().skip(2).count();
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["interfaces"], here);
}

#[test]
fn a_read_only_bind_refuses_even_its_owner_and_a_writable_one_does_not() {
    let data = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(data.path(), Some(123_456), None).unwrap();
    for (readonly, expected) in [(true, "Err(ReadOnlyFilesystem)"), (false, "Ok(())")] {
        let mut jail = jail();
        jail.binds.push(Bind { source: data.path().into(), target: "/data".into(), readonly });
        assert_eq!(run(probe("write", jail)).0.trim(), expected);
    }
}

#[test]
fn a_device_is_usable_by_the_jails_user() {
    let mut jail = jail();
    jail.devices.push("/dev/null".into());
    assert_eq!(run(probe("open", jail)).0.trim(), "true");
}

#[test]
fn a_link_to_a_library_directory_stays_a_link() {
    let mut jail = jail();
    jail.binds.extend(["/usr", "/lib64"].map(Bind::same));
    jail.binds.push(Bind::same("/lib"));
    let shell = Launch::program(Path::new("/usr/bin/true"), Vec::new()).jail(jail);
    let (_, stderr, status) = run(shell);
    assert!(status.success(), "{stderr}");
}

#[test]
fn a_call_that_the_filter_does_not_allow_fails_or_kills() {
    let mut jail = jail();
    let allow: Vec<i64> = (0..500).filter(|call| *call != libc::SYS_mkdir).collect();
    let errno = Seccomp { allow: allow.clone(), otherwise: Violation::Errno(99) };
    jail.seccomp = Some(errno);
    assert_eq!(run(probe("mkdir", jail.clone())).0.trim(), "Err(Some(99))");
    jail.seccomp = Some(Seccomp { allow, otherwise: Violation::Kill });
    assert_eq!(run(probe("mkdir", jail)).2.signal(), Some(libc::SIGSYS));
}

#[test]
fn a_crash_of_the_first_process_of_its_namespace_is_seen() {
    // The C library aborts PID 1 by an invalid instruction, as SIGABRT does not reach it.
    let signal = run(probe("abort", jail())).2.signal();
    assert!(matches!(signal, Some(libc::SIGABRT | libc::SIGSEGV | libc::SIGILL)), "{signal:?}");
}

#[test]
fn what_fails_is_one_clear_line_and_code_125() {
    let mut broken = jail();
    broken.binds.push(Bind::same("/nonexistent/file"));
    let (_, stderr, status) = run(probe("report", broken));
    assert_eq!(
        stderr,
        "jail-exec: cannot look at \"/nonexistent/file\": No such file or directory (os error 2)\n"
    );
    assert_eq!(status.code(), Some(125));

    let missing = Launch::program(Path::new("/missing"), Vec::new()).jail(jail());
    let (_, stderr, status) = run(missing);
    assert_eq!(
        stderr,
        "jail-exec: cannot execute \"/missing\" in the jail: No such file or directory (os error 2)\n"
    );
    assert_eq!(status.code(), Some(125));
}

#[test]
fn a_jailed_process_dies_with_its_parent() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let (ready, says) = std::io::pipe().unwrap();
    let parent = Launch::role(Role::StandIn, "parent", &json!({}))
        .unwrap()
        .stdout(writer.into())
        .fd(ready.into(), 5)
        .fd(says.into(), 6)
        .spawn()
        .unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    let pid: i32 = text.trim().parse().unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z ")) {
        assert!(Instant::now() < deadline, "the jailed process outlived its parent");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(parent);
}

#[test]
fn the_host_sees_nothing_of_the_jails_mounts() {
    seen(jail());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(" - tmpfs jail "), "{mounts}");
}
