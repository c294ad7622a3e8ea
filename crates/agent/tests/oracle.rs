//! The container builder against `runc` and `crun`: the same `config.json`, the same
//! process. Runs as root on the machine itself, without a VM.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests.

#[path = "oracle/filters.rs"]
mod filters;
#[path = "oracle/machine.rs"]
mod machine;

use kata_agent::container::NewContainer;
use machine::{Bundle, compare, exec, kill, run, run_by, start};
use serde_json::{Value, json};

const BOTH: [&str; 2] = ["runc", "crun"];
const RUNC: [&str; 1] = ["runc"];

/// Identity, limits and what surrounds a process. Lines that name no property of the
/// container (pids, memory, counters) are left out.
const PROCESS: &str = "grep -E '^(Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|SigBlk|SigCgt|\
Speculation_Store_Bypass)' /proc/self/status; cat /proc/self/limits; env; pwd; \
cat /proc/self/oom_score_adj; hostname; id; cat /proc/self/uid_map; ls /proc/self/fd | grep -c . ";

/// Mounts in order: root, place, options, propagation, kind, source, options again.
const MOUNTS: &str = "sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //; s/(master|shared):[0-9]+/\\1/' \
/proc/self/mountinfo";

/// Device nodes and links.
const DEVICES: &str = "cd /dev; for f in *; do stat -c '%n %F %a %u:%g %t:%T %N' $f; done";

fn add_mounts(config: &mut Value, mounts: &[Value]) {
    config["mounts"].as_array_mut().unwrap().extend(mounts.iter().cloned());
}

#[tokio::test]
async fn default_container_is_as_runc_and_crun_build_it() {
    let bundle = Bundle::new();
    compare(&bundle, &bundle.config(PROCESS), &BOTH).await;
    compare(&bundle, &bundle.config(DEVICES), &RUNC).await;
    compare(&bundle, &bundle.config(MOUNTS), &RUNC).await;
    // Not by a shell, which ignores some itself.
    let mut config = bundle.config("");
    config["process"]["args"] = json!(["grep", "SigIgn", "/proc/self/status"]);
    assert_eq!(run(&config).await.unwrap().output, "SigIgn:\t0000000000000000\n");
}

#[tokio::test]
async fn identity_and_limits_are_as_runc_and_crun_set_them() {
    let bundle = Bundle::new();
    let mut config = bundle.config(PROCESS);
    let process = &mut config["process"];
    process["user"] =
        json!({"uid": 1000, "gid": 1000, "additionalGids": [10, 20, 4000], "umask": 0o27});
    process["noNewPrivileges"] = json!(true);
    process["oomScoreAdj"] = json!(123);
    process["cwd"] = json!("/made/for/it");
    process["rlimits"] = json!([
        {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}
    ]);
    let some = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
    process["capabilities"] = json!({
        "bounding": ["CAP_NET_BIND_SERVICE", "CAP_KILL", "CAP_CHOWN"],
        "permitted": some, "effective": some, "inheritable": some,
        "ambient": ["CAP_NET_BIND_SERVICE"]
    });
    let outcome = compare(&bundle, &config, &BOTH).await;
    assert!(outcome.output.contains("HOME=/home/user"), "{}", outcome.output);
}

#[tokio::test]
async fn process_without_capabilities_has_none() {
    let bundle = Bundle::new();
    let mut config = bundle.config("grep Cap /proc/self/status");
    config["process"]["capabilities"] = json!({});
    let outcome = compare(&bundle, &config, &BOTH).await;
    assert_eq!(outcome.output.matches("0000000000000000").count(), 5, "{}", outcome.output);
}

