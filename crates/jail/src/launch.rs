//! What to start, and with what.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exec::JailedProgram;
use crate::role::{ROLE, ROLE_ARGS, Role};
use crate::spawn::{self, Plan};
use crate::{Child, Jail};

/// Our own binary, whatever happened to its path since it was started.
const SELF: &str = "/proc/self/exe";
/// The `PATH` of a process that is given no other.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a process was not started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The environment names a role that this binary does not have.
    #[error("role {0:?} is unknown; the process was started by another version")]
    UnknownRole(String),
    /// A role's arguments are not text.
    #[error("arguments of role {0} are not UTF-8")]
    RoleArguments(Role),
    /// A role's arguments cannot be written as JSON.
    #[error("cannot write the arguments of role {role} as JSON")]
    Serialise {
        /// The role.
        role: Role,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A text for the process holds a zero byte.
    #[error("{0:?} holds a zero byte; it cannot be passed to a process")]
    ZeroByte(OsString),
    /// Two descriptors for one number, or a number that is reserved.
    #[error("descriptor {0} is given twice, or is below 3")]
    Descriptor(RawFd),
    /// A descriptor could not be prepared.
    #[error("cannot prepare {what} for {program}")]
    Prepare {
        /// What was prepared.
        what: &'static str,
        /// For which program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The process could not be started.
    #[error("cannot start {program}: {step}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The step that failed.
        step: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A process to start. Inherits nothing but what is named here (and the umask, the
/// working directory and the limits of its parent).
#[derive(Debug)]
pub struct Launch {
    program: PathBuf,
    role: Option<(Role, String)>,
    argv: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    stdio: [Option<OwnedFd>; 3],
    fds: Vec<(OwnedFd, RawFd)>,
    directory: Option<PathBuf>,
    jail: Option<Jail>,
    new_session: bool,
    die_with_parent: bool,
    pid_namespace: bool,
}

impl Launch {
    /// Our own binary in a role. `title` becomes `argv[0]`.
    ///
    /// # Errors
    /// When the arguments cannot be written as JSON.
    pub fn role(
        role: Role,
        title: impl Into<OsString>,
        args: &impl Serialize,
    ) -> Result<Self, LaunchError> {
        let args = serde_json::to_string(args)
            .map_err(|source| LaunchError::Serialise { role, source })?;
        let mut launch = Self::program(Path::new(SELF), Vec::new());
        launch.argv = vec![title.into()];
        launch.role = Some((role, args));
        Ok(launch)
    }

    /// A program and its arguments (without `argv[0]`, which is its path).
    pub fn program(path: &Path, args: Vec<OsString>) -> Self {
        let mut argv = vec![path.as_os_str().to_owned()];
        argv.extend(args);
        Self {
            program: path.to_owned(),
            role: None,
            argv,
            env: vec![("PATH".into(), PATH.into())],
            stdio: [None, None, None],
            fds: Vec::new(),
            directory: None,
            jail: None,
            new_session: false,
            die_with_parent: false,
            pid_namespace: false,
        }
    }

    /// The whole command line that `ps` shows. Of no use for a jailed program.
    pub fn argv(mut self, argv: Vec<OsString>) -> Self {
        self.argv = argv;
        self
    }

    /// Jails the program: it is started by way of the role `jail-exec`, in a PID namespace
    /// of its own whose PID 1 it is. Its environment is kept.
    pub fn jail(mut self, jail: Jail) -> Self {
        self.jail = Some(jail);
        self
    }

    /// Gives the process `fd` under the number `at` (3 or more).
    pub fn fd(mut self, fd: OwnedFd, at: RawFd) -> Self {
        self.fds.push((fd, at));
        self
    }

    /// Standard input; `/dev/null` if not given.
    pub fn stdin(mut self, fd: OwnedFd) -> Self {
        self.stdio[0] = Some(fd);
        self
    }

    /// Standard output; `/dev/null` if not given.
    pub fn stdout(mut self, fd: OwnedFd) -> Self {
        self.stdio[1] = Some(fd);
        self
    }

    /// Standard error; `/dev/null` if not given.
    pub fn stderr(mut self, fd: OwnedFd) -> Self {
        self.stdio[2] = Some(fd);
        self
    }

    /// Adds an environment variable, or replaces it. There is none but `PATH` otherwise.
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let key = key.into();
        self.env.retain(|(name, _)| *name != key);
        self.env.push((key, value.into()));
        self
    }

    /// The working directory; the parent's if not given.
    pub fn directory(mut self, path: &Path) -> Self {
        self.directory = Some(path.to_owned());
        self
    }

    /// Makes the process the leader of a session of its own, without a terminal.
    pub fn new_session(mut self) -> Self {
        self.new_session = true;
        self
    }

    /// Makes the kernel kill the process when the *thread* that starts it ends.
    pub fn die_with_parent(mut self) -> Self {
        self.die_with_parent = true;
        self
    }

    /// Makes the process PID 1 of a PID namespace of its own: what it starts dies with it.
    /// Signals whose action is the default one do not reach it then, but for SIGKILL.
    pub fn pid_namespace(mut self) -> Self {
        self.pid_namespace = true;
        self
    }

    /// Starts the process. Safe in a process with threads.
    ///
    /// # Errors
    /// When the process could not be made, or could not execute its program; nothing is
    /// left behind then.
    pub fn spawn(mut self) -> Result<Child, LaunchError> {
        if let Some(jail) = self.jail.take() {
            self = self.jailed(jail)?;
        }
        self.fds.sort_by_key(|(_, at)| *at);
        let reserved = self.fds.first().filter(|(_, at)| *at < 3).map(|(_, at)| *at);
        let twice = self.fds.windows(2).find(|pair| pair[0].1 == pair[1].1).map(|pair| pair[0].1);
        if let Some(at) = reserved.or(twice) {
            return Err(LaunchError::Descriptor(at));
        }
        let plan = self.plan()?;
        spawn::spawn(&plan).map_err(|failure| LaunchError::Spawn {
            program: self.program,
            step: failure.step,
            source: failure.source,
        })
    }

    /// The same launch by way of `jail-exec`.
    fn jailed(mut self, jail: Jail) -> Result<Self, LaunchError> {
        let args = JailedProgram {
            jail,
            program: std::mem::replace(&mut self.program, SELF.into()),
            argv: std::mem::take(&mut self.argv),
            parent: self.die_with_parent.then(std::process::id),
        };
        let role = Role::JailExec;
        let json = serde_json::to_string(&args)
            .map_err(|source| LaunchError::Serialise { role, source })?;
        self.argv = vec![role.as_str().into()];
        self.role = Some((role, json));
        self.pid_namespace = true;
        Ok(self)
    }

    /// Everything the child needs, made ready while there is still a heap to use.
    fn plan(&mut self) -> Result<Plan, LaunchError> {
        let prepare = |what| {
            let program = self.program.clone();
            move |source| LaunchError::Prepare { what, program, source }
        };
        let highest = self.fds.last().map_or(2, |(_, at)| *at);
        let mut null = None;
        let mut fds = Vec::with_capacity(3 + self.fds.len());
        for (at, given) in (0..).zip(&self.stdio) {
            let fd = match given {
                Some(fd) => fd,
                None => null.get_or_insert(OwnedFd::from(
                    File::options()
                        .read(true)
                        .write(true)
                        .open("/dev/null")
                        .map_err(prepare("/dev/null"))?,
                )),
            };
            fds.push((above(fd, highest).map_err(prepare("standard streams"))?, at));
        }
        for (fd, at) in &self.fds {
            fds.push((above(fd, highest).map_err(prepare("descriptors"))?, *at));
        }
        let mut env: Vec<CString> = Vec::with_capacity(self.env.len() + 2);
        for (key, value) in &self.env {
            env.push(assignment(key, value)?);
        }
        if let Some((role, args)) = &self.role {
            env.push(assignment(ROLE.as_ref(), role.as_str().as_ref())?);
            env.push(assignment(ROLE_ARGS.as_ref(), args.as_ref())?);
        }
        Ok(Plan {
            program: c_string(self.program.as_os_str())?,
            argv: self.argv.iter().map(|arg| c_string(arg)).collect::<Result<_, _>>()?,
            env,
            directory: self.directory.as_ref().map(|d| c_string(d.as_os_str())).transpose()?,
            fds,
            new_session: self.new_session,
            die_with_parent: self.die_with_parent,
            pid_namespace: self.pid_namespace,
        })
    }
}

/// A copy of `fd` with a number above every number the child wants, so that no step of
/// the child's renumbering overwrites a descriptor that a later step needs.
fn above(fd: &OwnedFd, highest: RawFd) -> std::io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is open for as long as `fd` is borrowed.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, highest + 1) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel made this descriptor just now, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn c_string(text: &OsStr) -> Result<CString, LaunchError> {
    CString::new(text.as_bytes()).map_err(|_| LaunchError::ZeroByte(text.to_owned()))
}

fn assignment(key: &OsStr, value: &OsStr) -> Result<CString, LaunchError> {
    let mut text = key.to_owned();
    text.push("=");
    text.push(value);
    c_string(&text)
}
