//! One cgroup.

use crate::{CgroupError, Hierarchy, Stats, devices, file, hierarchy, kill, stats, v1, v2};
use kata_oci::Resources;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Controllers a v2 cgroup is given, as far as there are any.
const V2_CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"];

/// One cgroup: a directory in the v2 tree, or one of the same name in every v1 tree.
///
/// It is not removed when dropped, since it outlives the process that made it:
/// [`Cgroup::delete`] does that, from its path alone if need be ([`Cgroup::open`]).
#[derive(Clone, Debug)]
pub struct Cgroup {
    hierarchy: Hierarchy,
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup at `path`, which is relative to the root of the tree, and those
    /// above it; one that is there already is taken as it is.
    ///
    /// In a v2 tree every controller that can be is enabled on the way; whether one is
    /// missing shows when a limit needs it.
    ///
    /// # Errors
    /// When the path is not acceptable, or the kernel refuses.
    pub fn create(hierarchy: &Hierarchy, path: &str) -> Result<Self, CgroupError> {
        let cgroup = Self::open(hierarchy, path)?;
        for root in hierarchy.roots() {
            // Beside v1 the v2 tree is for freezing and killing only, and is left as it is.
            let limits = matches!(hierarchy, Hierarchy::V2 { .. });
            let cpuset = hierarchy.v1_root("cpuset") == Some(root);
            let mut dir = root.to_owned();
            for part in &cgroup.path {
                if limits {
                    enable_controllers(&dir);
                }
                let parent = dir.clone();
                dir.push(part);
                file::mkdir(&dir)?;
                if cpuset {
                    v1::inherit_cpuset(&parent, &dir)?;
                }
            }
        }
        Ok(cgroup)
    }

    /// Names the cgroup at `path` without touching it.
    ///
    /// # Errors
    /// When the path is not acceptable.
    pub fn open(hierarchy: &Hierarchy, path: &str) -> Result<Self, CgroupError> {
        Ok(Self { hierarchy: hierarchy.clone(), path: hierarchy::check_path(path)? })
    }

    /// The cgroup a process is in now. It differs from the container's own when the
    /// container divided its cgroup further; then new processes have to go there, too,
    /// since v2 takes none into a cgroup whose controllers went to its children.
    ///
    /// # Errors
    /// When there is no such process, or it is in the root.
    pub fn of_process(hierarchy: &Hierarchy, pid: i32) -> Result<Self, CgroupError> {
        let text = file::read(&PathBuf::from(format!("/proc/{pid}/cgroup")))?;
        let v2 = text.lines().find_map(|line| line.strip_prefix("0::"));
        let v1 = || {
            text.lines().find_map(|line| {
                let mut fields = line.splitn(3, ':');
                let controllers = fields.nth(1)?;
                hierarchy.v1_root(controllers.split(',').next()?)?;
                fields.next()
            })
        };
        let path = match hierarchy {
            Hierarchy::V2 { .. } => v2,
            Hierarchy::V1 { .. } => v1(),
        };
        Self::open(hierarchy, path.unwrap_or("/"))
    }

    /// Path relative to the root of the tree, with a leading `/`.
    pub fn path(&self) -> String {
        format!("/{}", self.path.display())
    }

    /// Whether it is there, in any tree.
    pub fn exists(&self) -> bool {
        self.directories().iter().any(|dir| dir.is_dir())
    }

