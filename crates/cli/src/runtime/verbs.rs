//! The verbs of the OCI command line and their flags: runc 1.1's, and Kata's own.

use crate::flags::{Flag, Order, list, number, switch, text};

/// One verb.
pub struct Verb {
    /// Its name.
    pub name: &'static str,
    /// How its arguments are written.
    pub usage: &'static str,
    /// One line.
    pub summary: &'static str,
    /// What it accepts.
    pub flags: &'static [Flag],
    /// Least and most arguments.
    pub args: (usize, Option<usize>),
    /// Where flags may stand.
    pub order: Order,
}

const ID: &str = "<container-id>";
const ONE: (usize, Option<usize>) = (1, Some(1));
const ANY: (usize, Option<usize>) = (0, None);

/// Flags before the verb.
pub static GLOBAL: &[Flag] = &[
    switch("debug", "enable debug logging"),
    text("log", "set the log file to write runtime logs to (default is '/dev/stderr')"),
    text("log-format", "set the log format ('text' (default), or 'json')"),
    text("root", "root directory for storage of container state (default: \"/run/kata-runtime\")"),
    text("criu", "accepted for compatibility: there is no checkpointing of virtual machines"),
    switch("systemd-cgroup", "expect cgroupsPath to be of form \"slice:prefix:name\""),
    text("rootless", "ignore cgroup permission errors ('true', 'false', or 'auto')"),
    text("config", "the configuration.toml to use").or("kata-config"),
    switch("show-default-config-paths", "list where configuration.toml is searched, then exit"),
    switch("version", "print the version").or("v"),
];

const BUNDLE: Flag =
    text("bundle", "path to the root of the bundle directory, defaults to the current directory")
        .or("b");
const CONSOLE_SOCKET: Flag =
    text("console-socket", "AF_UNIX socket which receives the master end of the pseudoterminal");
const PID_FILE: Flag = text("pid-file", "specify the file to write the process id to");
const NO_PIVOT: Flag =
    switch("no-pivot", "accepted for compatibility: the root is always pivoted to, in the guest");
const NO_NEW_KEYRING: Flag =
    switch("no-new-keyring", "accepted for compatibility: the guest has its own keyrings");
const PRESERVE_FDS: Flag =
    number("preserve-fds", "not supported: descriptors cannot be passed into a virtual machine");
const DETACH: Flag = switch("detach", "detach from the container's process").or("d");
const FORMAT: Flag = text("format", "select one of: table or json (default: \"table\")").or("f");
const NO_SUBREAPER: Flag =
    switch("no-subreaper", "accepted for compatibility: no process is ever reparented here");

static CREATE: &[Flag] =
    &[BUNDLE, CONSOLE_SOCKET, PID_FILE, NO_PIVOT, NO_NEW_KEYRING, PRESERVE_FDS];
static RUN: &[Flag] = &[
    BUNDLE,
    CONSOLE_SOCKET,
    DETACH,
    switch("keep", "do not delete the container after it exits"),
    PID_FILE,
    NO_SUBREAPER,
    NO_PIVOT,
    NO_NEW_KEYRING,
    PRESERVE_FDS,
];
static EXEC: &[Flag] = &[
    CONSOLE_SOCKET,
    text("cwd", "current working directory in the container"),
    list("env", "set environment variables").or("e"),
    switch("tty", "allocate a pseudo-TTY").or("t"),
    text("user", "UID (format: <uid>[:<gid>])").or("u"),
    list("additional-gids", "additional gids").or("g"),
    text("process", "path to the process.json").or("p"),
    DETACH,
    PID_FILE,
    text("process-label", "set the SELinux label of the process"),
    text("apparmor", "set the apparmor profile for the process"),
    switch("no-new-privs", "set the no new privileges value for the process"),
    list("cap", "add a capability to the bounding set for the process").or("c"),
    PRESERVE_FDS,
    list("cgroup", "not supported: run the process in an (existing) sub-cgroup"),
    switch("ignore-paused", "allow exec in a paused container"),
];
static UPDATE: &[Flag] = &[
    text("resources", "file with the resources to update, or '-' for the standard input").or("r"),
    number("blkio-weight", "per cgroup weight, range is from 10 to 1000"),
    text("cpu-period", "CPU CFS period to be used for hardcapping (in usecs)"),
    text("cpu-quota", "CPU CFS hardcap limit (in usecs)"),
    text("cpu-share", "CPU shares (relative weight vs. other containers)"),
    text("cpu-rt-period", "CPU realtime period to be used for hardcapping (in usecs)"),
    text("cpu-rt-runtime", "CPU realtime hardcap limit (in usecs)"),
    text("cpuset-cpus", "CPU(s) to use"),
    text("cpuset-mems", "Memory node(s) to use"),
    text("kernel-memory", "(obsoleted; do not use)"),
    text("kernel-memory-tcp", "(obsoleted; do not use)"),
    text("memory", "Memory limit (in bytes)"),
    text("memory-reservation", "Memory reservation or soft_limit (in bytes)"),
    text("memory-swap", "Total memory usage (memory + swap); '-1' is unlimited swap"),
    number("pids-limit", "Maximum number of pids allowed in the container"),
    text("l3-cache-schema", "not supported: Intel RDT is a matter of the host"),
    text("mem-bw-schema", "not supported: Intel RDT is a matter of the host"),
];

