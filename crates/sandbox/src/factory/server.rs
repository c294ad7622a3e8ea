//! The factory process: keeps templates, makes those that are asked for.

use super::make::Plan;
use super::pool::{self, Pool};
use super::recipe::Recipe;
use super::standing::Standing;
use super::wire::{self, Answer, Ask, Request, Take, TemplateStatus};
use crate::packets::{PacketListener, Packets};
use crate::process::lock;
use kata_hypervisor::Snapshot;
use kata_protocol::chain;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, watch};

/// Where the factory finds the socket on which it listens.
pub(super) const LISTENER_FD: RawFd = 3;
/// Templates kept at a time; the one that was used least recently goes.
const MOST: usize = 4;

/// The role `factory`: serves until it is told to end.
///
/// # Errors
/// It cannot listen.
pub fn main(_args: &str) -> io::Result<()> {
    // SAFETY: whoever starts this role hands it this descriptor (client::start); this is the
    // first and only place that takes it.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    // It outlives the sandbox that started it, and is not to be counted there.
    if let Err(error) = crate::machine::leave_cgroup() {
        tracing::warn!(error = %chain(&error), "the factory stays in the cgroup of a sandbox");
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(listener))
}

async fn serve(listener: OwnedFd) -> io::Result<()> {
    let listener = PacketListener::new(listener)?;
    let factory = Arc::new(Factory::default());
    factory.pool.sweep();
    let build = wire::build()?;
    loop {
        let connection = tokio::select! {
            connection = listener.accept() => connection?,
            () = factory.over.notified() => return Ok(()),
        };
        let (factory, build) = (Arc::clone(&factory), build.clone());
        tokio::spawn(async move {
            if let Err(error) = factory.converse(connection, &build).await {
                tracing::warn!(%error, "a caller was not answered");
            }
        });
    }
}

#[derive(Default)]
struct Factory {
    templates: Mutex<HashMap<String, Template>>,
    pool: Arc<Pool>,
    /// One is made at a time.
    making: tokio::sync::Mutex<()>,
    ended: AtomicBool,
    over: Notify,
    clock: Mutex<u64>,
}

struct Template {
    recipe: Recipe,
    memory_mib: u32,
    vcpus: u32,
    state: State,
    /// Told when it is ready, or will never be.
    settled: watch::Sender<bool>,
    /// Once it is ready, and if machines of it are forked.
    stem: Option<Arc<Standing>>,
    clones: u64,
    used: u64,
}

enum State {
    Making,
    Ready(Arc<Snapshot>),
    /// Why it cannot be made, or is of no use.
    Failed(String),
}

/// What there is of a template that is ready.
struct Found {
    snapshot: Arc<Snapshot>,
    stem: Option<Arc<Standing>>,
}

impl Template {
    /// The host's memory that it takes for guests' memory.
    fn bytes(&self) -> u64 {
        let saved = match &self.state {
            State::Ready(snapshot) => snapshot.bytes().unwrap_or(0),
            State::Making | State::Failed(_) => 0,
        };
        saved + self.stem.as_ref().map_or(0, |stem| stem.memory().bytes())
    }
}

impl Factory {
    async fn converse(self: Arc<Self>, connection: Packets, build: &str) -> io::Result<()> {
        let Some((bytes, fds)) = connection.receive().await? else { return Ok(()) };
        let request: Request = serde_json::from_slice(&bytes)?;
        if request.build != build {
            tracing::info!("another build of this program is in use: the factory ends");
            return self.end(&connection, Answer::OtherBuild).await;
        }
        let answer = match request.ask {
            Ask::Fetch { key, recipe, forks } => match self.fetch(&key, &recipe) {
                Ok(Some(Found { snapshot, stem })) => {
                    hand_over(&connection, &snapshot, stem.filter(|_| forks).as_deref()).await?;
                    if let Ok(plan) = Plan::of(&recipe) {
                        self.keep_spares(&recipe, &plan);
                    }
                    return Ok(());
                }
                Ok(None) => Answer::NotYet,
                Err(why) => Answer::Failed(why),
            },
            Ask::Make { recipe } => match self.made(&recipe).await {
                Ok(()) => Answer::Done,
                Err(why) => Answer::Failed(why),
            },
            Ask::Take(take) => return self.take(&connection, &take, fds).await,
            Ask::Broken { key } => {
                self.doubt(&key);
                Answer::Done
            }
            Ask::Status => Answer::Status(self.status()),
            Ask::Destroy => return self.end(&connection, Answer::Done).await,
        };
        reply(&connection, answer).await
    }

