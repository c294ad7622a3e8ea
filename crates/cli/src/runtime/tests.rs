//! Real command lines of engines, as they were seen or as their sources build them.

use super::*;

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// A verb's flags, read from the text that follows it.
pub(super) fn parsed(verb: &str, line: &str) -> Parsed {
    let verb = find(verb).unwrap();
    Parsed::read(verb.flags, verb.order, &words(line)).unwrap()
}

/// Global flags, the verb, and its own flags.
fn whole(line: &str) -> (Parsed, &'static str, Parsed) {
    let global = Parsed::read(GLOBAL, Order::First, &words(line)).unwrap();
    let verb = find(&global.args[0]).unwrap();
    let flags = Parsed::read(verb.flags, verb.order, &global.args[1..]).unwrap();
    count(verb, flags.args.len()).unwrap();
    (global, verb.name, flags)
}

#[test]
fn containerds_command_lines_are_understood() {
    let before = "--root /run/containerd/runc/moby --log /b/log.json --log-format json";
    let (global, verb, flags) = whole(&format!(
        "{before} --systemd-cgroup create --bundle /b --pid-file /b/init.pid \
         --console-socket /tmp/pty123/pty.sock --no-pivot --no-new-keyring c1"
    ));
    assert_eq!((verb, flags.args.as_slice()), ("create", &["c1".to_owned()][..]));
    assert!(global.on("systemd-cgroup"));
    assert_eq!(global.text("log-format"), Some("json"));
    assert_eq!(flags.text("console-socket"), Some("/tmp/pty123/pty.sock"));

    let (_, _, flags) = whole(&format!(
        "{before} exec --process /tmp/runc-process1 --console-socket /t/pty.sock --detach \
         --pid-file /b/e.pid c1"
    ));
    assert_eq!(flags.text("process"), Some("/tmp/runc-process1"));
    assert!(flags.on("detach"));

    let (_, _, flags) = whole(&format!("{before} kill --all c1 9"));
    assert!(flags.on("all"));
    assert_eq!(flags.args, ["c1", "9"]);
    assert!(whole(&format!("{before} delete --force c1")).2.on("force"));
    assert_eq!(whole(&format!("{before} update --resources - c1")).2.text("resources"), Some("-"));
    assert_eq!(whole(&format!("{before} update --resources=- c1")).2.text("resources"), Some("-"));
    assert!(whole(&format!("{before} events --stats c1")).2.on("stats"));
    assert_eq!(whole(&format!("{before} events --interval=1s c1")).2.text("interval"), Some("1s"));
    assert_eq!(whole(&format!("{before} ps --format json c1")).2.text("format"), Some("json"));
    for verb in ["start", "state", "pause", "resume"] {
        assert_eq!(whole(&format!("{before} {verb} c1")).2.args, ["c1"]);
    }
    assert_eq!(whole(&format!("{before} list --format=json")).2.text("format"), Some("json"));
}

#[test]
fn buildkits_command_line_is_understood() {
    let (_, verb, flags) = whole(
        "--log /x/runc-log.json --log-format json run --bundle /x/b --no-pivot --keep \
         --pid-file /x/pid --no-new-keyring c1",
    );
    assert_eq!(verb, "run");
    assert!(flags.on("keep") && flags.on("no-pivot"));
}

#[test]
fn conmons_command_lines_are_understood() {
    let (global, _, flags) = whole(
        "--systemd-cgroup --log-format=json --log=/run/c/oci-log --root /run/kata create \
         --bundle /b --pid-file /p/pidfile c1",
    );
    assert_eq!(global.text("log"), Some("/run/c/oci-log"));
    assert_eq!(flags.text("pid-file"), Some("/p/pidfile"));
    let (_, _, flags) = whole(
        "exec --pid-file /p/exec_pid --process /p/exec.json --detach --tty \
         --console-socket /p/s --preserve-fds 2 c1",
    );
    assert_eq!(flags.number("preserve-fds"), Some(2));
    assert!(flags.on("tty"));
}

