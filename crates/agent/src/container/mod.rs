//! Builds containers inside the guest.
//!
//! The agent has threads, so it never forks: a child of its beginnings, the [`Zygote`],
//! forks single-threaded inits, each of which takes a configuration from a socket, becomes
//! the container step by step and finally executes the container's program. Start reading
//! at [`Builder::create`] for the agent's side and at `init.rs` for the other; `wire.rs`
//! shows the conversation.
//!
//! Trusted: the specification's guest paths (the sandbox server wrote them). Not trusted:
//! everything below the container's root; it is only reached by `openat2` with
//! `RESOLVE_IN_ROOT` (`inside.rs`).

mod capabilities;
mod copy;
mod devices;
mod failure;
mod hooks;
mod init;
mod inside;
mod labels;
mod mount_options;
mod mounts;
mod namespaces;
mod process;
mod rootfs;
mod seccomp;
mod sysctl;
mod terminal;
mod wire;
mod zygote;

pub use zygote::{ZYGOTE, Zygote, zygote_main};

use failure::{Failure, FailureKind};
use kata_oci::{NamespaceKind, Process, Spec};
use kata_protocol::Id;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use seccomp::{Filter, SeccompError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use wire::{AgentChannel, Config, FdRole, ToAgent, ToInit};

/// The child's ends of its streams; none means `/dev/null`. Not used with a terminal.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// Standard input.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: Option<OwnedFd>,
    /// Standard error.
    pub stderr: Option<OwnedFd>,
}

/// A container to be built.
#[derive(Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: Id,
    /// The bundle's directory on the host.
    pub bundle: PathBuf,
    /// Its specification, with paths of the guest.
    pub spec: Spec,
    /// Rows and columns of its terminal.
    pub size: Option<(u16, u16)>,
}

/// A process that was built.
#[derive(Debug)]
pub struct Built {
    /// Its pid in the guest; a child of the agent, which reaps it.
    pub pid: i32,
    /// The master of its terminal, where it has one.
    pub terminal_master: Option<OwnedFd>,
}

/// A container whose process waits for its start. Dropping it ends that process.
pub struct Created {
    channel: AgentChannel,
    profile: Arc<Profile>,
}

/// What an [`exec`] takes over from its container: the specification without its
/// process, mounts and filter, and the compiled filter.
#[derive(Debug)]
pub struct Profile {
    id: Id,
    spec: Spec,
    process: Process,
    filter: Option<Filter>,
}

/// Why a container or process could not be built or started.
///
/// The texts of [`ContainerError::Program`] and [`ContainerError::Init`] are worded as
/// runc words them: engines look into them for the exit code.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Its filter cannot be used.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// It asks for something that cannot be had in a guest.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Init did not come up.
    #[error("fork the container's init")]
    Spawn(#[source] io::Error),
    /// It did not get into its cgroup.
    #[error("put the process into the container's cgroup")]
    Cgroup(#[source] io::Error),
    /// The container to join has ended.
    #[error("cannot exec in a stopped container")]
    NotRunning(#[source] io::Error),
    /// The socket to init broke.
    #[error("talk to the container's init")]
    Channel(#[source] io::Error),
    /// The id maps or limits of the new process could not be written.
    #[error("{0}")]
    Process(String),
    /// Init ended without a word.
    #[error("the container's init ended before its program ran: killed, or out of memory")]
    Died,
    /// A step of building failed.
    #[error("error during container init: {0}")]
    Init(String),
    /// The program cannot be executed.
    #[error("{text}")]
    Program {
        /// Whether there is no such program at all.
        missing: bool,
        /// runc's words.
        text: String,
    },
}

impl ContainerError {
    /// The exit code engines give such a failure: 127 when there is no such program, 126
    /// when it cannot be executed, else 1.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Program { missing: true, .. } => Some(127),
            Self::Program { missing: false, .. } => Some(126),
            _ => None,
        }
    }
}

/// Compiles a seccomp profile, for the fuzz target; gives how long the filter is when written out.
#[cfg(fuzzing)]
pub fn fuzz_seccomp(profile: &kata_oci::Seccomp) -> Option<usize> {
    seccomp::Filter::compile(profile).ok().map(|filter| format!("{filter:?}").len())
}

impl From<Failure> for ContainerError {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            FailureKind::Setup => Self::Init(failure.text),
            kind => Self::Program { missing: kind == FailureKind::NotFound, text: failure.text },
        }
    }
}

/// Builds containers and processes.
#[derive(Debug)]
pub struct Builder {
    zygote: Zygote,
}

