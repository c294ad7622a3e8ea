//! The init: a single-threaded process that becomes the container.
//!
//! The order of the steps is runc's; each that depends on a privilege comes before the
//! one that gives it up.

use super::capabilities::Sets;
use super::failure::{Context, Failure, Step};
use super::inside::Inside;
use super::labels::Labels;
use super::wire::{Channel, Config, FdRole, ToAgent, ToInit};
use super::{devices, hooks, mounts, namespaces, process, rootfs, sysctl, terminal};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{DumpableBehavior, set_dumpable_behavior, setsid, umask};
use rustix::thread::{set_keep_capabilities, set_no_new_privs};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Runs an init, whose configuration comes over `socket`. The process has one thread.
pub(super) fn init_main(socket: OwnedFd) -> ! {
    let channel = Channel::new(socket);
    let Err(failure) = run(&channel);
    let _ = channel.send(&ToAgent::Failed(failure), &[]);
    // SAFETY: ends the process; there is nothing to destroy.
    unsafe { libc::_exit(1) }
}

/// Descriptors from the agent, and the guest's null device.
struct Received {
    streams: [Option<OwnedFd>; 3],
    target: Option<OwnedFd>,
    null: OwnedFd,
}

fn run(channel: &Channel) -> Step<std::convert::Infallible> {
    let (message, fds) = channel.receive().context(|| "receive the configuration")?;
    let ToInit::Config(config) = message else {
        return Err(Failure::setup("the agent sent no configuration"));
    };
    let null = openat(CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context(|| "open /dev/null of the guest")?;
    let mut received = Received { streams: [None, None, None], target: None, null };
    for (role, fd) in config.fds.iter().zip(fds) {
        match role {
            FdRole::Stdin => received.streams[0] = Some(fd),
            FdRole::Stdout => received.streams[1] = Some(fd),
            FdRole::Stderr => received.streams[2] = Some(fd),
            FdRole::Target => received.target = Some(fd),
        }
    }
    umask(Mode::empty());
    set_oom_score(&config)?;
    let proc =
        openat(CWD, "/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .context(|| "open /proc of the guest")?;
    let labels = if config.exec {
        join(&config, &mut received, proc.as_fd(), channel)?
    } else {
        build(&config, &mut received, proc.as_fd(), channel)?
    };
    drop(proc);
    become_program(&config, received, &labels, channel)
}

/// Before a user namespace takes the right away.
fn set_oom_score(config: &Config) -> Step {
    let Some(score) = config.process.oom_score_adj else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(|| format!("set oom_score_adj to {score}"))
}

/// Builds the container around this process.
fn build(
    config: &Config,
    received: &mut Received,
    proc: BorrowedFd<'_>,
    channel: &Channel,
) -> Step<Labels> {
    let spec = &config.spec;
    let linux = spec.linux();
    namespaces::build(config, channel)?;
    setsid().context(|| "start a session")?;
    namespaces::join_keyring(&config.id, channel);
    let inside = rootfs::prepare(spec)?;
    mounts::make_all(&inside, spec)?;
    if devices::ours(spec) {
        devices::fill(&inside, spec, namespaces::has_user(&linux))?;
    }
    if config.process.terminal {
        let slave = terminal::open(&inside, config.size, true, channel)?;
        received.set_terminal(slave)?;
    } else {
        received.complete(&inside)?;
    }
    let cwd = Path::new(&config.process.cwd);
    inside.make_directory(cwd, 0o755).context(|| format!("mkdir {}", cwd.display()))?;
    set_names(config)?;
    let labels = Labels::prepare(&config.process, proc, channel)?;
    sysctl::apply(spec, proc)?;
    rootfs::close(&inside, spec)?;
    rootfs::enter(&inside, spec)?;
    Ok(labels)
}

fn set_names(config: &Config) -> Step {
    let spec = &config.spec;
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes()).context(|| "set the host name")?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .context(|| "set the domain name")?;
    }
    Ok(())
}

/// Joins the container of an exec.
fn join(
    config: &Config,
    received: &mut Received,
    proc: BorrowedFd<'_>,
    channel: &Channel,
) -> Step<Labels> {
    let Some(target) = received.target.take() else {
        return Err(Failure::setup("the agent named no container to join"));
    };
    // Until it has become the program, the container's processes may not look into this one.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "hide from the container")?;
    namespaces::join(config, target.as_fd(), channel)?;
    drop(target);
    setsid().context(|| "start a session")?;
    namespaces::join_keyring(&config.id, channel);
    let inside = Inside::at(Path::new("/")).context(|| "open the container's root")?;
    if config.process.terminal {
        let slave = terminal::open(&inside, config.size, false, channel)?;
        received.set_terminal(slave)?;
    } else {
        received.complete(&inside)?;
    }
    Labels::prepare(&config.process, proc, channel)
}

