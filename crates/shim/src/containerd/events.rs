//! Telling containerd what happens.
//!
//! Events go to containerd's ttRPC socket one after the other, in the order in which they
//! happened. While containerd is away they wait, up to a bound, and the sandbox never waits
//! for them: what a restarted containerd missed it finds out by asking for the state.

use super::Engine;
use crate::task::{pid, timestamp};
use containerd_shim_protos::events::task as message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use kata_protocol::Id;
use kata_sandbox::{Event, EventSink, ProcessRef};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use ttrpc::asynchronous::{Client, transport::Socket};

/// Events that wait while containerd is away; then the oldest are lost.
const WAITING: usize = 1024;
/// How long containerd may take for one event.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pauses between two attempts: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

enum Item {
    Event(Box<Envelope>),
    /// Answered when everything before it is with containerd.
    Flush(oneshot::Sender<()>),
}

/// Takes events from a sandbox, and lets containerd have them.
#[derive(Clone)]
pub(crate) struct Publisher {
    items: Option<mpsc::UnboundedSender<Item>>,
    namespace: String,
    /// What is no task to containerd.
    kept_from: Arc<OnceLock<Id>>,
}

impl Publisher {
    /// One that tells `engine`; without any it tells nobody.
    pub(crate) fn start(engine: Option<&Engine>) -> Self {
        let Some(engine) = engine.filter(|engine| !engine.events.as_os_str().is_empty()) else {
            return Self { items: None, namespace: String::new(), kept_from: Arc::default() };
        };
        let (items, received) = mpsc::unbounded_channel();
        tokio::spawn(publish(received, engine.events.clone()));
        let namespace = engine.namespace.clone();
        Self { items: Some(items), namespace, kept_from: Arc::default() }
    }

    /// What the sandbox calls. Never waits.
    pub(crate) fn sink(&self) -> EventSink {
        let publisher = self.clone();
        Box::new(move |event| publisher.tell(&event))
    }

    /// From now on containerd is told nothing of `container`: to it that is no task.
    pub(crate) fn keep_from(&self, container: &Id) {
        // There is one pod in a sandbox.
        let _ = self.kept_from.set(container.clone());
    }

    fn tell(&self, event: &Event) {
        let Some(items) = &self.items else { return };
        if self.kept_from.get() == Some(event.container()) {
            return;
        }
        let (topic, event) = translate(event);
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        };
        // The publisher ends only with the server.
        let _ = items.send(Item::Event(Box::new(envelope)));
    }

    /// Waits until containerd has all events, at most so long.
    pub(crate) async fn flush(&self, patience: Duration) {
        let Some(items) = &self.items else { return };
        let (done, waits) = oneshot::channel();
        if items.send(Item::Flush(done)).is_ok() {
            let _ = tokio::time::timeout(patience, waits).await;
        }
    }
}

async fn publish(mut items: mpsc::UnboundedReceiver<Item>, address: PathBuf) {
    let mut queue = VecDeque::new();
    let mut connection = None;
    let mut pause = PAUSES.0;
    loop {
        if queue.is_empty() {
            match items.recv().await {
                Some(item) => queue.push_back(item),
                None => return,
            }
        }
        while let Ok(item) = items.try_recv() {
            queue.push_back(item);
        }
        if queue.len() > WAITING {
            let lost = queue.len() - WAITING;
            tracing::warn!(lost, "containerd does not take events; the oldest are lost");
            queue.drain(..lost);
        }
        match queue.pop_front() {
            Some(Item::Event(envelope)) => {
                if forward(&mut connection, &address, &envelope).await {
                    pause = PAUSES.0;
                } else {
                    queue.push_front(Item::Event(envelope));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
            }
            Some(Item::Flush(done)) => {
                let _ = done.send(());
            }
            None => {}
        }
    }
}

/// Whether the event needs no further attempt.
async fn forward(
    connection: &mut Option<EventsClient>,
    address: &Path,
    envelope: &Envelope,
) -> bool {
    let client = match connection.take() {
        Some(client) => client,
        None => match UnixStream::connect(address).await {
            Ok(stream) => EventsClient::new(Client::new(Socket::new(stream))),
            Err(error) => {
                tracing::debug!(%error, "containerd is not there to be told");
                return false;
            }
        },
    };
    let request =
        ForwardRequest { envelope: MessageField::some(envelope.clone()), ..Default::default() };
    match client.forward(ttrpc::context::with_duration(PATIENCE), &request).await {
        Ok(_) => {
            *connection = Some(client);
            true
        }
        Err(ttrpc::Error::RpcStatus(status)) => {
            // It has heard of it, and does not want it.
            let topic = &envelope.topic;
            tracing::warn!(topic, error = status.message(), "containerd refuses an event");
            *connection = Some(client);
            true
        }
        Err(error) => {
            tracing::debug!(%error, "containerd did not take an event");
            false
        }
    }
}

/// An event in containerd's terms: its topic and its message.
fn translate(event: &Event) -> (&'static str, Any) {
    match event {
        Event::Created { .. } => (topics::TASK_CREATE_EVENT_TOPIC, any(&created(event))),
        Event::Started { process, pid } => started(process, *pid),
        Event::ExecAdded { process } => {
            let added = message::TaskExecAdded {
                container_id: process.container.to_string(),
                exec_id: exec(process),
                ..Default::default()
            };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&added))
        }
        Event::Exit { process, pid: host, exit } => {
            let container_id = process.container.to_string();
            let ended = message::TaskExit {
                id: process.exec.as_ref().map_or_else(|| container_id.clone(), ToString::to_string),
                container_id,
                pid: pid(*host),
                exit_status: exit.code.into(),
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, any(&ended))
        }
        Event::Deleted { container, pid: host, exit } => {
            let deleted = message::TaskDelete {
                container_id: container.to_string(),
                pid: pid(*host),
                exit_status: exit.code.into(),
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, any(&deleted))
        }
        Event::Paused { container, paused: true } => {
            let container_id = container.to_string();
            let paused = message::TaskPaused { container_id, ..Default::default() };
            (topics::TASK_PAUSED_EVENT_TOPIC, any(&paused))
        }
        Event::Paused { container, paused: false } => {
            let container_id = container.to_string();
            let resumed = message::TaskResumed { container_id, ..Default::default() };
            (topics::TASK_RESUMED_EVENT_TOPIC, any(&resumed))
        }
        Event::OutOfMemory { container } => {
            let container_id = container.to_string();
            let oom = message::TaskOOM { container_id, ..Default::default() };
            (topics::TASK_OOM_EVENT_TOPIC, any(&oom))
        }
    }
}

