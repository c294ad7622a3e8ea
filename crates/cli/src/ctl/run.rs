//! `kata-ctl run`: from a root or an image to an exit code, and nothing left.

use super::bundle::{self, Wanted};
use super::network::{self, Network};
use super::workdir::{self, Workdir};
use super::{Run, forward};
use crate::foreground::{Patience, Signals};
use crate::image::{Config, Source};
use crate::runtime::create::{self, Console};
use crate::runtime::{Global, block_on, destroy};
use anyhow::{Context, Result, bail};
use kata_protocol::Id;
use std::fs;
use std::path::{Path, PathBuf};

/// Runs the container; the exit code of its process.
pub fn run(run: &Run, config: Option<&Path>) -> Result<u8> {
    if !run.publish.is_empty() && run.network.as_deref() == Some("none") {
        bail!("--publish needs a network: leave out --network none");
    }
    let id = container_id(run)?;
    let source = Source::open(&run.source)?;
    let global = workdir::global(config);
    block_on(async {
        // From here on an interrupt cannot skip the clean-up.
        let signals = Signals::take(Patience::Limited)?;
        workdir::sweep(&global).await;
        let workdir = Workdir::create(&id)?;
        workdir::start_keeper(config)?;
        let (rootfs, image) = root_of(source, workdir.path())?;
        let network = connect(run, &id)?;
        let hostname =
            run.hostname.clone().unwrap_or_else(|| id.as_str().chars().take(63).collect());
        bundle::write(
            workdir.path(),
            &Wanted {
                run,
                image: &image,
                rootfs: &rootfs,
                hostname: &hostname,
                netns: network.as_ref().map(|network| network.namespace.as_path()),
            },
        )?;
        if let Some(network) = &network {
            forward::start(&run.publish, network.guest).await?;
        }
        let code = in_container(&global, &id, workdir.path(), &signals).await;
        // Both are tried whatever the container did; its own failure is told first.
        let gone = destroy(&global, &id).await;
        drop(network);
        let code = code?;
        gone.map(|()| code)
    })
}

async fn in_container(global: &Global, id: &Id, bundle: &Path, signals: &Signals) -> Result<u8> {
    let created =
        create::create_unless_told_to_end(global, id, bundle, Console::Ours, signals).await?;
    create::start_and_wait(id, created, signals).await
}

fn container_id(run: &Run) -> Result<Id> {
    if let Some(name) = &run.name {
        return name.parse().with_context(|| format!("--name {name:?} cannot be used"));
    }
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("cannot get random bytes")?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("ctl-{hex}").parse()?)
}

/// The root file system, unpacked if need be, and how the image wants to be run.
fn root_of(source: Source, workdir: &Path) -> Result<(PathBuf, Config)> {
    match source {
        Source::Directory(path) => Ok((path, Config::default())),
        Source::Image(image) => {
            let path = workdir.join("rootfs");
            fs::create_dir(&path).context("cannot create the root directory")?;
            image.unpack(&path)?;
            Ok((path, image.config))
        }
    }
}

fn connect(run: &Run, id: &Id) -> Result<Option<Network>> {
    match run.network.as_deref() {
        Some("none") => Ok(None),
        None if run.publish.is_empty() && !network::possible() => {
            eprintln!("kata-ctl: the container has no network: install iproute2 for one");
            Ok(None)
        }
        _ => Network::create(id).map(Some).context("cannot make the container's network"),
    }
}
