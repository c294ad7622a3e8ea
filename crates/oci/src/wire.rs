//! How host and guest tell each other what JSON said: values in the order of their fields,
//! without names.
//!
//! The guest reads what each container is, and where its processor is emulated that costs by
//! the instructions that are run for the first time: for JSON, where any field may come at any
//! place in any form, five times as many as for this. Both sides have the same types: a host
//! speaks only with an agent of its own protocol version.

use crate::{Process, Resources, Spec};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why bytes are not what they are said to be.
#[derive(Debug, thiserror::Error)]
#[error("cannot read a {what} that host or agent sent: {source}")]
pub struct WireError {
    what: &'static str,
    source: postcard::Error,
}

/// What is sent to the guest. It was checked when it was read, on the host.
pub trait Wire: Serialize + DeserializeOwned {
    /// What it is, for errors.
    const NAME: &'static str;

    /// The value as bytes.
    ///
    /// # Errors
    /// There is no memory for it.
    fn to_wire(&self) -> Result<Vec<u8>, WireError> {
        postcard::to_stdvec(self).map_err(|source| WireError { what: Self::NAME, source })
    }

    /// The value of these bytes.
    ///
    /// # Errors
    /// They are none, or not of this version.
    fn from_wire(bytes: &[u8]) -> Result<Self, WireError> {
        postcard::from_bytes(bytes).map_err(|source| WireError { what: Self::NAME, source })
    }
}

impl Wire for Spec {
    const NAME: &'static str = "specification";
}

impl Wire for Process {
    const NAME: &'static str = "process";
}

impl Wire for Resources {
    const NAME: &'static str = "list of limits";
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Something of each kind of field.
    const SPEC: &str = r#"{
        "ociVersion": "1.1.0", "root": {"path": "r", "readonly": true}, "hostname": "h",
        "process": {
            "cwd": "/", "args": ["a", "b"], "env": ["A=ä"], "terminal": true,
            "consoleSize": {"height": 3, "width": 4}, "oomScoreAdj": -5,
            "user": {"uid": 1, "gid": 4294967295, "umask": 18, "additionalGids": [1, 2]},
            "capabilities": {"bounding": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 18446744073709551615, "soft": 1}]
        },
        "mounts": [{"destination": "/p", "type": "proc", "source": "proc", "options": ["ro"]}],
        "hooks": {"createContainer": [{"path": "/h", "args": ["h"], "timeout": 3}]},
        "annotations": {"a": "b"},
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}],
            "uidMappings": [{"containerID": 0, "hostID": 1, "size": 2}],
            "devices": [{"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229}],
            "sysctl": {"net.x": "1"}, "maskedPaths": ["/m"], "rootfsPropagation": "shared",
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "minor": -1}],
                "memory": {"limit": -1, "swappiness": 60}, "cpu": {"quota": -1, "cpus": "0-3"},
                "blockIO": {"weight": 10}, "unified": {"memory.high": "max"}
            },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                "syscalls": [{"names": ["a"], "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 9223372036854775808, "op": "SCMP_CMP_EQ"}]}]
            }
        }
    }"#;

    fn json<T: Serialize>(value: &T) -> serde_json::Value {
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn a_specification_arrives_as_it_was() {
        let spec = Spec::parse(SPEC.as_bytes()).unwrap();
        let bytes = spec.to_wire().unwrap();
        assert_eq!(json(&Spec::from_wire(&bytes).unwrap()), json(&spec));
        let parts = spec.process.unwrap();
        let arrived = Process::from_wire(&parts.to_wire().unwrap()).unwrap();
        assert_eq!(json(&arrived), json(&parts));
        let limits = spec.linux.unwrap().resources.unwrap();
        let arrived = Resources::from_wire(&limits.to_wire().unwrap()).unwrap();
        assert_eq!(json(&arrived), json(&limits));
    }

    #[test]
    fn what_is_cut_is_an_error_that_says_of_what() {
        let bytes = Spec::parse(SPEC.as_bytes()).unwrap().to_wire().unwrap();
        for length in 0..bytes.len() {
            let error = Spec::from_wire(&bytes[..length]).unwrap_err();
            assert!(error.to_string().contains("specification"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let _ = Spec::from_wire(&bytes);
        }
    }
}
