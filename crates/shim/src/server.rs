//! The server process: one sandbox, two sockets, until it is shut down.

use crate::client::{ATTACH_FD, TASK_FD};
use crate::connections::Connections;
use crate::containerd::events::Publisher;
use crate::containerd::log::LogPipe;
use crate::containerd::{Engine, SandboxService};
use crate::stand_ins::{StandIns, nonblocking};
use crate::stats;
use crate::task::TaskService;
use anyhow::Context;
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use kata_sandbox::Sandbox;
use kata_sandbox::factory::{self, Taken};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use ttrpc::asynchronous::{Server, Service};

/// Arguments of the `sandbox-server` role.
#[derive(Debug, Deserialize, Serialize)]
pub struct ServerArgs {
    /// The sandbox's id.
    pub sandbox: String,
    /// The containerd whose shim it is; none: it serves the OCI command line.
    pub engine: Option<Engine>,
    /// What is logged, as `KATA_LOG` says it.
    pub log: Option<String>,
}

/// How long the engine may take for the last events of a sandbox.
const LAST_EVENTS: Duration = Duration::from_secs(1);

/// How long those who are connected may take to hang up at the end.
const LAST_CALLERS: Duration = Duration::from_secs(1);

/// What the services of a server have in common.
pub(crate) struct Parts {
    pub sandbox: Arc<Sandbox>,
    pub stand_ins: Arc<StandIns>,
    pub publisher: Publisher,
    /// The containerd whose shim it is.
    pub engine: Option<Engine>,
    pub connections: Connections,
    /// Metrics are of cgroup v2's kind.
    pub unified: bool,
    /// Told when the server is to end.
    pub over: Notify,
}

impl Parts {
    /// Ends sandbox and server, once nothing is in it; `now`, whatever is.
    pub(crate) async fn end(&self, now: bool) {
        if self.sandbox.shutdown(now).await {
            // Once it is answered, nobody looks after us any more.
            self.publisher.flush(LAST_EVENTS).await;
            self.over.notify_one();
        }
    }
}

/// Names under which engines know the Task API; the messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The `sandbox-server` role: serves until `Shutdown`.
///
/// # Errors
/// The sandbox cannot be set up, or its sockets cannot be served.
pub fn main(args: &str) -> anyhow::Result<()> {
    let args: ServerArgs = serde_json::from_str(args).context("arguments of the server")?;
    start_log(&args);
    // SAFETY: whoever starts this role hands it these descriptors (client::launch); this is
    // the first and only place that takes them.
    let task = unsafe { OwnedFd::from_raw_fd(TASK_FD) };
    // SAFETY: the same; it is there when there is no containerd.
    let attach = args.engine.is_none().then(|| unsafe { OwnedFd::from_raw_fd(ATTACH_FD) });
    runtime()?.block_on(serve(args, task, attach, None))
}

/// The `spare` role: makes a machine, waits for its sandbox, and is its server then.
///
/// # Errors
/// The machine cannot be made, or what [`main`] says.
pub fn spare_main(args: &str) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let Some(mut taken) = factory::spare(args).await? else { return Ok(()) };
        let args: ServerArgs =
            serde_json::from_str(&taken.args).context("arguments of the server")?;
        start_log(&args);
        let mut fds = std::mem::take(&mut taken.fds).into_iter();
        let task = fds.next().context("the factory handed over no socket")?;
        serve(args, task, fds.next(), Some(taken)).await
    })
}

/// For who waits for one thing.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the asynchronous runtime")
}

async fn serve(
    args: ServerArgs,
    task: OwnedFd,
    attach: Option<OwnedFd>,
    taken: Option<Taken>,
) -> anyhow::Result<()> {
    let publisher = Publisher::start(args.engine.as_ref());
    let id = args.sandbox.parse().context("the sandbox's id")?;
    let sandbox = Sandbox::new(id, publisher.sink(), taken)?;
    let stand_ins = Arc::new(StandIns::default());
    if let Some(attach) = attach {
        tokio::spawn(Arc::clone(&stand_ins).serve(attach, Arc::clone(&sandbox)));
    }
    let connections = Connections::default();
    let parts = Arc::new(Parts {
        sandbox,
        stand_ins,
        publisher,
        unified: args.engine.is_some() && stats::host_is_unified(),
        engine: args.engine,
        connections: connections.clone(),
        over: Notify::new(),
    });
    let listener = connections.listener(UnixListener::from(nonblocking(task)?))?;
    let mut server = Server::new().add_listener(listener).register_service(services(&parts));
    server.start().await.context("cannot serve the task API")?;
    parts.over.notified().await;
    // Who asked for the end hangs up once it has the answer.
    connections.gone(LAST_CALLERS).await;
    server.shutdown().await.context("cannot end the task API")
}

fn services(parts: &Arc<Parts>) -> HashMap<String, Service> {
    let tasks = Arc::new(TaskService::new(Arc::clone(parts)));
    let tasks = SERVICES.iter().flat_map(|name| {
        create_task(tasks.clone()).into_values().map(|service| ((*name).to_owned(), service))
    });
    // The OCI command line has no use for it.
    let sandboxes = parts
        .engine
        .is_some()
        .then(|| create_sandbox(Arc::new(SandboxService::new(Arc::clone(parts)))));
    tasks.chain(sandboxes.into_iter().flatten()).collect()
}

/// Logs go to standard error, which is the sandbox's log file, and to containerd's log.
fn start_log(args: &ServerArgs) {
    let level = args.log.as_deref().unwrap_or("info");
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
    let _ = match &args.engine {
        None => builder.with_writer(std::io::stderr).try_init(),
        Some(engine) => {
            use tracing_subscriber::fmt::writer::MakeWriterExt;
            let pipe = LogPipe::open(&engine.log);
            builder.with_writer(std::io::stderr.and(move || pipe.clone())).try_init()
        }
    };
}