impl Received {
    /// All three streams are the terminal.
    fn set_terminal(&mut self, slave: OwnedFd) -> Step {
        let again = || slave.try_clone().context(|| "share the terminal");
        self.streams = [Some(again()?), Some(again()?), Some(slave)];
        Ok(())
    }

    /// Streams that nobody gave are the container's null device.
    fn complete(&mut self, inside: &Inside) -> Step {
        for stream in self.streams.iter_mut().filter(|stream| stream.is_none()) {
            *stream = Some(open_null(inside, &self.null)?);
        }
        Ok(())
    }
}

/// The container's null device if it is one, so that it shows under its own name, else
/// the guest's. Nothing of a hostile `/dev` is waited for.
fn open_null(inside: &Inside, of_guest: &OwnedFd) -> Step<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    if let Ok(fd) = inside.open(Path::new("/dev/null"), flags)
        && devices::is_null(fd.as_fd())
    {
        rustix::fs::fcntl_setfl(&fd, OFlags::empty()).context(|| "open /dev/null")?;
        return Ok(fd);
    }
    of_guest.try_clone().context(|| "share /dev/null")
}

/// The last steps, the same for a container's first process and for an exec.
fn become_program(
    config: &Config,
    received: Received,
    labels: &Labels,
    channel: &Channel,
) -> Step<std::convert::Infallible> {
    let process = &config.process;
    let linux = config.spec.linux();
    set_streams(received, process.terminal)?;
    if process.no_new_privileges {
        set_no_new_privs(true).context(|| "set no_new_privs")?;
    }
    process::set_priorities(process)?;
    if let Some(personality) = &linux.personality {
        process::set_personality(personality)?;
    }
    labels.apply()?;
    let capabilities = Sets::read(process.capabilities.as_ref(), channel);
    // Without no_new_privs a filter takes a capability that is given up below.
    let late = process.no_new_privileges;
    if !late && let Some(filter) = &config.filter {
        filter.install()?;
    }
    // As root first: the directory may be the user's, or only root may reach it.
    let entered = std::env::set_current_dir(&process.cwd);
    capabilities.apply_bounding()?;
    set_keep_capabilities(true).context(|| "keep the capabilities")?;
    if !namespaces::has_user(&linux) {
        process::set_limits(None, &process.rlimits)?;
    }
    process::take_identity(process, process::standard_streams())?;
    if let Err(error) = entered {
        if error.kind() != io::ErrorKind::PermissionDenied {
            return Err(error).context(|| chdir_failed(&process.cwd));
        }
        std::env::set_current_dir(&process.cwd).context(|| chdir_failed(&process.cwd))?;
    }
    set_keep_capabilities(false).context(|| "give up kept capabilities")?;
    capabilities.apply()?;
    umask(Mode::from_raw_mode(process.user.umask.unwrap_or(0o022)));
    start(config, if late { config.filter.as_ref() } else { None }, channel)
}

fn chdir_failed(cwd: &str) -> String {
    format!("chdir to cwd ({cwd:?}) set in config.json failed")
}

/// Waits for the start, and executes.
fn start(
    config: &Config,
    filter: Option<&super::seccomp::Filter>,
    channel: &Channel,
) -> Step<std::convert::Infallible> {
    let process = &config.process;
    let mut environment = process::Environment::new(&process.env)?;
    environment.complete_home(process.user.uid);
    let strings = environment.strings()?;
    let args: Vec<CString> =
        process.args.iter().map(|arg| process::c_string(arg.as_str())).collect::<Step<_>>()?;
    let program = process.args.first().map_or("", String::as_str);
    let path = process::look_up(program, &environment)?;
    channel.send(&ToAgent::Ready, &[]).context(|| "tell the agent")?;
    channel.wait_for_go().context(|| "wait for the start")?;
    if let Some(filter) = filter {
        filter.install()?;
    }
    hooks::run(config)?;
    channel.send(&ToAgent::Executing, &[]).context(|| "tell the agent")?;
    process::reset_signals();
    Err(process::execute(&path, &args, &strings))
}

/// Puts the streams at 0, 1 and 2; everything else is closed by execve.
fn set_streams(received: Received, terminal: bool) -> Step {
    for (number, stream) in received.streams.into_iter().enumerate() {
        let Some(stream) = stream else { continue };
        let what = || "set the standard streams";
        // SAFETY: both numbers are open or free; 0 to 2 belong to nobody in this process.
        let result = unsafe { libc::dup2(stream.as_raw_fd(), i32::try_from(number).unwrap_or(0)) };
        if result < 0 {
            return Err(io::Error::last_os_error()).context(what);
        }
    }
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: marks descriptors only; none is closed before execve.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, flags) } < 0 {
        return Err(io::Error::last_os_error()).context(|| "mark descriptors for closing");
    }
    if terminal {
        let [stdin, ..] = process::standard_streams();
        rustix::process::ioctl_tiocsctty(stdin).context(|| "set the controlling terminal")?;
    }
    Ok(())
}
