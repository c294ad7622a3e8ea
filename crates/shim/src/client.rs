//! Talking to a sandbox server, and starting one.

use containerd_shim_protos::shim_async::TaskClient;
use kata_jail::{Launch, role::Role};
use kata_protocol::Id;
use kata_sandbox::SandboxDir;
use kata_sandbox::factory::{self, Recipe};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use ttrpc::asynchronous::{Client as Ttrpc, transport::Socket};

use crate::server::ServerArgs;

/// Descriptors at which the server finds its listeners.
pub(crate) const TASK_FD: i32 = 3;
/// See [`TASK_FD`].
pub(crate) const ATTACH_FD: i32 = 4;

/// A connection to one sandbox server.
pub struct Client {
    tasks: TaskClient,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the server never ran or has ended.
    #[error("sandbox {0} is not running")]
    NotRunning(Id),
    /// A sandbox of this id exists already.
    #[error("sandbox {0} exists already: delete it first, or choose another id")]
    Exists(Id),
    /// The host refused something.
    #[error("cannot {what} for sandbox {sandbox}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// For which sandbox.
        sandbox: Id,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The factory ended while it handed the sandbox to a spare server.
    #[error("sandbox {sandbox} was not handed to a waiting server: start it again")]
    Spare {
        /// Which sandbox.
        sandbox: Id,
        /// The cause.
        #[source]
        source: Box<kata_sandbox::SandboxError>,
    },
    /// The server process could not be started.
    #[error("cannot start the server of sandbox {sandbox}")]
    Launch {
        /// For which sandbox.
        sandbox: Id,
        /// The cause.
        #[source]
        source: kata_jail::LaunchError,
    },
}

impl Client {
    /// Starts the server of a new sandbox, whose machine is to be of this recipe, and connects
    /// to it. The listeners exist before the server does, so nobody ever waits for it to come up.
    ///
    /// # Errors
    /// [`ClientError::Exists`] when the sandbox exists; nothing is left behind on failure.
    pub async fn start_sandbox(sandbox: &Id, recipe: &Recipe) -> Result<Self, ClientError> {
        let io = |what| {
            let sandbox = sandbox.clone();
            move |source| ClientError::Io { what, sandbox, source }
        };
        let dir = SandboxDir::create(sandbox).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => ClientError::Exists(sandbox.clone()),
            _ => io("create the directory")(source),
        })?;
        let started = async {
            let listeners = Listeners {
                task: listen_stream(&dir).map_err(io("listen on task.sock"))?,
                attach: Some(listen_packets(&dir).map_err(io("listen on attach.sock"))?),
            };
            let log = std::env::var("KATA_LOG").ok();
            let args = ServerArgs { sandbox: sandbox.to_string(), engine: None, log };
            launch(&dir, sandbox, &args, listeners, Some(recipe)).await
        };
        if let Err(error) = started.await {
            let _ = dir.remove();
            return Err(error);
        }
        Self::connect(sandbox).await
    }

    /// Connects to the server of a sandbox.
    ///
    /// # Errors
    /// [`ClientError::NotRunning`] when nobody listens.
    pub async fn connect(sandbox: &Id) -> Result<Self, ClientError> {
        let connect = async {
            let address = SandboxDir::of(sandbox).task_socket()?;
            tokio::net::UnixStream::connect(address.path()).await
        };
        match connect.await {
            Ok(stream) => Ok(Self { tasks: TaskClient::new(Ttrpc::new(Socket::new(stream))) }),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Err(ClientError::NotRunning(sandbox.clone()))
            }
            Err(source) => {
                Err(ClientError::Io { what: "connect", sandbox: sandbox.clone(), source })
            }
        }
    }

    /// containerd's Task API of this sandbox.
    pub fn tasks(&self) -> &TaskClient {
        &self.tasks
    }
}

/// What a server listens on.
pub(crate) struct Listeners {
    /// Calls of the Task API.
    pub task: OwnedFd,
    /// Stand-ins; none where the engine names its streams by path.
    pub attach: Option<OwnedFd>,
}

/// Starts the server process of the sandbox whose directory exists: one that waits with a
/// machine of this recipe, where there is such a one.
pub(crate) async fn launch(
    dir: &SandboxDir,
    sandbox: &Id,
    args: &ServerArgs,
    listeners: Listeners,
    recipe: Option<&Recipe>,
) -> Result<(), ClientError> {
    if let Some(recipe) = recipe
        && take_spare(dir, sandbox, args, &listeners, recipe).await?
    {
        return Ok(());
    }
    let log = File::create(dir.log()).map_err(|source| ClientError::Io {
        what: "create the log",
        sandbox: sandbox.clone(),
        source,
    })?;
    let failed = |source| ClientError::Launch { sandbox: sandbox.clone(), source };
    // People look for a shim where there is containerd.
    let name = if args.engine.is_some() { "containerd-shim-kata-v2" } else { "kata-sandbox" };
    let title = format!("{name} {sandbox}");
    let mut launch = Launch::role(Role::SandboxServer, title, args)
        .map_err(failed)?
        .fd(listeners.task, TASK_FD)
        .stderr(log.into())
        .directory(Path::new("/"))
        .new_session();
    if let Some(attach) = listeners.attach {
        launch = launch.fd(attach, ATTACH_FD);
    }
    launch.spawn().map(drop).map_err(failed)
}

/// Whether a spare server serves the sandbox from now on. When that cannot be known, whatever
/// does is ended: no two servers may have one sandbox.
async fn take_spare(
    dir: &SandboxDir,
    sandbox: &Id,
    args: &ServerArgs,
    listeners: &Listeners,
    recipe: &Recipe,
) -> Result<bool, ClientError> {
    let fds = std::iter::once(&listeners.task).chain(&listeners.attach);
    let fds: Vec<BorrowedFd<'_>> = fds.map(AsFd::as_fd).collect();
    let Ok(args) = serde_json::to_string(args) else { return Ok(false) };
    match factory::take(sandbox, recipe, args, &fds).await {
        Ok(taken) => Ok(taken),
        Err(source) => {
            if let Err(error) = kata_sandbox::cleanup(dir) {
                let error = kata_protocol::chain(&error);
                tracing::warn!(%sandbox, error, "cannot undo what a spare has of the sandbox");
            }
            Err(ClientError::Spare { sandbox: sandbox.clone(), source: Box::new(source) })
        }
    }
}

fn listen_stream(dir: &SandboxDir) -> io::Result<OwnedFd> {
    Ok(UnixListener::bind(dir.task_socket()?.path())?.into())
}

fn listen_packets(dir: &SandboxDir) -> io::Result<OwnedFd> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    let address = dir.attach_socket()?;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(address.path())?)?;
    listen(&fd, Backlog::new(128)?)?;
    Ok(fd)
}
