//! What goes wrong: one clear error with the cause, runc's exit codes, nothing left.

mod machine;

use std::fs;

use anyhow::{Result, ensure};
use kata_e2e::oci::Oci;
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::json;

pub fn trials() -> Vec<Trial<Oci>> {
    let mut all = machine::trials();
    all.extend(trials!["input":
        Both: missing_bundle_is_named, bad_json_is_an_error, missing_rootfs_is_named,
            rootfs_without_the_command_names_it, missing_bind_source_is_named,
            unknown_flag_and_verb_are_errors, state_directory_on_a_full_disk_is_an_error;
    ]);
    all
}

fn missing_bundle_is_named(oci: &Oci) -> Result<()> {
    let output = oci.cmd("create --bundle /no/such/bundle x1")?.expect_code(1)?;
    ensure!(
        output.err().contains("/no/such/bundle")
            && output.err().to_lowercase().contains("no such file"),
        "{output}"
    );
    Ok(())
}

fn bad_json_is_an_error(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    fs::write(bundle.dir.join("config.json"), "{ \"ociVersion\": ")?;
    let output = bundle.create()?.expect_code(1)?;
    ensure!(!output.err().is_empty() && output.err().lines().count() <= 3, "{output}");
    ensure!(bundle.verb("state")?.code == 1);
    Ok(())
}

fn missing_rootfs_is_named(oci: &Oci) -> Result<()> {
    let bundle =
        oci.bundle("true")?.with(|spec| spec["root"]["path"] = json!("/no/such/rootfs"))?;
    let output = bundle.create()?.expect_code(1)?;
    ensure!(output.err().contains("/no/such/rootfs"), "{output}");
    ensure!(bundle.verb("state")?.code == 1, "a container is left");
    Ok(())
}

fn rootfs_without_the_command_names_it(oci: &Oci) -> Result<()> {
    let bundle =
        oci.bundle("true")?.with(|spec| spec["process"]["args"] = json!(["no-such-command"]))?;
    let output = bundle.create()?.expect_code(1)?;
    let said = output.err();
    ensure!(
        said.contains("no-such-command") && said.contains("executable file not found"),
        "{output}"
    );
    ensure!(bundle.verb("state")?.code == 1, "a container is left");
    Ok(())
}

fn missing_bind_source_is_named(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?.with(|spec| {
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source", "options": ["rbind"] }));
        }
    })?;
    let output = bundle.create()?.expect_code(1)?;
    ensure!(output.err().contains("/no/such/source"), "{output}");
    ensure!(bundle.verb("state")?.code == 1, "a container is left");
    Ok(())
}

fn unknown_flag_and_verb_are_errors(oci: &Oci) -> Result<()> {
    ensure!(oci.cmd("create --no-such-flag x")?.code != 0);
    ensure!(oci.cmd("no-such-verb")?.code != 0);
    ensure!(oci.cmd("create")?.code != 0);
    Ok(())
}

fn state_directory_on_a_full_disk_is_an_error(oci: &Oci) -> Result<()> {
    use kata_e2e::command::ok;
    use std::process::Command;
    let root = oci.arena.dir(&format!("full-{}", oci.runtime))?;
    let shown = root.display().to_string();
    ok(Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k,nr_inodes=64", "none", &shown]))?;
    let result = (|| {
        fs::write(root.join("fill"), vec![0; 16 << 10]).ok();
        let bundle = oci.bundle("true")?;
        let line = format!("--root {shown} create --bundle {} {}", bundle.dir.display(), bundle.id);
        let output = oci.cmd(&line)?;
        // runc says that something failed, but not what.
        let named = output.err().to_lowercase().contains("no space left");
        ensure!(output.code == 1 && (named || !oci.is_kata()), "{output}");
        oci.cmd(&format!("--root {shown} delete --force {}", bundle.id))?;
        Ok(())
    })();
    ok(Command::new("umount").arg("-l").arg(&root))?;
    result
}