fn created(event: &Event) -> message::TaskCreate {
    let Event::Created { container, bundle, rootfs, paths, terminal, pid: host } = event else {
        return message::TaskCreate::default();
    };
    let mut created = message::TaskCreate {
        container_id: container.to_string(),
        bundle: bundle.to_string_lossy().into_owned(),
        io: MessageField::some(message::TaskIO {
            stdin: paths.stdin.clone(),
            stdout: paths.stdout.clone(),
            stderr: paths.stderr.clone(),
            terminal: *terminal,
            ..Default::default()
        }),
        pid: pid(*host),
        ..Default::default()
    };
    created.rootfs.resize_with(rootfs.len(), Default::default);
    for (mount, fs) in created.rootfs.iter_mut().zip(rootfs) {
        mount.type_ = fs.kind.clone();
        mount.source = fs.source.clone();
        mount.options = fs.options.clone();
    }
    created
}

fn started(process: &ProcessRef, host: i32) -> (&'static str, Any) {
    let container_id = process.container.to_string();
    if process.exec.is_none() {
        let started = message::TaskStart { container_id, pid: pid(host), ..Default::default() };
        return (topics::TASK_START_EVENT_TOPIC, any(&started));
    }
    let started = message::TaskExecStarted {
        container_id,
        exec_id: exec(process),
        pid: pid(host),
        ..Default::default()
    };
    (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&started))
}

fn exec(process: &ProcessRef) -> String {
    process.exec.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn any<M: MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // Serialising to memory fails only when there is none.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use containerd_shim_protos::api;
    use containerd_shim_protos::protobuf::Message;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use kata_sandbox::Exit;
    use std::sync::Mutex;
    use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

    #[derive(Default)]
    struct Received(Mutex<Vec<Envelope>>);

    #[async_trait]
    impl Events for Received {
        async fn forward(
            &self,
            _: &TtrpcContext,
            request: ForwardRequest,
        ) -> ttrpc::Result<api::Empty> {
            self.0.lock().unwrap().push(request.envelope.unwrap());
            Ok(api::Empty::default())
        }
    }

    fn engine(socket: &Path) -> Engine {
        Engine {
            namespace: "k8s.io".to_owned(),
            events: socket.to_owned(),
            log: PathBuf::new(),
            config: None,
        }
    }

    fn exit(code: u8) -> Event {
        let process = ProcessRef { container: "c1".parse().unwrap(), exec: None };
        let exit = Exit { code, at: SystemTime::UNIX_EPOCH + Duration::from_secs(7) };
        Event::Exit { process, pid: 42, exit }
    }

    #[tokio::test]
    async fn events_wait_for_an_engine_that_is_away_and_keep_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("ttrpc");
        let publisher = Publisher::start(Some(&engine(&socket)));
        let sink = publisher.sink();
        (0..5).for_each(|code| sink(exit(code)));
        publisher.flush(Duration::from_millis(50)).await;

        let received = Arc::new(Received::default());
        let mut server = Server::new()
            .add_listener(Listener::bind(format!("unix://{}", socket.display())).unwrap())
            .register_service(create_events(received.clone()));
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(20)).await;
        let envelopes = received.0.lock().unwrap().clone();
        let codes: Vec<u32> = envelopes
            .iter()
            .map(|e| message::TaskExit::parse_from_bytes(&e.event.value).unwrap().exit_status)
            .collect();
        assert_eq!(codes, [0, 1, 2, 3, 4]);
        assert_eq!(envelopes[0].namespace, "k8s.io");
        assert_eq!(envelopes[0].topic, "/tasks/exit");
        assert_eq!(envelopes[0].event.type_url, "containerd.events.TaskExit");
    }

    #[tokio::test]
    async fn without_an_engine_nothing_is_kept() {
        let publisher = Publisher::start(None);
        publisher.sink()(exit(1));
        publisher.flush(Duration::from_secs(60)).await;
    }

    #[test]
    fn an_exec_is_told_by_its_own_id() {
        let process =
            ProcessRef { container: "c1".parse().unwrap(), exec: Some("e1".parse().unwrap()) };
        let (topic, any) = translate(&Event::Started { process, pid: 3 });
        assert_eq!(
            (topic, any.type_url.as_str()),
            ("/tasks/exec-started", "containerd.events.TaskExecStarted")
        );
        let started = message::TaskExecStarted::parse_from_bytes(&any.value).unwrap();
        assert_eq!((started.container_id.as_str(), started.exec_id.as_str()), ("c1", "e1"));
    }
}
