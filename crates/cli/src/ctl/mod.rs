//! `kata-ctl`: containers in virtual machines without any engine.
//!
//! [`run`] is the way in: a root directory or an image, and a command. It creates, starts
//! and deletes the container as `kata-runtime run` does, and removes all it made.

mod bundle;
mod datagrams;
mod forward;
mod network;
mod run;
mod trace;
mod users;
mod workdir;

use crate::log::{self, Format};
use anyhow::{Result, anyhow};
use clap::{Args, Parser, Subcommand};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use tracing::level_filters::LevelFilter;

/// Manages Kata containers.
#[derive(Debug, Parser)]
#[command(name = "kata-ctl", version, disable_help_subcommand = true)]
struct Ctl {
    /// The configuration.toml to use.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say what is being done.
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a container in a virtual machine of its own.
    Run(Box<Run>),
    /// Say whether this host can run virtual machines, and what is missing.
    Check,
    /// Print the effective configuration.
    Env {
        /// JSON instead of TOML.
        #[arg(long)]
        json: bool,
    },
    /// Removes what our parent leaves behind.
    #[command(name = workdir::KEEP, hide = true)]
    Keep,
    /// Show where the time of a sandbox's start went.
    Trace {
        /// OpenTelemetry spans (OTLP, JSON) instead of a table.
        #[arg(long)]
        otlp: bool,
        /// The sandbox: its id, or how that begins.
        sandbox: String,
    },
    /// Templates that virtual machines are cloned from.
    Factory {
        /// Make them now; show them; forget them.
        #[arg(value_parser = ["init", "status", "destroy"])]
        what: String,
    },
}

/// What `kata-ctl run` is told.
#[derive(Debug, Args)]
pub struct Run {
    /// Keep standard input open for the process.
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal.
    #[arg(short, long)]
    tty: bool,
    /// Bind a host path: SOURCE:DESTINATION[:ro].
    #[arg(short, long = "volume", value_name = "SRC:DST[:ro]")]
    volumes: Vec<Volume>,
    /// Set an environment variable; a name alone takes ours.
    #[arg(short, long = "env", value_name = "K=V")]
    env: Vec<String>,
    /// Working directory in the container.
    #[arg(short, long)]
    workdir: Option<String>,
    /// User (and group) in the container, names or numbers.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Forward a port of the host: [ADDRESS:]HOST:GUEST[/tcp|/udp].
    #[arg(short, long = "publish", value_name = "[IP:]HOST:GUEST[/udp]")]
    publish: Vec<Publish>,
    /// Memory limit of the container, such as 512m.
    #[arg(short, long)]
    memory: Option<String>,
    /// CPUs, such as 1.5.
    #[arg(long)]
    cpus: Option<f64>,
    /// Host name of the container.
    #[arg(long)]
    hostname: Option<String>,
    /// Id of the container.
    #[arg(long)]
    name: Option<String>,
    /// Make the root file system read-only.
    #[arg(long)]
    read_only: bool,
    /// "none": loopback only.
    #[arg(long, value_parser = ["none", "nat"])]
    network: Option<String>,
    /// Accepted for compatibility: the container is always removed.
    #[arg(long)]
    rm: bool,
    /// Root directory, OCI layout (directory or archive), or docker save archive.
    source: PathBuf,
    /// The command; the image's own if none is given.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// `-v`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Volume {
    source: PathBuf,
    destination: PathBuf,
    readonly: bool,
}

impl FromStr for Volume {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let shape = || anyhow!("a volume is SOURCE:DESTINATION[:ro|rw], not {text:?}");
        let mut parts = text.split(':');
        let source = parts.next().filter(|part| !part.is_empty()).ok_or_else(shape)?;
        let destination = parts.next().filter(|part| part.starts_with('/')).ok_or_else(shape)?;
        let readonly = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(shape()),
        };
        if parts.next().is_some() {
            return Err(shape());
        }
        Ok(Self { source: source.into(), destination: destination.into(), readonly })
    }
}

