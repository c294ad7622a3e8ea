//! A container that a spare's guest runs before anybody needs one, by the same calls by which
//! it will run others: what a guest does the first time only is done then. Under TCG that is
//! to translate the code of the agent and of the kernel, which is most of a first start.

use super::program;
use crate::SandboxError;
use crate::agent::{Agent, NewContainer, ProcessRef};
use crate::container::Bundle;
use crate::io::{EngineStreams, Relay};
use crate::network::Network;
use crate::process::Stdio;
use crate::sandbox::CreateRequest;
use crate::share::Share;
use kata_hypervisor::Qemu;
use kata_network::{Netns, Prefix, Tap};
use kata_oci::{Spec, SpecError};
use kata_protocol::Id;
use serde_json::{Value, json};
use std::cell::Cell;
use std::fs;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;
use tokio::sync::Mutex;

/// A container such as Docker makes. What it sets for the whole machine are the kernel's defaults,
/// where Docker has others: it stays.
const SPEC: &[u8] = include_bytes!("rehearsal.json");
/// Where the container has its program.
const PROGRAM: &str = "/rehearsal";
/// By which name it is called.
const NAME: &str = "program";
/// How often it is run, and whether with IPv6: Podman's networks and pods have it on, Docker's off,
/// which the guest is left with. The second time also finds its way from each piece of translated
/// code to the next, which is written into the code: a fork that does it by itself copies the page.
const WITH_IPV6: [bool; 2] = [true, false];
/// How long the guest may take. It takes a second where it is emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest of a template is to build: containers as engines describe them. It keeps what it
/// makes of their lists of devices, of which there are two kinds: Docker's and containerd's, which
/// allow the console, and Podman's, which allows nothing beyond what every container may use.
pub(super) fn specs() -> Result<[Spec; 2], SpecError> {
    let docker = Spec::parse(SPEC)?;
    let mut podman = docker.clone();
    if let Some(resources) = podman.linux.as_mut().and_then(|linux| linux.resources.as_mut()) {
        resources.devices.truncate(1);
    }
    Ok([podman, docker])
}

/// The parts of a machine that has answered.
pub(super) struct Rehearsal<'a> {
    pub hypervisor: &'a Mutex<Qemu>,
    pub share: &'a Share,
    pub agent: &'a Agent,
    pub network: &'a mut Network,
}

impl Rehearsal<'_> {
    /// Runs the container; nothing of it is left. `dir` is the spare's.
    pub(super) async fn run(mut self, dir: &Path) -> Result<(), SandboxError> {
        let step = Cell::new("begin");
        let all = async {
            for ipv6 in WITH_IPV6 {
                self.perform(dir, ipv6, &step).await?;
            }
            Ok(())
        };
        match tokio::time::timeout(PATIENCE, all).await {
            Ok(done) => done,
            Err(_) => Err(SandboxError::Factory(format!(
                "the rehearsal of a spare has not ended within {PATIENCE:?}; it was to {}",
                step.get()
            ))),
        }
    }

    async fn perform(
        &mut self,
        dir: &Path,
        ipv6: bool,
        step: &Cell<&'static str>,
    ) -> Result<(), SandboxError> {
        let path = dir.join("rehearsal");
        write_bundle(&path).map_err(SandboxError::io("write the bundle of a rehearsal"))?;
        let id: Id = "rehearsal".parse()?;
        let process = ProcessRef { container: id.clone(), exec: None };
        let mut request = CreateRequest {
            id: id.clone(),
            bundle: path.clone(),
            rootfs: Vec::new(),
            stdio: stdio().map_err(SandboxError::io("make the streams of a rehearsal"))?,
            stand_in: None,
            config: None,
            systemd_cgroup: false,
        };
        let bundle = Bundle::load(&request, None)?;
        step.set("attach the root");
        for attachment in &bundle.plan.attachments {
            self.share.attach(self.hypervisor, attachment).await?;
        }
        let link = interface(&self.network.netns(), ipv6)?;
        let network = self.network.sync(None)?;
        let (message, streams) =
            (request.stdio.message(), std::mem::take(&mut request.stdio.streams));
        let relay = Relay::start(self.agent.channel(), &id, None, streams).await?;
        let spec = &bundle.plan.spec;
        let new = NewContainer { bundle: &bundle, spec, stdio: message, network };
        step.set("create the container");
        self.agent.create(new, PATIENCE).await?;
        step.set("run an exec in it");
        self.exec(&id, spec).await?;
        step.set("start it");
        self.agent.start(&id, None).await?;
        step.set("hear of its end");
        self.hear_of_end(&process).await?;
        step.set("delete it");
        self.agent.delete(&process).await?;
        step.set("write back");
        self.agent.sync(PATIENCE).await?;
        step.set("take the network away");
        relay.end_input();
        drop(link);
        self.agent.configure_network(&self.network.clear()?).await?;
        for attachment in bundle.plan.attachments.iter().rev() {
            self.share.detach(&attachment.at)?;
        }
        fs::remove_dir_all(&path).map_err(SandboxError::io("remove the bundle of a rehearsal"))
    }

    /// Runs the program once more, by an exec. The agent needs no running one for it, and the
    /// container's own ends too soon.
    async fn exec(&self, container: &Id, spec: &Spec) -> Result<(), SandboxError> {
        let Some(program) = &spec.process else { return Ok(()) };
        let exec: Id = "exec".parse()?;
        let mut stdio = stdio().map_err(SandboxError::io("make the streams of a rehearsal"))?;
        let (message, streams) = (stdio.message(), std::mem::take(&mut stdio.streams));
        let channel = self.agent.channel();
        let relay = Relay::start(channel, container, Some(&exec), streams).await?;
        let process = ProcessRef { container: container.clone(), exec: Some(exec) };
        self.agent.exec(&process, program, message).await?;
        self.hear_of_end(&process).await?;
        relay.end_input();
        self.agent.delete(&process).await
    }

    async fn hear_of_end(&self, process: &ProcessRef) -> Result<(), SandboxError> {
        let ended = self.agent.wait(process).await?;
        if ended.code != 0 {
            // Forks are only slower without the rest of it.
            tracing::warn!(code = ended.code, "a rehearsal's program could not make all its calls");
        }
        Ok(())
    }
}

