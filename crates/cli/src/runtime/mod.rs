//! `kata-runtime`: the OCI command line, as thin clients of a sandbox's server.
//!
//! [`main`] reads the flags and finds the verb; each verb is one function that takes the
//! [`Call`] and returns an exit code. [`create`] is the one with a story to tell.

mod check;
pub mod create;
mod delete;
mod env;
mod events;
mod exec;
mod features;
mod lifecycle;
mod query;
mod resources;
mod spec;
mod stats;
mod verbs;

use crate::flags::{self, FlagError, Order, Parsed};
use crate::log::{self, Format};
use crate::record::{DEFAULT_ROOT, Root};
use anyhow::{Context, Result, anyhow, bail};
use std::path::PathBuf;
use tracing::level_filters::LevelFilter;
use verbs::{GLOBAL, VERBS, Verb};

/// What was said before the verb.
#[derive(Clone, Debug)]
pub struct Global {
    /// Where the records are.
    pub root: Root,
    /// `cgroupsPath` is systemd's.
    pub systemd_cgroup: bool,
    /// The configuration file to use.
    pub config: Option<PathBuf>,
}

impl Default for Global {
    fn default() -> Self {
        Self { root: Root::new(DEFAULT_ROOT), systemd_cgroup: false, config: None }
    }
}

/// One call of a verb.
pub struct Call {
    global: Global,
    flags: Parsed,
}

impl Call {
    fn id(&self) -> Result<kata_protocol::Id> {
        let text = self.flags.args.first().map_or("", String::as_str);
        if text.is_empty() {
            bail!("container id cannot be empty");
        }
        text.parse().context("invalid container ID format")
    }
}

/// Runs the command line; returns the exit code.
pub fn main(words: &[String]) -> u8 {
    let global = match Parsed::read(GLOBAL, Order::First, words) {
        Ok(global) => global,
        Err(FlagError::Help) => {
            print!("{}", usage());
            return 0;
        }
        Err(error) => {
            print!("Incorrect Usage. {error}\n\n{}", usage());
            let _ = log::start(None, Format::Text, LevelFilter::ERROR);
            log::fatal(&error.into(), false);
            return 1;
        }
    };
    let to_file = match start_log(&global) {
        Ok(to_file) => to_file,
        Err(error) => {
            let _ = log::start(None, Format::Text, LevelFilter::ERROR);
            log::fatal(&error, false);
            return 1;
        }
    };
    match run(&global) {
        Ok(code) => code,
        Err(failure) => {
            log::fatal(&failure.error, to_file);
            failure.code
        }
    }
}

struct Failure {
    error: anyhow::Error,
    code: u8,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { error, code: 1 }
    }
}

fn start_log(global: &Parsed) -> Result<bool> {
    let format = match global.text("log-format").unwrap_or("text") {
        "text" => Format::Text,
        "json" => Format::Json,
        other => bail!("invalid log-format: {other}"),
    };
    let level = if global.on("debug") { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let file = global.text("log").map(PathBuf::from);
    log::start(file.as_deref(), format, level)
        .with_context(|| format!("cannot open the log file {:?}", file.unwrap_or_default()))
}

fn run(parsed: &Parsed) -> Result<u8, Failure> {
    if parsed.on("version") {
        print!("{}", version());
        return Ok(0);
    }
    if parsed.on("show-default-config-paths") {
        return Ok(env::show_paths());
    }
    if let Some(value) = parsed.text("rootless")
        && !["true", "false", "auto"].contains(&value)
    {
        return Err(anyhow!("invalid value {value:?} for flag -rootless").into());
    }
    let Some((name, rest)) = parsed.args.split_first() else {
        print!("{}", usage());
        return Ok(0);
    };
    if ["help", "h"].contains(&name.as_str()) {
        let verb = rest.first().and_then(|name| find(name));
        print!("{}", verb.map_or_else(usage, verb_usage));
        return Ok(0);
    }
    let verb = find(name)
        .ok_or_else(|| Failure { error: anyhow!("No help topic for '{name}'"), code: 3 })?;
    let flags = match Parsed::read(verb.flags, verb.order, rest) {
        Ok(flags) => flags,
        Err(FlagError::Help) => {
            print!("{}", verb_usage(verb));
            return Ok(0);
        }
        Err(error) => {
            print!("Incorrect Usage: {error}\n\n{}", verb_usage(verb));
            return Err(anyhow!(error).into());
        }
    };
    if let Err(error) = count(verb, flags.args.len()) {
        print!("Incorrect Usage.\n\n{}", verb_usage(verb));
        return Err(error.into());
    }
    dispatch(verb.name, &Call { global: settings(parsed), flags })
}

fn settings(parsed: &Parsed) -> Global {
    let config = parsed.text("config").map(PathBuf::from);
    Global {
        root: Root::new(parsed.text("root").unwrap_or(DEFAULT_ROOT)),
        systemd_cgroup: parsed.on("systemd-cgroup"),
        config: config.or_else(|| {
            std::env::var_os(kata_config::CONFIG_ENV).filter(|v| !v.is_empty()).map(PathBuf::from)
        }),
    }
}

fn find(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|verb| verb.name == name)
}

