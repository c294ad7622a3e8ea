//! What happens to the processes of a sandbox between their creation and their deletion:
//! they start, get signals, are paused, end. Events leave in the order in which an engine
//! expects them: a start before its exit, each exit once.

use crate::agent::ProcessRef;
use crate::container::{Container, hook_state};
use crate::io::Relay;
use crate::machine::Machine;
use crate::process::{Exit, Process, ProcessStatus, Stdio, lock};
use crate::resize::updated;
use crate::sandbox::{Event, ProcessState, Sandbox};
use crate::{SandboxError, hooks};
use kata_oci::Status;
use kata_protocol::{Id, chain};
use std::sync::Arc;
use std::time::SystemTime;

impl Sandbox {
    /// Starts a created container, or an exec. Returns its host pid.
    ///
    /// # Errors
    /// See [`SandboxError`]; a command that cannot be executed leaves the process ended.
    pub async fn start(self: &Arc<Self>, process: &ProcessRef) -> Result<i32, SandboxError> {
        let container = self.container(&process.container)?;
        let machine = self.machine().await?;
        let found = container.process(process.exec.as_ref())?;
        {
            let _in_order = found.order().await;
            if found.status() != ProcessStatus::Created {
                return Err(SandboxError::WrongState {
                    what: "start",
                    id: process.container.to_string(),
                    state: status_word(found.status()),
                });
            }
            match &process.exec {
                None => self.start_init(&machine, &container).await?,
                Some(exec) => self.start_exec(&machine, &container, exec, &found).await?,
            }
            self.emit(Event::Started { process: process.clone(), pid: found.pid });
        }
        if process.exec.is_none() {
            self.started(&machine, &container).await;
        }
        Ok(found.pid)
    }

    async fn start_init(
        &self,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
    ) -> Result<(), SandboxError> {
        // Engines may connect the network between create and start.
        let network = machine.network_change().await?;
        let started = if container.in_guest {
            machine.call(machine.agent().start(&container.id, network)).await
        } else if let Some(network) = network {
            machine.call(machine.agent().configure_network(&network)).await
        } else {
            Ok(())
        };
        if let Err(error) = started {
            return Err(machine.explain(error).await);
        }
        container.init.running();
        Ok(())
    }

    /// What follows the start of a container.
    async fn started(&self, machine: &Arc<Machine>, container: &Container) {
        machine.mark("container started");
        machine.has_started();
        machine.watch_network();
        let hooks = container.spec.hooks.clone().unwrap_or_default();
        let state = hook_state(
            &container.id,
            &container.bundle,
            &container.spec,
            Status::Running,
            container.init.pid,
        );
        if let Err(error) = hooks::run("poststart", &hooks.poststart, &state).await {
            // The specification: a failing poststart hook is logged, the container runs on.
            tracing::warn!(sandbox = %self.id(), container = %container.id, error = %chain(&error), "hook failed");
        }
    }

    async fn start_exec(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        exec: &Id,
        process: &Arc<Process>,
    ) -> Result<(), SandboxError> {
        let Some(mut pending) = process.take_pending() else {
            return Err(SandboxError::WrongState {
                what: "start",
                id: exec.to_string(),
                state: "being started",
            });
        };
        let mut message = pending.stdio.message();
        if let Some((rows, columns)) = process.take_size() {
            (message.rows, message.columns) = (rows, columns);
        }
        let streams = std::mem::take(&mut pending.stdio.streams);
        let relay = Relay::start(machine.channel(), &container.id, Some(exec), streams).await?;
        process.set_relay(relay);
        let reference = container.reference(Some(exec));
        if process.pid != container.init.pid {
            machine.adopt(process.pid).await;
        }
        let begin = machine.agent().exec(&reference, &pending.spec, message);
        let (begun, joined) = tokio::join!(machine.call(begin), machine.joined());
        if let Err(error) = joined {
            // The process runs, and is limited, in the guest: it is only not all counted.
            tracing::warn!(sandbox = %machine.sandbox(), exec = %exec, error = %chain(&error),
                "a process of the host that stands for an exec is outside of the sandbox's cgroup");
        }
        if let Err(error) = begun {
            process.exited(Exit { code: 127, at: SystemTime::now() });
            return Err(machine.explain(error).await);
        }
        process.running();
        // One that came while the guest was starting it.
        if let Some((rows, columns)) = process.take_size() {
            // It keeps the one it has otherwise.
            let _ = machine.agent().resize(&reference, rows, columns).await;
        }
        self.follow(machine, container, Arc::clone(process));
        Ok(())
    }