impl Builder {
    /// Has its inits from `zygote`.
    pub fn new(zygote: Zygote) -> Self {
        Self { zygote }
    }

    /// Builds a container up to the point where its program would run.
    ///
    /// `join_cgroup` gets the pid that is to be put into the container's cgroup before
    /// anything else happens.
    ///
    /// # Errors
    /// [`ContainerError`]; nothing is left behind then.
    pub async fn create(
        &self,
        container: NewContainer,
        io: ProcessIo,
        join_cgroup: impl FnOnce(i32) -> io::Result<()> + Send,
    ) -> Result<(Built, Created), ContainerError> {
        let NewContainer { id, bundle, mut spec, size } = container;
        check(&spec)?;
        let Some(process) = spec.process.take() else {
            return Err(ContainerError::Unsupported(
                "the specification has no process: there is nothing to run",
            ));
        };
        let filter = match spec.linux.as_mut().and_then(|linux| linux.seccomp.take()) {
            Some(seccomp) => Some(Filter::compile(&seccomp)?),
            None => None,
        };
        let mut fds = Fds::default();
        fds.add_io(io, process.terminal);
        let config = Config {
            id: id.to_string(),
            bundle,
            exec: false,
            size: size.or_else(|| console_size(&process)),
            spec,
            process,
            filter,
            fds: Vec::new(),
        };
        let (built, channel, config) = self.build(config, fds, join_cgroup).await?;
        let profile = Arc::new(Profile::new(&id, config));
        Ok((built, Created { channel, profile }))
    }

    /// Runs one more process in the container whose init is `target`. Returns once its
    /// program runs.
    ///
    /// # Errors
    /// [`ContainerError`]; nothing is left behind then.
    pub async fn exec(
        &self,
        target: i32,
        profile: &Profile,
        process: Process,
        io: ProcessIo,
        join_cgroup: impl FnOnce(i32) -> io::Result<()> + Send,
        size: Option<(u16, u16)>,
    ) -> Result<Built, ContainerError> {
        let process = profile.complete(process);
        let target = Pid::from_raw(target)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| ContainerError::NotRunning(error.into()))?;
        let mut fds = Fds::default();
        fds.add(FdRole::Target, Some(target));
        fds.add_io(io, process.terminal);
        let config = Config {
            id: profile.id.to_string(),
            bundle: PathBuf::new(),
            exec: true,
            size: size.or_else(|| console_size(&process)),
            spec: profile.spec.clone(),
            process,
            filter: profile.filter.clone(),
            fds: Vec::new(),
        };
        let (built, channel, _) = self.build(config, fds, join_cgroup).await?;
        start(&channel).await?;
        Ok(built)
    }

    /// Starts an init and brings it to where it waits for its start.
    async fn build(
        &self,
        mut config: Config,
        fds: Fds,
        join_cgroup: impl FnOnce(i32) -> io::Result<()> + Send,
    ) -> Result<(Built, AgentChannel, Box<Config>), ContainerError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(|error| ContainerError::Spawn(error.into()))?;
        // The child is not waited for here: the agent reaps whatever ends.
        let first = self.zygote.init(&theirs).map_err(ContainerError::Spawn)?;
        drop(theirs);
        let channel = AgentChannel::new(ours).map_err(ContainerError::Channel)?;
        join_cgroup(first).map_err(ContainerError::Cgroup)?;
        config.fds = fds.roles;
        let message = ToInit::Config(Box::new(config));
        let borrowed: Vec<_> = fds.fds.iter().map(AsFd::as_fd).collect();
        channel.send(&message, &borrowed).await.map_err(ContainerError::Channel)?;
        drop(borrowed);
        drop(fds.fds);
        let ToInit::Config(config) = message else { return Err(ContainerError::Died) };
        let built = follow(&channel, first, &config).await?;
        if namespaces::has_user(&config.spec.linux()) {
            // Root of a user namespace may not raise limits; init leaves them to us then.
            process::set_limits(Some(built.pid), &config.process.rlimits)
                .map_err(|failure| ContainerError::Process(failure.text))?;
        }
        Ok((built, channel, config))
    }
}