/// An interface such as engines make; the guest has it as long as this lives. Nobody else sees the
/// addresses, which are those for examples (RFC 5737, RFC 3849).
fn interface(netns: &Netns, ipv6: bool) -> Result<Tap, SandboxError> {
    let v4 = [2, 1].map(|last| Ipv4Addr::new(192, 0, 2, last));
    let v6 = [2, 1].map(|last| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
    let mut addresses = vec![(Prefix { address: v4[0].into(), length: 24 }, v4[1].into())];
    if netns.switch_ipv6(ipv6)? {
        addresses.push((Prefix { address: v6[0].into(), length: 64 }, v6[1].into()));
    }
    Ok(Tap::as_interface(netns, "eth0", &addresses)?)
}

fn write_bundle(path: &Path) -> io::Result<()> {
    let root = path.join("rootfs");
    fs::create_dir_all(&root)?;
    // As of many programs, the name by which it is called is a link.
    symlink(PROGRAM, root.join(NAME))?;
    let program = path.join("program");
    let file = File::options().write(true).create_new(true).mode(0o755).open(&program);
    file?.write_all(&program::executable(PROGRAM))?;
    let mut spec: Value = serde_json::from_slice(SPEC)?;
    spec["root"]["path"] = json!("rootfs");
    spec["process"]["args"] = json!([format!("/{NAME}")]);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": PROGRAM, "source": program, "type": "bind", "options": ["rbind", "ro"],
        }));
    }
    fs::write(path.join("config.json"), spec.to_string())
}

/// Streams such as engines give: nobody reads what is written.
fn stdio() -> io::Result<Stdio> {
    let null = || {
        Ok::<_, io::Error>(Some(File::options().read(true).write(true).open("/dev/null")?.into()))
    };
    let streams =
        EngineStreams { stdin: null()?, stdout: null()?, stderr: null()?, held: Vec::new() };
    Ok(Stdio { streams, ..Stdio::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_kinds_of_containers_are_described() {
        let [podman, docker] = specs().unwrap().map(|spec| spec.linux.unwrap());
        assert!(podman.seccomp.is_some() && docker.seccomp.is_some());
        let allowed = |linux: kata_oci::Linux| {
            let devices = linux.resources.unwrap().devices.into_iter();
            devices.filter(|rule| rule.allow).filter_map(|rule| rule.minor).collect::<Vec<i64>>()
        };
        assert!(allowed(podman).is_empty());
        assert_eq!(allowed(docker), vec![3_i64, 1]);
    }
}
