//! Machines that go on where another one stands still: its monitor is forked.
//!
//! Under TCG most of a clone's start is to translate what its template had translated: the
//! guest's code, which no snapshot has. A fork inherits it. The machine that is forked, the
//! [`Stem`], is a clone with memory of its own that has met its agent and left it again. Its share
//! is mounted nowhere any more. A fork has another one in its place: by virtio-fs another devices
//! process is behind the connection, by 9p another file system below the directory. What else a
//! fork has of its own is what leads to its server (sockets, taps) and what QEMU keeps for itself
//! (`kata_fork`).
//!
//! The fork has the jail of the stem, in namespaces of its own, and less: of 9p's capabilities
//! it has those over files, but cannot make devices, which takes the host's own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::process::ExitStatus;
use std::sync::Arc;

use kata_fork::{Forked, Frozen, Memory, Plan, Touches};
use kata_jail::{Capability, Child};
use kata_pager::{Origin, Pager};

use super::args::{Numbers, name};
use super::cage::{FOR_9P, SHARE};
use super::ends::{Ends, TheirEnds};
use super::{Ports, Qemu};
use crate::Hypervisor;
use crate::config::{Machine, Nic, Share, VmConfig};
use crate::error::{HypervisorError, host};
use crate::snapshot::{self, Copying, ForkMemory, ForkOrder, Start, StemMemory};

/// Number of standard error.
const STDERR: RawFd = 2;
/// Longest name of a fork's machine.
const NAME_ROOM: usize = 160;

/// A machine that stands still, to be forked.
///
/// All calls have to be made by the thread that made it stand still.
#[derive(Debug)]
pub struct Stem {
    /// Before the monitor, which learns of its end by this.
    frozen: Frozen,
    qemu: Qemu,
    memory: StemMemory,
    /// What a fork's descriptors stand for, in the order in which they come.
    numbers: Vec<RawFd>,
    /// Where 9p has the share.
    root: Option<RawFd>,
    name: String,
}

impl Stem {
    /// The name of a machine that is to stand still: it has room for that of any fork.
    pub fn name() -> String {
        format!("stem{}", "-".repeat(NAME_ROOM))
    }

    /// Brings a machine to a stand, which has stopped, and whose agent has left the share and
    /// waits for another connection. What serves the share must not end before: from then on the
    /// monitor learns of nothing. `template` is the memory that it was cloned from.
    ///
    /// # Errors
    /// It is no clone with memory of its own, or its monitor cannot be forked.
    pub fn new(mut qemu: Qemu, template: BorrowedFd<'_>) -> Result<Self, HypervisorError> {
        let memory = qemu.memory.take();
        let memory = memory.ok_or(HypervisorError::State("no clone with a copy of its memory"))?;
        let running = qemu.running()?;
        let numbers = running.numbers.clone();
        let thin_out = || snapshot::give_back_zeros(memory.as_fd());
        let frozen = Frozen::freeze(running.child.pid(), memory.as_fd(), thin_out)?;
        let root = root_of_9p(frozen.pid()).map_err(host("find the share of a monitor"))?;
        let sockets = [Some(numbers.qmp), Some(numbers.console), numbers.agent, Some(STDERR)];
        let devices = numbers.taps.into_iter().chain(numbers.share);
        let numbers = sockets.into_iter().flatten().chain(devices).collect();
        let memory = StemMemory::new(memory, template).map_err(host("compare memory"))?;
        Ok(Self { frozen, qemu, memory, numbers, root, name: name(&Self::name()) })
    }

    /// Its memory, from which a fork's is copied.
    pub fn memory(&self) -> &StemMemory {
        &self.memory
    }

    /// Whether it still stands; none of its forks lives if not.
    pub fn stands(&self) -> bool {
        self.frozen.stands()
    }

