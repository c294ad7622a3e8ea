//! What containerd sends to `start` on its standard input, and how it wants the answer.
//!
//! Up to containerd 2.2 the input is the runtime's options (an `Any`, or nothing) and the
//! answer the bare address. Since 2.3 it is a message with all parameters, and the answer
//! says which version of the Task API the server speaks. Both are read as far as they are
//! understood: a shim that does not know a field must still start.

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use std::path::PathBuf;

/// The newest version of the Task API that the server speaks.
const VERSION: i32 = containerd_shim_protos::TASK_API_VERSION;

/// The parameters of `start`.
#[derive(Debug, Default)]
pub(crate) struct Bootstrap {
    params: Option<BootstrapParams>,
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
        Self { params: params.filter(told) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    #[test]
    fn old_containerd_gets_the_bare_address() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: vec![0x12, 1, b'x'],
            ..Any::default()
        };
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
