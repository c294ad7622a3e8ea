//! The server process: one sandbox, two sockets, until it is shut down.

use crate::client::{ATTACH_FD, TASK_FD};
use crate::stand_ins::{StandIns, nonblocking};
use crate::task::TaskService;
use anyhow::Context;
use containerd_shim_protos::shim_async::create_task;
use kata_sandbox::Sandbox;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Server, Service};

/// Arguments of the `sandbox-server` role.
#[derive(Debug, Deserialize, Serialize)]
pub struct ServerArgs {
    /// The sandbox's id.
    pub sandbox: String,
}

/// Names under which engines know the Task API; the messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// The `sandbox-server` role: serves until `Shutdown`.
///
/// # Errors
/// The sandbox cannot be set up, or its sockets cannot be served.
pub fn main(args: &str) -> anyhow::Result<()> {
    let args: ServerArgs = serde_json::from_str(args).context("arguments of the server")?;
    start_log();
    // SAFETY: whoever starts this role hands it these two descriptors (client::start_sandbox);
    // this is the first and only place that takes them.
    let (task, attach) =
        unsafe { (OwnedFd::from_raw_fd(TASK_FD), OwnedFd::from_raw_fd(ATTACH_FD)) };
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the server's runtime")?
        .block_on(serve(&args, task, attach))
}

async fn serve(args: &ServerArgs, task: OwnedFd, attach: OwnedFd) -> anyhow::Result<()> {
    let sandbox = Sandbox::new(args.sandbox.parse().context("the sandbox's id")?)?;
    let stand_ins = Arc::new(StandIns::default());
    tokio::spawn(Arc::clone(&stand_ins).serve(attach, Arc::clone(&sandbox)));
    let over = Arc::new(Notify::new());
    let service = TaskService::new(sandbox, stand_ins, Arc::clone(&over));
    let mut server =
        Server::new().add_listener(listener(task)?).register_service(services(Arc::new(service)));
    server.start().await.context("cannot serve the task API")?;
    over.notified().await;
    // The answer to Shutdown is on its way: let it out.
    server.shutdown().await.context("cannot end the task API")
}

fn services(service: Arc<TaskService>) -> HashMap<String, Service> {
    SERVICES
        .iter()
        .flat_map(|name| {
            create_task(service.clone()).into_values().map(|s| ((*name).to_owned(), s))
        })
        .collect()
}

fn listener(fd: OwnedFd) -> anyhow::Result<Listener> {
    let listener = UnixListener::from(nonblocking(fd)?);
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let connections = futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| Socket::new(stream));
        if accepted.is_err() {
            // Out of descriptors, most likely: ttrpc asks again at once.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Some((accepted, listener))
    });
    Ok(Listener::new(connections))
}

/// Logs go to standard error, which is the sandbox's log file.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KATA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}