    /// Makes a monitor with these descriptors, which come from [`Qemu::order`].
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub fn fork(
        &self,
        id: &str,
        memory: ForkMemory,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Forked, HypervisorError> {
        // What else there is are its own memory and the pager's device.
        let more = fds.split_off(self.numbers.len().min(fds.len()));
        let memory = match (memory, more.as_slice()) {
            (ForkMemory::Private, []) => Some(Memory::Private),
            (ForkMemory::Copied, [own]) => Some(Memory::Shared(own.as_fd())),
            (ForkMemory::Touched, [own, device]) => {
                Some(Memory::Touched { file: own.as_fd(), device: device.as_fd() })
            }
            _ => None,
        };
        let memory = memory.filter(|_| fds.len() == self.numbers.len());
        let memory = memory
            .ok_or(HypervisorError::Config("a fork needs a descriptor for each of the stem's"))?;
        let given: Vec<_> = self.numbers.iter().copied().zip(fds.iter().map(AsFd::as_fd)).collect();
        let emptied: Vec<_> = self.root.iter().map(|root| (*root, SHARE)).collect();
        // Devices are made by the host's own root only.
        let needed = self.root.iter().flat_map(|_| FOR_9P);
        let kept = needed.filter(|capability| *capability != Capability::Mknod);
        let plan = Plan {
            given: &given,
            emptied: &emptied,
            memory,
            argument: (&self.name, &name(id)),
            capabilities: kept.fold(0, |all, capability| all | 1 << capability as u64),
        };
        Ok(self.frozen.fork(&plan)?)
    }

    /// How a fork ended, if it has.
    ///
    /// # Errors
    /// The machine that stands still has ended.
    pub fn reap(&self, forked: &Forked) -> Result<Option<ExitStatus>, HypervisorError> {
        Ok(self.frozen.reap(forked)?)
    }

    /// The monitor that stands still.
    pub fn pid(&self) -> i32 {
        self.qemu.pid()
    }

    /// Ends it, and all its forks; returns when it is gone.
    pub async fn end(self) {
        let Self { frozen, qemu, .. } = self;
        qemu.watch.expect_end();
        drop(frozen);
        qemu.exited().wait().await;
    }
}

/// A machine whose monitor is being forked.
#[derive(Debug)]
pub(super) struct Ordered {
    config: VmConfig,
    ends: Ends,
    filling: Filling,
}

/// How the memory comes to hold what the stem's does.
#[derive(Debug)]
enum Filling {
    /// It is what the stem's is, until the machine writes to it.
    None,
    /// It is being copied. Until the machine goes on nobody looks at it: its processors stand
    /// still, it takes no frame, and nobody speaks with its agent yet.
    Copied(Copying),
    /// What will be touched soon is, too; the rest is from this, when it is touched.
    Touched(Copying, Origin),
}

/// Where the monitor's 9p server begins to look for files, if it has one.
fn root_of_9p(pid: i32) -> std::io::Result<Option<RawFd>> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        if std::fs::read_link(entry.path())?.as_os_str() == SHARE {
            return Ok(entry.file_name().to_str().and_then(|name| name.parse().ok()));
        }
    }
    Ok(None)
}

impl Qemu {
    /// Begins the start of a machine as a fork: what the keeper of its stem is to be asked, to
    /// have [`Stem::fork`] done. [`Qemu::forked`] goes on with what comes of it.
    ///
    /// # Errors
    /// It is to be none, or the host refuses what it needs.
    pub async fn order(&mut self) -> Result<ForkOrder, HypervisorError> {
        let mut config = self.config.take().ok_or(HypervisorError::State("started already"))?;
        let Start::Fork { from, memory } = std::mem::take(&mut config.start) else {
            return Err(HypervisorError::State("none that is forked"));
        };
        if config.id.len() > NAME_ROOM {
            return Err(HypervisorError::Config("a fork's name has at most 160 characters"));
        }
        let (ends, theirs) = Ends::new(&config.channel)?;
        let TheirEnds { qmp, console, agent, stderr } = theirs;
        let mut fds: Vec<OwnedFd> =
            [Some(qmp), Some(console), agent, Some(stderr)].into_iter().flatten().collect();
        for Nic { tap, .. } in std::mem::take(&mut config.nics) {
            ready(&tap).map_err(host("set up a tap for a fork"))?;
            fds.push(tap);
        }
        if let Some(Share::VhostUserFs { socket, .. }) = config.share.take() {
            fds.push(socket);
        }
        let mut begin = |what| {
            let own = snapshot::guest_memory(config.memory_mib)?;
            let copying = Copying::begin(what, own.try_clone()?);
            fds.push(own);
            Ok::<_, std::io::Error>(copying)
        };
        let StemMemory { whole, lively } = from;
        let filling = match memory {
            ForkMemory::Private => Filling::None,
            ForkMemory::Copied => Filling::Copied(begin(whole).map_err(host("make memory"))?),
            ForkMemory::Touched => {
                let copying = begin(lively).map_err(host("make memory"))?;
                fds.push(kata_pager::device().map_err(host("open /dev/userfaultfd"))?);
                Filling::Touched(copying, Origin::new(whole))
            }
        };
        let id = config.id.clone();
        self.ordered = Some(Ordered { config, ends, filling });
        Ok(ForkOrder { id, memory, fds })
    }

