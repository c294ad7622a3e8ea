//! `kata-env`: the configuration in effect, for people and bug reports.

use super::Call;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::Path;

/// `kata-env`.
pub fn env(call: &Call) -> Result<u8> {
    kata_env(call.global.config.as_deref(), call.flags.on("json"))
}

/// Prints what is in effect: as JSON, or as TOML.
///
/// # Errors
/// The configuration cannot be read.
pub fn kata_env(config: Option<&Path>, as_json: bool) -> Result<u8> {
    let config = kata_config::load(config)?;
    let value = json!({
        "Runtime": {
            "Version": env!("CARGO_PKG_VERSION"),
            "OCI": super::features::SPEC_MAX,
            "Path": std::env::current_exe().context("cannot tell where this program is")?,
            "Config": config.sources,
        },
        "Hypervisor": &config.hypervisor,
        "Agent": &config.agent,
        "Settings": &config.runtime,
        "Factory": &config.factory,
        "Host": {
            "Kernel": kernel(),
            "Architecture": std::env::consts::ARCH,
            "Vsock": kata_hypervisor::vsock_available().is_ok(),
        },
    });
    if as_json {
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print!("{}", toml::to_string_pretty(&without_nulls(value))?);
    }
    Ok(0)
}

/// `--show-default-config-paths`: where the configuration is looked for.
pub fn show_paths() -> u8 {
    let places = kata_config::Places::of_this_program();
    println!("{}", places.etc.join("kata-containers/configuration.toml").display());
    for share in &places.share {
        println!("{}", share.join("defaults/kata-containers/configuration.toml").display());
    }
    0
}

fn kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// TOML has no null.
fn without_nulls(value: serde_json::Value) -> serde_json::Value {
    match value {
        serde_json::Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| (name, without_nulls(value)))
            .collect(),
        other => other,
    }
}
