//! `factory`: templates of virtual machines, for `kata-ctl` and `kata-runtime` alike.

use crate::runtime::block_on;
use anyhow::{Result, bail};
use kata_sandbox::factory;
use std::path::Path;

/// Does what the arguments say.
///
/// # Errors
/// They say nothing that is known, or it cannot be done.
pub fn run(config: Option<&Path>, arguments: &[String]) -> Result<u8> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["init"] => init(config),
        ["status"] => status(),
        ["destroy"] => destroy(),
        _ => bail!("factory takes one of: init, status, destroy"),
    }
}

/// The role that keeps the templates.
///
/// # Errors
/// It cannot be set up.
pub fn role(args: &str) -> Result<()> {
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).try_init();
    Ok(factory::main(args)?)
}

/// The role that holds a machine which is forked.
///
/// # Errors
/// It cannot be made, or has ended.
pub fn stem_role(args: &str) -> Result<()> {
    let _ = tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).try_init();
    Ok(factory::stem_main(args)?)
}

fn init(config: Option<&Path>) -> Result<u8> {
    let enabled = kata_config::load(config)?.factory.makes_templates();
    if !enabled {
        bail!(
            "factory init: enable_template is off, so that no sandbox would use a template: say \
             enable_template = true in the [factory] section of configuration.toml first"
        );
    }
    let config = config.map(std::fs::canonicalize).transpose()?;
    block_on(async { Ok(factory::init(config).await?) })?;
    status()
}

fn status() -> Result<u8> {
    let Some(templates) = block_on(async { Ok(factory::status().await?) })? else {
        println!("no templates: the factory does not run");
        return Ok(0);
    };
    println!(
        "{:16}  {:>10}  {:>5}  {:>9}  {:>5}  {:>6}  {:>6}  STATE",
        "TEMPLATE", "MEMORY", "VCPUS", "TAKES", "FORKS", "CLONES", "SPARES"
    );
    for template in templates {
        println!(
            "{:16}  {:>6} MiB  {:>5}  {:>5} MiB  {:>5}  {:>6}  {:>6}  {}",
            template.name,
            template.memory_mib,
            template.vcpus,
            template.bytes.div_ceil(1 << 20),
            if template.forks { "yes" } else { "no" },
            template.clones,
            format!("{}/{}", template.spares, template.spares_wanted),
            template.state
        );
    }
    Ok(0)
}

fn destroy() -> Result<u8> {
    match block_on(async { Ok(factory::destroy().await?) })? {
        true => println!("the templates are gone; sandboxes that were cloned from them run on"),
        false => println!("no templates: the factory does not run"),
    }
    Ok(0)
}