    /// Lets the machine of a monitor that was forked go on. To what serves a share by vhost-user
    /// has been said by then what a monitor says only once.
    ///
    /// # Errors
    /// None was ordered, or the monitor refuses.
    pub async fn forked(
        &mut self,
        child: Child,
        touches: Option<Touches>,
    ) -> Result<(), HypervisorError> {
        let ordered = self.ordered.take().ok_or(HypervisorError::State("not ordered"))?;
        let Ordered { config, ends, filling } = ordered;
        tracing::debug!(id = config.id, pid = child.pid(), "qemu forked");
        // It has been spoken with before.
        let (_, up) = tokio::sync::watch::channel(true);
        let count = if self.machine == Machine::Q35 { config.hotplug_ports } else { 0 };
        let ports = Ports { count, vhost_net: false, numbers: Numbers::default() };
        self.follow(Arc::new(child), ends, up, ports)?;
        self.reached("monitor forked");
        if self.shared_memory {
            // The stem's, with another connection.
            self.running()?.reserve_for_share()?;
        }
        let copying = match (filling, touches) {
            (Filling::None, None) => None,
            (Filling::Copied(copying), None) => Some(copying),
            (Filling::Touched(copying, origin), Some(touches)) => {
                self.serve(config.id, origin, touches)?;
                Some(copying)
            }
            _ => return Err(HypervisorError::State("forked with other memory than was ordered")),
        };
        if let Some(copying) = copying {
            copying.done().await?;
            self.reached("memory copied");
        }
        self.resume().await
    }

    /// From now on memory that the machine touches is copied.
    fn serve(
        &mut self,
        id: String,
        origin: Origin,
        touches: Touches,
    ) -> Result<(), HypervisorError> {
        let Touches { faults, pieces } = touches;
        let running = self.running()?;
        let child = Arc::clone(&running.child);
        let failed = move |error| {
            tracing::error!(sandbox = id, %error,
                "memory of the virtual machine cannot be copied any more: it is ended");
            let _ = child.kill(libc::SIGKILL);
        };
        let pager = Pager::start(faults, origin, pieces, failed);
        running.pager = Some(Arc::new(pager.map_err(host("copy memory when it is touched"))?));
        Ok(())
    }

    /// Copies what has not been touched yet: before who shares the memory is told of it anew,
    /// while it works, and might look before it is told of missing pages.
    pub(super) async fn complete(&mut self) -> Result<(), HypervisorError> {
        const STEP: &str = "copy the rest of the memory";
        let Some(pager) = self.running()?.pager.clone() else { return Ok(()) };
        let completed = tokio::task::spawn_blocking(move || pager.complete()).await;
        completed.map_err(host(STEP))?.map_err(host(STEP))
    }
}

/// Sets a tap up as QEMU has set up the one that this one stands for: it asks the guest's
/// driver, which is Linux's, and takes all of these.
fn ready(tap: &OwnedFd) -> std::io::Result<()> {
    /// Length of the header before each frame (virtio 1.2, 5.1.6: with `num_buffers`).
    const HEADER: libc::c_int = 12;
    /// Checksums, and segments of TCP over IPv4 and IPv6, with congestion marks.
    const OFFLOADS: libc::c_uint =
        libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    // SAFETY: the first reads an int, which lives; the second takes a number.
    let set = unsafe {
        let header = HEADER;
        match libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) {
            0 => libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(OFFLOADS)),
            failed => failed,
        }
    };
    if set < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
