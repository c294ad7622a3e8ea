//! What a container or pod may change, by annotations: one row each.
//!
//! An annotation sets a key of the same section (`keys.rs`), within the key's bounds.

use crate::error::{ConfigError, Position};
use crate::keys::{self, Key, Kind, Section};
use crate::types::SandboxConfig;
use crate::value::{Entry, Value};
use crate::{glob, load};
use std::collections::BTreeMap;

/// Beginning of every annotation that is configuration.
const PREFIX: &str = "io.katacontainers.config.";

/// Names a configuration file; kept from containers altogether.
const CONFIG_PATH: &str = "io.katacontainers.config_path";

/// Whose leave is needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// The administrator's: the name is in `enable_annotations`.
    Listed,
    /// None: nothing but the container's own guest is touched.
    Open,
}

/// How the text is turned into the key's value.
#[derive(Clone, Copy)]
pub(crate) enum Parse {
    /// As the key's kind says.
    Plain,
    /// A host path; only those that the globs allow.
    Path(fn(&SandboxConfig) -> (&'static str, &Vec<String>)),
    /// Kernel parameters; they are added to the configured ones.
    AddWords,
    /// Switches separated by commas, for a hypervisor's option: nothing that could be a file.
    Switches,
}

/// One annotation.
pub(crate) struct Annotation {
    pub section: Section,
    /// Last part of the name.
    pub name: &'static str,
    /// The key it sets.
    pub key: &'static str,
    pub gate: Gate,
    pub parse: Parse,
}

impl Annotation {
    /// The whole name.
    pub(crate) fn full(&self) -> String {
        format!("{PREFIX}{}.{}", section_prefix(self.section), self.name)
    }
}

fn section_prefix(section: Section) -> &'static str {
    match section {
        Section::Hypervisor => "hypervisor",
        Section::Agent => "agent",
        Section::Runtime => "runtime",
        Section::Factory => "factory",
    }
}

const fn row(section: Section, name: &'static str, gate: Gate, parse: Parse) -> Annotation {
    Annotation { section, name, key: name, gate, parse }
}

const fn listed(section: Section, name: &'static str) -> Annotation {
    row(section, name, Gate::Listed, Parse::Plain)
}

fn assets(config: &SandboxConfig) -> (&'static str, &Vec<String>) {
    ("valid_asset_paths", &config.hypervisor.valid_asset_paths)
}

use Section::{Agent, Hypervisor, Runtime};

/// Every annotation.
#[rustfmt::skip]
pub(crate) static ANNOTATIONS: &[Annotation] = &[
    row(Hypervisor, "path", Gate::Listed, Parse::Path(|c| {
        ("valid_hypervisor_paths", &c.hypervisor.valid_hypervisor_paths)
    })),
    row(Hypervisor, "kernel", Gate::Listed, Parse::Path(assets)),
    row(Hypervisor, "initrd", Gate::Listed, Parse::Path(assets)),
    row(Hypervisor, "firmware", Gate::Listed, Parse::Path(assets)),
    row(Hypervisor, "entropy_source", Gate::Listed, Parse::Path(|c| {
        ("valid_entropy_sources", &c.hypervisor.valid_entropy_sources)
    })),
    row(Hypervisor, "kernel_params", Gate::Listed, Parse::AddWords),
    listed(Hypervisor, "machine_type"),
    row(Hypervisor, "machine_accelerators", Gate::Listed, Parse::Switches),
    row(Hypervisor, "cpu_features", Gate::Listed, Parse::Switches),
    listed(Hypervisor, "default_vcpus"),
    Annotation { key: "default_maxvcpus", ..listed(Hypervisor, "default_max_vcpus") },
    listed(Hypervisor, "default_memory"),
    listed(Hypervisor, "memory_slots"),
    listed(Hypervisor, "shared_fs"),
    listed(Hypervisor, "virtio_fs_cache"),
    listed(Hypervisor, "msize_9p"),
    listed(Hypervisor, "disable_vhost_net"),
    listed(Hypervisor, "disable_block_device_use"),
    listed(Hypervisor, "rootless"),
    listed(Runtime, "internetworking_model"),
    listed(Runtime, "disable_new_netns"),
    listed(Runtime, "sandbox_cgroup_only"),
    listed(Runtime, "vfio_mode"),
    listed(Runtime, "disable_guest_seccomp"),
    row(Runtime, "create_container_timeout", Gate::Open, Parse::Plain),
    row(Agent, "kernel_modules", Gate::Open, Parse::Plain),
];

impl SandboxConfig {
    /// Takes the annotations of a pod or container; those that are not ours are not looked at.
    ///
    /// # Errors
    /// When one is not enabled, not allowed or not right. Ignoring it would give a sandbox
    /// other than the one asked for.
    pub fn annotate(&mut self, annotations: &BTreeMap<String, String>) -> Result<(), ConfigError> {
        if annotations.contains_key(CONFIG_PATH) {
            return Err(refuse(
                CONFIG_PATH,
                "is not taken: a container must not choose the configuration. Name the file in \
                 the engine's runtime options (ConfigPath) or in KATA_CONF_FILE",
            ));
        }
        // What the administrator allowed, before any annotation.
        let allowed = self.clone();
        for (name, text) in annotations {
            if let Some(short) = name.strip_prefix(PREFIX) {
                self.annotate_one(&allowed, name, short, text)?;
            }
        }
        self.settle()
    }

