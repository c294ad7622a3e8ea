//! What containerd sends to `start` on its standard input, and how it wants the answer.
//!
//! Up to containerd 2.2 the input is the runtime's options (an `Any`, or nothing) and the
//! answer the bare address. Since 2.3 it is a message with all parameters, and the answer
//! says which version of the Task API the server speaks. Both are read as far as they are
//! understood: a shim that does not know a field must still start.

use crate::options::CreateOptions;
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use std::path::PathBuf;

/// The newest version of the Task API that the server speaks.
const VERSION: i32 = containerd_shim_protos::TASK_API_VERSION;

/// The parameters of `start`.
#[derive(Debug, Default)]
pub(crate) struct Bootstrap {
    params: Option<BootstrapParams>,
    config: Option<PathBuf>,
}

impl Bootstrap {
    /// Reads the input.
    pub(crate) fn parse(input: &[u8]) -> Self {
        // Options have a type's URL where the parameters have an id, and nothing else that
        // parameters always have.
        let params = BootstrapParams::parse_from_bytes(input).ok();
        let told = |params: &BootstrapParams| {
            !params.namespace.is_empty() && !params.containerd_ttrpc_address.is_empty()
        };
        let params = params.filter(told);
        let config = match &params {
            None => Any::parse_from_bytes(input).ok().and_then(|any| config_of(&any)),
            Some(params) => params.extensions.iter().find_map(|e| config_of(&e.value)),
        };
        Self { params, config }
    }

    /// The configuration file that the runtime's options name. Containers name it again when
    /// they are created; a sandbox of the Sandbox API does not.
    pub(crate) fn config(&self) -> Option<PathBuf> {
        self.config.clone()
    }

    /// Where the socket is to be.
    pub(crate) fn socket_dir(&self) -> Option<PathBuf> {
        let dir = self.params.as_ref()?.socket_dir.as_ref()?;
        (!dir.is_empty()).then(|| PathBuf::from(dir))
    }

    /// containerd's ttRPC socket, if it is named here.
    pub(crate) fn events(&self) -> Option<&str> {
        self.params.as_ref().map(|params| params.containerd_ttrpc_address.as_str())
    }

    /// The answer for containerd.
    pub(crate) fn answer(&self, address: &str) -> String {
        if self.params.is_none() {
            return address.to_owned();
        }
        serde_json::json!({"version": VERSION, "address": address, "protocol": "ttrpc"}).to_string()
    }
}

fn config_of(options: &Any) -> Option<PathBuf> {
    CreateOptions::from_any(options).config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_containerd_gets_the_bare_address() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: vec![0x12, 1, b'x'],
            ..Any::default()
        };
        let named = Bootstrap::parse(&any.write_to_bytes().unwrap()).config();
        assert_eq!(named, Some("x".into()));
        for input in [Vec::new(), any.write_to_bytes().unwrap(), b"\xff\xff".to_vec()] {
            let bootstrap = Bootstrap::parse(&input);
            assert_eq!(bootstrap.answer("unix:///s"), "unix:///s");
            assert_eq!(bootstrap.socket_dir(), None);
        }
    }

    #[test]
    fn new_containerd_is_told_the_version() {
        let params = BootstrapParams {
            instance_id: "c1".to_owned(),
            namespace: "default".to_owned(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
            socket_dir: Some("/run/x".to_owned()),
            ..BootstrapParams::default()
        };
        let bootstrap = Bootstrap::parse(&params.write_to_bytes().unwrap());
        let answer: serde_json::Value =
            serde_json::from_str(&bootstrap.answer("unix:///s")).unwrap();
        assert_eq!(answer["version"], 3);
        assert_eq!(answer["address"], "unix:///s");
        assert_eq!(answer["protocol"], "ttrpc");
        assert_eq!(bootstrap.socket_dir(), Some("/run/x".into()));
        assert_eq!(bootstrap.events(), Some("/run/c.sock.ttrpc"));
    }
}
