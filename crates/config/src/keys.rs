//! What a key of `configuration.toml` is, and how a value gets to its place.

use crate::ConfigError;
use crate::table::KEYS;
use crate::types::SandboxConfig;
use crate::value::{Entry, Value};
use std::path::PathBuf;

/// Where a key stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Section {
    Hypervisor,
    Agent,
    Runtime,
    Factory,
}

impl Section {
    pub(crate) const ALL: [Self; 4] = [Self::Hypervisor, Self::Agent, Self::Runtime, Self::Factory];

    /// As TOML has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hypervisor => "hypervisor.qemu",
            Self::Agent => "agent.kata",
            Self::Runtime => "runtime",
            Self::Factory => "factory",
        }
    }
}

type Place<T> = fn(&mut SandboxConfig) -> &mut T;

/// What a key takes, and where it goes.
pub(crate) enum Kind {
    Flag(Place<bool>),
    Text(Place<String>),
    /// Absolute; empty leaves the default.
    Path(Place<PathBuf>),
    Texts(Place<Vec<String>>),
    Number(Place<u32>, u32, u32),
    Choice(&'static [&'static str], fn(&mut SandboxConfig, &str)),
    /// What it takes in words; false when the value is not that.
    Special(&'static str, fn(&mut SandboxConfig, &Value) -> bool),
    /// Kata's, and without meaning here: nothing is lost by not having it.
    Moot,
    /// Kata's, not done here: a warning when it asks for something.
    Missing,
    /// Kata's, and ignoring it would break a promise: an error when it asks for something.
    Refused,
}

/// One key.
pub(crate) struct Key {
    pub section: Section,
    pub name: &'static str,
    /// In TOML; empty where it is found on the machine.
    pub default: &'static str,
    pub kind: Kind,
    /// A sentence or two; for keys without effect, why.
    pub doc: &'static str,
}

impl Key {
    /// `section.name`
    pub(crate) fn full(&self) -> String {
        format!("{}.{}", self.section.name(), self.name)
    }

    pub(crate) fn find(section: Section, name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.section == section && key.name == name)
    }
}

/// Words of a text.
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Puts a value where its key says. Warnings are collected in the configuration.
pub(crate) fn set(config: &mut SandboxConfig, key: &Key, entry: &Entry) -> Result<(), ConfigError> {
    if entry.value.texts().iter().any(|text| text.chars().any(char::is_control)) {
        return Err(entry.wrong("without control characters"));
    }
    match (&key.kind, &entry.value) {
        (Kind::Flag(place), Value::Flag(flag)) => *place(config) = *flag,
        (Kind::Flag(_), _) => return Err(entry.wrong("true or false")),
        (Kind::Text(place), Value::Text(text)) => place(config).clone_from(text),
        (Kind::Text(_), _) => return Err(entry.wrong("a text")),
        (Kind::Path(_), Value::Text(text)) if text.is_empty() => {}
        (Kind::Path(place), Value::Text(text)) if text.starts_with('/') => {
            *place(config) = PathBuf::from(text);
        }
        (Kind::Path(_), _) => return Err(entry.wrong("an absolute path")),
        (Kind::Texts(place), Value::Texts(texts)) => place(config).clone_from(texts),
        (Kind::Texts(_), _) => return Err(entry.wrong("a list of texts")),
        (Kind::Number(place, least, most), value) => match value {
            Value::Integer(n) if (i64::from(*least)..=i64::from(*most)).contains(n) => {
                *place(config) = u32::try_from(*n).unwrap_or(*most);
            }
            _ => return Err(entry.wrong(format!("a whole number from {least} to {most}"))),
        },
        (Kind::Choice(choices, put), Value::Text(text)) if choices.contains(&text.as_str()) => {
            put(config, text);
        }
        (Kind::Choice(choices, _), _) => {
            return Err(entry.wrong(format!("one of {}", choices.join(", "))));
        }
        (Kind::Special(expects, put), value) => {
            if !put(config, value) {
                return Err(entry.wrong(*expects));
            }
        }
        (Kind::Moot, _) => tracing::debug!(key = entry.key, why = key.doc, "key without effect"),
        (Kind::Missing, value) if asks_nothing(value) => {}
        (Kind::Missing, _) => config.warnings.push(format!(
            "{}: {} = {} has no effect: {}",
            entry.at,
            entry.key,
            entry.value.describe(),
            key.doc
        )),
        (Kind::Refused, value) if asks_nothing(value) => {}
        (Kind::Refused, _) => {
            return Err(ConfigError::Refused {
                at: entry.at.clone(),
                key: entry.key.to_owned(),
                why: key.doc.to_owned(),
            });
        }
    }
    Ok(())
}

/// Kata's templates write out what is off.
fn asks_nothing(value: &Value) -> bool {
    value.is_empty() || *value == Value::Text("no-port".to_owned())
}
