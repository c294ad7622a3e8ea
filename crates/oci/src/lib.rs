//! The OCI runtime specification's `config.json`, as far as this project reads it.
//!
//! Types follow runtime-spec 1.1 (`config.md`, `config-linux.md`). Reading is lenient
//! where the specification lets others extend it: unknown fields are ignored, and
//! enumerations stay text until the one place that understands them turns them into something.
//! [`Spec::parse`] checks what must hold before anything is created; [`Wire`] is how the guest
//! is told.

mod linux;
mod process;
mod state;
mod wire;

pub use linux::*;
pub use process::*;
pub use state::{State, Status};
pub use wire::{Wire, WireError};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A container's `config.json`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Version of the specification the file follows.
    pub oci_version: String,
    /// What runs; may be absent for a container that is only created.
    pub process: Option<Process>,
    /// The root file system.
    pub root: Option<Root>,
    /// UTS host name.
    pub hostname: String,
    /// UTS domain name.
    pub domainname: String,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Programs to run at points of the life cycle.
    pub hooks: Option<Hooks>,
    /// Free key-value pairs.
    pub annotations: BTreeMap<String, String>,
    /// All that is Linux's own.
    pub linux: Option<Linux>,
}

/// The root file system.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Root {
    /// Directory, relative to the bundle or absolute.
    pub path: PathBuf,
    /// Mount it read-only.
    pub readonly: bool,
}

/// One entry of `mounts`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Where, inside the container.
    pub destination: PathBuf,
    /// File system type; may be empty or `none` for binds.
    #[serde(rename = "type")]
    pub kind: String,
    /// Device, host path or label.
    pub source: Option<PathBuf>,
    /// `mount(8)`-like options.
    pub options: Vec<String>,
    /// User ids of an idmapped mount.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids of an idmapped mount.
    pub gid_mappings: Vec<IdMapping>,
}

impl Mount {
    /// Whether this is a bind mount of a host path.
    pub fn is_bind(&self) -> bool {
        self.kind == "bind" || self.options.iter().any(|o| o == "bind" || o == "rbind")
    }

    /// What the share between host and guest cannot carry.
    fn check(&self) -> Result<(), SpecError> {
        let field = match (self.uid_mappings.as_slice(), self.gid_mappings.as_slice()) {
            ([], []) => {
                let mapped = |option: &&String| matches!(option.as_str(), "idmap" | "ridmap");
                let Some(option) = self.options.iter().find(mapped) else { return Ok(()) };
                let problem = format!(
                    "of {} has {option:?}: idmapped mounts are not supported in a VM",
                    self.destination.display()
                );
                return Err(SpecError::Invalid { field: "mounts.options", problem });
            }
            ([], _) => "mounts.gidMappings",
            _ => "mounts.uidMappings",
        };
        let problem = format!(
            "of {} is set: idmapped mounts are not supported in a VM; leave it out",
            self.destination.display()
        );
        Err(SpecError::Invalid { field, problem })
    }

    /// Whether the options ask for a read-only mount.
    pub fn is_readonly(&self) -> bool {
        self.options.iter().rev().find_map(|o| match o.as_str() {
            "ro" | "rro" => Some(true),
            "rw" | "rrw" => Some(false),
            _ => None,
        }) == Some(true)
    }
}

/// Programs to run at points of the life cycle.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// On the host, after the namespaces exist (deprecated by the specification, used by Docker).
    pub prestart: Vec<Hook>,
    /// On the host, after the namespaces exist.
    pub create_runtime: Vec<Hook>,
    /// In the container's namespaces, path on the host.
    pub create_container: Vec<Hook>,
    /// In the container, before its process.
    pub start_container: Vec<Hook>,
    /// On the host, after the process started.
    pub poststart: Vec<Hook>,
    /// On the host, after the container is deleted.
    pub poststop: Vec<Hook>,
}

/// One program.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Hook {
    /// Absolute path.
    pub path: PathBuf,
    /// `argv`, including `argv[0]`; empty means the path alone.
    pub args: Vec<String>,
    /// `KEY=value`.
    pub env: Vec<String>,
    /// Seconds after which it is killed.
    pub timeout: Option<u32>,
}

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not the JSON the specification asks for.
    #[error("config.json is not a valid OCI specification: {0}")]
    Json(#[from] serde_json::Error),
    /// Well-formed, but it cannot be meant.
    #[error("config.json: {field} {problem}")]
    Invalid {
        /// The field, as a path from the top.
        field: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl Spec {
    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// [`SpecError`] names the field and the way out.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        let spec: Self = from_slice(bytes)?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), SpecError> {
        let invalid =
            |field, problem: &str| Err(SpecError::Invalid { field, problem: problem.to_owned() });
        if self.oci_version.is_empty() {
            return invalid("ociVersion", "is missing");
        }
        match &self.root {
            None => return invalid("root", "is missing: name the root file system's directory"),
            Some(root) if root.path.as_os_str().is_empty() => {
                return invalid("root.path", "is empty: name the root file system's directory");
            }
            Some(_) => {}
        }
        if let Some(process) = &self.process {
            process.check()?;
        }
        for mount in &self.mounts {
            if !mount.destination.has_root() {
                // runc accepts and makes them absolute, with a warning; so do we, in the guest.
                if mount.destination.as_os_str().is_empty() {
                    return invalid("mounts", "has an entry without a destination");
                }
            }
            mount.check()?;
        }
        if let Some(linux) = &self.linux {
            linux.check()?;
        }
        Ok(())
    }

    /// The Linux part, or its default.
    pub fn linux(&self) -> std::borrow::Cow<'_, Linux> {
        self.linux
            .as_ref()
            .map_or_else(|| std::borrow::Cow::Owned(Linux::default()), std::borrow::Cow::Borrowed)
    }
}

