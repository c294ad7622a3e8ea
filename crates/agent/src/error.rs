//! What can go wrong in a call, and what the host is told of it. One place for both.

use kata_cgroups::CgroupError;
use kata_oci::WireError;
use kata_protocol::agent::{Failure, failure::Code};
use kata_protocol::call::InvalidCall;
use kata_protocol::{InvalidId, chain};

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
    /// A message that is none, or is too long.
    #[error(transparent)]
    Call(#[from] InvalidCall),
    /// A specification, process or list of limits that is none.
    #[error(transparent)]
    Spec(#[from] WireError),
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
            Self::NotFound(_) | Self::Finished => Code::NotFound,
            Self::Exists(_) => Code::Exists,
            Self::Precondition(_) | Self::Container(ContainerError::NotRunning(_)) => {
                Code::Precondition
            }
            Self::Invalid(_)
            | Self::Id(_)
            | Self::Call(_)
            | Self::Spec(_)
            | Self::Container(ContainerError::Seccomp(_) | ContainerError::Unsupported(_)) => {
                Code::Invalid
            }
            Self::Limit(_) => Code::Limit,
            // The program is not there or cannot be run: runc's words tell, as with runc.
            Self::Container(_) => Code::Unknown,
            Self::GivenUp => Code::GivenUp,
            Self::Cgroup(_) | Self::Storage(_) | Self::Network(_) | Self::System(..) => {
                Code::Internal
            }
        }
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        let exit_code = match &error {
            AgentError::Container(error) => error.exit_code(),
            _ => None,
        };
        Self {
            code: error.code().into(),
            message: chain(&error),
            exit_code: exit_code.unwrap_or_default().into(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_container_is_not_found() {
        let failure = Failure::from(AgentError::NotFound("container x".into()));
        assert_eq!(failure.code, Code::NotFound.into());
        assert_eq!(failure.message, "container x does not exist");
        assert_eq!(failure.exit_code, 0);
    }
}
