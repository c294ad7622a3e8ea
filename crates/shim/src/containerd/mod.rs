//! `containerd-shim-kata-v2`: what containerd calls, and what makes a sandbox server its shim.
//!
//! containerd runs the program twice per sandbox and never stays in it. `start` finds the
//! pod's server or starts a new one and prints its address ([`start`]). `delete` undoes what
//! a server left that is gone ([`delete`]). In between the server speaks the Task API like
//! it does for the OCI command line, and tells containerd what happens ([`events`]). Where
//! containerd 2 is told to leave pods to the shim, it speaks the Sandbox API too
//! ([`sandbox_api`]).

mod address;
mod bootstrap;
mod delete;
pub(crate) mod events;
mod flags;
pub(crate) mod log;
mod pod;
mod sandbox_api;
mod start;

pub(crate) use sandbox_api::SandboxService;

use anyhow::{Context, bail};
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use flags::{Action, Flags};
use kata_protocol::Id;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::path::PathBuf;

/// The runtime's name in containerd's terms.
const RUNTIME: &str = "io.containerd.kata.v2";
/// More than any options or parameters that containerd sends.
const MAX_INPUT: u64 = 4 << 20;

/// What a server must know that is containerd's shim.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Engine {
    /// containerd's namespace, in which its clients see the sandbox.
    pub namespace: String,
    /// Where events go: the path of containerd's ttRPC socket; empty: nowhere.
    pub events: PathBuf,
    /// The FIFO that containerd copies into its log.
    pub log: PathBuf,
    /// The configuration file to use unless a container's options name one.
    pub config: Option<PathBuf>,
}

/// `containerd-shim-kata-v2`, as containerd calls it; gives the exit code.
pub fn shim_main() -> i32 {
    let mut words = std::env::args();
    let name = words.next().unwrap_or_default();
    let name = name.rsplit('/').next().unwrap_or_default().to_owned();
    match run(&name, words) {
        Ok(()) => 0,
        Err(error) => {
            // containerd shows this to the user.
            eprintln!("{name}: {error:#}");
            1
        }
    }
}

fn run(name: &str, words: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let flags = Flags::parse(words)?;
    if flags.version {
        let version = env!("CARGO_PKG_VERSION");
        return print(format!("{name}:\n  Version:  {version}\n").as_bytes());
    }
    if flags.info {
        return print(&info()?);
    }
    match flags.action {
        Some(Action::Start) => print(start::start(name, &flags, &input()?)?.as_bytes()),
        Some(Action::Delete) => print(&delete::delete(&flags)?),
        None => bail!(
            "it is started by containerd, with `start` or `delete`; name it as runtime \
             {RUNTIME} there"
        ),
    }
}

fn input() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .take(MAX_INPUT)
        .read_to_end(&mut bytes)
        .context("cannot read what containerd sent")?;
    Ok(bytes)
}

fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    out.write_all(bytes).and_then(|()| out.flush()).context("cannot answer containerd")
}

/// What `ctr plugins inspect-runtime` shows.
fn info() -> anyhow::Result<Vec<u8>> {
    let info = RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    };
    info.write_to_bytes().context("cannot describe the runtime")
}

/// The sandbox of a containerd container: unlike containers, sandboxes of all namespaces
/// are together, so their ids begin with the namespace. A `+` is in no name of containerd's,
/// so no two give the same id. What is too long is cut, and kept apart by its hash.
fn sandbox_id(namespace: &str, container: &Id) -> anyhow::Result<Id> {
    const LONGEST: usize = 128;
    let mut id = format!("{namespace}+{container}");
    if id.len() > LONGEST {
        let hash = format!("+{:x}", Sha256::digest(&id));
        id.truncate(id.floor_char_boundary(LONGEST - hash.len()));
        id.push_str(&hash);
    }
    id.parse().with_context(|| format!("no sandbox can be named after namespace {namespace:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_namespaces_may_hold_the_same_id() {
        let id: Id = "c-1".parse().unwrap();
        assert_eq!(sandbox_id("k8s.io", &id).unwrap().as_str(), "k8s.io+c-1");
        let other = sandbox_id("k8s.io-c", &"1".parse().unwrap()).unwrap();
        assert_ne!(sandbox_id("k8s.io", &id).unwrap(), other);
    }

    #[test]
    fn long_names_still_give_an_id_and_not_the_same() {
        let namespace = "n".repeat(76);
        let id = |last| format!("{}{last}", "c".repeat(75)).parse::<Id>().unwrap();
        let (one, two) = (sandbox_id(&namespace, &id('1')), sandbox_id(&namespace, &id('2')));
        assert_ne!(one.unwrap(), two.unwrap());
        assert!(sandbox_id("a/b", &"c".parse().unwrap()).is_err());
        assert!(sandbox_id("", &"c".parse().unwrap()).is_ok());
    }

    #[test]
    fn runtime_describes_itself() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        assert_eq!(info.name, RUNTIME);
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    }
}
