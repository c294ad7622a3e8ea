//! What `kata-runtime create` tells the server beyond the Task API's fields.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Travels as JSON in `CreateTaskRequest.options`.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(default)]
pub struct CreateOptions {
    /// The configuration file to use instead of the search path's.
    pub config: Option<PathBuf>,
    /// `linux.cgroupsPath` is systemd's `slice:prefix:name`.
    pub systemd_cgroup: bool,
    /// A stand-in stands for each process: create and exec wait for its hello.
    pub stand_in: bool,
}

const TYPE_URL: &str = "kata.CreateOptions";

impl CreateOptions {
    /// For the request.
    pub fn to_any(&self) -> Any {
        Any {
            type_url: TYPE_URL.to_owned(),
            // Serialising a struct of paths and flags fails only on paths that are not
            // UTF-8, and those the command line has refused.
            value: serde_json::to_vec(self).unwrap_or_default(),
            ..Any::default()
        }
    }

    /// From the request; none when the options are somebody else's.
    pub fn from_any(any: &Any) -> Option<Self> {
        (any.type_url == TYPE_URL).then(|| serde_json::from_slice(&any.value).ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_survive_the_trip() {
        let options = CreateOptions {
            config: Some("/etc/x.toml".into()),
            systemd_cgroup: true,
            stand_in: true,
        };
        assert_eq!(CreateOptions::from_any(&options.to_any()), Some(options));
    }

    #[test]
    fn options_of_others_are_not_ours() {
        assert_eq!(CreateOptions::from_any(&Any::default()), None);
    }
}
