//! The stand-in as a real process, against a server that the test plays. Needs root: the
//! socket is where the real one would be, and network namespaces are made.

#![allow(clippy::unwrap_used)]

use kata_sandbox::SandboxDir;
use kata_shim::attach::{Hello, MAX_PACKET, ToServer, ToStandIn};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4,
    bind, listen, recvmsg, send, socket,
};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A sandbox's directory with an attach socket on which the test listens.
struct Server {
    id: String,
    dir: SandboxDir,
    listener: OwnedFd,
}

impl Server {
    fn new(name: &str) -> Self {
        let id = format!("test-{name}-{}", std::process::id());
        let dir = SandboxDir::create(&id.parse().unwrap()).unwrap();
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let address = dir.attach_socket().unwrap();
        bind(listener.as_raw_fd(), &UnixAddr::new(address.path()).unwrap()).unwrap();
        listen(&listener, Backlog::new(4).unwrap()).unwrap();
        Self { id, dir, listener }
    }

    /// Starts a stand-in; `stdio` becomes its standard streams.
    fn start(&self, terminal: bool, netns: Value, stdio: [OwnedFd; 3]) -> StandIn {
        let (ready, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let args = json!({
            "hello": {"container": self.id, "exec": "", "terminal": terminal,
                      "rows": 24, "columns": 80},
            "sandbox": self.id, "netns": netns, "name": "sleep",
        });
        let [stdin, stdout, stderr] = stdio.map(Stdio::from);
        let mut command = Command::new(env!("CARGO_BIN_EXE_kata-runtime"));
        command
            .arg0("/bin/sleep")
            .args(["1000"])
            .env_clear()
            .env("_KATA_ROLE", "stand-in")
            .env("_KATA_ROLE_ARGS", args.to_string())
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr);
        let raw = theirs.as_raw_fd();
        // SAFETY: between fork and exec only dup2 and setsid are called, both of which are
        // allowed there.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(raw, 3) < 0 || libc::setsid() < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        StandIn { child, ready: File::from(ready) }
    }

    /// Takes the next stand-in: its hello and its descriptors.
    fn accept(&self) -> (Connection, Hello, Vec<OwnedFd>) {
        let fd = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        let connection = Connection(unsafe { OwnedFd::from_raw_fd(fd) });
        let (bytes, fds) = connection.receive();
        (connection, serde_json::from_slice(&bytes).unwrap(), fds)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.dir.remove().unwrap();
    }
}

struct Connection(OwnedFd);

impl Connection {
    fn receive(&self) -> (Vec<u8>, Vec<OwnedFd>) {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = nix::cmsg_space!([i32; 3]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty())
                .unwrap();
        let mut fds = Vec::new();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for us.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        bytes.truncate(length);
        (bytes, fds)
    }

    fn message(&self) -> ToServer {
        serde_json::from_slice(&self.receive().0).unwrap()
    }

    fn say(&self, message: &ToStandIn) {
        let bytes = serde_json::to_vec(message).unwrap();
        send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
    }
}

struct StandIn {
    child: Child,
    ready: File,
}

impl StandIn {
    fn wait_ready(&mut self) -> String {
        let mut text = String::new();
        self.ready.read_to_string(&mut text).unwrap();
        text
    }

    fn signal(&self, number: i32) {
        // SAFETY: sends a signal to our own child, which was not waited for yet.
        assert_eq!(unsafe { libc::kill(self.child.id().cast_signed(), number) }, 0);
    }

    fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the stand-in does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn proc(&self, what: &str) -> String {
        format!("/proc/{}/{what}", self.child.id())
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // A failed test must not leave it behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The stand-in's standard streams, and our ends of its input and output.
fn pipes() -> ([OwnedFd; 3], File, File) {
    let cloexec = rustix::pipe::PipeFlags::CLOEXEC;
    let (stdin, input) = rustix::pipe::pipe_with(cloexec).unwrap();
    let (output, stdout) = rustix::pipe::pipe_with(cloexec).unwrap();
    let stderr = stdout.try_clone().unwrap();
    ([stdin, stdout, stderr], input.into(), output.into())
}

/// A stand-in whose hello was taken.
fn standing(server: &Server, netns: Value) -> (StandIn, Connection, Vec<OwnedFd>, File, File) {
    let (stdio, input, output) = pipes();
    let mut stand_in = server.start(false, netns, stdio);
    let (connection, hello, fds) = server.accept();
    assert_eq!(hello.container, server.id);
    assert!(!hello.terminal);
    connection.say(&ToStandIn::Ready);
    assert_eq!(stand_in.wait_ready(), "ready");
    (stand_in, connection, fds, input, output)
}

#[test]
fn the_engines_streams_are_handed_over_and_let_go() {
    let server = Server::new("streams");
    let (stand_in, connection, fds, mut input, mut output) = standing(&server, json!("host"));
    let mut fds = fds.into_iter();
    let (stdin, stdout, stderr) = (fds.next().unwrap(), fds.next().unwrap(), fds.next().unwrap());
    input.write_all(b"in").unwrap();
    let mut bytes = [0; 2];
    File::from(stdin).read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"in");
    File::from(stdout).write_all(b"out").unwrap();
    drop(stderr);
    // The end of the output is seen although the stand-in lives.
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "out");
    connection.say(&ToStandIn::Exit(7));
    assert_eq!(stand_in.end().code(), Some(7));
}