/// Answers an init until it is ready.
async fn follow(
    channel: &AgentChannel,
    first: i32,
    config: &Config,
) -> Result<Built, ContainerError> {
    let mut built = Built { pid: first, terminal_master: None };
    loop {
        let next = channel.receive().await.map_err(ContainerError::Channel)?;
        let Some((message, fds)) = next else { return Err(ContainerError::Died) };
        match message {
            ToAgent::Map => namespaces::write_maps(first, &config.spec.linux())
                .map_err(|failure| ContainerError::Process(failure.text))?,
            ToAgent::Forked(pid) => built.pid = pid,
            ToAgent::Terminal => {
                built.terminal_master = fds.into_iter().next();
                continue;
            }
            ToAgent::Log(text) => {
                tracing::warn!(container = config.id, "{text}");
                continue;
            }
            ToAgent::Failed(failure) => return Err(failure.into()),
            ToAgent::Ready => return Ok(built),
            ToAgent::Executing => return Err(ContainerError::Died),
        }
        channel.send(&ToInit::Go, &[]).await.map_err(ContainerError::Channel)?;
    }
}

/// Lets a waiting init execute its program, and waits until it did.
async fn start(channel: &AgentChannel) -> Result<(), ContainerError> {
    // A send that fails means that init is gone; receiving tells how.
    let sent = channel.send(&ToInit::Go, &[]).await;
    let mut executing = false;
    loop {
        match channel.receive().await.map_err(ContainerError::Channel)? {
            None if executing && sent.is_ok() => return Ok(()),
            None => return Err(ContainerError::Died),
            Some((ToAgent::Failed(failure), _)) => return Err(failure.into()),
            Some((ToAgent::Executing, _)) => executing = true,
            Some((ToAgent::Log(text), _)) => tracing::warn!("{text}"),
            Some(_) => {}
        }
    }
}

impl Created {
    /// Lets the container's program run. Returns once it does.
    ///
    /// # Errors
    /// [`ContainerError`] when it could not be executed; the process ends then.
    pub async fn start(self) -> Result<(), ContainerError> {
        start(&self.channel).await
    }

    /// What later [`exec`]s need of this container.
    pub fn profile(&self) -> Arc<Profile> {
        self.profile.clone()
    }
}

impl Profile {
    fn new(id: &Id, config: Box<Config>) -> Self {
        let Config { mut spec, process, filter, .. } = *config;
        spec.mounts = Vec::new();
        spec.hooks = None;
        spec.annotations.clear();
        if let Some(linux) = &mut spec.linux {
            linux.resources = None;
            linux.devices = Vec::new();
            linux.masked_paths = Vec::new();
            linux.readonly_paths = Vec::new();
        }
        Self { id: id.clone(), spec, process, filter }
    }

    /// Fills what an exec's process leaves open with the container's own, as runc does.
    fn complete(&self, mut process: Process) -> Process {
        let own = &self.process;
        if process.capabilities.is_none() {
            process.capabilities.clone_from(&own.capabilities);
        }
        if process.rlimits.is_empty() {
            process.rlimits.clone_from(&own.rlimits);
        }
        process.oom_score_adj = process.oom_score_adj.or(own.oom_score_adj);
        process.user.umask = process.user.umask.or(own.user.umask);
        process.apparmor_profile =
            process.apparmor_profile.or_else(|| own.apparmor_profile.clone());
        process.selinux_label = process.selinux_label.or_else(|| own.selinux_label.clone());
        process
    }
}

fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size?;
    let fit = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    Some((fit(size.height), fit(size.width)))
}

/// Refuses what has no meaning in a guest.
fn check(spec: &Spec) -> Result<(), ContainerError> {
    if spec.hooks.as_ref().is_some_and(|hooks| !hooks.create_container.is_empty()) {
        return Err(ContainerError::Unsupported(
            "createContainer hooks cannot run: their path is on the host, the container's \
             namespaces are in the VM; use createRuntime or startContainer hooks",
        ));
    }
    let linux = spec.linux();
    let joins = |kind| linux.namespace(kind).is_some_and(|n| n.path.is_some());
    if joins(NamespaceKind::Mount) {
        return Err(ContainerError::Unsupported(
            "a container cannot join another mount namespace in a VM: leave out the path",
        ));
    }
    Ok(())
}

/// Descriptors that go to init, and what each is.
#[derive(Default)]
struct Fds {
    roles: Vec<FdRole>,
    fds: Vec<OwnedFd>,
}

impl Fds {
    fn add(&mut self, role: FdRole, fd: Option<OwnedFd>) {
        if let Some(fd) = fd {
            self.roles.push(role);
            self.fds.push(fd);
        }
    }

    fn add_io(&mut self, io: ProcessIo, terminal: bool) {
        if terminal {
            return;
        }
        self.add(FdRole::Stdin, io.stdin);
        self.add(FdRole::Stdout, io.stdout);
        self.add(FdRole::Stderr, io.stderr);
    }
}