#[tokio::test]
async fn mounts_of_all_kinds_are_as_runc_makes_them() {
    let bundle = Bundle::new();
    let volume = bundle.path().join("volume");
    std::fs::create_dir_all(volume.join("below")).unwrap();
    std::fs::write(volume.join("file"), "text").unwrap();
    std::fs::create_dir(bundle.root().join("full")).unwrap();
    std::fs::write(bundle.root().join("full/kept"), "kept").unwrap();
    std::os::unix::fs::symlink("/run", bundle.root().join("var/run")).unwrap();
    let script = format!("{MOUNTS}; cat /full/kept /file; ls -lan /full; touch /covered/x");
    let mut config = bundle.config(&script);
    config["root"]["readonly"] = json!(true);
    let bind = |to: &str, from: &std::path::Path, options: &[&str]| json!({"destination": to, "type": "bind", "source": from, "options": options});
    let tmpfs = |to: &str, options: &[&str]| json!({"destination": to, "type": "tmpfs", "source": "tmpfs", "options": options});
    add_mounts(
        &mut config,
        &[
            bind("/plain", &volume, &["rbind"]),
            bind("/ro", &volume, &["rbind", "ro", "rprivate"]),
            bind("/flags", &volume, &["bind", "nosuid", "nodev", "noexec", "noatime"]),
            bind("/shared", &volume, &["rbind", "rshared"]),
            bind("/slave", &volume, &["rbind", "rshared", "rslave"]),
            bind("/unbindable", &volume, &["bind", "unbindable"]),
            bind("/tree", &volume, &["rbind", "rro", "rnosuid"]),
            bind("/file", &volume.join("file"), &["bind", "ro"]),
            bind("/var/run/deep/inside", &volume, &["bind"]),
            tmpfs("/covered", &["rw", "size=1m", "mode=755"]),
            tmpfs("/mnt", &["nosuid", "ro", "mode=755"]),
            tmpfs("/full", &["tmpcopyup", "size=1m", "mode=755"]),
        ],
    );
    let outcome = compare(&bundle, &config, &RUNC).await;
    assert!(outcome.output.contains("kepttext"), "{}", outcome.output);
}

#[tokio::test]
async fn tmpfs_keeps_the_mode_of_what_it_covers_unless_told() {
    let bundle = Bundle::new();
    for name in ["kept", "told"] {
        let path = bundle.root().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o1770))
            .unwrap();
    }
    let mut config = bundle.config("stat -c %a /kept /told /fresh");
    let tmpfs = |to: &str, options: &[&str]| json!({"destination": to, "type": "tmpfs", "source": "tmpfs", "options": options});
    add_mounts(
        &mut config,
        &[tmpfs("/kept", &[]), tmpfs("/told", &["mode=700"]), tmpfs("/fresh", &[])],
    );
    assert_eq!(run(&config).await.unwrap().output, "1770\n700\n1777\n");
}

#[tokio::test]
async fn extra_devices_are_as_runc_makes_them() {
    let bundle = Bundle::new();
    let mut config =
        bundle.config(&format!("{DEVICES}; stat -c '%n %F %a %u:%g %t:%T' /dev/sub/x"));
    config["linux"]["devices"] = json!([
        {"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 7, "gid": 8},
        {"type": "c", "path": "/dev/sub/x", "major": 1, "minor": 5},
        {"type": "p", "path": "/dev/fifo", "fileMode": 0o600}
    ]);
    compare(&bundle, &config, &RUNC).await;
}

#[tokio::test]
async fn sysctls_and_names_are_set() {
    let bundle = Bundle::new();
    let mut config =
        bundle.config("cat /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max; hostname");
    config["linux"]["sysctl"] = json!({"kernel.msgmax": "65536", "fs.mqueue.msg_max": "20"});
    let outcome = compare(&bundle, &config, &BOTH).await;
    assert_eq!(outcome.output, "65536\n20\noracle\n");
}

#[tokio::test]
async fn user_namespace_maps_ids() {
    let bundle = Bundle::new();
    std::process::Command::new("chmod").arg("755").arg(bundle.path()).status().unwrap();
    std::process::Command::new("chown")
        .args(["-R", "100000:100000"])
        .arg(bundle.path())
        .status()
        .unwrap();
    let script = format!(
        "id; cat /proc/self/uid_map /proc/self/gid_map; {MOUNTS}; {DEVICES} | grep -v mqueue"
    );
    let mut config = bundle.config(&script);
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100000, "size": 65536}]);
    config["linux"]["uidMappings"] = map.clone();
    config["linux"]["gidMappings"] = map;
    // A sysfs needs a network namespace of the user namespace; ours is shared.
    config["mounts"].as_array_mut().unwrap().retain(|m| m["type"] != "sysfs");
    compare(&bundle, &config, &RUNC).await;
}

