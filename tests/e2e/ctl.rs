//! `kata-ctl run`: no engine at all.

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use kata_e2e::assets::CTL;
use kata_e2e::command::{self, Output, PATIENCE, words};
use kata_e2e::images;
use kata_e2e::oci::Oci;
use kata_e2e::pty::Session;
use kata_e2e::runner::Trial;
use kata_e2e::trials;
use serde_json::json;

pub fn trials() -> Vec<Trial<Oci>> {
    trials!["run":
        Kata: directory_runs_and_gives_its_exit_code, oci_layout_runs_as_its_configuration_says,
            docker_archive_runs, volumes_environment_and_limits_arrive, published_port_answers,
            published_udp_port_answers, zstd_layers_are_unpacked,
            commands_that_cannot_run_give_126_and_127, terminal_works_and_ctrl_c_ends_it, input_is_carried, everything_is_gone_after_a_kill,
            source_that_is_no_image_is_named, check_gives_a_verdict_with_its_reason;
    ]
}

fn ctl(line: &str) -> Command {
    let mut command = Command::new(CTL);
    command.args(words(line));
    command
}

fn run(oci: &Oci, options: &str, script: &str) -> Result<Output> {
    let line = format!("run {options} {} sh -c", oci.rootfs.display());
    command::run(ctl(&line).arg(script))
}

fn directory_runs_and_gives_its_exit_code(oci: &Oci) -> Result<()> {
    let output = run(oci, "", "uname -r; echo err >&2; exit 21")?.expect_code(21)?;
    let host = command::ok(Command::new("uname").arg("-r"))?.out();
    // Before it there may be a word on the network, where the host forwards nothing.
    let said = output.err();
    ensure!(output.out() != host && said.lines().last() == Some("err"), "{output}");
    Ok(())
}

/// An image directory in the OCI layout with one layer, whose archive `pack` compresses.
fn layout(oci: &Oci, name: &str, pack: impl FnOnce(Vec<u8>) -> Result<Vec<u8>>) -> Result<PathBuf> {
    let dir = oci.arena.dir(name)?;
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8]| -> Result<String> {
        let digest = images::sha256(bytes)?;
        fs::write(blobs.join(&digest), bytes)?;
        Ok(digest)
    };
    let tar = images::archive(&oci.rootfs, &oci.arena.work.join(format!("{name}.tar")))?;
    let archive = fs::read(&tar)?;
    let diff_id = images::sha256(&archive[..])?;
    let layer_bytes = pack(archive)?;
    let layer = put(&layer_bytes)?;
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Env": ["PATH=/bin", "FROM=image"], "WorkingDir": "/var/www", "User": "alice",
            "Entrypoint": ["sh", "-c"], "Cmd": ["id -un; pwd; echo $FROM"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{diff_id}")] },
    });
    let config_bytes = serde_json::to_vec(&config)?;
    let digest = put(&config_bytes)?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{digest}"), "size": config_bytes.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer}"), "size": layer_bytes.len() }],
    });
    let manifest_bytes = serde_json::to_vec(&manifest)?;
    let digest = put(&manifest_bytes)?;
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": format!("sha256:{digest}"), "size": manifest_bytes.len() }] });
    fs::write(dir.join("index.json"), index.to_string())?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(dir)
}

fn oci_layout_runs_as_its_configuration_says(oci: &Oci) -> Result<()> {
    let dir = layout(oci, "layout", Ok)?;
    let seen = command::ok(&mut ctl(&format!("run {}", dir.display())))?.out();
    ensure!(seen == "alice\n/var/www\nimage", "{seen}");
    Ok(())
}

fn docker_archive_runs(oci: &Oci) -> Result<()> {
    let dir = oci.arena.dir("archive")?;
    images::archive(&oci.rootfs, &dir.join("layer.tar"))?;
    let layer = images::sha256(fs::File::open(dir.join("layer.tar"))?)?;
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Env": ["PATH=/bin"], "Cmd": ["hostname"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer}")] },
    });
    fs::write(dir.join("config.json"), config.to_string())?;
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": ["t:latest"], "Layers": ["layer.tar"] }]);
    fs::write(dir.join("manifest.json"), manifest.to_string())?;
    let tar = images::archive(&dir, &oci.arena.work.join("archive.tar"))?;
    let seen = command::ok(&mut ctl(&format!("run --hostname box {}", tar.display())))?.out();
    ensure!(seen == "box", "{seen}");
    Ok(())
}

fn volumes_environment_and_limits_arrive(oci: &Oci) -> Result<()> {
    let dir = oci.arena.dir("ctl-volume")?;
    fs::write(dir.join("in"), "shared\n")?;
    let options = format!(
        "-v {0}:/mnt -v {0}/in:/etc/in:ro -e A=b -w /tmp -u alice --memory 300m --cpus 1",
        dir.display()
    );
    let output = run(
        oci,
        &options,
        "cat /mnt/in /etc/in; echo $A; pwd; id -un; cat /sys/fs/cgroup/memory.max",
    )?;
    let expected = format!("shared\nshared\nb\n/tmp\nalice\n{}", 300 << 20);
    ensure!(output.out() == expected, "{output}");
    Ok(())
}