#[test]
fn it_looks_like_the_process_it_stands_for() {
    let server = Server::new("looks");
    let (stand_in, connection, ..) = standing(&server, json!("host"));
    let command = fs::read(stand_in.proc("cmdline")).unwrap();
    assert_eq!(command, b"/bin/sleep\x001000\0");
    assert_eq!(fs::read_to_string(stand_in.proc("comm")).unwrap(), "sleep\n");
    assert_eq!(fs::read_dir(stand_in.proc("task")).unwrap().count(), 1, "it has one thread");
    connection.say(&ToStandIn::Exit(0));
    assert_eq!(stand_in.end().code(), Some(0));
}

#[test]
fn it_costs_next_to_no_memory() {
    let server = Server::new("memory");
    let (stand_in, connection, ..) = standing(&server, json!("host"));
    // It lets go of its code after it has said that it is ready, and after each signal.
    stand_in.signal(libc::SIGUSR1);
    assert_eq!(connection.message(), ToServer::Signal(libc::SIGUSR1));
    std::thread::sleep(Duration::from_millis(100));
    let rollup = fs::read_to_string(stand_in.proc("smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Rss:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    // An unoptimised build is larger than the product, of which the benchmark takes the PSS.
    assert!(kib <= 3072, "it takes {kib} KiB");
    connection.say(&ToStandIn::Exit(0));
    assert_eq!(stand_in.end().code(), Some(0));
}

#[test]
fn every_signal_is_passed_on() {
    let server = Server::new("signals");
    let (stand_in, connection, ..) = standing(&server, json!("host"));
    let signals = [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGUSR1,
        libc::SIGCHLD,
        libc::SIGWINCH,
        40,
    ];
    for number in signals {
        stand_in.signal(number);
        assert_eq!(connection.message(), ToServer::Signal(number));
    }
    connection.say(&ToStandIn::Exit(143));
    assert_eq!(stand_in.end().code(), Some(143));
}

#[test]
fn a_lost_server_is_as_a_killed_process() {
    let server = Server::new("lost");
    let (stand_in, connection, ..) = standing(&server, json!("host"));
    drop(connection);
    assert_eq!(stand_in.end().code(), Some(137));
}

#[test]
fn a_refusal_is_told_to_the_parent() {
    let server = Server::new("refused");
    let (stdio, _input, _output) = pipes();
    let mut stand_in = server.start(false, json!("host"), stdio);
    let (connection, ..) = server.accept();
    connection.say(&ToStandIn::Error("no such container".into()));
    assert_eq!(stand_in.wait_ready(), "no such container");
    assert_eq!(stand_in.end().code(), Some(1));
}

#[test]
fn no_server_at_all_is_told_to_the_parent() {
    let mut server = Server::new("none");
    server.listener = File::open("/dev/null").unwrap().into();
    let (stdio, _input, _output) = pipes();
    let mut stand_in = server.start(false, json!("host"), stdio);
    let text = stand_in.wait_ready();
    assert!(text.contains("cannot connect to the sandbox server"), "{text}");
}

#[test]
fn it_lives_in_the_network_namespace_it_is_told() {
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    let first_server = Server::new("netns");
    let (first, connection, ..) = standing(&first_server, json!("new"));
    let made = fs::read_link(first.proc("ns/net")).unwrap();
    assert_ne!(made, ours);
    let routes = fs::read_to_string(first.proc("net/if_inet6")).unwrap_or_default();
    assert!(routes.is_empty() || routes.contains("lo"), "{routes}");

    let second_server = Server::new("netns2");
    let (second, other, ..) = standing(&second_server, json!({"path": first.proc("ns/net")}));
    assert_eq!(fs::read_link(second.proc("ns/net")).unwrap(), made);
    connection.say(&ToStandIn::Exit(0));
    other.say(&ToStandIn::Exit(0));
    assert_eq!(first.end().code(), Some(0));
    assert_eq!(second.end().code(), Some(0));
}

#[test]
fn a_missing_namespace_is_told_to_the_parent() {
    let server = Server::new("nons");
    let (stdio, _input, _output) = pipes();
    let mut stand_in = server.start(false, json!({"path": "/run/netns/does-not-exist"}), stdio);
    let text = stand_in.wait_ready();
    assert!(text.contains("/run/netns/does-not-exist"), "{text}");
    assert_eq!(stand_in.end().code(), Some(1));
}

#[test]
fn a_terminal_is_its_controlling_one_and_its_sizes_are_passed_on() {
    let server = Server::new("tty");
    let flags = rustix::pty::OpenptFlags::RDWR
        | rustix::pty::OpenptFlags::NOCTTY
        | rustix::pty::OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).unwrap();
    let stdio = [slave.try_clone().unwrap(), slave.try_clone().unwrap(), slave];
    let mut stand_in = server.start(true, json!("host"), stdio);
    let (connection, hello, fds) = server.accept();
    assert!(hello.terminal);
    assert_eq!((hello.rows, hello.columns), (24, 80));
    assert_eq!(fds.len(), 3);
    connection.say(&ToStandIn::Ready);
    assert_eq!(stand_in.wait_ready(), "ready");

    let stat = fs::read_to_string(stand_in.proc("stat")).unwrap();
    let terminal: i64 =
        stat.rsplit_once(')').unwrap().1.split_whitespace().nth(4).unwrap().parse().unwrap();
    assert_ne!(terminal, 0, "it has no controlling terminal");

    let size = Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&master, size).unwrap();
    assert_eq!(connection.message(), ToServer::Resize { rows: 50, columns: 132 });

    // The engine hangs up: the process is to know.
    drop(master);
    let hangup = connection.message();
    assert_eq!(hangup, ToServer::Signal(libc::SIGHUP));
    connection.say(&ToStandIn::Exit(129));
    assert_eq!(stand_in.end().code(), Some(129));
}