    /// Ends the factory with this answer: from before it on nobody meets it any more. Only the
    /// first time: later the socket of that name is another factory's.
    async fn end(&self, connection: &Packets, answer: Answer) -> io::Result<()> {
        if !self.ended.swap(true, Ordering::Relaxed) {
            let _ = std::fs::remove_file(wire::socket_path());
            lock(&self.templates).clear();
            self.pool.clear();
        }
        let answered = reply(connection, answer).await;
        self.over.notify_one();
        answered
    }

    /// The template, if it is ready. One that is not known begins to be made; one that
    /// failed is told to nobody but who asks for it by `init`.
    fn fetch(self: &Arc<Self>, key: &str, recipe: &Recipe) -> Result<Option<Found>, String> {
        let now = self.tick();
        if let Some(template) = lock(&self.templates).get_mut(key) {
            return Ok(match &template.state {
                State::Ready(snapshot) => {
                    (template.used, template.clones) = (now, template.clones + 1);
                    template.stem.take_if(|stem| !stem.stands());
                    Some(Found { snapshot: Arc::clone(snapshot), stem: template.stem.clone() })
                }
                State::Making | State::Failed(_) => None,
            });
        }
        let plan = Plan::of(recipe).map_err(|error| chain(&error))?;
        self.begin(recipe, plan);
        Ok(None)
    }

    /// Hands a sandbox over to a spare of its kind, and sees to it that there are such: later,
    /// for that takes a processor.
    async fn take(
        self: &Arc<Self>,
        connection: &Packets,
        take: &Take,
        fds: Vec<OwnedFd>,
    ) -> io::Result<()> {
        let plan = match Plan::of(&take.recipe) {
            Ok(plan) => plan,
            Err(error) => return reply(connection, Answer::Failed(chain(&error))).await,
        };
        let answer = match self.pool.take(&pool::kind_of(&plan)?, take, fds).await? {
            true => Answer::Taken,
            false => Answer::NotYet,
        };
        reply(connection, answer).await?;
        self.keep_spares(&take.recipe, &plan);
        Ok(())
    }

    /// Spares are clones of a template, which has to be there.
    fn keep_spares(&self, recipe: &Recipe, plan: &Plan) {
        let templates = lock(&self.templates);
        if matches!(templates.get(&plan.key).map(|t| &t.state), Some(State::Ready(_))) {
            self.pool.keep(recipe, plan);
        }
    }

    /// Makes the template, again if it failed before; returns when it is there.
    async fn made(self: &Arc<Self>, recipe: &Recipe) -> Result<(), String> {
        let plan = Plan::of(recipe).map_err(|error| chain(&error))?;
        let key = plan.key.clone();
        lock(&self.templates)
            .retain(|known, template| *known != key || !matches!(template.state, State::Failed(_)));
        let _ = self.begin(recipe, plan).wait_for(|settled| *settled).await;
        match lock(&self.templates).get(&key).map(|template| &template.state) {
            Some(State::Ready(_)) => Ok(()),
            Some(State::Failed(why)) => Err(why.clone()),
            Some(State::Making) | None => Err("it was given up".to_owned()),
        }
    }

