//! Directories, files and named volumes of the host.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};
use kata_e2e::docker::Docker;
use kata_e2e::runner::Trial;
use kata_e2e::trials;

pub fn trials() -> Vec<Trial<Docker>> {
    trials!["volumes":
        Both: directory_is_shared_both_ways, changes_of_the_host_are_seen, read_only_directory_refuses_writes,
            single_files_are_shared_ro_and_rw, named_volume_outlives_its_container,
            owner_and_mode_are_kept, many_volumes_at_once, root_is_writable_and_private,
            symlinks_of_the_image_stay_inside;
    ]
}

fn directory_is_shared_both_ways(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    fs::write(dir.join("in"), "from the host\n")?;
    let container = docker.sleeper(&format!("-v {}:/data", dir.display()))?;
    let seen = container.exec("cat /data/in; echo from inside > /data/out; mkdir /data/sub")?;
    ensure!(seen == "from the host", "{seen}");
    ensure!(fs::read_to_string(dir.join("out"))? == "from inside\n");
    ensure!(dir.join("sub").is_dir());
    // What comes later is seen too.
    fs::write(dir.join("later"), "later\n")?;
    ensure!(container.exec("cat /data/later")? == "later");
    Ok(())
}

/// A file the container has read, and that has been left alone since, is changed: to the same
/// length, with its time set back, and while the container runs it.
fn changes_of_the_host_are_seen(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let (file, program) = (dir.join("file"), dir.join("program"));
    let write = |text: &str| -> Result<()> {
        fs::write(&file, text)?;
        fs::write(&program, format!("#!/bin/sh\necho {text}\n"))?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))?;
        Ok(())
    };
    write("first")?;
    let container = docker.sleeper(&format!("-v {}:/v", dir.display()))?;
    // Opened often enough that its pages are kept.
    for _ in 0..4 {
        ensure!(container.exec("cat /v/file; /v/program")? == "firstfirst", "before the change");
        std::thread::sleep(Duration::from_secs(1));
    }
    for (text, time) in [("other", None), ("third", Some(SystemTime::UNIX_EPOCH))] {
        write(text)?;
        if let Some(time) = time {
            fs::File::options().write(true).open(&file)?.set_modified(time)?;
            fs::File::options().write(true).open(&program)?.set_modified(time)?;
        }
        // What a guest knows of a file it trusts for a second.
        std::thread::sleep(Duration::from_millis(1100));
        let seen = container.exec("cat /v/file; /v/program")?;
        ensure!(seen == format!("{text}{text}"), "{seen} instead of {text}");
    }
    Ok(())
}

fn read_only_directory_refuses_writes(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    fs::write(dir.join("in"), "x\n")?;
    let options = format!("--cap-add SYS_ADMIN -v {}:/data:ro", dir.display());
    let seen =
        docker.sh(&options, "cat /data/in; touch /data/no 2>&1; rm -f /data/in 2>&1; true")?;
    ensure!(
        seen.starts_with("x\n") && seen.matches("Read-only file system").count() == 2,
        "{seen}"
    );
    ensure!(dir.join("in").exists() && !dir.join("no").exists());
    Ok(())
}

fn single_files_are_shared_ro_and_rw(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let (ro, rw) = (dir.join("ro"), dir.join("rw"));
    fs::write(&ro, "read\n")?;
    fs::write(&rw, "old\n")?;
    let options = format!("-v {}:/etc/ro:ro -v {}:/new/place/rw", ro.display(), rw.display());
    let seen = docker
        .sh(&options, "cat /etc/ro; echo new > /new/place/rw; echo bad 2>&1 > /etc/ro || true")?;
    ensure!(seen.starts_with("read"), "{seen}");
    ensure!(fs::read_to_string(&rw)? == "new\n" && fs::read_to_string(&ro)? == "read\n");
    Ok(())
}

fn named_volume_outlives_its_container(docker: &Docker) -> Result<()> {
    let volume = docker.name();
    docker.sh(
        &format!("-v {volume}:/var/www"),
        "echo kept > /var/www/kept; cat /var/www/index.html",
    )?;
    let seen = docker.sh(&format!("-v {volume}:/data"), "cat /data/kept /data/index.html")?;
    docker.ok(&format!("volume rm {volume}"))?;
    ensure!(seen == "kept\nhello from the image", "{seen}");
    Ok(())
}

fn owner_and_mode_are_kept(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let script = "echo x > /data/f; chown 1000:3000 /data/f; chmod 640 /data/f; ln -s f /data/l; \
        mkfifo /data/p; stat -c '%u:%g %a %s' /data/f; su alice -c 'cat /data/f'";
    let seen = docker.sh(&format!("-v {}:/data", dir.display()), script)?;
    ensure!(seen == "1000:3000 640 2\nx", "{seen}");
    let meta = fs::metadata(dir.join("f"))?;
    ensure!((meta.uid(), meta.gid(), meta.mode() & 0o777) == (1000, 3000, 0o640));
    ensure!(fs::read_link(dir.join("l"))?.as_os_str() == "f");
    Ok(())
}

fn many_volumes_at_once(docker: &Docker) -> Result<()> {
    let top = docker.arena.dir(&docker.name())?;
    let mut options = String::new();
    for n in 0..20 {
        let dir = top.join(n.to_string());
        fs::create_dir(&dir)?;
        fs::write(dir.join("n"), format!("{n} "))?;
        options += &format!("-v {}:/v/{n} ", dir.display());
    }
    let seen = docker.sh(&options, "for n in $(seq 0 19); do cat /v/$n/n; done")?;
    let expected: Vec<_> = (0..20).map(|n: u32| n.to_string()).collect();
    ensure!(seen == expected.join(" "), "{seen}");
    Ok(())
}

fn root_is_writable_and_private(docker: &Docker) -> Result<()> {
    let seen =
        docker.sh("", "echo x > /made && cat /made && rm /bin/vi && ls /bin/vi 2>&1 || true")?;
    ensure!(seen.starts_with("x\n") && seen.contains("No such file"), "{seen}");
    ensure!(docker.sh("", "ls /made 2>&1 || true; ls /bin/vi")?.contains("/bin/vi"));
    Ok(())
}

fn symlinks_of_the_image_stay_inside(docker: &Docker) -> Result<()> {
    let dir = docker.arena.dir(&docker.name())?;
    let container = docker.created("", "sh -c 'rm -rf /escape; ln -s / /escape'")?;
    docker.ok(&format!("start -a {}", container.name))?;
    let image = docker.name();
    docker.ok(&format!("commit {} {image}", container.name))?;
    // The mount point lies behind a link to the root: it must be the container's root.
    let line =
        format!("run --rm -v {}:/escape/made/there {image} ls -d /made/there", dir.display());
    let seen = docker.ok(&line);
    docker.ok(&format!("rmi {image}"))?;
    ensure!(seen? == "/made/there");
    ensure!(!std::path::Path::new("/made").exists(), "the host has a /made now");
    Ok(())
}