/// runc's words for a wrong number of arguments.
fn count(verb: &Verb, given: usize) -> Result<()> {
    match verb.args {
        (least, Some(most)) if least == most && given != least => {
            bail!("kata-runtime: {:?} requires exactly {least} argument(s)", verb.name)
        }
        (_, Some(most)) if given > most => {
            bail!("kata-runtime: {:?} requires a maximum of {most} argument(s)", verb.name)
        }
        (least, _) if given < least => {
            bail!("kata-runtime: {:?} requires a minimum of {least} argument(s)", verb.name)
        }
        _ => Ok(()),
    }
}

fn dispatch(verb: &str, call: &Call) -> Result<u8, Failure> {
    let result = match verb {
        "create" => block_on(create::create_verb(call)),
        "run" => block_on(create::run_verb(call)),
        "exec" => {
            return block_on(exec::exec(call))
                .map_err(|error| Failure { error: error.context("exec failed"), code: 255 });
        }
        "start" => block_on(lifecycle::start(call)),
        "kill" => block_on(lifecycle::kill(call)),
        "pause" => block_on(lifecycle::pause(call)),
        "resume" => block_on(lifecycle::resume(call)),
        "update" => block_on(lifecycle::update(call)),
        "delete" => block_on(delete::delete(call)),
        "state" => block_on(query::state(call)),
        "list" => block_on(query::list(call)),
        "ps" => block_on(query::ps(call)),
        "events" => block_on(events::events(call)),
        "spec" => spec::spec(call),
        "features" => features::features(),
        "kata-check" | "check" => check::check(call),
        "kata-env" | "env" => env::env(call),
        "factory" => crate::factory::run(call.global.config.as_deref(), &call.flags.args),
        "checkpoint" | "restore" => Err(anyhow!(
            "{verb} is not supported: CRIU cannot see the processes inside a virtual machine"
        )),
        other => Err(anyhow!("No help topic for '{other}'")),
    };
    Ok(result?)
}

/// Runs a verb's calls.
///
/// # Errors
/// The verb's.
pub fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?
        .block_on(future)
}

/// `--version`, as engines parse it.
fn version() -> String {
    format!("kata-runtime version {}\nspec: {}\n", env!("CARGO_PKG_VERSION"), features::SPEC_MAX)
}

fn usage() -> String {
    let width = VERBS.iter().map(|verb| verb.name.len()).max().unwrap_or(0);
    let verbs: String =
        VERBS.iter().map(|verb| format!("   {:width$}  {}\n", verb.name, verb.summary)).collect();
    format!(
        "NAME:\n   kata-runtime - run each container in a virtual machine of its own\n\n\
         USAGE:\n   kata-runtime [global options] command [command options] [arguments...]\n\n\
         COMMANDS:\n{verbs}\nGLOBAL OPTIONS:\n{}",
        flags::help(GLOBAL)
    )
}

fn verb_usage(verb: &Verb) -> String {
    let options = if verb.flags.is_empty() {
        String::new()
    } else {
        format!("\nOPTIONS:\n{}", flags::help(verb.flags))
    };
    format!(
        "NAME:\n   kata-runtime {} - {}\n\nUSAGE:\n   kata-runtime {} [command options] {}\n{options}",
        verb.name, verb.summary, verb.name, verb.usage
    )
}

pub use check::kata_check;
pub use delete::destroy;
pub use env::kata_env;
pub use resources::bytes as size;
pub use spec::example as example_spec;

#[cfg(test)]
mod tests;
