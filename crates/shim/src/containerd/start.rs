//! `start`: the address of the server that a container belongs to, which is started if
//! there is none yet.

use super::address::Address;
use super::bootstrap::Bootstrap;
use super::flags::Flags;
use super::{Engine, sandbox_id};
use crate::client::{Listeners, launch};
use crate::server::{ServerArgs, runtime};
use anyhow::{Context, bail};
use kata_oci::Spec;
use kata_protocol::Id;
use kata_sandbox::factory::Recipe;
use kata_sandbox::{PodRole, Resource, SandboxDir, StateFile, cleanup};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a bundle's specification has in it.
const CONFIG: &str = "config.json";
/// Where containerd 1.6 looks for the address after it was restarted.
const ADDRESS_FILE: &str = "address";
/// Highest `oom_score_adj`.
const MAX_OOM_SCORE: i32 = 1000;

/// Finds or starts the server; gives what is to be printed.
pub(crate) fn start(name: &str, flags: &Flags, input: &[u8]) -> anyhow::Result<String> {
    let bootstrap = Bootstrap::parse(input);
    let id: Id = flags.id.parse().context("flag -id")?;
    let bundle = bundle(flags)?;
    let spec = spec(&bundle)?;
    let pod = role(spec.as_ref())?;
    let (group, joins) = match &pod {
        PodRole::Container { sandbox } => (sandbox, true),
        PodRole::Alone | PodRole::Sandbox => (&id, false),
    };
    let dir = bootstrap.socket_dir();
    let address = Address::of(&flags.address, &flags.namespace, group.as_str(), dir.as_deref());
    if joins && !address.answers() {
        bail!("the sandbox {group} of container {id} is not running: its pod must be made anew");
    }
    if !joins {
        let sandbox = sandbox_id(&flags.namespace, group)?;
        let engine = Engine {
            namespace: flags.namespace.clone(),
            events: events(&bootstrap),
            log: bundle.join("log"),
            config: bootstrap.config().map_or_else(|| variant(name), |path| Ok(Some(path)))?,
        };
        let recipe = spec.map(|spec| Recipe::of(engine.config.as_deref(), &spec));
        launch_server(&sandbox, &address, engine, flags.debug, recipe.as_ref())?;
    }
    write_address(&bundle, &address)?;
    Ok(bootstrap.answer(&address.uri()))
}

/// The bundle: containerd makes it our working directory.
pub(crate) fn bundle(flags: &Flags) -> anyhow::Result<PathBuf> {
    let here = std::env::current_dir().context("cannot find the bundle: it has been removed")?;
    Ok(here.join(&flags.bundle))
}

/// The specification in a bundle; none in a sandbox's, of the Sandbox API.
pub(crate) fn spec(bundle: &Path) -> anyhow::Result<Option<Spec>> {
    let path = bundle.join(CONFIG);
    let raw = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    Spec::parse(&raw).map(Some).with_context(|| format!("cannot use {}", path.display()))
}

/// What the container with this specification is to a pod.
pub(crate) fn role(spec: Option<&Spec>) -> anyhow::Result<PodRole> {
    Ok(spec.map_or(Ok(PodRole::Sandbox), |spec| PodRole::of(&spec.annotations))?)
}

fn events(bootstrap: &Bootstrap) -> PathBuf {
    let from_env = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let address = bootstrap.events().unwrap_or(&from_env);
    address.strip_prefix("unix://").unwrap_or(address).into()
}

/// The configuration of `containerd-shim-kata-<variant>-v2`.
fn variant(name: &str) -> anyhow::Result<Option<PathBuf>> {
    let named = std::env::var_os(kata_config::CONFIG_ENV).filter(|v| !v.is_empty());
    let variant = name.strip_prefix("containerd-shim-kata-").unwrap_or_default();
    let Some(variant) = variant.strip_suffix("-v2").filter(|v| !v.is_empty()) else {
        return Ok(named.map(PathBuf::from));
    };
    let found = kata_config::Places::of_this_program().variant(variant);
    found.map(Some).with_context(|| {
        format!("there is no configuration-{variant}.toml where configuration.toml is looked for")
    })
}