#[tokio::test]
async fn start_hooks_run_in_the_container_before_its_program() {
    let bundle = Bundle::new();
    let mut config = bundle.config("cat /tmp/hook");
    let hook = "cat >/tmp/state; grep -c '\"status\":\"created\"' /tmp/state >/tmp/hook; \
                echo $X $$ >>/tmp/hook; grep -o '\"bundle\":[^,]*' /tmp/state >>/tmp/hook";
    config["hooks"] = json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", hook], "env": ["X=y", "PATH=/bin"]}
    ]});
    let ours = run(&config).await.unwrap();
    assert!(ours.output.starts_with("1\ny "), "{}", ours.output);
    assert!(ours.output.ends_with("\"bundle\":\"/the/bundle\"\n"), "{}", ours.output);
    assert!(run_by("runc", &bundle, &config).output.starts_with("1\ny "));
    config["hooks"]["startContainer"][0]["args"] =
        json!(["sh", "-c", "echo complaint >&2; exit 3"]);
    let error = run(&config).await.unwrap_err().to_string();
    assert!(error.contains("complaint"), "{error}");
}

#[tokio::test]
async fn errors_read_as_runcs() {
    let bundle = Bundle::new();
    std::fs::write(bundle.root().join("bin/data"), "no program").unwrap();
    let cases: [(&[&str], &str, u32); 4] = [
        (&["missing"], r#"exec: "missing": executable file not found in $PATH"#, 127),
        (
            &["/bin/missing"],
            r#"exec: "/bin/missing": stat /bin/missing: no such file or directory"#,
            127,
        ),
        (&["/bin/data"], r#"exec: "/bin/data": permission denied"#, 126),
        (&["/etc"], r#"exec: "/etc": "#, 126),
    ];
    for (args, text, code) in cases {
        let mut config = bundle.config("");
        config["process"]["args"] = json!(args);
        let error = run(&config).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.exit_code().map(u32::from), Some(code), "{error}");
        let runc = run_by("runc", &bundle, &config);
        // Its message is quoted in a log line.
        assert!(runc.output.replace('\\', "").contains(text), "{}", runc.output);
    }
    let mut config = bundle.config("true");
    add_mounts(
        &mut config,
        &[json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]})],
    );
    let error = run(&config).await.unwrap_err().to_string();
    assert!(
        error.contains(
            "error during container init: error mounting \"/no/such\" to rootfs at \"/x\""
        ),
        "{error}"
    );
    assert!(error.contains("no such file or directory"), "{error}");
}

#[tokio::test]
async fn exec_is_as_runcs() {
    let bundle = Bundle::new();
    let mut config = bundle.config("sleep 100");
    config["process"]["noNewPrivileges"] = json!(true);
    config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]
    });
    let running = start(&config, Default::default()).await.unwrap();
    let script = format!(
        "{PROCESS}; {MOUNTS}; ls -1 /proc | grep -c '^1$'; mkdir /tmp/x 2>/dev/null || echo no"
    );
    let process = json!({
        "args": ["sh", "-c", script], "cwd": "/tmp", "env": ["PATH=/bin", "A=b"],
        "user": {"uid": 1000, "gid": 7, "additionalGids": [3]},
        "capabilities": {"bounding": ["CAP_KILL"], "inheritable": ["CAP_KILL"]}
    });
    let ours = exec(&running, &process).await.unwrap();
    let missing = json!({"args": ["missing"], "cwd": "/", "env": ["PATH=/bin"]});
    let error = exec(&running, &missing).await.unwrap_err();
    assert_eq!(error.exit_code(), Some(127), "{error}");
    kill(&running);
    assert!(exec(&running, &process).await.unwrap_err().to_string().contains("stopped container"));

    let state = tempfile::tempdir().unwrap();
    std::fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
    std::fs::write(bundle.path().join("process.json"), process.to_string()).unwrap();
    let runc = |args: &[&str]| {
        std::process::Command::new("runc")
            .arg("--root")
            .arg(state.path())
            .args(args)
            .current_dir(bundle.path())
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    };
    let id = machine::fresh_id();
    let started = std::process::Command::new("runc")
        .arg("--root")
        .arg(state.path())
        .args(["run", "--detach", &id])
        .current_dir(bundle.path())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(started.success());
    let theirs = runc(&["exec", "--process", "process.json", &id]);
    runc(&["delete", "--force", &id]);
    assert_eq!(ours.output, String::from_utf8_lossy(&theirs.stdout));
}