const fn verb(
    name: &'static str,
    usage: &'static str,
    summary: &'static str,
    flags: &'static [Flag],
    args: (usize, Option<usize>),
) -> Verb {
    Verb { name, usage, summary, flags, args, order: Order::Anywhere }
}

const fn unsupported(mut verb: Verb) -> Verb {
    verb.order = Order::Nowhere;
    verb
}

const fn flags_first(mut verb: Verb) -> Verb {
    verb.order = Order::First;
    verb
}

/// All verbs.
pub static VERBS: &[Verb] = &[
    unsupported(verb("checkpoint", ID, "not supported", &[], ANY)),
    verb("create", ID, "create a container", CREATE, ONE),
    verb(
        "delete",
        ID,
        "delete any resources held by the container",
        &[switch("force", "delete the container even if it is still running (SIGKILL)").or("f")],
        ONE,
    ),
    verb(
        "events",
        ID,
        "display container events such as OOM notifications, cpu, memory, and IO usage",
        &[
            text("interval", "set the stats collection interval (default: 5s)"),
            switch("stats", "display the container's stats then exit"),
        ],
        ONE,
    ),
    flags_first(verb(
        "exec",
        "<container-id> <command> [arguments] || -p process.json <container-id>",
        "execute new process inside the container",
        EXEC,
        (1, None),
    )),
    verb("features", "", "show the enabled features", &[], ANY),
    verb(
        "kill",
        "<container-id> [signal]",
        "send a signal (default: SIGTERM) to the container's init process",
        &[switch("all", "send the signal to all processes inside the container").or("a")],
        (1, Some(2)),
    ),
    verb(
        "list",
        "",
        "list containers with the given root",
        &[FORMAT, switch("quiet", "display only container IDs").or("q")],
        ANY,
    ),
    verb("pause", ID, "suspend all processes inside the container", &[], ONE),
    flags_first(verb(
        "ps",
        "<container-id> [ps options]",
        "display the host processes that stand for the container's",
        &[FORMAT],
        (1, None),
    )),
    unsupported(verb("restore", ID, "not supported", &[], ANY)),
    verb("resume", ID, "resume all processes that have been previously paused", &[], ONE),
    verb("run", ID, "create and run a container", RUN, ONE),
    verb(
        "spec",
        "",
        "create a new specification file",
        &[BUNDLE, switch("rootless", "generate a configuration for a rootless container")],
        (0, Some(0)),
    ),
    verb("start", ID, "execute the user defined process in a created container", &[], ONE),
    verb("state", ID, "output the state of a container", &[], ONE),
    verb("update", ID, "update container resource constraints", UPDATE, ONE),
    verb(
        "kata-check",
        "",
        "say whether this host can run virtual machines, and what is missing",
        &[
            switch("verbose", "accepted for compatibility").or("v"),
            switch("no-network-checks", "accepted for compatibility").or("n"),
            switch("strict", "accepted for compatibility").or("s"),
        ],
        ANY,
    ),
    verb("check", "", "the same as kata-check", &[switch("verbose", "").or("v")], ANY),
    verb("kata-env", "", "print the effective configuration", ENV, ANY),
    verb("env", "", "the same as kata-env", ENV, ANY),
    verb(
        "factory",
        "init|status|destroy",
        "templates that virtual machines are cloned from",
        &[],
        ONE,
    ),
];

static ENV: &[Flag] = &[switch("json", "print JSON instead of TOML")];
