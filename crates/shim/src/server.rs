//! The server process.

use serde::{Deserialize, Serialize};

/// Arguments of the `sandbox-server` role.
#[derive(Debug, Deserialize, Serialize)]
pub struct ServerArgs {
    /// The sandbox's id.
    pub sandbox: String,
}