    /// Makes an exec known; [`Sandbox::start`] runs it.
    ///
    /// # Errors
    /// The container is not running, the process object is bad, or the id is taken.
    pub fn exec(
        &self,
        process: &ProcessRef,
        spec: &[u8],
        stdio: Stdio,
        stand_in: Option<i32>,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let exec = process.exec.as_ref().ok_or(SandboxError::Unsupported("an exec without id"))?;
        let spec = kata_oci::Process::parse(spec)?;
        if !container.in_guest {
            return Err(SandboxError::Unsupported("an exec in a pod's sandbox container"));
        }
        if container.init.status() != ProcessStatus::Running || container.is_paused() {
            let paused = container.is_paused();
            return Err(SandboxError::WrongState {
                what: "exec in",
                id: container.id.to_string(),
                state: if paused { "paused" } else { status_word(container.init.status()) },
            });
        }
        if let Some(pid) = stand_in {
            self.record_stand_in(pid)?;
        }
        let pid = stand_in.unwrap_or(container.init.pid);
        container.add(exec, Process::pending(process.clone(), pid, spec, stdio))?;
        self.emit(Event::ExecAdded { process: process.clone() });
        Ok(())
    }

    /// What `state` tells about a process.
    ///
    /// # Errors
    /// There is no such process.
    pub fn process_state(&self, process: &ProcessRef) -> Result<ProcessState, SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        Ok(ProcessState {
            bundle: container.bundle.clone(),
            pid: found.pid,
            status: found.status(),
            paused: container.is_paused(),
            terminal: found.terminal,
            paths: found.paths.clone(),
        })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn wait(&self, process: &ProcessRef) -> Result<Exit, SandboxError> {
        let container = self.container(&process.container)?;
        Ok(container.process(process.exec.as_ref())?.wait().await)
    }

    /// Sends a signal to a process, or to all of its container's.
    ///
    /// # Errors
    /// There is no such process, or it has ended.
    pub async fn kill(
        &self,
        process: &ProcessRef,
        signal: u32,
        all: bool,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        if matches!(found.status(), ProcessStatus::Exited(_)) {
            if all {
                // Nobody is left to get it.
                return Ok(());
            }
            return Err(SandboxError::Finished(process.container.to_string()));
        }
        let machine = self.machine().await?;
        if !container.in_guest {
            self.signal_pod(&machine, &container, signal).await;
            return Ok(());
        }
        machine.call(machine.agent().signal(process, signal, all)).await
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// There is no such process, or it has no terminal.
    pub async fn resize(
        &self,
        process: &ProcessRef,
        rows: u32,
        columns: u32,
    ) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        let found = container.process(process.exec.as_ref())?;
        match found.status() {
            ProcessStatus::Exited(_) => return Ok(()),
            // The guest knows nothing of an exec before it has started it.
            ProcessStatus::Created if process.exec.is_some() => {
                found.note_size(rows, columns);
                return Ok(());
            }
            // A container's first process has its terminal before it runs.
            ProcessStatus::Created | ProcessStatus::Running => {}
        }
        let machine = self.machine().await?;
        machine.call(machine.agent().resize(process, rows, columns)).await
    }

