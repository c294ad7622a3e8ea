//! What a kubelet mounts: emptyDir, hostPath, configMap, subPath, the termination log.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use k8s_cri::v1;
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::cri::{Cri, Pod};
use kata_e2e::runner::Trial;
use kata_e2e::trials;

use super::pods::SLEEP;

pub fn trials() -> Vec<Trial<Cri>> {
    trials!["volumes":
        Both: empty_dir_is_shared_by_the_containers, empty_dir_in_memory_is_shared,
            host_paths_are_seen_from_both_sides, config_map_updates_are_seen,
            sub_path_and_single_files_are_mounted, termination_message_reaches_the_host,
            hosts_file_is_the_kubelets;
    ]
}

fn mount(host: &Path, inside: &str, readonly: bool) -> v1::Mount {
    v1::Mount {
        container_path: inside.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

/// A directory as a kubelet has for each volume.
fn volume(cri: &Cri, pod: &Pod<'_>, name: &str) -> Result<std::path::PathBuf> {
    let arena = &cri.containerd.arena;
    arena.dir(&format!("pods/{}/volumes/{name}", pod.config.hostname))
}

fn empty_dir_is_shared_by_the_containers(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let dir = volume(cri, &pod, "empty")?;
    let mut first = pod.container("first", "echo one > /data/x; mkdir /data/d; exit 0");
    first.mounts = vec![mount(&dir, "/data", false)];
    ensure!(pod.run_config(first)?.wait()? == 0);
    let mut second = pod.container("second", SLEEP);
    second.mounts = vec![mount(&dir, "/other", false), mount(&dir, "/fixed", true)];
    let second = pod.run_config(second)?;
    let seen = second.exec(
        "cat /other/x; echo two >> /other/x; cat /fixed/x; \
         touch /fixed/y 2>/dev/null || echo read-only; ls -d /fixed/d",
    )?;
    ensure!(seen == "one\none\ntwo\nread-only\n/fixed/d", "{seen}");
    ensure!(fs::read_to_string(dir.join("x"))? == "one\ntwo\n");
    Ok(())
}

fn empty_dir_in_memory_is_shared(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let dir = volume(cri, &pod, "memory")?;
    let shown = dir.display().to_string();
    let options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", &shown];
    command::ok(Command::new("mount").args(options))?;
    let result = (|| {
        let mut first = pod.container("first", "echo one > /data/x; exit 0");
        first.mounts = vec![mount(&dir, "/data", false)];
        ensure!(pod.run_config(first)?.wait()? == 0);
        let mut second = pod.container("second", SLEEP);
        second.mounts = vec![mount(&dir, "/data", false)];
        let second = pod.run_config(second)?;
        let full = "head -c 2000000 /dev/zero > /data/big 2>/dev/null || echo full; rm /data/big";
        ensure!(second.exec("cat /data/x")? == "one");
        ensure!(second.exec(full)? == "full");
        pod.remove(&[&second.id])
    })();
    command::ok(Command::new("umount").arg(&shown))?;
    result
}

fn host_paths_are_seen_from_both_sides(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let dir = volume(cri, &pod, "host")?;
    fs::write(dir.join("in"), "from the host\n")?;
    let mut config = pod.container("one", SLEEP);
    config.mounts = vec![mount(&dir, "/d", false), mount(&dir.join("in"), "/file", true)];
    let container = pod.run_config(config)?;
    let seen = container
        .exec("cat /file; echo inside > /d/out; echo x 2>/dev/null > /file || echo refused")?;
    ensure!(seen == "from the host\nrefused", "{seen}");
    ensure!(fs::read_to_string(dir.join("out"))? == "inside\n");
    fs::write(dir.join("later"), "later")?;
    command::eventually("a file made later is seen", PATIENCE, || {
        Ok(container.execute("cat /d/later")?.out == "later")
    })
}

/// As a kubelet's atomic writer: `key -> ..data/key`, `..data -> ..<time>`.
fn publish(dir: &Path, version: &str, text: &str) -> Result<()> {
    let own = dir.join(format!("..{version}"));
    fs::create_dir(&own)?;
    fs::write(own.join("key"), text)?;
    symlink(format!("..{version}"), dir.join("..data_tmp"))?;
    fs::rename(dir.join("..data_tmp"), dir.join("..data"))?;
    if !dir.join("key").is_symlink() {
        symlink("..data/key", dir.join("key"))?;
    }
    Ok(())
}

fn config_map_updates_are_seen(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let dir = volume(cri, &pod, "config")?;
    publish(&dir, "one", "first")?;
    let mut config = pod.container("one", SLEEP);
    config.mounts = vec![mount(&dir, "/config", true)];
    let container = pod.run_config(config)?;
    ensure!(container.exec("cat /config/key")? == "first");
    ensure!(container.exec("echo x 2>/dev/null > /config/key || echo refused")? == "refused");
    publish(&dir, "two", "second")?;
    fs::remove_dir_all(dir.join("..one"))?;
    command::eventually("the update is seen", PATIENCE, || {
        Ok(container.execute("cat /config/key")?.out == "second")
    })
}

fn sub_path_and_single_files_are_mounted(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let dir = volume(cri, &pod, "whole")?;
    fs::create_dir_all(dir.join("part/deep"))?;
    fs::write(dir.join("part/deep/f"), "deep")?;
    fs::write(dir.join("secret"), "not to be seen")?;
    // A kubelet binds the part to a place of its own and hands that over.
    let bound = volume(cri, &pod, "bound")?;
    let shown = bound.display().to_string();
    command::ok(Command::new("mount").arg("--bind").arg(dir.join("part")).arg(&shown))?;
    let result = (|| {
        let mut config = pod.container("one", SLEEP);
        let file = dir.join("part/deep/f");
        config.mounts = vec![mount(&bound, "/part", false), mount(&file, "/etc/one.conf", true)];
        let container = pod.run_config(config)?;
        let seen = container.exec("cat /part/deep/f /etc/one.conf; ls /part; ls /part/..")?;
        ensure!(seen.starts_with("deepdeepdeep\n") && !seen.contains("secret"), "{seen}");
        pod.remove(&[&container.id])
    })();
    command::ok(Command::new("umount").arg(&shown))?;
    result
}

fn termination_message_reaches_the_host(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let log = volume(cri, &pod, "etc")?.join("termination");
    fs::write(&log, "")?;
    let mut config = pod.container("one", "echo reason > /dev/termination-log; exit 1");
    config.mounts = vec![mount(&log, "/dev/termination-log", false)];
    let container = pod.run_config(config)?;
    ensure!(container.wait()? == 1);
    ensure!(fs::read_to_string(&log)? == "reason\n", "{:?}", fs::read_to_string(&log)?);
    Ok(())
}

fn hosts_file_is_the_kubelets(cri: &Cri) -> Result<()> {
    let pod = cri.pod()?;
    let hosts = volume(cri, &pod, "etc")?.join("hosts");
    fs::write(&hosts, format!("127.0.0.1 localhost\n{} other.test\n", pod.address()?))?;
    let mut config = pod.container("one", SLEEP);
    config.mounts = vec![mount(&hosts, "/etc/hosts", false)];
    let container = pod.run_config(config)?;
    let seen = container.exec("ping -c1 -W20 other.test > /dev/null && echo known")?;
    ensure!(seen == "known", "{seen}");
    Ok(())
}