#[test]
fn podmans_and_buildahs_own_calls_are_understood() {
    assert_eq!(whole("start c1").2.args, ["c1"]);
    assert_eq!(whole("kill c1 TERM").2.args, ["c1", "TERM"]);
    assert_eq!(whole("kill --all c1 9").2.args, ["c1", "9"]);
    assert!(whole("delete --force c1").2.on("force"));
    assert!(whole("delete c1 -f").2.on("force"));
    let (_, _, flags) =
        whole("create --no-new-keyring --bundle /b --pid-file /p --console-socket /s c1");
    assert!(flags.on("no-new-keyring"));
    let (_, _, flags) = whole(
        "exec -d --tty=false --cwd /w -e A=B --cap CAP_KILL --apparmor p --process-label l \
         --ignore-paused --user 1:1 c1 ls --all",
    );
    assert_eq!(flags.args, ["c1", "ls", "--all"]);
    assert!(flags.on("ignore-paused") && !flags.on("tty"));
}

#[test]
fn what_is_not_supported_says_so_whatever_flags_it_gets() {
    let (_, verb, flags) = whole("restore --bundle /b --image-path /i --detach c1");
    assert_eq!((verb, flags.args.len()), ("restore", 6));
    assert_eq!(whole("checkpoint --leave-running c1").1, "checkpoint");
}

#[test]
fn factory_takes_one_word() {
    let (_, verb, flags) = whole("--config /c factory init");
    assert_eq!((verb, flags.args), ("factory", vec!["init".to_owned()]));
    assert!(count(find("factory").unwrap(), 2).is_err());
}

#[test]
fn every_flag_of_runc_is_known() {
    let runc = [
        ("create", "bundle b console-socket pid-file no-pivot no-new-keyring preserve-fds"),
        ("delete", "force f"),
        ("events", "interval stats"),
        (
            "exec",
            "console-socket cwd env e tty t user u additional-gids g process p detach d pid-file \
             process-label apparmor no-new-privs cap c preserve-fds cgroup ignore-paused",
        ),
        ("kill", "all a"),
        ("list", "format f quiet q"),
        ("ps", "format f"),
        (
            "run",
            "bundle b console-socket detach d keep pid-file no-subreaper no-pivot \
             no-new-keyring preserve-fds",
        ),
        ("spec", "bundle b rootless"),
        (
            "update",
            "resources r blkio-weight cpu-period cpu-quota cpu-share cpu-rt-period cpu-rt-runtime \
             cpuset-cpus cpuset-mems memory memory-reservation memory-swap pids-limit \
             l3-cache-schema mem-bw-schema",
        ),
    ];
    for (verb, names) in runc {
        let flags = find(verb).unwrap().flags;
        for name in names.split_whitespace() {
            let known = flags.iter().any(|f| f.name == name || f.short == Some(name));
            assert!(known, "{verb} --{name}");
        }
    }
    for name in ["debug", "log", "log-format", "root", "criu", "systemd-cgroup", "rootless"] {
        assert!(GLOBAL.iter().any(|flag| flag.name == name), "--{name}");
    }
}

#[test]
fn a_wrong_number_of_arguments_is_refused_in_runcs_words() {
    let error = count(find("state").unwrap(), 0).unwrap_err().to_string();
    assert_eq!(error, "kata-runtime: \"state\" requires exactly 1 argument(s)");
    let error = count(find("kill").unwrap(), 0).unwrap_err().to_string();
    assert_eq!(error, "kata-runtime: \"kill\" requires a minimum of 1 argument(s)");
}

#[test]
fn the_version_is_what_engines_parse() {
    let text = version();
    let mut lines = text.lines();
    assert!(lines.next().unwrap().starts_with("kata-runtime version "));
    assert!(lines.next().unwrap().starts_with("spec: 1."));
}
