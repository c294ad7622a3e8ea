//! The spares: sandbox servers that have a machine and wait for a sandbox.
//!
//! There are spares for sandboxes that state no limits and no annotations, of each
//! configuration file that such a sandbox came with. They are made one after the other, and
//! the next one only when the sandbox that took the last has started: it is not to wait for a
//! processor that makes a machine for somebody else. What is kept is bounded by
//! `vm_cache_number`; spares of a configuration that has changed end.

use super::make::Plan;
use super::recipe::Recipe;
use super::spare;
use super::standing::launch;
use super::wire::{self, FromSpare, Take};
use crate::packets::Packets;
use crate::process::lock;
use crate::{RUN_DIR, SandboxDir, SandboxError, cleanup};
use kata_jail::{Child, Role};
use kata_protocol::chain;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

/// Where a spare, or the keeper of a stem, finds its line to the factory.
pub(super) const LINE_FD: RawFd = 3;
/// How long a spare may take to take a sandbox over.
const TAKE: Duration = Duration::from_secs(5);
/// How long the next spare waits for a sandbox to start: it may have been created for later.
const START: Duration = Duration::from_secs(10);
/// Configuration files that there are spares of.
const MOST_KINDS: usize = 4;
/// Spares that fail one after the other until no more are made of a kind.
const MOST_FAILURES: u32 = 3;

/// All spares.
#[derive(Default)]
pub(super) struct Pool {
    kinds: Mutex<HashMap<String, Kind>>,
}

/// Spares that are alike.
struct Kind {
    recipe: Recipe,
    wanted: u32,
    idle: VecDeque<oneshot::Sender<Order>>,
    /// How many are being made, or were taken by a sandbox that has not started yet.
    busy: u32,
    failures: u32,
}

/// A sandbox for a spare.
struct Order {
    take: Vec<u8>,
    fds: Vec<OwnedFd>,
    done: oneshot::Sender<bool>,
}

/// What spares have to be of: the machine, and everything else that is configured.
pub(super) fn kind_of(plan: &Plan) -> io::Result<String> {
    Ok(format!("{} {}", plan.key, serde_json::to_string(&plan.config)?))
}

impl Pool {
    /// Sees to it that there are spares for sandboxes of this recipe, if there are to be any. The
    /// template exists.
    pub(super) fn keep(self: &Arc<Self>, recipe: &Recipe, plan: &Plan) {
        let Ok(kind) = kind_of(plan) else { return };
        let wanted = plan.config.factory.vm_cache_number;
        {
            let mut kinds = lock(&self.kinds);
            // Of the same file, but as it was before: they end when nobody holds their line.
            kinds.retain(|name, known| *name == kind || known.recipe != *recipe);
            let room = kinds.contains_key(&kind) || kinds.len() < MOST_KINDS;
            if wanted == 0 || !recipe.is_usual() || !room {
                return;
            }
            let known = kinds.entry(kind.clone()).or_insert_with(|| Kind {
                recipe: recipe.clone(),
                wanted,
                idle: VecDeque::new(),
                busy: 0,
                failures: 0,
            });
            known.wanted = wanted;
        }
        self.fill(&kind);
    }

    /// Hands a sandbox over to a spare of this kind; false when there is none.
    pub(super) async fn take(
        &self,
        kind: &str,
        take: &Take,
        fds: Vec<OwnedFd>,
    ) -> io::Result<bool> {
        if take.place != wire::place()? {
            return Ok(false);
        }
        let order = lock(&self.kinds).get_mut(kind).and_then(|kind| kind.idle.pop_front());
        self.show();
        let Some(spare) = order else { return Ok(false) };
        let (done, answer) = oneshot::channel();
        let take = serde_json::to_vec(take)?;
        let sent = spare.send(Order { take, fds, done }).is_ok();
        Ok(sent && answer.await.unwrap_or(false))
    }

    /// How many spares of this template wait, and how many should.
    pub(super) fn count(&self, template: &str) -> (u32, u32) {
        let kinds = lock(&self.kinds);
        let of_template = kinds.iter().filter(|(name, _)| name.starts_with(template));
        of_template.fold((0, 0), |(idle, wanted), (_, kind)| {
            (idle + u32::try_from(kind.idle.len()).unwrap_or(u32::MAX), wanted + kind.wanted)
        })
    }

    /// Lets them all end.
    pub(super) fn clear(&self) {
        lock(&self.kinds).clear();
        self.show();
    }

    fn fill(self: &Arc<Self>, name: &str) {
        let recipe = {
            let mut kinds = lock(&self.kinds);
            let Some(kind) = kinds.get_mut(name) else { return };
            let enough = kind.idle.len() >= kind.wanted as usize;
            if enough || kind.busy > 0 || kind.failures >= MOST_FAILURES {
                return;
            }
            kind.recipe.clone()
        };
        let busy = Busy::new(self, name);
        tokio::spawn(async move {
            let (pool, name) = (Arc::clone(&busy.pool), busy.name.clone());
            if let Err(error) = pool.live(&name, &recipe, busy).await {
                tracing::warn!(%error, "a spare was of no use");
                if let Some(kind) = lock(&pool.kinds).get_mut(&name) {
                    kind.failures += 1;
                }
            }
            pool.fill(&name);
        });
    }

