//! `configuration.toml`, its drop-ins and annotations: one checked [`SandboxConfig`].
//!
//! [`load`] finds and reads the files, [`SandboxConfig::annotate`] takes what a pod or
//! container may change, [`Sizing`] decides how large the VM is. Every key is one row of
//! the table in `table.rs`, every annotation one row in `annotations.rs`; the reference
//! ([`reference`]) and the commented default file ([`default_file`]) are made from them.
//!
//! The files are the administrator's and trusted. Annotations come with a container from
//! whoever may start one, and are not: only names that the administrator enabled are
//! taken, only within bounds, and a host path only where a glob allows it.

mod annotations;
mod assets;
mod error;
mod glob;
mod keys;
mod load;
mod reference;
mod sizing;
mod table;
mod types;
mod value;

pub use assets::Places;
pub use error::{ConfigError, Position};
pub use load::{CONFIG_ENV, load, load_from};
pub use reference::{default_file, reference};
pub use sizing::{Host, Limits, Sizing};
pub use types::*;