#[tokio::test]
async fn clocks_of_a_time_namespace_are_set() {
    let bundle = Bundle::new();
    let mut config = bundle.config("cat /proc/self/timens_offsets");
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "time"}));
    config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 86400, "nanosecs": 7}});
    // The runtimes of Debian 12 do not know the field.
    let output = run(&config).await.unwrap().output;
    let words: Vec<_> = output.split_whitespace().collect();
    assert_eq!(words, ["monotonic", "0", "0", "boottime", "86400", "7"]);
}

#[tokio::test]
async fn container_that_is_not_started_ends_with_its_builder() {
    let bundle = Bundle::new();
    let container = machine::container(&bundle.config("true"));
    let (built, created) =
        machine::builder().create(container, Default::default(), |_| Ok(())).await.unwrap();
    drop(created);
    let ended = || machine::state(built.pid).is_none_or(|(state, _)| state == 'Z');
    for _ in 0..500 {
        if ended() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("init {} still waits", built.pid);
}

#[tokio::test]
async fn killed_zygote_is_replaced() {
    let bundle = Bundle::new();
    let before = machine::children();
    let builder = machine::builder();
    let zygote = machine::children().into_iter().find(|pid| !before.contains(pid)).unwrap();
    machine::end(zygote);
    let container = machine::container(&bundle.config("exit 7"));
    let (built, created) = builder.create(container, Default::default(), |_| Ok(())).await.unwrap();
    created.start().await.unwrap();
    assert_eq!(machine::wait(built.pid), 7);
}

/// Reads what a terminal shows until its last user is gone.
fn shown(master: std::os::fd::OwnedFd) -> String {
    let mut text = Vec::new();
    // The last read of a terminal that nobody has open fails.
    let _ = std::io::Read::read_to_end(&mut std::fs::File::from(master), &mut text);
    String::from_utf8_lossy(&text).replace('\r', "")
}

#[tokio::test]
async fn terminal_is_the_containers_own_and_the_users() {
    let bundle = Bundle::new();
    let script = "tty; stty size; stat -c '%u %t' /dev/pts/0 /dev/console; echo through >/dev/tty; \
        for n in 0 1 2; do readlink /proc/self/fd/$n; done; grep -o ' /dev/console .*devpts' /proc/self/mountinfo; \
        echo console >/dev/console";
    let mut config = bundle.config(script);
    config["process"]["terminal"] = json!(true);
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [5]});
    let container = machine::container(&config);
    let container = NewContainer { size: Some((33, 77)), ..container };
    let (built, created) =
        machine::builder().create(container, Default::default(), |_| Ok(())).await.unwrap();
    let profile = created.profile();
    let master = built.terminal_master.unwrap();
    created.start().await.unwrap();
    let text = shown(master);
    let expected =
        "/dev/pts/0\n33 77\n1000 88\n1000 88\nthrough\n/dev/pts/0\n/dev/pts/0\n/dev/pts/0\n";
    assert!(text.starts_with(expected), "{text}");
    assert!(text.contains("/dev/console rw") && text.ends_with("console\n"), "{text}");
    assert_eq!(machine::wait(built.pid), 0);
    drop(profile);
}