    /// The life of a spare, until the sandbox that took it has started.
    async fn live(self: &Arc<Self>, name: &str, recipe: &Recipe, busy: Busy) -> io::Result<()> {
        let (child, line) = launch(recipe, Role::Spare, "kata-sandbox (spare)")?;
        let child = Arc::new(child);
        let ends = Arc::clone(&child);
        // It is a child of the factory's also as a sandbox's server.
        tokio::spawn(async move { ends.wait().await });
        let lived = self.spend(name, line, &child, busy).await;
        // One that was killed could not. There is nothing of one that took a sandbox over.
        let id = spare::name(child.pid().unsigned_abs());
        let undone = id.and_then(|id| cleanup(&SandboxDir::of(&id)));
        lived.and(undone.map_err(io::Error::other))
    }

    async fn spend(
        self: &Arc<Self>,
        name: &str,
        line: Packets,
        child: &Child,
        busy: Busy,
    ) -> io::Result<()> {
        let ended = || io::Error::other("it ended; what it said is above");
        if !matches!(hear(&line).await?, Some(FromSpare::Ready)) {
            return Err(ended());
        }
        let (sender, order) = oneshot::channel();
        {
            let mut kinds = lock(&self.kinds);
            // Nobody wants it any more.
            let Some(kind) = kinds.get_mut(name) else { return Ok(()) };
            kind.idle.push_back(sender);
            kind.failures = 0;
        }
        drop(busy);
        self.show();
        self.fill(name);
        let order = tokio::select! {
            order = order => order,
            // It says nothing while it waits.
            _ = hear(&line) => {
                self.forget_dead(name);
                return Err(ended());
            }
        };
        // Without an order its kind is gone, and it goes with its line.
        let Ok(Order { take, fds, done }) = order else { return Ok(()) };
        let _busy = Busy::new(self, name);
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let taken = async {
            line.send(&take, &fds).await?;
            hear(&line).await
        };
        let taken = tokio::time::timeout(TAKE, taken).await;
        let taken = matches!(taken, Ok(Ok(Some(FromSpare::Taken))));
        if !taken {
            // It must not serve the sandbox beside the server that is started now.
            let _ = child.kill(libc::SIGKILL);
        }
        let told = done.send(taken);
        if !taken || told.is_err() {
            return Err(ended());
        }
        // It hangs up when its sandbox has started, or is no more.
        let _ = tokio::time::timeout(START, hear(&line)).await;
        Ok(())
    }

    /// Drops those whose task has ended.
    fn forget_dead(&self, name: &str) {
        if let Some(kind) = lock(&self.kinds).get_mut(name) {
            kind.idle.retain(|spare| !spare.is_closed());
        }
        self.show();
    }

    /// Undoes what another factory and its spares left, if all of them were killed. A spare that
    /// took a sandbox over has nothing of its own any more.
    pub(super) fn sweep(&self) {
        self.show();
        let found = std::fs::read_dir(RUN_DIR).into_iter().flatten().flatten();
        for name in found.filter_map(|entry| entry.file_name().into_string().ok()) {
            if !name.starts_with(spare::PREFIX) {
                continue;
            }
            let undone = name.parse().map_err(SandboxError::from);
            let undone = undone.and_then(|id| cleanup(&SandboxDir::of(&id)));
            if let Err(error) = undone {
                tracing::warn!(name, error = %chain(&error), "cannot undo what is left of a spare");
            }
        }
    }

    /// Lets those who start sandboxes know whether it is worth asking.
    fn show(&self) {
        let any = lock(&self.kinds).values().any(|kind| !kind.idle.is_empty());
        let path = wire::spares_path();
        let shown = match any {
            true => std::fs::write(&path, ""),
            false => std::fs::remove_file(&path).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }),
        };
        if let Err(error) = shown {
            tracing::warn!(%error, path = %path.display(), "cannot show whether there are spares");
        }
    }
}

/// As long as it lives no further spare of this kind is made.
struct Busy {
    pool: Arc<Pool>,
    name: String,
}

impl Busy {
    fn new(pool: &Arc<Pool>, name: &str) -> Self {
        if let Some(kind) = lock(&pool.kinds).get_mut(name) {
            kind.busy += 1;
        }
        Self { pool: Arc::clone(pool), name: name.to_owned() }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(kind) = lock(&self.pool.kinds).get_mut(&self.name) {
            kind.busy = kind.busy.saturating_sub(1);
        }
    }
}

/// What a spare says; none when it has hung up.
async fn hear(line: &Packets) -> io::Result<Option<FromSpare>> {
    match line.receive().await? {
        Some((bytes, _)) => Ok(Some(serde_json::from_slice(&bytes)?)),
        None => Ok(None),
    }
}
