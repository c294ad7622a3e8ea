//! What `kata-runtime create` tells the server beyond the Task API's fields.

use containerd_shim_protos::protobuf::CodedInputStream;
use containerd_shim_protos::protobuf::rt::WireType;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Travels as JSON in `CreateTaskRequest.options`, unless containerd's own options do.
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
/// containerd's options for runtimes other than runc, by its old and its new name.
const RUNTIME_OPTIONS: [&str; 2] =
    ["runtimeoptions.v1.Options", "containerd.runtimeoptions.v1.Options"];

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

    /// From the request: our own, or as containerd's configuration gives them. Those of
    /// other runtimes mean nothing here.
    pub fn from_any(any: &Any) -> Self {
        let kind = any.type_url.rsplit('/').next().unwrap_or_default();
        if kind == TYPE_URL {
            return serde_json::from_slice(&any.value).unwrap_or_default();
        }
        let known = RUNTIME_OPTIONS.contains(&kind);
        let config = known.then(|| config_path(&any.value)).flatten().map(PathBuf::from);
        Self { config, ..Self::default() }
    }
}

/// `ConfigPath` of containerd's runtime options.
fn config_path(message: &[u8]) -> Option<String> {
    const CONFIG_PATH: u32 = 2;
    let mut input = CodedInputStream::from_bytes(message);
    let mut found = None;
    while let Ok(Some(tag)) = input.read_raw_tag_or_eof() {
        let (number, kind) = (tag >> 3, WireType::new(tag & 7)?);
        if number == CONFIG_PATH && kind == WireType::LengthDelimited {
            found = input.read_string().ok();
        } else {
            input.skip_field(kind).ok()?;
        }
    }
    found.filter(|path| !path.is_empty())
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
        assert_eq!(CreateOptions::from_any(&options.to_any()), options);
    }

    #[test]
    fn options_of_others_are_not_ours() {
        let runc = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: b"\x12\x01x".to_vec(),
            ..Any::default()
        };
        assert_eq!(CreateOptions::from_any(&runc), CreateOptions::default());
    }

    #[test]
    fn containerds_config_path_is_found() {
        for kind in RUNTIME_OPTIONS {
            // type_url "kind", config_path "/c.toml", config_body "".
            let value = b"\x0a\x04kind\x12\x07/c.toml\x1a\x00".to_vec();
            let any = Any { type_url: kind.to_owned(), value, ..Any::default() };
            assert_eq!(CreateOptions::from_any(&any).config, Some("/c.toml".into()));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_as_options(value: Vec<u8>) {
            let type_url = RUNTIME_OPTIONS[0].to_owned();
            let _ = CreateOptions::from_any(&Any { type_url, value, ..Any::default() });
        }
    }
}
