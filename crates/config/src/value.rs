//! A value as a file or an annotation has it, and where it stands.

use crate::{ConfigError, Position};
use toml::de::DeValue;

/// Kata's templates have sections without a key.
const EMPTY_TABLE: &str = "empty table";

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Flag(bool),
    Texts(Vec<String>),
    /// What no key takes; its name in TOML.
    Other(&'static str),
}

impl Value {
    pub(crate) fn from_toml(value: &DeValue<'_>) -> Self {
        let other = Self::Other(value.type_str());
        match value {
            DeValue::String(text) => Self::Text(text.to_string()),
            DeValue::Boolean(flag) => Self::Flag(*flag),
            DeValue::Integer(n) => {
                i64::from_str_radix(n.as_str(), n.radix()).map_or(other, Self::Integer)
            }
            DeValue::Float(n) => n.as_str().parse().map_or(other, Self::Float),
            DeValue::Array(items) => items
                .iter()
                .map(|item| item.get_ref().as_str().map(str::to_owned))
                .collect::<Option<_>>()
                .map_or(Self::Other("array of other things"), Self::Texts),
            DeValue::Table(table) if table.is_empty() => Self::Other(EMPTY_TABLE),
            DeValue::Datetime(_) | DeValue::Table(_) => other,
        }
    }

    /// Nothing is asked for by it.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Integer(n) => *n == 0,
            Self::Float(n) => *n == 0.0,
            Self::Flag(flag) => !flag,
            Self::Texts(texts) => texts.is_empty(),
            Self::Other(kind) => *kind == EMPTY_TABLE,
        }
    }

    /// All text in it.
    pub(crate) fn texts(&self) -> &[String] {
        match self {
            Self::Text(text) => std::slice::from_ref(text),
            Self::Texts(texts) => texts,
            _ => &[],
        }
    }

    /// For a message.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Text(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
            Self::Integer(n) => n.to_string(),
            Self::Float(n) => n.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Texts(_) => "a list of texts".to_owned(),
            Self::Other(kind) => format!("a TOML {kind}"),
        }
    }
}

/// A value with its place, while it is put into the configuration.
pub(crate) struct Entry<'a> {
    pub at: Position,
    /// Name of the key, with its section.
    pub key: &'a str,
    pub value: Value,
}

impl Entry<'_> {
    pub(crate) fn wrong(&self, expects: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            at: self.at.clone(),
            key: self.key.to_owned(),
            expects: expects.into(),
            found: self.value.describe(),
        }
    }
}