/// Reads JSON in which `null` means the same as an absent field, as Go programs write it.
pub(crate) fn from_slice<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, SpecError> {
    fn without_nulls(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(map) => {
                map.retain(|_, v| !v.is_null());
                map.values_mut().for_each(without_nulls);
            }
            serde_json::Value::Array(items) => items.iter_mut().for_each(without_nulls),
            _ => {}
        }
    }
    // Engines write few of them, and an error that is none of theirs says where it is.
    let error = match serde_json::from_slice(bytes) {
        Ok(read) => return Ok(read),
        Err(error) => error,
    };
    let whole: serde_json::Value = serde_json::from_slice(bytes)?;
    let mut value = whole.clone();
    without_nulls(&mut value);
    if value == whole {
        return Err(error.into());
    }
    Ok(serde_json::from_value(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINIMAL: &str = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},
        "process":{"args":["sh"],"cwd":"/","user":{"uid":0,"gid":0}},
        "linux":{"namespaces":[{"type":"pid"}]},"unknown":{"x":1}}"#;

    #[test]
    fn minimal_spec_is_accepted_and_unknown_fields_ignored() {
        let spec = Spec::parse(MINIMAL.as_bytes()).unwrap();
        assert_eq!(spec.process.unwrap().args, ["sh"]);
    }

    #[test]
    fn null_means_absent() {
        let text = MINIMAL.replace(r#""unknown""#, r#""mounts":null,"hooks":null,"unknown""#);
        assert!(Spec::parse(text.as_bytes()).unwrap().mounts.is_empty());
    }

    #[test]
    fn an_error_says_where_it_is() {
        let wrong = MINIMAL.replace(r#""uid":0"#, r#""uid":"0""#);
        let error = Spec::parse(wrong.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("expected u32 at line 2"), "{error}");
        // A null that may be there is not what is wrong.
        let wrong = wrong.replace(r#""unknown""#, r#""mounts":null,"unknown""#);
        let error = Spec::parse(wrong.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("expected u32"), "{error}");
    }

    #[test]
    fn texts_with_null_in_them_are_no_nulls() {
        let text = MINIMAL.replace(r#""sh""#, r#""/dev/null", "null", " ,null""#);
        let spec = Spec::parse(text.as_bytes()).unwrap();
        assert_eq!(spec.process.unwrap().args, ["/dev/null", "null", " ,null"]);
    }

    #[test]
    fn idmapped_mounts_are_refused_by_name() {
        for (mount, named) in [
            (
                r#"{"destination":"/x","uidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
                "mounts.uidMappings of /x",
            ),
            (
                r#"{"destination":"/x","gidMappings":[{"containerID":0,"hostID":1,"size":1}]}"#,
                "mounts.gidMappings of /x",
            ),
            (r#"{"destination":"/x","options":["bind","idmap"]}"#, "mounts.options of /x"),
        ] {
            let text = MINIMAL.replace(r#""unknown""#, &format!(r#""mounts":[{mount}],"unknown""#));
            let error = Spec::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn time_offsets_are_checked() {
        let spec = |offsets: &str, time: &str| {
            let linux = format!(r#""timeOffsets":{offsets},"namespaces":[{{"type":"pid"}}{time}]"#);
            let text = MINIMAL.replace(r#""namespaces":[{"type":"pid"}]"#, &linux);
            Spec::parse(text.as_bytes())
        };
        let new = r#",{"type":"time"}"#;
        let day = r#"{"boottime":{"secs":86400,"nanosecs":5}}"#;
        assert_eq!(spec(day, new).unwrap().linux().time_offsets["boottime"].secs, 86400);
        for (offsets, time) in [(day, ""), (r#"{"realtime":{"secs":1}}"#, new)] {
            let error = spec(offsets, time).unwrap_err().to_string();
            assert!(error.contains("linux.timeOffsets"), "{error}");
        }
    }

    #[test]
    fn missing_root_is_named() {
        let error = Spec::parse(br#"{"ociVersion":"1.0.2"}"#).unwrap_err();
        assert!(error.to_string().contains("root is missing"), "{error}");
    }

    #[test]
    fn relative_cwd_is_refused() {
        let text = MINIMAL.replace(r#""cwd":"/""#, r#""cwd":"tmp""#);
        assert!(Spec::parse(text.as_bytes()).unwrap_err().to_string().contains("process.cwd"));
    }

    #[test]
    fn last_of_ro_and_rw_wins() {
        let mount = |options: &[&str]| Mount {
            options: options.iter().map(|o| (*o).to_owned()).collect(),
            ..Mount::default()
        };
        assert!(mount(&["rw", "ro"]).is_readonly());
        assert!(!mount(&["ro", "rw"]).is_readonly());
        assert!(!mount(&["rbind"]).is_readonly());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            let _ = Spec::parse(&bytes);
        }
    }
}
