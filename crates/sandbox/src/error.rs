//! What can go wrong with a sandbox, and how an engine is told.
//!
//! No error repeats its cause; who shows one to a person shows the whole chain
//! ([`kata_protocol::chain`]).

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why something about a sandbox failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // each variant is its message; fields are what it names
pub enum SandboxError {
    #[error("cannot read {path}")]
    Bundle { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Spec(#[from] kata_oci::SpecError),
    /// What the guest is to be told cannot be put into bytes.
    #[error(transparent)]
    Wire(#[from] kata_oci::WireError),
    #[error(transparent)]
    Id(#[from] kata_protocol::InvalidId),
    #[error("annotation {kind} says \"container\", but {missing} is missing")]
    Annotation { kind: &'static str, missing: &'static str },
    #[error("cannot use the configuration")]
    Config(#[from] kata_config::ConfigError),
    #[error(transparent)]
    Storage(#[from] kata_storage::StorageError),
    #[error("network")]
    Network(#[from] kata_network::NetworkError),
    #[error("virtual machine")]
    Hypervisor(#[from] kata_hypervisor::HypervisorError),
    #[error(
        "the container is on more networks than its virtual machine has room for ({networks}): disconnect it from one"
    )]
    NoRoom { networks: usize, source: kata_hypervisor::HypervisorError },
    #[error("devices process")]
    Devices(#[from] kata_devices::Error),
    #[error("channel to the guest")]
    Channel(#[from] kata_channel::ChannelError),
    /// More than the guest takes at once.
    #[error("cannot pass this on to the guest")]
    TooMuch(#[from] kata_protocol::call::InvalidCall),
    #[error("cannot use the cgroup {path}")]
    Cgroup { path: String, source: kata_cgroups::CgroupError },
    #[error("{what} is missing at {path}: {remedy}")]
    Asset { what: &'static str, path: PathBuf, remedy: &'static str },
    #[error("{kind} hook {path}: {problem}", path = path.display())]
    Hook { kind: &'static str, path: PathBuf, problem: String },
    #[error("cannot write the sandbox's state to {path}")]
    State { path: PathBuf, source: io::Error },
    #[error("{role} (pid {pid}) did not end within {waited:?} of SIGKILL: look at it with ps")]
    Stuck { pid: i32, role: String, waited: Duration },
    /// The guest's agent refused; its own words.
    #[error("{message}")]
    Agent { code: ttrpc::Code, message: String, exit: Option<u8> },
    /// The virtual machine, or a process it cannot do without, is gone.
    #[error("the sandbox is lost: {0}")]
    Lost(String),
    #[error("the guest's agent does not answer in time")]
    Late,
    #[error("the guest does not answer within {waited:?}: {console}")]
    Silent { waited: Duration, console: String },
    #[error(
        "the guest's agent speaks version {guest} of the protocol, this runtime {host}: install matching guest assets"
    )]
    Version { guest: u32, host: u32 },
    #[error("container {0} does not exist")]
    NoContainer(String),
    #[error("process {exec} of container {container} does not exist")]
    NoProcess { container: String, exec: String },
    #[error("{0} exists already")]
    Exists(String),
    /// What was to get a signal has ended; engines take this for success.
    #[error("cannot signal {0}: it is stopped (process already finished)")]
    Finished(String),
    #[error("cannot {what} {id}: it is {state}")]
    WrongState { what: &'static str, id: String, state: &'static str },
    #[error("cannot use {0} as a stream: known are a FIFO's path, file://, and binary://")]
    Stream(String),
    #[error("the factory of templates: {0}")]
    Factory(String),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("cannot {what}")]
    Io { what: String, source: io::Error },
}

impl SandboxError {
    /// What went wrong, with all its causes.
    pub fn text(&self) -> String {
        kata_protocol::chain(self)
    }

    /// The ttRPC code by which engines tell errors apart.
    pub fn code(&self) -> ttrpc::Code {
        use ttrpc::Code;
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Finished(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Spec(_)
            | Self::Id(_)
            | Self::Annotation { .. }
            | Self::Stream(_)
            | Self::TooMuch(_)
            | Self::Storage(_) => Code::INVALID_ARGUMENT,
            Self::Agent { code, .. } => *code,
            Self::Lost(_) | Self::Late | Self::Silent { .. } => Code::UNAVAILABLE,
            _ => Code::UNKNOWN,
        }
    }

    /// As a ttRPC status, with all there is to tell.
    pub fn status(&self) -> ttrpc::proto::Status {
        let mut status = ttrpc::get_status(self.code(), self.text());
        if let Self::Agent { exit: Some(code), .. } = self {
            crate::exit::set_exit_code(&mut status, *code);
        }
        status
    }

    /// An I/O error with what was attempted.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
