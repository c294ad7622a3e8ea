//! One container of a sandbox: its specification and its processes.

use crate::agent::ProcessRef;
use crate::process::{Process, lock};
use crate::sandbox::CreateRequest;
use crate::{PodRole, SandboxError};
use kata_config::Limits;
use kata_hypervisor::DeviceId;
use kata_oci::{Hooks, Resources, Spec, State, Status};
use kata_protocol::Id;
use kata_storage::{Plan, Pod};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Containers of this sandbox so far: an engine may create one of the same name again.
static CREATED: AtomicU64 = AtomicU64::new(0);

/// A bundle that was read and checked; nothing has been created for it yet.
pub(crate) struct Bundle {
    pub id: Id,
    pub path: PathBuf,
    pub spec: Spec,
    pub plan: Plan,
    /// Its part of the share.
    pub share: PathBuf,
    /// It is a container of the guest; not so what only stands for a pod.
    pub in_guest: bool,
}

impl Bundle {
    /// Reads `config.json` of the bundle that is asked for.
    /// `pod` is what it joins.
    pub(crate) fn load(request: &CreateRequest, pod: Option<&Pod>) -> Result<Self, SandboxError> {
        let CreateRequest { id, bundle: path, .. } = request;
        let config = path.join("config.json");
        let raw = std::fs::read(&config)
            .map_err(|source| SandboxError::Bundle { path: config, source })?;
        let spec = Spec::parse(&raw)?;
        let path = path
            .canonicalize()
            .map_err(|source| SandboxError::Bundle { path: path.to_owned(), source })?;
        let share = PathBuf::from(format!("{id}.{}", CREATED.fetch_add(1, Ordering::Relaxed)));
        let plan = kata_storage::plan(id, &share, &path, &spec, &request.rootfs, pod)?;
        // Where a stand-in is the engine's process, the engine may join what is inside it.
        let pod = PodRole::of(&spec.annotations)? == PodRole::Sandbox;
        let in_guest = !pod || request.stand_in.is_some();
        Ok(Self { id: id.clone(), path, spec, plan, share, in_guest })
    }

    pub(crate) fn hooks(&self) -> Hooks {
        self.spec.hooks.clone().unwrap_or_default()
    }
}

/// A container.
pub(crate) struct Container {
    pub id: Id,
    pub bundle: PathBuf,
    pub spec: Spec,
    /// Where its root and volumes are in the share.
    pub attached: Vec<PathBuf>,
    /// It is a container of the guest.
    pub in_guest: bool,
    /// The plugged disk that is its root.
    pub disk: Option<DeviceId>,
    pub init: Arc<Process>,
    /// As its engine last said.
    resources: Mutex<Resources>,
    execs: Mutex<BTreeMap<Id, Arc<Process>>>,
    paused: AtomicBool,
    oom_killed: AtomicBool,
}

impl Container {
    pub(crate) fn new(bundle: Bundle, init: Process, disk: Option<DeviceId>) -> Self {
        let resources = bundle.spec.linux().resources.clone().unwrap_or_default();
        Self {
            resources: Mutex::new(resources),
            id: bundle.id,
            bundle: bundle.path,
            spec: bundle.spec,
            attached: bundle.plan.attachments.into_iter().map(|a| a.at).collect(),
            in_guest: bundle.in_guest,
            disk,
            init: Arc::new(init),
            execs: Mutex::default(),
            paused: AtomicBool::new(false),
            oom_killed: AtomicBool::new(false),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits::of_container(Some(&lock(&self.resources)))
    }

    pub(crate) fn resources(&self) -> Resources {
        lock(&self.resources).clone()
    }

    pub(crate) fn set_resources(&self, resources: Resources) {
        *lock(&self.resources) = resources;
    }

    /// Adds an exec; refused when its id is taken or there are too many.
    pub(crate) fn add(&self, exec: &Id, process: Process) -> Result<(), SandboxError> {
        let mut execs = lock(&self.execs);
        if execs.contains_key(exec) {
            return Err(SandboxError::Exists(format!("process {exec} of container {}", self.id)));
        }
        if execs.len() >= kata_protocol::limits::PROCESSES {
            return Err(SandboxError::Unsupported("more than 1024 execs at once in one container"));
        }
        execs.insert(exec.clone(), Arc::new(process));
        Ok(())
    }

    pub(crate) fn process(&self, exec: Option<&Id>) -> Result<Arc<Process>, SandboxError> {
        let Some(exec) = exec else { return Ok(Arc::clone(&self.init)) };
        lock(&self.execs).get(exec).cloned().ok_or_else(|| SandboxError::NoProcess {
            container: self.id.to_string(),
            exec: exec.to_string(),
        })
    }

    pub(crate) fn remove(&self, exec: &Id) {
        lock(&self.execs).remove(exec);
    }

    /// The first process and all execs.
    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let mut all = vec![Arc::clone(&self.init)];
        all.extend(lock(&self.execs).values().cloned());
        all
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    pub(crate) fn set_oom_killed(&self) {
        self.oom_killed.store(true, Ordering::Relaxed);
    }

    /// The name of the process `exec` of this container.
    pub(crate) fn reference(&self, exec: Option<&Id>) -> ProcessRef {
        ProcessRef { container: self.id.clone(), exec: exec.cloned() }
    }
}

/// The state that hooks read.
pub(crate) fn hook_state(id: &Id, bundle: &Path, spec: &Spec, status: Status, pid: i32) -> State {
    State {
        oci_version: spec.oci_version.clone(),
        id: id.to_string(),
        status,
        pid,
        bundle: bundle.to_owned(),
        annotations: spec.annotations.clone(),
    }
}
