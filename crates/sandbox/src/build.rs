//! A container is built: what it shares is attached, the engine's hooks run, the guest gets its
//! network and makes the container.
//!
//! Hooks run while the guest boots. A guest that stood ready (a spare's, or a fork) would only wait
//! for them, a fifth of its start: it makes its first container meanwhile, and gets the network
//! afterwards. The specification wants the hooks before `pivot_root`, for what they change in the
//! root: that arrives all the same, because the root is shared. Should one fail, the machine
//! ends, and with it the container.

use crate::SandboxError;
use crate::agent::ProcessRef;
use crate::container::{Bundle, Container, hook_state};
use crate::hooks;
use crate::io::{EngineStreams, Relay};
use crate::machine::Machine;
use crate::process::{Process, lock};
use crate::sandbox::{CreateRequest, Event, Sandbox};
use kata_hypervisor::DeviceId;
use kata_oci::{Spec, State, Status};
use kata_protocol::agent as message;
use std::sync::Arc;

/// A container that is being built.
struct New<'a> {
    machine: &'a Arc<Machine>,
    bundle: &'a Bundle,
    process: &'a Process,
    /// What hooks are told.
    state: State,
    stdio: message::Stdio,
}

impl New<'_> {
    /// They find the sandbox's processes in its cgroup.
    async fn run_hooks(&self) -> Result<(), SandboxError> {
        self.machine.joined().await?;
        let hooks = self.bundle.hooks();
        hooks::run("prestart", &hooks.prestart, &self.state).await?;
        hooks::run("createRuntime", &hooks.create_runtime, &self.state).await
    }

    /// Whether the guest would have nothing to do while hooks run, and need not wait for them.
    fn need_not_wait(&self) -> bool {
        let Self { machine, bundle, .. } = self;
        machine.is_awake()
            && bundle.id == *machine.first_container()
            && !sets_up_network(&bundle.spec)
    }
}

/// Whether a container has settings of interfaces, which may come with the hooks only. What is
/// said of the whole network is not: engines say some of that for every container.
fn sets_up_network(spec: &Spec) -> bool {
    let names_interface = |name: &String| {
        let mut parts = name.split(['.', '/']);
        parts.next() == Some("net")
            && parts.any(|part| part == "conf" || part == "neigh")
            && !parts.next().is_some_and(|name| matches!(name, "all" | "default" | "lo"))
    };
    spec.linux().sysctl.keys().any(names_interface)
}

impl Sandbox {
    /// Builds a container in a machine that was started. What fails leaves nothing of it.
    pub(crate) async fn create_in(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        mut bundle: Bundle,
        request: CreateRequest,
    ) -> Result<i32, SandboxError> {
        let mut disk = None;
        if bundle.in_guest && bundle.plan.disk.is_some() {
            // A guest that is still looking for its devices might miss it.
            machine.ready().await?;
            disk = machine.plug_root(&mut bundle).await?;
        }
        let attached: Vec<_> = bundle.plan.attachments.iter().map(|a| a.at.clone()).collect();
        let built = self.build_in(machine, bundle, request, disk.clone()).await;
        if built.is_err() && !machine.is_over() {
            // The pod lives on, without what this container would have had.
            machine.detach(&attached);
            if let Some(disk) = &disk {
                machine.unplug(disk).await;
            }
        }
        built
    }

    async fn build_in(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        bundle: Bundle,
        mut request: CreateRequest,
        disk: Option<DeviceId>,
    ) -> Result<i32, SandboxError> {
        let pid = request.stand_in.unwrap_or_else(|| machine.pid());
        if let Some(pid) = request.stand_in {
            self.record_stand_in(pid)?;
            machine.adopt(pid).await;
        }
        let state = hook_state(&bundle.id, &bundle.path, &bundle.spec, Status::Creating, pid);
        let reference = ProcessRef { container: bundle.id.clone(), exec: None };
        let process = Process::new(reference, pid, &request.stdio);
        let stdio = request.stdio.message();
        let streams = std::mem::take(&mut request.stdio.streams);
        let new = New { machine, bundle: &bundle, process: &process, state, stdio };
        if !bundle.in_guest {
            tokio::try_join!(new.run_hooks(), machine.ready())?;
            machine.follow_engine().await?;
            machine.mark("hooks and network");
        } else if new.need_not_wait() {
            self.make_beside_hooks(&new, streams).await?;
        } else {
            self.make_after_hooks(&new, streams).await?;
        }
        machine.mark("container created");
        let container = Arc::new(Container::new(bundle, process, disk));
        if container.in_guest {
            self.follow(machine, &container, Arc::clone(&container.init));
        }
        self.emit(Event::Created {
            container: container.id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            paths: request.stdio.paths,
            terminal: request.stdio.terminal,
            pid,
        });
        lock(&self.containers).insert(container.id.clone(), container);
        Ok(pid)
    }

    /// The guest makes the container when the engine's hooks have run.
    async fn make_after_hooks(
        &self,
        new: &New<'_>,
        streams: EngineStreams,
    ) -> Result<(), SandboxError> {
        let prepare = async {
            new.machine.attach(&new.bundle.plan.attachments).await?;
            new.run_hooks().await
        };
        tokio::try_join!(prepare, new.machine.ready())?;
        let network = new.machine.network_change().await?;
        new.machine.mark("hooks and network");
        self.hand_over(new, streams, network).await
    }

    /// The guest makes the container while the engine's hooks run.
    async fn make_beside_hooks(
        &self,
        new: &New<'_>,
        streams: EngineStreams,
    ) -> Result<(), SandboxError> {
        let make = async {
            let machine = new.machine;
            tokio::try_join!(machine.attach(&new.bundle.plan.attachments), machine.ready())?;
            self.hand_over(new, streams, None).await
        };
        tokio::try_join!(new.run_hooks(), make)?;
        new.machine.mark("hooks and container");
        new.machine.follow_engine().await
    }

    async fn hand_over(
        &self,
        new: &New<'_>,
        streams: EngineStreams,
        network: Option<message::Network>,
    ) -> Result<(), SandboxError> {
        let New { machine, bundle, process, .. } = new;
        process.set_relay(Relay::start(machine.channel(), &bundle.id, None, streams).await?);
        self.make_room(machine, &bundle.id, bundle.spec.linux().resources.as_ref()).await;
        machine.create(bundle, new.stdio.clone(), network).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_interfaces_wait_for_the_network() {
        let spec = |sysctl: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"linux":{{"sysctl":{sysctl}}}}}"#
            );
            Spec::parse(text.as_bytes()).unwrap()
        };
        assert!(sets_up_network(&spec(r#"{"net.ipv4.conf.eth0.forwarding":"1"}"#)));
        assert!(sets_up_network(&spec(r#"{"net/ipv6/neigh/eth0.1/gc_stale_time":"1"}"#)));
        assert!(!sets_up_network(&spec(r#"{"net.ipv4.ip_unprivileged_port_start":"0"}"#)));
        assert!(!sets_up_network(&spec(r#"{"net.ipv4.conf.all.forwarding":"1"}"#)));
        assert!(!sets_up_network(&spec(r#"{"kernel.msgmax":"65536"}"#)));
        assert!(!sets_up_network(&spec("{}")));
    }
}
