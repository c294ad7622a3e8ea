//! The host's side for tests: the real agent as a process, a container of busybox, and
//! the calls and streams that the sandbox server would use.

#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests are tests

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kata_cgroups::{Cgroup, Hierarchy};
use kata_channel::{CallError, HostChannel, Stream};
use kata_oci::{Process, Spec, Wire as _};
use kata_protocol::agent::{
    ConnectRequest, ConnectResponse, ContainerId, CreateContainerRequest, ExecRequest, ProcessId,
    ResizeTerminalRequest, SignalRequest, StartContainerRequest, Stdio, WaitResponse,
};
use kata_protocol::call::{self, Call};
use kata_protocol::{StreamHeader, StreamKind, VERSION};
use protobuf::MessageField;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// An agent process, connected.
pub struct Agent {
    process: Child,
    pub channel: HostChannel,
    directory: tempfile::TempDir,
    cgroup: String,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Kills what is left of the containers.
        let deleted = Hierarchy::detect()
            .and_then(|hierarchy| Cgroup::open(&hierarchy, &self.cgroup)?.delete());
        if let Err(error) = deleted {
            eprintln!("{error}");
        }
    }
}

/// Long for a test, so that a hang is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

impl Agent {
    pub async fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = theirs.into_std().unwrap();
        let inherited = theirs.as_raw_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kata-agent"));
        command.args(["--serve-fd", "9"]);
        // SAFETY: dup2 may be called between fork and exec.
        unsafe {
            command.pre_exec(move || match libc::dup2(inherited, 9) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let process = command.spawn().unwrap();
        let channel = HostChannel::serial(ours);
        static AGENTS: AtomicU32 = AtomicU32::new(0);
        let number = AGENTS.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("/kata-agent-test-{}-{number}", std::process::id());
        Self { process, channel, directory: tempfile::tempdir().unwrap(), cgroup }
    }

    pub async fn try_call<C: Call>(&self, request: &C::Request) -> Result<C::Answer, CallError> {
        timeout(PATIENCE, self.channel.call::<C>(request)).await.unwrap()
    }

    pub async fn call<C: Call>(&self, request: &C::Request) -> C::Answer {
        self.try_call::<C>(request).await.unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub async fn connect(&self) -> ConnectResponse {
        let request = ConnectRequest {
            protocol_version: VERSION,
            sandbox_id: "sandbox".into(),
            ..ConnectRequest::default()
        };
        self.call::<call::Connect>(&request).await
    }

    /// A root file system in which busybox is everything.
    pub fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.directory.path().join(name);
        for directory in ["bin", "proc", "dev", "tmp", "sys"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for applet in ["sh", "cat", "echo", "true", "sleep", "head", "stty", "tty", "seq", "dd"] {
            let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
        }
        root
    }

    pub async fn open(&self, kind: StreamKind, container: &str, exec: &str) -> Stream {
        let exec = (!exec.is_empty()).then(|| exec.parse().unwrap());
        let header = StreamHeader::process(kind, container.parse().unwrap(), exec);
        self.channel.open(&header).await.unwrap()
    }

    /// Creates a container, with the streams that `stdio` names.
    pub async fn create(&self, id: &str, arguments: &[&str], stdio: Stdio) -> Streams {
        let streams = self.streams(id, "", &stdio).await;
        let spec = spec(&self.rootfs(id), &self.cgroup, id, arguments, stdio.terminal);
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: Spec::parse(spec.to_string().as_bytes()).unwrap().to_wire().unwrap(),
            stdio: MessageField::some(stdio),
            ..CreateContainerRequest::default()
        };
        self.call::<call::CreateContainer>(&request).await;
        streams
    }

    pub async fn start_container(&self, id: &str) {
        let request =
            StartContainerRequest { container_id: id.into(), ..StartContainerRequest::default() };
        self.call::<call::StartContainer>(&request).await;
    }

    pub async fn run(&self, id: &str, arguments: &[&str], stdio: Stdio) -> Streams {
        let streams = self.create(id, arguments, stdio).await;
        self.start_container(id).await;
        streams
    }

    pub async fn try_exec(
        &self,
        id: &str,
        exec: &str,
        arguments: &[&str],
        stdio: Stdio,
    ) -> Result<Streams, CallError> {
        let streams = self.streams(id, exec, &stdio).await;
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: wire(&process(arguments, stdio.terminal)),
            stdio: MessageField::some(stdio),
            ..ExecRequest::default()
        };
        self.try_call::<call::Exec>(&request).await?;
        Ok(streams)
    }

