//! What can go wrong in a call, and which ttRPC code says it. One place for both.

use kata_cgroups::CgroupError;
use kata_oci::SpecError;
use kata_protocol::{InvalidId, chain, set_exit_code};
use ttrpc::Code;

use crate::container::ContainerError;
use crate::storage::StorageError;

/// Why a call failed. The texts reach the engine's user.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No such container or process.
    #[error("{0} does not exist")]
    NotFound(String),
    /// The process has ended already.
    #[error("process already finished")]
    Finished,
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// Not now.
    #[error("{0}")]
    Precondition(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A bad id.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// JSON that is none of the specification's.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Enough is enough.
    #[error("{0} is the limit")]
    Limit(String),
    /// The container or its process could not be built.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// A cgroup would not do.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Something could not be mounted.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The network could not be set up.
    #[error("cannot configure the guest's network: {0}")]
    Network(String),
    /// A system call failed.
    #[error("cannot {0}")]
    System(&'static str, #[source] std::io::Error),
    /// Nobody will answer this any more.
    #[error("the call was given up")]
    GivenUp,
}

impl AgentError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Precondition(_) | Self::Container(ContainerError::NotRunning(_)) => {
                Code::FAILED_PRECONDITION
            }
            Self::Invalid(_)
            | Self::Id(_)
            | Self::Spec(_)
            | Self::Container(
                ContainerError::Spec(_)
                | ContainerError::Seccomp(_)
                | ContainerError::Unsupported(_),
            ) => Code::INVALID_ARGUMENT,
            Self::Limit(_) => Code::RESOURCE_EXHAUSTED,
            // The program is not there or cannot be run: runc's words tell, as with runc.
            Self::Container(_) => Code::UNKNOWN,
            Self::GivenUp => Code::CANCELLED,
            Self::Cgroup(_) | Self::Storage(_) | Self::Network(_) | Self::System(..) => {
                Code::INTERNAL
            }
        }
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        let mut status = ttrpc::get_status(error.code(), chain(&error));
        if let AgentError::Container(error) = &error
            && let Some(code) = error.exit_code()
        {
            set_exit_code(&mut status, code);
        }
        Self::RpcStatus(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_container_is_not_found() {
        let ttrpc::Error::RpcStatus(status) = AgentError::NotFound("container x".into()).into()
        else {
            panic!("no status");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "container x does not exist");
    }
}