/// `-p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Publish {
    protocol: Protocol,
    host: SocketAddr,
    guest: u16,
}

/// What a published port carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

impl FromStr for Publish {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let shape =
            || anyhow!("a published port is [ADDRESS:]HOST:GUEST, with /udp for UDP, not {text:?}");
        let (text, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((text, "tcp")) => (text, Protocol::Tcp),
            Some((text, "udp")) => (text, Protocol::Udp),
            Some(_) => return Err(shape()),
        };
        let (rest, guest) = text.rsplit_once(':').ok_or_else(shape)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), rest),
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (address.parse().map_err(|_| shape())?, host)
            }
        };
        let port = |text: &str| text.parse::<u16>().map_err(|_| shape());
        let guest = port(guest)?;
        if guest == 0 {
            return Err(shape());
        }
        Ok(Self { protocol, host: SocketAddr::new(address, port(host)?), guest })
    }
}

/// Runs the command line; returns the exit code.
pub fn main(words: &[String]) -> u8 {
    let words = std::iter::once("kata-ctl".to_owned()).chain(words.iter().cloned());
    let ctl = match Ctl::try_parse_from(words) {
        Ok(ctl) => ctl,
        Err(error) => {
            let code = error.exit_code();
            // Nobody reads it: nothing else to say.
            let _ = error.print();
            return if code == 0 { 0 } else { 125 };
        }
    };
    let level = if ctl.debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let _ = log::start(None, Format::Text, level);
    let result = match &ctl.command {
        Command::Run(run) => run::run(run, ctl.config.as_deref()),
        Command::Keep => workdir::keep(&workdir::global(ctl.config.as_deref())),
        Command::Check => crate::runtime::kata_check(ctl.config.as_deref()),
        Command::Env { json } => crate::runtime::kata_env(ctl.config.as_deref(), *json),
        Command::Trace { otlp, sandbox } => trace::trace(sandbox, *otlp),
        Command::Factory { what } => {
            crate::factory::run(ctl.config.as_deref(), std::slice::from_ref(what))
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kata-ctl: {error:#}");
            exit_code(&error)
        }
    }
}

/// As Docker: 127 for a program that is not there, 126 for one that cannot be executed, 125
/// for a container that never came to run any.
fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<crate::calls::Refused>().and_then(|refused| refused.exit).unwrap_or(125)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Run {
        let words = std::iter::once("kata-ctl").chain(line.split_whitespace());
        match Ctl::try_parse_from(words).unwrap().command {
            Command::Run(run) => *run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_reads_like_dockers() {
        let run = parse(
            "run -it --rm -v /a:/b:ro -e A=1 -e B -w /w -u nobody -p 8080:80 --memory 256m \
             --cpus 1.5 --hostname h --name n --read-only /images/busybox.tar sh -c ls -l",
        );
        assert!(run.interactive && run.tty && run.read_only);
        assert_eq!(run.command, ["sh", "-c", "ls", "-l"]);
        assert_eq!(run.env, ["A=1", "B"]);
        assert_eq!(run.cpus, Some(1.5));
        assert!(run.volumes[0].readonly);
    }

    #[test]
    fn volumes_and_ports_are_checked() {
        for bad in ["/a", "/a:b", ":/b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(bad.parse::<Volume>().is_err(), "{bad}");
        }
        let port: Publish = "127.0.0.1:8080:80".parse().unwrap();
        assert_eq!(port.host, "127.0.0.1:8080".parse().unwrap());
        assert_eq!("[::1]:1:2".parse::<Publish>().unwrap().host, "[::1]:1".parse().unwrap());
        assert_eq!("8080:80/tcp".parse::<Publish>().unwrap().guest, 80);
        assert_eq!("53:53/udp".parse::<Publish>().unwrap().protocol, Protocol::Udp);
        for bad in ["80", "x:80", "1:2/sctp", "1:0", "1.2.3:1:2", "70000:1"] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Ctl::command().debug_assert();
    }
}
