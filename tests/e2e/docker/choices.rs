//! What the configuration may choose: other shares, other ways for the network.
//!
//! Each is a runtime of its own in daemon.json, which hands a configuration file over.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Result, ensure};
use kata_e2e::command::{self, PATIENCE};
use kata_e2e::docker::Docker;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["choices":
        Kata: nine_p_carries_root_and_volumes, nine_p_keeps_read_only_what_is,
            nine_p_runs_exec_and_leaves_a_layer_to_commit, macvtap_carries_networks,
            macvtap_serves_a_network_that_is_joined_late, no_network_model_means_no_interface;
    ]
}

fn nine_p_carries_root_and_volumes(docker: &Docker) -> Result<()> {
    let (dir, file) = (docker.arena.dir(&docker.name())?, docker.arena.work.join(docker.name()));
    fs::write(dir.join("in"), "from the host\n")?;
    fs::write(&file, "old\n")?;
    let options =
        format!("--runtime kata-9p -v {}:/data -v {}:/etc/one", dir.display(), file.display());
    let script = "grep -c 'kataShared / 9p' /proc/mounts; cat /data/in /etc/one; \
        echo new > /etc/one; mkdir -p /data/a/b; echo x > /data/a/b/out; \
        chown 1000:3000 /data/a/b/out; chmod 4750 /data/a/b/out; ln -s out /data/a/b/link; \
        mv /data/a/b /data/c; rm -r /data/a; stat -c '%u:%g %a' /data/c/out; \
        for i in $(seq 50); do echo $i > /root-$i; done; cat /root-* | wc -l";
    let seen = docker.sh(&options, script)?;
    ensure!(seen == "1\nfrom the host\nold\n1000:3000 4750\n50", "{seen}");
    ensure!(fs::read_to_string(&file)? == "new\n");
    let meta = fs::metadata(dir.join("c/out"))?;
    ensure!((meta.uid(), meta.gid(), meta.mode() & 0o7777) == (1000, 3000, 0o4750), "{meta:?}");
    ensure!(fs::read_link(dir.join("c/link"))?.as_os_str() == "out" && !dir.join("a").exists());
    Ok(())
}

fn nine_p_keeps_read_only_what_is(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    fs::write(dir.join("in"), "x\n")?;
    // Even with a mount of its own of the share, a container cannot write to it.
    let options = format!("--runtime kata-9p --privileged -v {}:/data:ro", dir.display());
    let script = "cat /data/in; touch /data/no 2>&1; rm -f /data/in 2>&1; \
        mkdir /t && mount -t 9p -o trans=virtio,version=9p2000.L kataShared /t 2>/dev/null; \
        for f in /t/*/m*; do touch $f/no 2>/dev/null; done; true";
    let seen = docker.sh(&options, script)?;
    ensure!(
        seen.starts_with("x\n") && seen.matches("Read-only file system").count() == 2,
        "{seen}"
    );
    ensure!(dir.join("in").exists() && !dir.join("no").exists());
    Ok(())
}

fn nine_p_runs_exec_and_leaves_a_layer_to_commit(docker: &Docker) -> Result<()> {
    let container = docker.sleeper("--runtime kata-9p")?;
    ensure!(container.exec("echo here > /made; id -u")? == "0");
    let diff = docker.ok(&format!("diff {}", container.name))?;
    ensure!(diff.contains("A /made"), "{diff}");
    Ok(())
}

const SERVE: &str = "httpd -f -p 80 -h /var/www";

fn macvtap_carries_networks(docker: &Docker) -> Result<()> {
    let server = docker.detached("--runtime kata-macvtap", SERVE)?;
    let address = server.address("bridge")?;
    let script = format!(
        "ip -4 addr show eth0 | grep -o 'inet [0-9.]*'; gw=$(ip route | awk '/default/ {{ print $3 }}'); \
         ping -c1 -W20 $gw > /dev/null && echo gateway; fetch http://{address}/"
    );
    let seen = docker.sh("--runtime kata-macvtap", &script)?;
    ensure!(
        seen.starts_with("inet 172.") && seen.ends_with("gateway\nhello from the image"),
        "{seen}"
    );
    Ok(())
}

fn macvtap_serves_a_network_that_is_joined_late(docker: &Docker) -> Result<()> {
    let network = docker.network("")?;
    let container = docker.sleeper("--runtime kata-macvtap")?;
    docker.ok(&format!("network connect {} {}", network.name, container.name))?;
    let address = container.address(&network.name)?;
    command::eventually("the second interface has its address", PATIENCE, || {
        Ok(container.exec("ip -4 -o addr")?.contains(&address))
    })?;
    let options = format!("--runtime kata-macvtap --network {}", network.name);
    let server = docker.detached(&options, SERVE)?;
    let page = container.exec(&format!("fetch http://{}/", server.address(&network.name)?))?;
    ensure!(page == "hello from the image", "{page}");
    Ok(())
}

fn no_network_model_means_no_interface(docker: &Docker) -> Result<()> {
    let seen = docker.sh("--runtime kata-no-network", "ls /sys/class/net; ip -4 route")?;
    ensure!(seen == "lo", "{seen}");
    Ok(())
}