fn launch_server(
    sandbox: &Id,
    address: &Address,
    engine: Engine,
    debug: bool,
    recipe: Option<&Recipe>,
) -> anyhow::Result<()> {
    let listener = address.listen()?;
    // Written down as soon as there is where to; until then `delete` finds it by its name.
    let dir = new_dir(sandbox)?;
    let launched = (|| -> anyhow::Result<()> {
        let path = address.path().to_owned();
        StateFile::open(dir.clone()).record(Resource::Socket { path })?;
        std::os::unix::fs::symlink(address.path(), dir.task_link())
            .context("cannot link the server's socket")?;
        raise_oom_score();
        let level = std::env::var("KATA_LOG").ok().or(debug.then(|| "debug".to_owned()));
        let args = ServerArgs { sandbox: sandbox.to_string(), engine: Some(engine), log: level };
        let listeners = Listeners { task: listener.into(), attach: None };
        let launched = launch(&dir, sandbox, &args, listeners, recipe);
        Ok(runtime()?.block_on(launched)?)
    })();
    if launched.is_err() {
        address.remove();
        // The first failure is the one to tell.
        let _ = dir.remove();
    }
    launched
}

/// The directory of a new sandbox. One that is there is a dead server's: a living one would
/// have the address.
fn new_dir(sandbox: &Id) -> anyhow::Result<SandboxDir> {
    let failed = || format!("cannot make the directory of sandbox {sandbox}");
    match SandboxDir::create(sandbox) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            cleanup(&SandboxDir::of(sandbox))
                .with_context(|| format!("cannot undo what is left of sandbox {sandbox}"))?;
            SandboxDir::create(sandbox).with_context(failed)
        }
        other => other.with_context(failed),
    }
}

/// A shim is to go before containerd when memory is short. The server inherits it from us.
fn raise_oom_score() {
    let read = |pid: &str| -> Option<i32> {
        fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).ok()?.trim().parse().ok()
    };
    let engine = std::os::unix::process::parent_id().to_string();
    let Some(score) = read(&engine) else { return };
    let score = (score + 1).min(MAX_OOM_SCORE);
    // Without the right to lower it, what is inherited stays.
    let _ = fs::write("/proc/self/oom_score_adj", score.to_string());
}

/// Replaces the file as one step: containerd may read it at any time.
fn write_address(bundle: &Path, address: &Address) -> anyhow::Result<()> {
    let new = bundle.join(format!(".{ADDRESS_FILE}"));
    fs::write(&new, address.uri())
        .and_then(|()| fs::rename(&new, bundle.join(ADDRESS_FILE)))
        .with_context(|| format!("cannot write the address to {}", bundle.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_name_has_no_variant() {
        assert!(variant("containerd-shim-kata-v2").is_ok());
        let error = variant("containerd-shim-kata-nosuch-v2").unwrap_err().to_string();
        assert!(error.contains("configuration-nosuch.toml"), "{error}");
    }

    #[test]
    fn a_bundle_tells_what_its_container_is() {
        let dir = tempfile::tempdir().unwrap();
        let told = || spec(dir.path()).and_then(|spec| role(spec.as_ref()));
        assert_eq!(told().unwrap(), PodRole::Sandbox);
        fs::write(dir.path().join(CONFIG), "{").unwrap();
        assert!(told().unwrap_err().to_string().contains("config.json"));
        let text = r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"},"annotations":{
            "io.kubernetes.cri.container-type":"sandbox"}}"#;
        fs::write(dir.path().join(CONFIG), text).unwrap();
        assert_eq!(told().unwrap(), PodRole::Sandbox);
    }
}
