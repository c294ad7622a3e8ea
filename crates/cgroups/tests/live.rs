//! On this machine's kernel, as root: what was written is what happens.

// Clippy does not take the helpers below for the tests they are part of.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use kata_cgroups::{Cgroup, Hierarchy, NO_LIMIT};
use kata_oci::Resources;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

fn is_root() -> bool {
    // SAFETY: no arguments, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The v2 tree of this machine, even if v1 has the controllers.
fn unified() -> Hierarchy {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = text.lines().find(|line| line.contains(" - cgroup2 ")).expect("a cgroup2 mount");
    Hierarchy::V2 { root: PathBuf::from(line.split(' ').nth(4).unwrap()) }
}

/// A cgroup of this test's own, removed at its end.
struct Own(Cgroup);

impl Own {
    fn new(hierarchy: &Hierarchy, name: &str) -> Self {
        let path = format!("kata-cgroups-test-{}-{name}", std::process::id());
        Self(Cgroup::create(hierarchy, &path).unwrap())
    }

    fn child(&self, hierarchy: &Hierarchy, name: &str) -> Cgroup {
        Cgroup::create(hierarchy, &format!("{}/{name}", self.0.path())).unwrap()
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.0.delete().unwrap();
        assert!(!self.0.exists());
    }
}

/// A shell that runs its script when told to.
struct Waiting(Child);

impl Waiting {
    fn new(script: &str) -> Self {
        let script = format!("read go; {script}");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).stdin(Stdio::piped()).stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    fn go(mut self) -> ExitStatus {
        self.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        self.0.wait().unwrap()
    }

    /// The exit of one that was killed while it waited.
    fn ended(mut self) -> ExitStatus {
        let stdin = self.0.stdin.take();
        let status = self.0.wait().unwrap();
        drop(stdin);
        status
    }
}

fn parse(json: &str) -> Resources {
    Resources::parse(json.as_bytes()).unwrap()
}

fn run_in(cgroup: &Cgroup, script: &str) -> bool {
    let process = Waiting::new(script);
    cgroup.add(process.pid()).unwrap();
    process.go().success()
}

#[test]
fn a_frozen_cgroup_stands_still_until_it_is_thawed() {
    if !is_root() {
        return;
    }
    for (name, hierarchy) in [("freeze2", unified()), ("freeze", Hierarchy::detect().unwrap())] {
        let own = Own::new(&hierarchy, name);
        let below = own.child(&hierarchy, "below");
        let mut busy = Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pid = busy.id();
        below.add(pid.cast_signed()).unwrap();
        own.0.freeze().unwrap();
        assert!(own.0.is_frozen().unwrap());
        let ticks = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let fields = stat.rsplit(')').next().unwrap().split_whitespace();
            fields.skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum::<u64>()
        };
        let before = ticks();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(ticks(), before, "{name}: ran while frozen");
        own.0.thaw().unwrap();
        assert!(!own.0.is_frozen().unwrap());
        let end = Instant::now() + Duration::from_secs(10);
        while ticks() == before {
            assert!(Instant::now() < end, "{name}: does not run after the thaw");
            std::thread::sleep(Duration::from_millis(10));
        }
        own.0.kill(libc::SIGKILL).unwrap();
        assert_eq!(busy.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}

#[test]
fn a_signal_reaches_every_process_below_and_kill_wakes_the_frozen() {
    if !is_root() {
        return;
    }
    for (name, hierarchy) in [("kill2", unified()), ("kill", Hierarchy::detect().unwrap())] {
        let own = Own::new(&hierarchy, name);
        // v2 takes no processes into a cgroup whose controllers its children have.
        let (beside, below) = (own.child(&hierarchy, "c"), own.child(&hierarchy, "a/b"));
        let processes = [Waiting::new(":"), Waiting::new(":")];
        beside.add(processes[0].pid()).unwrap();
        below.add(processes[1].pid()).unwrap();
        let mut pids: Vec<i32> = processes.iter().map(Waiting::pid).collect();
        pids.sort_unstable();
        assert_eq!(own.0.pids().unwrap(), pids);
        own.0.kill(libc::SIGTERM).unwrap();
        for process in processes {
            assert_eq!(process.ended().signal(), Some(libc::SIGTERM));
        }
        let frozen = Waiting::new(":");
        below.add(frozen.pid()).unwrap();
        own.0.freeze().unwrap();
        own.0.kill(libc::SIGKILL).unwrap();
        assert_eq!(frozen.ended().signal(), Some(libc::SIGKILL));
    }
}

#[test]
fn delete_kills_what_is_left_even_frozen_and_below() {
    if !is_root() {
        return;
    }
    for (name, hierarchy) in [("delete2", unified()), ("delete", Hierarchy::detect().unwrap())] {
        let own = Own::new(&hierarchy, name);
        let below = own.child(&hierarchy, "x/y/z");
        let process = Waiting::new(":");
        below.add(process.pid()).unwrap();
        own.0.freeze().unwrap();
        assert!(!own.0.delete_unused().unwrap(), "{name}");
        let began = Instant::now();
        own.0.delete().unwrap();
        assert!(!own.0.exists(), "{name}");
        assert!(began.elapsed() < Duration::from_secs(2), "{name}: {:?}", began.elapsed());
        assert_eq!(process.ended().signal(), Some(libc::SIGKILL));
        assert!(own.0.pids().is_err());
        own.0.delete().unwrap();
        let unused = own.child(&hierarchy, "x/y");
        assert!(own.0.delete_unused().unwrap() && own.0.delete_unused().unwrap(), "{name}");
        assert!(!unused.exists() && !own.0.exists(), "{name}");
    }
}

#[test]
fn a_container_divides_its_cgroup_and_its_processes_are_still_found() {
    if !is_root() {
        return;
    }
    let hierarchy = unified();
    let own = Own::new(&hierarchy, "of");
    let below = own.child(&hierarchy, "inner");
    let process = Waiting::new(":");
    below.add(process.pid()).unwrap();
    let found = Cgroup::of_process(&hierarchy, process.pid()).unwrap();
    assert_eq!(found.path(), below.path());
    process.go();
}

#[test]
fn a_process_that_leaves_is_in_the_root_and_lives_on() {
    if !is_root() {
        return;
    }
    for (name, hierarchy) in [("leave2", unified()), ("leave", Hierarchy::detect().unwrap())] {
        let own = Own::new(&hierarchy, name);
        let process = Waiting::new(":");
        own.0.add(process.pid()).unwrap();
        hierarchy.leave(process.pid()).unwrap();
        assert_eq!(own.0.pids().unwrap(), [0; 0], "{name}");
        assert!(
            Cgroup::of_process(&hierarchy, process.pid()).is_err(),
            "{name}: the root has no name"
        );
        own.0.delete().unwrap();
        assert!(process.go().success(), "{name}");
    }
}

#[test]
fn device_rules_are_enforced_and_replaced() {
    if !is_root() || std::fs::File::open("/dev/kmsg").is_err() {
        return;
    }
    let (read, write) = (": < /dev/kmsg", ": >> /dev/kmsg");
    for (name, hierarchy) in [("devices2", unified()), ("devices", Hierarchy::detect().unwrap())] {
        let own = Own::new(&hierarchy, name);
        assert!(run_in(&own.0, read) && run_in(&own.0, write), "{name}: free at first");
        own.0.apply(&parse(r#"{"devices":[{"allow":false,"access":"rwm"}]}"#), true).unwrap();
        assert!(!run_in(&own.0, read) && !run_in(&own.0, write), "{name}: denied");
        assert!(run_in(&own.0, ": < /dev/zero; : > /dev/null"), "{name}: always allowed");
        let rules = r#"{"devices":[{"allow":false},
            {"allow":true,"type":"c","major":1,"minor":11,"access":"r"}]}"#;
        own.0.apply(&parse(rules), true).unwrap();
        assert!(run_in(&own.0, read), "{name}: reading is allowed by the new rules");
        assert!(!run_in(&own.0, write), "{name}: writing is not");
        own.0.apply(&parse(r#"{"devices":[{"allow":true}]}"#), true).unwrap();
        assert!(run_in(&own.0, write), "{name}: everything is allowed");
        own.0.apply(&parse(r#"{"pids":{"limit":-1}}"#), false).unwrap();
        assert!(run_in(&own.0, write), "{name}: rules stay when they are not to be touched");
    }
}

#[test]
fn cgroups_with_the_same_device_rules_share_a_program() {
    if !is_root() || std::fs::File::open("/dev/kmsg").is_err() {
        return;
    }
    let hierarchy = unified();
    let (one, two) = (Own::new(&hierarchy, "shared1"), Own::new(&hierarchy, "shared2"));
    let denied = parse(r#"{"devices":[{"allow":false,"access":"rwm"}]}"#);
    let program = |own: &Own| {
        let Hierarchy::V2 { root } = &hierarchy else { panic!("{hierarchy:?}") };
        let cgroup = std::fs::File::open(root.join(own.0.path().trim_start_matches('/'))).unwrap();
        kata_bpf::attached(&cgroup, kata_bpf::Hook::Device).unwrap()
    };
    one.0.apply(&denied, true).unwrap();
    two.0.apply(&denied, true).unwrap();
    assert_eq!((program(&one).len(), program(&one)), (1, program(&two)));
    one.0.apply(&parse(r#"{"devices":[{"allow":true}]}"#), true).unwrap();
    let read = ": < /dev/kmsg";
    assert!(run_in(&one.0, read) && !run_in(&two.0, read), "the rules of one are only its own");
    // What a cgroup has cannot be attached to it again.
    two.0.apply(&denied, true).unwrap();
    assert!(!run_in(&two.0, read));
}

#[test]
fn limits_are_in_force_and_counted() {
    if !is_root() {
        return;
    }
    let hierarchy = Hierarchy::detect().unwrap();
    let own = Own::new(&hierarchy, "limits");
    let limits = r#"{"memory":{"limit":67108864,"reservation":33554432,"swap":134217728},
        "pids":{"limit":7},"cpu":{"shares":512,"quota":50000,"period":100000}}"#;
    own.0.apply(&parse(limits), false).unwrap();
    let process = Waiting::new("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done");
    own.0.add(process.pid()).unwrap();
    let stats = own.0.stats().unwrap();
    assert_eq!((stats.pids.current, stats.pids.limit), (1, 7));
    assert_eq!(stats.memory.limit, 67_108_864);
    assert!(process.go().success());
    assert!(own.0.stats().unwrap().cpu.usage_usec > 0);

    own.0.apply(&parse(r#"{"memory":{"limit":134217728,"swap":268435456}}"#), false).unwrap();
    own.0.apply(&parse(r#"{"memory":{"limit":-1,"swap":-1},"pids":{"limit":0}}"#), false).unwrap();
    let stats = own.0.stats().unwrap();
    assert_eq!((stats.memory.limit, stats.pids.limit), (NO_LIMIT, NO_LIMIT));

    own.0.apply(&parse(r#"{"pids":{"limit":1}}"#), false).unwrap();
    assert!(!run_in(&own.0, "/bin/true | /bin/true"), "forked beyond the limit");
}

#[test]
fn out_of_memory_is_counted_and_told() {
    if !is_root() {
        return;
    }
    let hierarchy = Hierarchy::detect().unwrap();
    let own = Own::new(&hierarchy, "oom");
    own.0.apply(&parse(r#"{"memory":{"limit":16777216,"swap":16777216}}"#), false).unwrap();
    let watch = match hierarchy {
        Hierarchy::V2 { .. } => Some(own.0.memory_events_inotify().unwrap()),
        Hierarchy::V1 { .. } => None,
    };
    assert_eq!(own.0.oom_kills().unwrap(), 0);
    assert!(!run_in(&own.0, "head -c 67108864 /dev/zero | tail -c 67108864 > /dev/null"));
    assert!(own.0.oom_kills().unwrap() >= 1);
    assert!(own.0.stats().unwrap().memory.oom_kills >= 1);
    if let Some(watch) = watch {
        let mut poll = libc::pollfd { fd: watch.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, and its count is one.
        assert_eq!(unsafe { libc::poll(&mut poll, 1, 5000) }, 1, "no event");
    }
}

#[test]
fn a_limit_without_its_controller_is_an_error_that_names_it() {
    if !is_root() {
        return;
    }
    let Hierarchy::V2 { root } = unified() else { unreachable!() };
    let has_pids = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap();
    if has_pids.contains("pids") {
        return;
    }
    let hierarchy = Hierarchy::V2 { root };
    let own = Own::new(&hierarchy, "missing");
    let error = own.0.apply(&parse(r#"{"pids":{"limit":5}}"#), false).unwrap_err().to_string();
    assert!(error.contains("pids.max = 5 needs the pids cgroup controller"), "{error}");
    own.0.apply(&parse(r#"{"pids":{"limit":-1},"cpu":{"quota":-1}}"#), false).unwrap();
    assert_eq!(own.0.stats().unwrap().memory.limit, NO_LIMIT);
    assert!(own.0.unified_directory().unwrap().is_dir());
}

/// Two servers on the same port of different addresses, as on a machine with an engine's
/// resolver: one is found by a redirection.
#[test]
fn what_is_sent_to_a_redirected_port_arrives_at_the_other() {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
    let Ok(hierarchy) = Hierarchy::detect() else { return };
    let resolver = IpAddr::V4(Ipv4Addr::new(127, 77, 1, 11));
    let socket = UdpSocket::bind((resolver, 0)).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    let port = socket.local_addr().unwrap().port();
    let asked = SocketAddr::new(resolver, 53);
    let redirect = kata_cgroups::Redirect::install(&hierarchy, asked, port, &socket).unwrap();

    let client = UdpSocket::bind("0.0.0.0:0").unwrap();
    client.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 16];
    client.send_to(b"by sendto", asked).unwrap();
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"by sendto");
    socket.send_to(b"answer", from).unwrap();
    assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, asked));

    client.connect(asked).unwrap();
    assert_eq!(client.peer_addr().unwrap(), asked);
    client.send(b"connected").unwrap();
    assert_eq!(socket.recv_from(&mut buffer).unwrap().0, 9);

    drop(redirect);
    let other = UdpSocket::bind("0.0.0.0:0").unwrap();
    other.send_to(b"to nobody", asked).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    assert!(socket.recv_from(&mut buffer).is_err(), "it is redirected no longer");
}

/// A signal makes the kernel give up checking a program; a process with children gets some.
#[test]
fn programs_are_installed_though_signals_come() {
    extern "C" fn nothing(_: libc::c_int) {}
    if !is_root() {
        return;
    }
    // SAFETY: the handler does nothing, and no other test uses the signal.
    unsafe { libc::signal(libc::SIGUSR1, nothing as *const () as libc::sighandler_t) };
    // SAFETY: names the calling thread.
    let me = unsafe { libc::pthread_self() };
    let hierarchy = unified();
    let own = Own::new(&hierarchy, "signals");
    let resources = Resources::parse(br#"{"devices":[{"allow":false}]}"#).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // SAFETY: the thread lives until this one has ended.
                unsafe { libc::pthread_kill(me, libc::SIGUSR1) };
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let results: Vec<_> = (0..300).map(|_| own.0.apply(&resources, true)).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
}