    fn annotate_one(
        &mut self,
        allowed: &Self,
        full: &str,
        short: &str,
        text: &str,
    ) -> Result<(), ConfigError> {
        let known = ANNOTATIONS.iter().find(|a| a.full() == full);
        let last = short.rsplit('.').next().unwrap_or(short);
        let is_open = known.is_some_and(|a| a.gate == Gate::Open);
        if !is_open && !glob::any_name(&allowed.hypervisor.enable_annotations, last) {
            return Err(refuse(
                full,
                format!(
                    "is not enabled: add \"{last}\" to enable_annotations in [hypervisor.qemu]"
                ),
            ));
        }
        let Some(annotation) = known else {
            let names = ANNOTATIONS.iter().map(Annotation::full);
            let hint = load::nearest(full, names).map(|n| format!("; did you mean {n}?"));
            let hint = hint.unwrap_or_default();
            self.warnings.push(format!("unknown annotation {full} has no effect{hint}"));
            return Ok(());
        };
        let Some(key) = Key::find(annotation.section, annotation.key) else { return Ok(()) };
        let entry = Entry {
            at: Position::Annotation(full.to_owned()),
            key: annotation.key,
            value: annotation.value(key, allowed, text)?,
        };
        keys::set(self, key, &entry)
    }
}

fn refuse(name: &str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Annotation { name: name.to_owned(), problem: problem.into() }
}

impl Annotation {
    /// The text as a value of the key.
    fn value(&self, key: &Key, allowed: &SandboxConfig, text: &str) -> Result<Value, ConfigError> {
        let trimmed = text.trim();
        Ok(match self.parse {
            Parse::Plain => plain(&key.kind, trimmed),
            Parse::AddWords => {
                let mut params = allowed.hypervisor.kernel_params.clone();
                params.extend(keys::words(text));
                Value::Text(params.join(" "))
            }
            Parse::Switches => {
                if !trimmed.split(',').all(is_switch) {
                    let problem = "takes switches only, separated by commas: name, name=on, \
                                   name=off or name=<number>";
                    return Err(refuse(&self.full(), problem));
                }
                Value::Text(trimmed.to_owned())
            }
            Parse::Path(globs) => {
                let (list, globs) = globs(allowed);
                let matching = |glob: &String| glob::matches(glob, trimmed);
                if !glob::is_plain_path(trimmed) || !globs.iter().any(matching) {
                    return Err(refuse(
                        &self.full(),
                        format!(
                            "names {:?}, which {list} in [hypervisor.qemu] does not allow",
                            trimmed.chars().take(200).collect::<String>()
                        ),
                    ));
                }
                Value::Text(trimmed.to_owned())
            }
        })
    }
}

/// `name`, or `name=` and on, off, auto or a number.
fn is_switch(text: &str) -> bool {
    let (name, value) = text.split_once('=').unwrap_or((text, "on"));
    let good = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    name.chars().all(good)
        && (matches!(value, "on" | "off" | "auto") || value.parse::<u32>().is_ok())
}

/// Reads the text as the key wants it; what cannot be stays text, and is then refused.
fn plain(kind: &Kind, text: &str) -> Value {
    let as_text = || Value::Text(text.to_owned());
    let flag = match text {
        "true" | "True" | "TRUE" | "t" | "T" => Some(true),
        "false" | "False" | "FALSE" | "f" | "F" => Some(false),
        _ => None,
    };
    let number = || {
        let integer = text.parse().ok().map(Value::Integer);
        integer.or_else(|| text.parse().ok().map(Value::Float))
    };
    match (kind, text) {
        (Kind::Flag(_), "1") => Value::Flag(true),
        (Kind::Flag(_), "0") => Value::Flag(false),
        (Kind::Flag(_), _) => flag.map_or_else(as_text, Value::Flag),
        (Kind::Number(..), _) => number().unwrap_or_else(as_text),
        (Kind::Special(..), _) => flag.map(Value::Flag).or_else(number).unwrap_or_else(as_text),
        _ => as_text(),
    }
}

#[cfg(test)]
#[path = "annotations_tests.rs"]
mod tests;
