//! The `config.json` of a container that no engine wrote one for.

use super::Run;
use super::users::{self, User};
use crate::image::{Config, ConfinedRoot};
use crate::runtime::{example_spec, size};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// What Docker gives a container.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const CPU_PERIOD: u64 = 100_000;

/// A container to describe.
pub struct Wanted<'a> {
    pub run: &'a Run,
    pub image: &'a Config,
    pub rootfs: &'a Path,
    pub hostname: &'a str,
    /// The network namespace to join; a new one with loopback alone if none.
    pub netns: Option<&'a Path>,
}

/// Writes the bundle into `directory`.
pub fn write(directory: &Path, wanted: &Wanted<'_>) -> Result<()> {
    let root = ConfinedRoot::open(wanted.rootfs)?;
    let user = users::find(&root, wanted.run.user.as_deref().unwrap_or(&wanted.image.user))?;
    let mut spec = spec(wanted, &user)?;
    let mounts = spec["mounts"].as_array_mut().context("the example has mounts")?;
    for (name, text) in [
        ("hostname", format!("{}\n", wanted.hostname)),
        ("hosts", format!("127.0.0.1\tlocalhost {}\n::1\tlocalhost\n", wanted.hostname)),
        ("resolv.conf", resolvers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())),
    ] {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        mounts.push(bind(&path, Path::new("/etc").join(name).as_path(), false));
    }
    for volume in &wanted.run.volumes {
        let source = fs::canonicalize(&volume.source)
            .with_context(|| format!("cannot find the volume {}", volume.source.display()))?;
        mounts.push(bind(&source, &volume.destination, volume.readonly));
    }
    let path = directory.join("config.json");
    fs::write(&path, serde_json::to_vec_pretty(&spec)?)
        .with_context(|| format!("cannot write {}", path.display()))
}

fn bind(source: &Path, destination: &Path, readonly: bool) -> Value {
    let access = if readonly { "ro" } else { "rw" };
    json!({"type": "bind", "source": source, "destination": destination,
           "options": ["rbind", "rprivate", access]})
}

fn spec(wanted: &Wanted<'_>, user: &User) -> Result<Value> {
    let mut spec = example_spec();
    let caps = json!(CAPABILITIES);
    spec["process"] = json!({
        "terminal": wanted.run.tty,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
        "args": command(wanted)?,
        "env": environment(wanted, user),
        "cwd": workdir(wanted)?,
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "noNewPrivileges": false
    });
    spec["root"] = json!({"path": wanted.rootfs, "readonly": wanted.run.read_only});
    spec["hostname"] = json!(wanted.hostname);
    if let Some(path) = wanted.netns {
        for namespace in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if namespace["type"] == "network" {
                namespace["path"] = json!(path);
            }
        }
    }
    if let Some(text) = &wanted.run.memory {
        let bytes = size(text).filter(|bytes| *bytes > 0);
        let bytes = bytes.with_context(|| format!("--memory {text:?} is not a size"))?;
        spec["linux"]["resources"]["memory"] = json!({"limit": bytes});
    }
    if let Some(cpus) = wanted.run.cpus {
        if !(0.01..=1024.0).contains(&cpus) {
            bail!("--cpus {cpus} is out of range");
        }
        let quota = (cpus * CPU_PERIOD as f64) as i64;
        spec["linux"]["resources"]["cpu"] = json!({"quota": quota, "period": CPU_PERIOD});
    }
    Ok(spec)
}

/// The caller's command replaces the image's arguments, not its entry point; as Docker.
fn command(wanted: &Wanted<'_>) -> Result<Vec<String>> {
    let arguments =
        if wanted.run.command.is_empty() { &wanted.image.cmd } else { &wanted.run.command };
    let command: Vec<String> = wanted.image.entrypoint.iter().chain(arguments).cloned().collect();
    if command.is_empty() {
        bail!("there is no command: name one after the source");
    }
    Ok(command)
}

fn workdir(wanted: &Wanted<'_>) -> Result<String> {
    let text = wanted.run.workdir.as_deref().unwrap_or(&wanted.image.working_dir);
    match text {
        "" => Ok("/".to_owned()),
        text if text.starts_with('/') => Ok(text.to_owned()),
        text => bail!("the working directory {text:?} must be an absolute path"),
    }
}