fn published_port_answers(oci: &Oci) -> Result<()> {
    let line = format!(
        "run --name web -p 127.0.0.1:18080:80 {} httpd -f -p 80 -h /var/www",
        oci.rootfs.display()
    );
    let mut server = Session::start(&mut ctl(&line), 24, 80)?;
    command::eventually("the port answers", PATIENCE, || {
        let get = command::run(Command::new("busybox").args([
            "wget",
            "-q",
            "-O-",
            "http://127.0.0.1:18080/",
        ]))?;
        Ok(get.out() == "hello from the image")
    })?;
    server.send("\x03")?;
    server.finish(Duration::from_secs(30)).map(drop)
}

fn published_udp_port_answers(oci: &Oci) -> Result<()> {
    let rootfs = oci.rootfs.display();
    let line = format!("run --name echo -p 127.0.0.1:18007:7/udp {rootfs} probe udp-echo 7");
    let mut server = Session::start(&mut ctl(&line), 24, 80)?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    command::eventually("the datagram comes back", PATIENCE, || {
        let mut buffer = [0; 16];
        // Until somebody listens there, sending is refused now and then.
        let _ = socket.send_to(b"ping", ("127.0.0.1", 18007));
        Ok(socket.recv(&mut buffer).is_ok_and(|count| &buffer[..count] == b"ping"))
    })?;
    server.send("\x03")?;
    server.finish(Duration::from_secs(30)).map(drop)
}

fn zstd_layers_are_unpacked(oci: &Oci) -> Result<()> {
    let zstd = |archive: Vec<u8>| -> Result<Vec<u8>> {
        let packed = command::run_with(Command::new("zstd").arg("-c"), Some(archive), PATIENCE)?;
        ensure!(packed.code == 0, "{}", packed.err());
        Ok(packed.stdout)
    };
    let dir = layout(oci, "zstd-layout", zstd)?;
    let seen = command::ok(&mut ctl(&format!("run {}", dir.display())))?.out();
    ensure!(seen == "alice\n/var/www\nimage", "{seen}");
    Ok(())
}

fn commands_that_cannot_run_give_126_and_127(oci: &Oci) -> Result<()> {
    let rootfs = oci.rootfs.display();
    for (command, code) in [("no-such-program", 127), ("/no/such", 127), ("/etc/passwd", 126)] {
        let output = command::run(&mut ctl(&format!("run {rootfs} {command}")))?;
        ensure!(output.code == code && output.err().contains(command), "{command}: {output}");
    }
    Ok(())
}

fn terminal_works_and_ctrl_c_ends_it(oci: &Oci) -> Result<()> {
    let line = format!("run -it {} sh", oci.rootfs.display());
    let mut session = Session::start(&mut ctl(&line), 32, 101)?;
    session.expect("# ")?;
    session.send("stty size; echo up-$((1+1))\r")?;
    session.expect("32 101")?;
    session.expect("up-2")?;
    session.resize(35, 99)?;
    session.send("until [ \"$(stty size)\" = '35 99' ]; do sleep 0.1; done; echo resi''zed\r")?;
    session.expect("resized")?;
    session.send("exit 14\r")?;
    let code = session.finish(PATIENCE)?;
    ensure!(code == 14, "{code}: {}", session.text());
    let line = format!("run {} sleep 100000", oci.rootfs.display());
    let mut session = Session::start(&mut ctl(&line), 24, 80)?;
    std::thread::sleep(Duration::from_secs(4));
    // The first process of a container ignores what it does not handle; the second insists.
    session.send("\x03")?;
    std::thread::sleep(Duration::from_millis(500));
    session.send("\x03")?;
    let code = session.finish(Duration::from_secs(30))?;
    ensure!(code == 130 || code == 137, "{code}: {}", session.text());
    Ok(())
}

fn input_is_carried(oci: &Oci) -> Result<()> {
    let bytes = images::noise(5 << 20, 11);
    let line = format!("run -i {} cat", oci.rootfs.display());
    let output = command::run_with(&mut ctl(&line), Some(bytes.clone()), PATIENCE)?;
    ensure!(
        output.code == 0 && output.stdout == bytes,
        "{} bytes came back: {}",
        output.stdout.len(),
        output.err()
    );
    Ok(())
}

/// Its container is swept by the next run at the latest.
fn everything_is_gone_after_a_kill(oci: &Oci) -> Result<()> {
    let line = format!("run --name killed {} sleep 100000", oci.rootfs.display());
    let mut child = ctl(&line).spawn()?;
    std::thread::sleep(Duration::from_secs(4));
    child.kill()?;
    child.wait()?;
    run(oci, "", "true")?.expect_code(0)?;
    ensure!(
        !PathBuf::from("/run/kata-containers/killed").exists(),
        "the killed one's state is left"
    );
    Ok(())
}

fn source_that_is_no_image_is_named(oci: &Oci) -> Result<()> {
    let missing = command::run(&mut ctl("run /no/such/image true"))?.expect_code(125)?;
    ensure!(missing.err().contains("/no/such/image"), "{missing}");
    let file = oci.arena.work.join("no-image");
    fs::write(&file, "text")?;
    let wrong =
        command::run(&mut ctl(&format!("run {} true", file.display())))?.expect_code(125)?;
    ensure!(wrong.err().contains("no-image"), "{wrong}");
    let none = run(oci, "--memory lots", "true")?.expect_code(125)?;
    ensure!(none.err().contains("lots"), "{none}");
    Ok(())
}

fn check_gives_a_verdict_with_its_reason(_: &Oci) -> Result<()> {
    let output = command::run(&mut ctl("check"))?;
    let said = (output.out() + &output.err()).to_lowercase();
    ensure!(said.contains("kvm") || said.contains("tcg"), "{output}");
    Ok(())
}