    pub async fn exec(&self, id: &str, exec: &str, arguments: &[&str], stdio: Stdio) -> Streams {
        self.try_exec(id, exec, arguments, stdio).await.unwrap()
    }

    async fn streams(&self, id: &str, exec: &str, stdio: &Stdio) -> Streams {
        let mut streams = Streams::default();
        if stdio.stdin {
            streams.stdin = Some(self.open(StreamKind::Stdin, id, exec).await);
        }
        if stdio.stdout {
            streams.stdout = Some(self.open(StreamKind::Stdout, id, exec).await);
        }
        if stdio.stderr {
            streams.stderr = Some(self.open(StreamKind::Stderr, id, exec).await);
        }
        streams
    }

    pub async fn wait(&self, id: &str, exec: &str) -> WaitResponse {
        self.call::<call::Wait>(&process_id(id, exec)).await
    }

    pub async fn delete(&self, id: &str, exec: &str) {
        self.call::<call::DeleteProcess>(&process_id(id, exec)).await;
    }

    pub async fn signal(
        &self,
        id: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), CallError> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..SignalRequest::default()
        };
        self.try_call::<call::Signal>(&request).await.map(drop)
    }

    pub async fn resize(&self, id: &str, exec: &str, rows: u32, columns: u32) {
        let request = ResizeTerminalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            rows,
            columns,
            ..ResizeTerminalRequest::default()
        };
        self.call::<call::ResizeTerminal>(&request).await;
    }
}

pub fn container(id: &str) -> ContainerId {
    ContainerId { container_id: id.into(), ..ContainerId::default() }
}

pub fn process_id(id: &str, exec: &str) -> ProcessId {
    ProcessId { container_id: id.into(), exec_id: exec.into(), ..ProcessId::default() }
}

/// The host's ends of a process's streams.
#[derive(Default)]
pub struct Streams {
    pub stdin: Option<Stream>,
    pub stdout: Option<Stream>,
    pub stderr: Option<Stream>,
}

/// Reads exactly as much as the exit said was written.
pub async fn take(stream: &mut Option<Stream>, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(count).unwrap()];
    stream.as_mut().unwrap().read_exact(&mut bytes).await.unwrap();
    bytes
}

pub fn output() -> Stdio {
    Stdio { stdout: true, stderr: true, ..Stdio::default() }
}

pub fn all() -> Stdio {
    Stdio { stdin: true, ..output() }
}

pub fn terminal() -> Stdio {
    Stdio { terminal: true, stdin: true, stdout: true, rows: 24, columns: 80, ..Stdio::default() }
}

fn wire(process: &Value) -> Vec<u8> {
    Process::parse(process.to_string().as_bytes()).unwrap().to_wire().unwrap()
}

fn process(arguments: &[&str], terminal: bool) -> Value {
    json!({
        "terminal": terminal, "cwd": "/", "args": arguments,
        "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin", "TERM=xterm"],
        "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] },
    })
}

fn spec(root: &Path, cgroup: &str, id: &str, arguments: &[&str], terminal: bool) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(arguments, terminal),
        "root": { "path": root },
        "hostname": id,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
        ],
        "linux": {
            "cgroupsPath": format!("{cgroup}/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
            ],
        },
    })
}