fn environment(wanted: &Wanted<'_>, user: &User) -> Vec<String> {
    let mut list: Vec<String> = vec![PATH.to_owned(), format!("HOME={}", user.home)];
    list.push(format!("HOSTNAME={}", wanted.hostname));
    if wanted.run.tty {
        list.push("TERM=xterm".to_owned());
    }
    for item in wanted.image.env.iter().chain(&wanted.run.env) {
        let (name, item) = match item.split_once('=') {
            Some((name, _)) => (name, item.clone()),
            None => match std::env::var(item) {
                Ok(value) => (item.as_str(), format!("{item}={value}")),
                Err(_) => continue,
            },
        };
        list.retain(|other| other.split('=').next() != Some(name));
        list.push(item);
    }
    list
}

/// The host's name servers, but for those that only the host itself can reach.
fn resolvers(text: &str) -> String {
    let reachable = |line: &&str| {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => words
                .next()
                .and_then(|word| word.parse::<IpAddr>().ok())
                .is_some_and(|address| !address.is_loopback()),
            Some("search" | "domain" | "options") => true,
            _ => false,
        }
    };
    text.lines().filter(reachable).map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn spec_of(line: &str, image: &Config) -> Result<kata_oci::Spec> {
        let words = std::iter::once("kata-ctl").chain(line.split_whitespace());
        let super::super::Command::Run(run) = super::super::Ctl::try_parse_from(words)?.command
        else {
            panic!("not a run");
        };
        let root = tempfile::tempdir()?;
        let bundle = tempfile::tempdir()?;
        fs::create_dir(root.path().join("etc"))?;
        fs::write(root.path().join("etc/passwd"), "web:x:33:34::/www:/bin/sh\n")?;
        let wanted = Wanted {
            run: &run,
            image,
            rootfs: root.path(),
            hostname: "box",
            netns: Some(Path::new("/run/netns/x")),
        };
        write(bundle.path(), &wanted)?;
        Ok(kata_oci::Spec::parse(&fs::read(bundle.path().join("config.json"))?)?)
    }

    #[test]
    fn the_image_and_the_command_line_are_joined_as_docker_does() {
        let image = Config {
            env: vec!["A=image".into(), "PATH=/image".into()],
            entrypoint: vec!["/entry".into()],
            cmd: vec!["default".into()],
            working_dir: "/srv".into(),
            user: "web".into(),
        };
        let spec = spec_of("run -e A=mine -v /tmp:/t:ro --memory 64m --cpus 0.5 x arg", &image);
        let spec = spec.unwrap();
        let process = spec.process.as_ref().unwrap();
        assert_eq!(process.args, ["/entry", "arg"]);
        assert_eq!((process.user.uid, process.user.gid), (33, 34));
        assert_eq!(process.cwd, "/srv");
        assert!(process.env.contains(&"A=mine".to_owned()));
        assert!(process.env.contains(&"PATH=/image".to_owned()));
        assert!(process.env.contains(&"HOME=/www".to_owned()));
        assert_eq!(process.env.iter().filter(|item| item.starts_with("PATH=")).count(), 1);
        assert!(spec.mounts.iter().any(|m| m.destination == Path::new("/t") && m.is_readonly()));
        let resources = spec.linux().resources.clone().unwrap();
        assert_eq!(resources.memory.unwrap().limit, Some(64 << 20));
        assert_eq!(resources.cpu.unwrap().quota, Some(50_000));
        assert!(
            spec_of("run x", &image).unwrap().process.unwrap().args.ends_with(&["default".into()])
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let image = Config::default();
        for line in [
            "run x",
            "run -w here x sh",
            "run -u nobody x sh",
            "run --memory lots x sh",
            "run --cpus 0 x sh",
            "run -v /does/not/exist:/x x sh",
        ] {
            assert!(spec_of(line, &image).is_err(), "{line}");
        }
    }

    #[test]
    fn name_servers_on_loopback_are_left_out() {
        let text = "# c\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nsearch example.org\n";
        assert_eq!(resolvers(text), "nameserver 10.0.0.2\nsearch example.org\n");
    }
}