#[tokio::test]
async fn exec_has_a_terminal_of_its_own() {
    let bundle = Bundle::new();
    let running = start(&bundle.config("sleep 100"), Default::default()).await.unwrap();
    let process = json!({
        "args": ["sh", "-c", "tty; stty size; echo $HOME"], "cwd": "/", "env": ["PATH=/bin"],
        "terminal": true, "consoleSize": {"height": 5, "width": 6}
    });
    let built = machine::builder()
        .exec(
            running.pid,
            &running.profile,
            kata_oci::Process::parse(process.to_string().as_bytes()).unwrap(),
            Default::default(),
            |_| Ok(()),
            None,
        )
        .await
        .unwrap();
    assert_eq!(shown(built.terminal_master.unwrap()), "/dev/pts/0\n5 6\n/root\n");
    assert_eq!(machine::wait(built.pid), 0);
    kill(&running);
}

#[tokio::test]
async fn hostile_images_do_not_lead_mounts_outside() {
    let bundle = Bundle::new();
    let outside = bundle.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::remove_dir(bundle.root().join("dev")).unwrap();
    std::os::unix::fs::symlink("../../../../outside", bundle.root().join("dev")).unwrap();
    std::os::unix::fs::symlink(&outside, bundle.root().join("absolute")).unwrap();
    let mut config = bundle.config("ls /dev/null && ls -d /absolute/deep");
    let tmpfs = |to: &str| json!({"destination": to, "type": "tmpfs", "source": "tmpfs"});
    add_mounts(&mut config, &[tmpfs("/absolute/deep")]);
    let outcome = run(&config).await.unwrap();
    assert_eq!((outcome.output.as_str(), outcome.code), ("/dev/null\n/absolute/deep\n", 0));
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    // The kernel's file systems go to no place a link chooses.
    std::fs::remove_dir(bundle.root().join("proc")).unwrap();
    std::os::unix::fs::symlink("tmp", bundle.root().join("proc")).unwrap();
    let error = run(&config).await.unwrap_err().to_string();
    assert!(error.contains("must be mounted on ordinary directory"), "{error}");
}

#[tokio::test]
async fn cgroup_mounts_show_the_containers_own_hierarchy() {
    let bundle = Bundle::new();
    let mut config = bundle.config(
        "ls /sys/fs/cgroup/cgroup.procs; cat /proc/self/cgroup | grep ^0; touch /sys/fs/cgroup/x; \
         grep -o 'cgroup r[ow],nosuid.* - cgroup2' /proc/self/mountinfo",
    );
    config["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| n["type"] != "cgroup");
    add_mounts(
        &mut config,
        &[json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["ro", "nosuid", "noexec", "nodev"]})],
    );
    let output = run(&config).await.unwrap().output;
    assert!(output.starts_with("/sys/fs/cgroup/cgroup.procs\n0::/\n"), "{output}");
    assert!(output.contains("Read-only") && output.ends_with("- cgroup2\n"), "{output}");
}

#[tokio::test]
async fn working_directory_is_checked_as_the_user() {
    let bundle = Bundle::new();
    let private = bundle.root().join("private");
    std::fs::create_dir(&private).unwrap();
    std::fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    let mut config = bundle.config("pwd");
    config["process"]["cwd"] = json!("/private");
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    // Root could enter it, so it is entered, as with runc.
    compare(&bundle, &config, &RUNC).await;
    config["process"]["cwd"] = json!("/etc/passwd");
    let error = run(&config).await.unwrap_err().to_string();
    assert!(error.contains("not a directory"), "{error}");
}

#[tokio::test]
async fn propagation_of_the_root_is_as_asked() {
    let bundle = Bundle::new();
    for (asked, shown) in [("private", ""), ("shared", "shared"), ("unbindable", "unbindable")] {
        let script = "sed -nE 's/.* \\/ \\/ [^ ]* ([a-z]*).*- .*/\\1/p; s/.*rootfs \\/ [^ ]* ([a-z]*).*- .*/\\1/p' /proc/self/mountinfo";
        let mut config = bundle.config(script);
        config["linux"]["rootfsPropagation"] = json!(asked);
        let outcome = run(&config).await.unwrap();
        assert_eq!(outcome.output.trim(), shown, "{asked}");
    }
}
