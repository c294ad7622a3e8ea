//! Asking the factory, and starting it.

use super::keeper::Keeper;
use super::recipe::Recipe;
use super::server::LISTENER_FD;
use super::wire::{self, Answer, Ask, Request, Take, TemplateStatus};
use crate::packets::Packets;
use crate::{RUN_DIR, SandboxError};
use kata_hypervisor::{Snapshot, StemMemory};
use kata_jail::{Launch, Role};
use kata_protocol::Id;
use rustix::fs::FlockOperation;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

pub(super) fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    SandboxError::io(what)
}

/// What a sandbox is made from.
pub(crate) enum Template {
    /// Machines go on from where it was saved.
    Saved(Snapshot),
    /// Machines are forked, by this keeper, from one that stands still and has this memory.
    Standing(Keeper, StemMemory),
}

/// The template of this key, if there is one. Else it will be there for a later sandbox.
/// `forks`: one that stands still is wanted rather than a saved one.
pub(crate) async fn fetch(
    key: &str,
    recipe: &Recipe,
    forks: bool,
) -> Result<Option<Template>, SandboxError> {
    let ask = || Ask::Fetch { key: key.to_owned(), recipe: recipe.clone(), forks };
    let (answer, fds) = ask_started(ask).await?;
    let mut fds = fds.into_iter();
    match (answer, fds.next(), fds.next(), fds.next()) {
        (Answer::Template, Some(memory), Some(devices), None) => {
            let snapshot = Snapshot::from_fds(memory, devices).map_err(failed("use a template"))?;
            Ok(Some(Template::Saved(snapshot)))
        }
        (Answer::Stem, Some(line), Some(whole), Some(lively)) => {
            let keeper = Keeper::new(line).map_err(failed("use a template"))?;
            Ok(Some(Template::Standing(keeper, StemMemory::from_fds([whole, lively]))))
        }
        (Answer::NotYet, ..) => Ok(None),
        (Answer::Failed(why), ..) => Err(SandboxError::Factory(why)),
        (other, ..) => Err(SandboxError::Factory(format!("it answered {other:?}"))),
    }
}

/// Says that a template is of no use. What comes of it is the factory's affair.
pub(crate) async fn report_broken(key: &str) {
    if let Ok(Some(connection)) = wire::connect() {
        let _ = converse(connection, Ask::Broken { key: key.to_owned() }, &[]).await;
    }
}

/// Has a spare server become that of this sandbox, whose directory exists: it goes on with these
/// arguments and descriptors. False when there is none; the sandbox gets a server of its own then.
///
/// # Errors
/// The factory did not answer: a spare may have the sandbox, or not.
pub async fn take(
    sandbox: &Id,
    recipe: &Recipe,
    args: String,
    fds: &[BorrowedFd<'_>],
) -> Result<bool, SandboxError> {
    if !wire::spares_path().exists() {
        return Ok(false);
    }
    let Ok(Some(connection)) = wire::connect() else { return Ok(false) };
    let take = Take {
        sandbox: sandbox.to_string(),
        recipe: recipe.clone(),
        place: wire::place().map_err(failed("find our own namespaces"))?,
        args,
        oom_score_adj: own_oom_score(),
    };
    let (answer, _) = converse(connection, Ask::Take(take), fds).await?;
    match answer {
        Answer::Taken => Ok(true),
        Answer::NotYet | Answer::OtherBuild => Ok(false),
        // The sandbox's own server meets the same, and tells it whom it concerns.
        other => {
            tracing::debug!(%sandbox, ?other, "no spare is to be had");
            Ok(false)
        }
    }
}

/// How soon this process is to go when memory is short.
pub(super) fn own_oom_score() -> i32 {
    let score = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    score.trim().parse().unwrap_or(0)
}

/// Makes the template of sandboxes that say nothing of themselves; returns when it is there.
///
/// # Errors
/// It cannot be made.
pub async fn init(config: Option<PathBuf>) -> Result<(), SandboxError> {
    let ask = || Ask::Make { recipe: Recipe::usual(config.clone()) };
    match ask_started(ask).await?.0 {
        Answer::Done => Ok(()),
        Answer::Failed(why) => Err(SandboxError::Factory(why)),
        other => Err(SandboxError::Factory(format!("it answered {other:?}"))),
    }
}

/// What templates there are; none when there is no factory.
///
/// # Errors
/// The factory does not answer.
pub async fn status() -> Result<Option<Vec<TemplateStatus>>, SandboxError> {
    let Some(connection) = wire::connect().map_err(failed("connect to the factory"))? else {
        return Ok(None);
    };
    match converse(connection, Ask::Status, &[]).await?.0 {
        Answer::Status(templates) => Ok(Some(templates)),
        // It has just ended, for being old.
        Answer::OtherBuild => Ok(None),
        other => Err(SandboxError::Factory(format!("it answered {other:?}"))),
    }
}

/// Ends the factory and all its templates. Returns whether there was one.
///
/// # Errors
/// The factory does not answer.
pub async fn destroy() -> Result<bool, SandboxError> {
    let Some(connection) = wire::connect().map_err(failed("connect to the factory"))? else {
        return Ok(false);
    };
    converse(connection, Ask::Destroy, &[]).await?;
    Ok(true)
}

/// Asks; starts the factory when there is none, or only one of another build.
async fn ask_started(ask: impl Fn() -> Ask) -> Result<(Answer, Vec<OwnedFd>), SandboxError> {
    if let Some(connection) = wire::connect().map_err(failed("connect to the factory"))? {
        let (answer, fds) = converse(connection, ask(), &[]).await?;
        if !matches!(answer, Answer::OtherBuild) {
            return Ok((answer, fds));
        }
    }
    converse(start()?, ask(), &[]).await
}

async fn converse(
    connection: OwnedFd,
    ask: Ask,
    fds: &[BorrowedFd<'_>],
) -> Result<(Answer, Vec<OwnedFd>), SandboxError> {
    let exchange = async {
        let request = Request { build: wire::build()?, ask };
        let connection = Packets::new(connection)?;
        connection.send(&serde_json::to_vec(&request)?, fds).await?;
        let ended = || io::Error::other("it ended; its log says why");
        let (bytes, fds) = connection.receive().await?.ok_or_else(ended)?;
        Ok((serde_json::from_slice(&bytes)?, fds))
    };
    exchange.await.map_err(failed("ask the factory"))
}

/// A connection to a factory that is started, unless somebody else has just done so. The
/// connection waits in the listener that the factory inherits.
fn start() -> Result<OwnedFd, SandboxError> {
    let begin = || -> io::Result<OwnedFd> {
        DirBuilder::new().recursive(true).mode(0o711).create(RUN_DIR)?;
        let lock = File::create(wire::lock_path())?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        if let Some(connection) = wire::connect()? {
            return Ok(connection);
        }
        let listener = wire::listen()?;
        let log = File::create(wire::log_path())?;
        let launch = Launch::role(Role::Factory, "kata-factory", &())
            .map_err(io::Error::other)?
            .fd(listener, LISTENER_FD)
            .stderr(log.into())
            .directory(Path::new("/"))
            .new_session();
        launch.spawn().map_err(io::Error::other)?;
        wire::connect()?.ok_or_else(|| io::Error::other("it does not listen"))
    };
    begin().map_err(failed("start the factory"))
}
