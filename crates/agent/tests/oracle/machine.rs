//! Runs one `config.json` by our builder and by another runtime, and takes what it wrote.

use kata_agent::container::{Builder, ContainerError, NewContainer, ProcessIo, Profile, Zygote};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Programs of busybox that tests use.
const PROGRAMS: [&str; 24] = [
    "sh", "cat", "grep", "id", "ls", "stat", "mkdir", "touch", "readlink", "hostname", "sleep",
    "tty", "stty", "mount", "chmod", "echo", "env", "sort", "true", "tr", "sed", "dd", "find",
    "unshare",
];

/// A bundle's directory with a root file system of busybox.
pub struct Bundle {
    directory: tempfile::TempDir,
}

/// What a container did.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub output: String,
    /// 128 + signal for a signal.
    pub code: i32,
}

/// An id that no other test has.
pub fn fresh_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("oracle-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Bundle {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("rootfs");
        for name in ["bin", "etc", "proc", "dev", "sys", "tmp", "var", "home/user", "mnt"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .expect("install busybox-static: containers of this test run it");
        for name in PROGRAMS {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn root(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// A configuration as Docker writes it, without network, cgroup mount and limits,
    /// that runs `script`.
    pub fn config(&self, script: &str) -> Value {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
            "CAP_AUDIT_WRITE"
        ]);
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": self.root(), "readonly": false},
            "hostname": "oracle",
            "process": {
                "args": ["sh", "-c", script],
                "cwd": "/",
                "env": ["PATH=/bin", "TERM=xterm"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                }
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]}
            ],
            "linux": {
                "namespaces": [
                    {"type": "mount"}, {"type": "uts"}, {"type": "pid"}, {"type": "ipc"},
                    {"type": "cgroup"}
                ],
                "maskedPaths": [
                    "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
                ]
            }
        })
    }
}

fn collect(mut file: impl Read) -> String {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs a configuration by another runtime.
pub fn run_by(runtime: &str, bundle: &Bundle, config: &Value) -> Outcome {
    let state = tempfile::tempdir().unwrap();
    fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec"]);
    // crun refuses hosts with both versions of cgroups, even where it is to use none.
    command.arg(match runtime {
        "crun" => {
            "mount -t cgroup2 none /sys/fs/cgroup; exec crun --cgroup-manager=disabled \"$@\""
        }
        _ => "exec runc \"$@\"",
    });
    command.arg(runtime);
    let output = command
        .arg("--root")
        .arg(state.path())
        .args(["run", "--bundle"])
        .arg(bundle.path())
        .arg(fresh_id())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("install {runtime}, the oracle of this test: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Outcome {
        output: text(&output.stdout) + &text(&output.stderr),
        code: output.status.code().unwrap_or(-1),
    }
}

/// A container of ours that runs.
pub struct Running {
    pub pid: i32,
    pub profile: Arc<Profile>,
}

pub fn builder() -> Builder {
    Builder::new(Zygote::launch(env!("CARGO_BIN_EXE_kata-agent")).unwrap())
}

/// Children of this thread.
pub fn children() -> Vec<i32> {
    let list = fs::read_to_string("/proc/thread-self/children").unwrap();
    list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Kills a child, and waits until it is gone.
pub fn end(pid: i32) {
    nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    assert_eq!(wait(pid), 128 + libc::SIGKILL);
}

/// Waits for a child, as a shell tells it.
pub fn wait(pid: i32) -> i32 {
    match waitpid(Pid::from_raw(pid), None).unwrap() {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        other => panic!("{other:?}"),
    }
}

fn pipe() -> (std::io::PipeReader, ProcessIo) {
    let (reader, writer) = std::io::pipe().unwrap();
    let io = ProcessIo {
        stdin: None,
        stdout: Some(OwnedFd::from(writer.try_clone().unwrap())),
        stderr: Some(OwnedFd::from(writer)),
    };
    (reader, io)
}

/// What our builder takes for a configuration.
pub fn container(config: &Value) -> NewContainer {
    let spec = kata_oci::Spec::parse(config.to_string().as_bytes()).unwrap();
    let id = fresh_id().parse().unwrap();
    NewContainer { id, bundle: PathBuf::from("/the/bundle"), spec, size: None }
}

/// Starts a configuration by our builder.
pub async fn start(config: &Value, io: ProcessIo) -> Result<Running, ContainerError> {
    let (built, created) = builder().create(container(config), io, |_| Ok(())).await?;
    let profile = created.profile();
    match created.start().await {
        Ok(()) => Ok(Running { pid: built.pid, profile }),
        Err(error) => Err(error),
    }
}

/// Runs a configuration by our builder to its end.
pub async fn run(config: &Value) -> Result<Outcome, ContainerError> {
    let (reader, io) = pipe();
    let running = start(config, io).await?;
    Ok(Outcome { output: collect(reader), code: wait(running.pid) })
}

/// Runs a process in a container of ours to its end.
pub async fn exec(running: &Running, process: &Value) -> Result<Outcome, ContainerError> {
    let (reader, io) = pipe();
    let process = kata_oci::Process::parse(process.to_string().as_bytes()).unwrap();
    let built =
        builder().exec(running.pid, &running.profile, process, io, |_| Ok(()), None).await?;
    Ok(Outcome { output: collect(reader), code: wait(built.pid) })
}

/// State and number of pid namespaces of a process.
pub fn state(pid: i32) -> Option<(char, usize)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let state = field("State:")?.trim().chars().next()?;
    Some((state, field("NSpid:")?.split_whitespace().count()))
}

/// Reaps processes that failed inside a container, as the agent would: its init cannot
/// end before.
fn reap_failed() {
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            // Those that became a program are waited for by their tests.
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if state(pid) == Some(('Z', 2)) && name == "kata-agent\n" {
                let _ = waitpid(Pid::from_raw(pid), None);
            }
        }
    }
}

/// Ends a container of ours.
pub fn kill(running: &Running) {
    let pid = Pid::from_raw(running.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
    while waitpid(pid, Some(WaitPidFlag::WNOHANG)).unwrap() == WaitStatus::StillAlive {
        reap_failed();
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Runs a configuration by us and by the runtimes and compares.
pub async fn compare(bundle: &Bundle, config: &Value, runtimes: &[&str]) -> Outcome {
    let ours = run(config).await.expect("ours");
    for runtime in runtimes {
        let theirs = run_by(runtime, bundle, config);
        let (left, right) = (&ours.output, &theirs.output);
        assert!(
            ours == theirs,
            "we differ from {runtime}\n{}\ncodes {} {}",
            difference(left, right),
            ours.code,
            theirs.code
        );
    }
    ours
}

fn difference(ours: &str, theirs: &str) -> String {
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.lines().collect(), theirs.lines().collect());
    let mut text = String::new();
    for at in 0..ours.len().max(theirs.len()) {
        let (left, right) = (ours.get(at).unwrap_or(&""), theirs.get(at).unwrap_or(&""));
        if left != right {
            text.push_str(&format!("- {left}\n+ {right}\n"));
        }
    }
    text
}