    /// Begins to make a template, unless it is known: who asked may have seen the configuration
    /// before it was changed. Gives what tells that it is settled.
    fn begin(self: &Arc<Self>, recipe: &Recipe, plan: Plan) -> watch::Receiver<bool> {
        if let Some(known) = lock(&self.templates).get(&plan.key) {
            return known.settled.subscribe();
        }
        self.forget_stale();
        let (settled, waits) = watch::channel(false);
        let template = Template {
            recipe: recipe.clone(),
            memory_mib: plan.sizing.memory_mib,
            vcpus: plan.sizing.vcpus,
            state: State::Making,
            settled,
            stem: None,
            clones: 0,
            used: self.tick(),
        };
        lock(&self.templates).insert(plan.key.clone(), template);
        let (factory, recipe) = (Arc::clone(self), recipe.clone());
        tokio::spawn(async move {
            let _in_turn = factory.making.lock().await;
            let made = match plan.make().await {
                Ok(snapshot) => {
                    tracing::info!(template = name(&plan.key), "template made");
                    State::Ready(Arc::new(snapshot))
                }
                Err(error) => {
                    let why = chain(&error);
                    tracing::warn!(template = name(&plan.key), why, "cannot make a template");
                    State::Failed(why)
                }
            };
            let ready = matches!(made, State::Ready(_));
            factory.with(&plan.key, |template| template.state = made);
            if ready && plan.forks {
                let stem = stem(&recipe, &plan.key).await;
                factory.with(&plan.key, |template| template.stem = stem);
            }
            factory.with(&plan.key, |template| {
                template.settled.send_replace(true);
            });
            factory.keep_spares(&recipe, &plan);
        });
        waits
    }

    /// Does this with a template, if there is such a one.
    fn with(&self, key: &str, act: impl FnOnce(&mut Template)) {
        if let Some(template) = lock(&self.templates).get_mut(key) {
            act(template);
        }
    }

    /// A machine of it did not come up. It was a fork if there are any, and clones may do better.
    fn doubt(&self, key: &str) {
        self.with(key, |template| {
            if template.stem.take().is_none() {
                template.state = State::Failed("a clone of it did not come up".to_owned());
            }
        });
    }

    /// Drops what nobody could ask for any more, and what was used least recently.
    fn forget_stale(&self) {
        let mut templates = lock(&self.templates);
        templates.retain(|key, template| {
            let making = matches!(template.state, State::Making);
            making || Plan::of(&template.recipe).is_ok_and(|plan| plan.key == *key)
        });
        while templates.len() >= MOST {
            let idle = templates.iter().filter(|(_, t)| !matches!(t.state, State::Making));
            let Some((oldest, _)) = idle.min_by_key(|(_, template)| template.used) else { return };
            let oldest = oldest.clone();
            templates.remove(&oldest);
        }
    }

    fn tick(&self) -> u64 {
        let mut clock = lock(&self.clock);
        *clock += 1;
        *clock
    }

    fn status(&self) -> Vec<TemplateStatus> {
        let templates = lock(&self.templates);
        let status = |(key, template): (&String, &Template)| TemplateStatus {
            name: name(key).to_owned(),
            state: match &template.state {
                State::Making => "being made".to_owned(),
                State::Ready(_) => "ready".to_owned(),
                State::Failed(why) => why.clone(),
            },
            memory_mib: template.memory_mib,
            vcpus: template.vcpus,
            bytes: template.bytes(),
            forks: template.stem.as_ref().is_some_and(|stem| stem.stands()),
            clones: template.clones,
            spares: self.pool.count(key).0,
            spares_wanted: self.pool.count(key).1,
        };
        templates.iter().map(status).collect()
    }
}

/// What there is of a template, to be forked if it can.
async fn hand_over(
    connection: &Packets,
    snapshot: &Snapshot,
    stem: Option<&Standing>,
) -> io::Result<()> {
    if let Some(stem) = stem {
        match stem.line().await {
            Ok(line) => {
                let answer = serde_json::to_vec(&Answer::Stem)?;
                let [whole, lively] = stem.memory().fds();
                return connection.send(&answer, &[line.as_fd(), whole, lively]).await;
            }
            Err(error) => tracing::warn!(%error, "a machine is cloned that was to be forked"),
        }
    }
    connection.send(&serde_json::to_vec(&Answer::Template)?, &snapshot.fds()).await
}

/// A stem of this template; none, and a warning, when it cannot be made.
async fn stem(recipe: &Recipe, key: &str) -> Option<Arc<Standing>> {
    match Standing::make(recipe).await {
        Ok(stem) => Some(Arc::new(stem)),
        Err(error) => {
            let why = chain(&error);
            tracing::warn!(template = name(key), why, "machines are cloned, not forked");
            None
        }
    }
}

async fn reply(connection: &Packets, answer: Answer) -> io::Result<()> {
    connection.send(&serde_json::to_vec(&answer)?, &[]).await
}

/// The short name at the beginning of a key.
fn name(key: &str) -> &str {
    key.split(' ').next().unwrap_or(key)
}