    /// Its directory in every tree.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.hierarchy.roots().into_iter().map(|root| root.join(&self.path)).collect()
    }

    /// Its directory in the v2 tree, if there is one (for `CLONE_INTO_CGROUP`).
    pub fn unified_directory(&self) -> Option<PathBuf> {
        self.hierarchy.unified().map(|root| root.join(&self.path))
    }

    /// Its directory in a v1 controller's tree.
    pub(crate) fn v1_directory(&self, controller: &str) -> Option<PathBuf> {
        self.hierarchy.v1_root(controller).map(|root| root.join(&self.path))
    }

    pub(crate) fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// Puts a process, with all its threads, into the cgroup; 0 is the caller.
    ///
    /// # Errors
    /// `EBUSY` beneath when the container divided the cgroup: see [`Cgroup::of_process`].
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for dir in self.directories() {
            file::write(&dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Writes the OCI resources; what they do not mention stays as it is.
    ///
    /// With `devices`, the device list replaces the one in force: anything is denied that
    /// the list (and the few devices every container has) does not allow.
    ///
    /// # Errors
    /// When a value is out of range, or a limit is asked for whose controller is missing.
    /// A missing controller that no limit needs is no error.
    pub fn apply(&self, resources: &Resources, devices: bool) -> Result<(), CgroupError> {
        match &self.hierarchy {
            Hierarchy::V2 { root } => v2::apply(&root.join(&self.path), resources)?,
            Hierarchy::V1 { .. } => v1::apply(self, resources)?,
        }
        if devices { self.apply_devices(resources) } else { Ok(()) }
    }

    fn apply_devices(&self, resources: &Resources) -> Result<(), CgroupError> {
        let rules = devices::rules(&resources.devices)?;
        match (&self.hierarchy, self.v1_directory("devices")) {
            (Hierarchy::V1 { .. }, Some(dir)) => devices::install_v1(&dir, &rules),
            (hierarchy, _) => match hierarchy.unified() {
                Some(root) => devices::install(&root.join(&self.path), &rules),
                None => Err(CgroupError::Unsupported {
                    file: "devices.deny".to_owned(),
                    value: "a".to_owned(),
                    controller: "devices".to_owned(),
                    place: self.path(),
                }),
            },
        }
    }

    /// Stops every process in the cgroup and below, and waits until all have stopped.
    ///
    /// # Errors
    /// When they do not stop in ten seconds (they are set going again), or there is no freezer.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        kill::freeze(self)
    }

    /// Lets the processes go on.
    ///
    /// # Errors
    /// When there is no freezer, or the kernel refuses.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        kill::thaw(self)
    }

    /// Whether it is frozen.
    ///
    /// # Errors
    /// When there is no freezer.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        kill::is_frozen(self)
    }

    /// Sends a signal to every process in the cgroup and below; none escapes by forking.
    ///
    /// # Errors
    /// When the cgroup is not there; that a process has ended meanwhile is no error.
    pub fn kill(&self, signal: i32) -> Result<(), CgroupError> {
        kill::kill(self, signal)
    }

    /// Processes in the cgroup and below, ascending.
    ///
    /// # Errors
    /// When the cgroup is not there.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        kill::pids(self)
    }

    /// Removes the cgroup and those below it; processes left in it are killed first,
    /// except the caller, who is put into the root. One that is not there is removed already.
    ///
    /// # Errors
    /// [`CgroupError::Busy`] names processes that would not die within two seconds.
    pub fn delete(&self) -> Result<(), CgroupError> {
        kill::delete(self)
    }

    /// Removes the cgroup and those below it if no process is in them, and waits for nothing.
    /// False: one is, and something of it is still there.
    ///
    /// # Errors
    /// It cannot be removed for another reason.
    pub fn delete_unused(&self) -> Result<bool, CgroupError> {
        kill::delete_unused(self)
    }

    /// What was used so far. Controllers that are not there count nothing.
    ///
    /// # Errors
    /// When the cgroup is not there.
    pub fn stats(&self) -> Result<Stats, CgroupError> {
        match &self.hierarchy {
            Hierarchy::V2 { root } => stats::v2(&root.join(&self.path)),
            Hierarchy::V1 { .. } => stats::v1(self),
        }
    }

    /// How many processes were killed for want of memory, in the cgroup and below.
    ///
    /// # Errors
    /// When the counter cannot be read.
    pub fn oom_kills(&self) -> Result<u64, CgroupError> {
        let text = match &self.hierarchy {
            Hierarchy::V2 { root } => {
                file::read_optional(&root.join(&self.path).join("memory.events"))?
            }
            Hierarchy::V1 { .. } => match self.v1_directory("memory") {
                Some(dir) => file::read_optional(&dir.join("memory.oom_control"))?,
                None => None,
            },
        };
        let counters = text.map(|text| file::flat_keyed(&text)).unwrap_or_default();
        Ok(counters.get("oom_kill").copied().unwrap_or(0))
    }

    /// A descriptor (close-on-exec, non-blocking) that becomes readable whenever a memory
    /// event happens; then compare [`Cgroup::oom_kills`]. v2 only.
    ///
    /// # Errors
    /// When there is no memory controller here.
    pub fn memory_events_inotify(&self) -> Result<OwnedFd, CgroupError> {
        let Hierarchy::V2 { root } = &self.hierarchy else {
            return Err(CgroupError::Unsupported {
                file: "memory.events".to_owned(),
                value: "watch".to_owned(),
                controller: "memory".to_owned(),
                place: "cgroup v1".to_owned(),
            });
        };
        inotify(&root.join(&self.path).join("memory.events"))
    }
}

/// An inotify descriptor for changes of one file.
fn inotify(path: &Path) -> Result<OwnedFd, CgroupError> {
    use std::os::unix::ffi::OsStrExt;
    let failed = || CgroupError::io("watch", path, std::io::Error::last_os_error());
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|error| CgroupError::io("watch", path, error.into()))?;
    // SAFETY: no pointers; a returned descriptor is ours alone.
    let fd = match unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) } {
        -1 => return Err(failed()),
        // SAFETY: just opened, owned by nobody else.
        fd => unsafe { OwnedFd::from_raw_fd(fd) },
    };
    use std::os::fd::AsRawFd;
    // SAFETY: `name` is a NUL-terminated string that lives through the call.
    if unsafe { libc::inotify_add_watch(fd.as_raw_fd(), name.as_ptr(), libc::IN_MODIFY) } == -1 {
        return Err(failed());
    }
    Ok(fd)
}

/// Hands every controller there is down to the children: together, because each change of
/// the tree is dear, and else one at a time, so that one which cannot be handed down (it is in
/// use by v1, or processes are in the way) keeps none back.
fn enable_controllers(dir: &Path) {
    let Ok(Some(available)) = file::read_optional(&dir.join("cgroup.controllers")) else { return };
    let control = dir.join("cgroup.subtree_control");
    let enabled = file::read(&control).unwrap_or_default();
    let missing: Vec<String> = V2_CONTROLLERS
        .iter()
        .filter(|c| {
            available.split_whitespace().any(|a| a == **c)
                && !enabled.split_whitespace().any(|e| e == **c)
        })
        .map(|controller| format!("+{controller}"))
        .collect();
    if missing.is_empty() || file::write(&control, &missing.join(" ")).is_ok() {
        return;
    }
    for controller in missing {
        if let Err(error) = file::write(&control, &controller) {
            tracing::debug!(%controller, %error, "cgroup controller not handed down");
        }
    }
}