    /// The process gets what is in its input, and then end of file.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, process: &ProcessRef) -> Result<(), SandboxError> {
        let container = self.container(&process.container)?;
        if let Some(relay) = container.process(process.exec.as_ref())?.relay() {
            relay.close_stdin();
        }
        Ok(())
    }

    /// The host processes that stand for the container's living ones.
    ///
    /// # Errors
    /// There is no such container.
    pub fn pids(&self, container: &Id) -> Result<Vec<i32>, SandboxError> {
        let container = self.container(container)?;
        let alive = |process: &Arc<Process>| !matches!(process.status(), ProcessStatus::Exited(_));
        Ok(container.processes().iter().filter(|p| alive(p)).map(|p| p.pid).collect())
    }

    /// What the container used.
    ///
    /// # Errors
    /// There is no such container, or the guest cannot tell.
    pub async fn stats(
        &self,
        container: &Id,
    ) -> Result<kata_protocol::agent::StatsResponse, SandboxError> {
        let container = self.container(container)?;
        let machine = self.machine().await?;
        if !container.in_guest {
            return machine.host_stats();
        }
        machine.call(machine.agent().stats(&container.id)).await
    }

    /// Changes the container's limits. The machine grows where they rise above its size.
    ///
    /// # Errors
    /// The resources are bad, or the guest refuses.
    pub async fn update(&self, container: &Id, resources: &[u8]) -> Result<(), SandboxError> {
        let container = self.container(container)?;
        let update = kata_oci::Resources::parse(resources)?;
        let machine = self.machine().await?;
        if !container.in_guest {
            return Err(SandboxError::Unsupported("a change of limits of a pod as a whole"));
        }
        let limits = updated(&container.resources(), &update);
        self.make_room(&machine, &container.id, Some(&limits)).await;
        let in_guest = kata_storage::guest_resources(update);
        machine.call(machine.agent().update(&container.id, &in_guest)).await?;
        container.set_resources(limits);
        Ok(())
    }

    /// Freezes the container's processes, or lets them go on.
    ///
    /// # Errors
    /// There is no such container, it is not running, or the guest refuses.
    pub async fn set_paused(&self, container: &Id, paused: bool) -> Result<(), SandboxError> {
        let container = self.container(container)?;
        let what = if paused { "pause" } else { "resume" };
        let wrong = |state| SandboxError::WrongState { what, id: container.id.to_string(), state };
        if container.init.status() != ProcessStatus::Running {
            return Err(wrong(status_word(container.init.status())));
        }
        if container.is_paused() == paused {
            return Err(wrong(if paused { "paused" } else { "not paused" }));
        }
        if !container.in_guest {
            return Err(SandboxError::Unsupported("pausing a pod's sandbox container"));
        }
        let machine = self.machine().await?;
        if paused {
            machine.call(machine.agent().pause(&container.id)).await?;
        } else {
            machine.call(machine.agent().resume(&container.id)).await?;
        }
        container.set_paused(paused);
        self.emit(Event::Paused { container: container.id.clone(), paused });
        Ok(())
    }

    /// Follows a process to its end, and tells everybody.
    pub(crate) fn follow(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        container: &Arc<Container>,
        process: Arc<Process>,
    ) {
        let (sandbox, machine, container) =
            (Arc::clone(self), Arc::clone(machine), Arc::clone(container));
        tokio::spawn(async move {
            let ended = machine.call(machine.agent().wait(&process.reference)).await;
            let code = match ended {
                Ok(ended) => {
                    if ended.oom_killed && process.reference.exec.is_none() {
                        container.set_oom_killed();
                    }
                    if let Some(relay) = process.relay() {
                        relay.end_input();
                        tokio::select! {
                            () = relay.delivered(ended.stdout_bytes, ended.stderr_bytes) => {}
                            _cause = machine.lost() => {}
                        }
                    }
                    ended.code
                }
                Err(_lost) => crate::LOST,
            };
            {
                // An engine hears of the start first.
                let _in_order = process.order().await;
                sandbox.ended(&process, Exit { code, at: SystemTime::now() });
            }
            // The sandbox ends with its first container; what it holds is given back at once.
            if process.reference.exec.is_none() && container.id == *machine.first_container() {
                machine.stop().await;
            }
        });
    }

    /// Ends every process when the machine is lost, and reports memory exhaustion.
    pub(crate) fn watch(self: &Arc<Self>, machine: &Arc<Machine>) {
        let (sandbox, lost) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            let cause = lost.lost().await;
            if !lost.is_stopping() {
                tracing::error!(sandbox = %sandbox.id(), %cause, "the sandbox is lost");
            }
            let containers: Vec<_> = lock(&sandbox.containers).values().cloned().collect();
            let exit = Exit { code: crate::LOST, at: SystemTime::now() };
            for process in containers.iter().flat_map(|container| container.processes()) {
                sandbox.ended(&process, exit);
            }
            lost.stop().await;
        });
        let (sandbox, machine) = (Arc::clone(self), Arc::clone(machine));
        tokio::spawn(async move {
            if machine.ready().await.is_err() {
                return;
            }
            // While nobody asks for a container yet. Who does is told what went wrong.
            let _ = machine.mounted().await;
            while let Ok(container) = machine.call(machine.agent().next_oom()).await {
                sandbox.emit(Event::OutOfMemory { container });
            }
        });
    }

    /// A process has ended; the first to say so is heard.
    fn ended(&self, process: &Process, exit: Exit) {
        // Nobody waits for an exec that was never started.
        let unheard =
            process.reference.exec.is_some() && process.status() == ProcessStatus::Created;
        if process.exited(exit) && !unheard {
            let reference = process.reference.clone();
            self.emit(Event::Exit { process: reference, pid: process.pid, exit });
        }
    }

    /// A signal for the container that stands for a pod. There is no such process: what
    /// would end it ends the pod's machine.
    async fn signal_pod(&self, machine: &Arc<Machine>, container: &Container, signal: u32) {
        let Some(code) = pause_exit(signal) else { return };
        self.ended(&container.init, Exit { code, at: SystemTime::now() });
        machine.stop().await;
    }
}

/// How the process that usually stands for a pod ends by a signal; none if it does not.
fn pause_exit(signal: u32) -> Option<u8> {
    let is = |known: i32| u32::try_from(known) == Ok(signal);
    if [libc::SIGTERM, libc::SIGINT].into_iter().any(is) {
        return Some(0);
    }
    let ignored = [0, libc::SIGCHLD, libc::SIGCONT, libc::SIGWINCH, libc::SIGURG];
    if ignored.into_iter().any(is) {
        return None;
    }
    u8::try_from(signal).ok().map(|signal| signal.saturating_add(128))
}

pub(crate) fn status_word(status: ProcessStatus) -> &'static str {
    match status {
        ProcessStatus::Created => "created",
        ProcessStatus::Running => "running",
        ProcessStatus::Exited(_) => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_ends_by_the_signals_that_end_its_pause_process() {
        assert_eq!(pause_exit(9), Some(137));
        assert_eq!(pause_exit(15), Some(0));
        assert_eq!(pause_exit(17), None);
        assert_eq!(pause_exit(28), None);
    }
}
