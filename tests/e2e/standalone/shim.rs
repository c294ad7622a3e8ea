//! `containerd-shim-kata-v2` without containerd: what this host's containerd never asks for.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, Mount, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::shim_sync::{Client, TaskClient};
use kata_e2e::command;
use kata_e2e::oci::{Bundle, Oci};
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use ttrpc::context::with_duration;

/// In containerd's place.
const NAMESPACE: &str = "e2e";
const SHIM: &str = "containerd-shim-kata-v2";

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["shim":
        Kata: root_on_an_image_is_a_disk_of_the_guest, start_of_a_dead_pods_container_is_refused;
    ]
}

/// The shim as containerd calls it.
fn shim(bundle: &Bundle<'_>, action: &str) -> Result<command::Output> {
    command::run(
        Command::new(SHIM)
            .args(["-namespace", NAMESPACE, "-address", "/run/none.sock", "-id", &bundle.id])
            .arg(action)
            .current_dir(&bundle.dir),
    )
}

/// An ext4 image with a root file system in it.
fn image(root: &Path, at: &Path) -> Result<()> {
    command::ok(
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([root, at]).arg("64M"),
    )
    .context("make an image (package e2fsprogs)")?;
    Ok(())
}

/// Runs the bundle's process to its end; its exit code.
fn run(bundle: &Bundle<'_>, address: &str, root: Mount) -> Result<u32> {
    let patience = || with_duration(command::PATIENCE);
    let tasks = TaskClient::new(Client::connect(address)?);
    let id = bundle.id.clone();
    let create = CreateTaskRequest {
        id: id.clone(),
        bundle: bundle.dir.display().to_string(),
        stdout: format!("file://{}/output", bundle.dir.display()),
        rootfs: vec![root],
        ..Default::default()
    };
    tasks.create(patience(), &create)?;
    tasks.start(patience(), &StartRequest { id: id.clone(), ..Default::default() })?;
    let ended = tasks.wait(patience(), &WaitRequest { id: id.clone(), ..Default::default() })?;
    tasks.delete(patience(), &DeleteRequest { id: id.clone(), ..Default::default() })?;
    tasks.shutdown(patience(), &ShutdownRequest { id, ..Default::default() })?;
    Ok(ended.exit_status)
}

fn root_on_an_image_is_a_disk_of_the_guest(oci: &Oci) -> Result<()> {
    let script = "grep ' / ' /proc/mounts; echo kept > /note; cat /etc/os-release; exit 4";
    let bundle = oci.bundle(script)?.with(|spec| {
        spec["root"] = serde_json::json!({ "path": "rootfs", "readonly": false });
    })?;
    fs::create_dir(bundle.dir.join("rootfs"))?;
    let disk = bundle.dir.join("root.ext4");
    image(&oci.rootfs, &disk)?;
    let address = shim(&bundle, "start")?.expect_code(0)?.out();
    let root = Mount {
        type_: "ext4".to_owned(),
        source: disk.display().to_string(),
        options: vec!["loop".to_owned()],
        ..Default::default()
    };
    let code = run(&bundle, &address, root)?;
    shim(&bundle, "delete")?.expect_code(0)?;
    let output = fs::read_to_string(bundle.dir.join("output"))?;
    ensure!(code == 4, "exit code {code}: {output}");
    ensure!(output.contains("/dev/vda / ext4") && output.contains("ID=busybox"), "{output}");
    let note = command::ok(Command::new("debugfs").args(["-R", "cat /note"]).arg(&disk))?.out();
    ensure!(note.contains("kept"), "what the guest wrote is not in the image: {note:?}");
    Ok(())
}

fn start_of_a_dead_pods_container_is_refused(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?.with(|spec| {
        spec["annotations"] = serde_json::json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "gone",
        });
    })?;
    let refused = shim(&bundle, "start")?.expect_code(1)?;
    ensure!(refused.err().contains("the sandbox gone"), "{refused}");
    // And containerd undoes what it started, more than once.
    for _ in 0..2 {
        shim(&bundle, "delete")?.expect_code(0)?;
    }
    Ok(())
}
