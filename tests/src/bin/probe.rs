//! Says, as one JSON object, what a process inside a container sees and may do.
//!
//! The same program runs under runc and under us; the end-to-end tests compare.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde_json::{Value, json};

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("spin") => loop {
            std::hint::spin_loop();
        },
        Some("udp-echo") => return echo_datagrams(),
        Some("udp-ask") => return ask_datagram(),
        _ => {}
    }
    let seen = json!({
        "args": std::env::args().collect::<Vec<_>>(),
        "cgroup": lines("/proc/self/cgroup"),
        "cwd": std::env::current_dir().ok(),
        "dev": devices(),
        "environment": std::env::vars().collect::<BTreeMap<_, _>>(),
        "fds": descriptors(),
        "hostname": text("/proc/sys/kernel/hostname"),
        "domainname": text("/proc/sys/kernel/domainname"),
        "limits": limits(),
        "mounts": mounts(),
        "namespaces": names("/proc/self/ns"),
        "oom_score_adj": text("/proc/self/oom_score_adj"),
        "paths": paths(),
        "pid": std::process::id(),
        "calls": calls(),
        "status": status(),
        "gid_map": text("/proc/self/gid_map"),
        "uid_map": text("/proc/self/uid_map"),
    });
    println!("{seen:#}");
}

fn echo_datagrams() {
    let port = std::env::args().nth(2).and_then(|port| port.parse().ok()).unwrap_or(7);
    let serve = || -> std::io::Result<()> {
        let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, port))?;
        let mut buffer = [0; 2048];
        loop {
            let (count, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..count], from).ok();
        }
    };
    if let Err(error) = serve() {
        eprintln!("no datagrams on port {port}: {error}");
        std::process::exit(1);
    }
}

/// Says whether a server of [`echo_datagrams`] at an address and port answers.
fn ask_datagram() {
    let words: Vec<String> = std::env::args().skip(2).collect();
    let (Some(address), Some(port)) = (words.first(), words.get(1)) else { return };
    let Ok(socket) = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0)) else {
        return;
    };
    socket.set_read_timeout(Some(std::time::Duration::from_secs(2))).ok();
    for _ in 0..10 {
        socket.send_to(b"ask", format!("{address}:{port}")).ok();
        let mut buffer = [0; 16];
        if matches!(socket.recv(&mut buffer), Ok(3)) {
            return println!("answered");
        }
    }
    println!("silent");
}

fn text(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|e| e.kind().to_string(), |t| t.trim().to_owned())
}

fn lines(path: &str) -> Vec<String> {
    text(path).lines().map(str::to_owned).collect()
}

fn names(path: &str) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn status() -> BTreeMap<String, String> {
    const KEPT: [&str; 17] = [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "NSpid",
        "Threads",
    ];
    let rows = lines("/proc/self/status");
    let rows = rows.iter().filter_map(|line| line.split_once(':'));
    rows.filter(|(key, _)| KEPT.contains(key))
        .map(|(key, value)| {
            (key.to_owned(), value.split_whitespace().collect::<Vec<_>>().join(" "))
        })
        .collect()
}

fn limits() -> BTreeMap<String, String> {
    let rows = lines("/proc/self/limits");
    let rows = rows.iter().skip(1);
    rows.map(|line| {
        let (name, rest) = line.split_at(line.len().min(26));
        let values: Vec<_> = rest.split_whitespace().take(2).collect();
        (name.trim().to_owned(), values.join(" "))
    })
    .collect()
}

/// Mount point → type, options and propagation, without what names a device or a size.
fn mounts() -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    for line in lines("/proc/self/mountinfo") {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let left: Vec<_> = left.split(' ').collect();
        let right: Vec<_> = right.split(' ').collect();
        let (Some(point), Some(options)) = (left.get(4), left.get(5)) else { continue };
        let mut options: Vec<_> = options.split(',').collect();
        options.sort_unstable();
        let propagation: Vec<_> =
            left.iter().skip(6).map(|tag| tag.split(':').next().unwrap_or(tag)).collect();
        let mut data: Vec<_> = right.get(2).map_or(vec![], |o| o.split(',').collect());
        data.sort_unstable();
        let entry = json!({
            "type": right.first(), "source": right.get(1), "options": options,
            "propagation": propagation, "data": data,
        });
        found.insert((*point).to_owned(), entry);
    }
    found
}

fn devices() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for name in names("/dev") {
        let path = format!("/dev/{name}");
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let kind = meta.file_type();
        let what = if kind.is_symlink() {
            format!("link to {}", fs::read_link(&path).unwrap_or_default().display())
        } else if kind.is_char_device() || kind.is_block_device() {
            let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            let letter = if kind.is_char_device() { 'c' } else { 'b' };
            let opens =
                fs::File::open(&path).map_or_else(|e| e.kind().to_string(), |_| "opens".into());
            format!(
                "{letter} {major}:{minor} {:o} {}:{} {opens}",
                meta.mode() & 0o7777,
                meta.uid(),
                meta.gid()
            )
        } else {
            format!("{:o}", meta.mode() & 0o7777)
        };
        found.insert(name, what);
    }
    found
}

fn descriptors() -> Vec<String> {
    // One more is the directory being read.
    let open = names("/proc/self/fd");
    open.into_iter().filter(|fd| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok()).collect()
}

/// What reading and writing paths gives that profiles mask or make read-only.
fn paths() -> BTreeMap<String, String> {
    const READ: [&str; 10] = [
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/acpi",
        "/proc/scsi",
        "/sys/firmware",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/asound",
        "/proc/bus",
    ];
    const WRITE: [&str; 6] = [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/proc/irq/probe",
        "/sys/probe",
        "/sys/fs/cgroup/probe",
        "/probe",
    ];
    let mut found = BTreeMap::new();
    for path in READ {
        let is = match fs::metadata(path) {
            Err(_) => "absent".to_owned(),
            Ok(meta) if meta.is_dir() => format!("directory of {}", names(path).len().min(1)),
            Ok(meta) if meta.file_type().is_char_device() => "masked by a device".to_owned(),
            Ok(_) => "a file".to_owned(),
        };
        found.insert(format!("read {path}"), is);
    }
    for path in WRITE {
        let opened = fs::OpenOptions::new()
            .write(true)
            .create(!path.starts_with("/proc"))
            .truncate(false)
            .open(path);
        let is = opened.map_or_else(|e| e.kind().to_string(), |_| "opens".to_owned());
        if path.ends_with("/probe") {
            fs::remove_file(path).ok();
        }
        found.insert(format!("write {path}"), is);
    }
    found
}

/// How system calls end that a filter or a missing capability may refuse.
///
/// Each is made with arguments that cannot succeed, so that only the refusal differs.
fn calls() -> BTreeMap<&'static str, &'static str> {
    const BAD: libc::c_long = -1;
    let calls: [(&str, libc::c_long, [libc::c_long; 5]); 42] = [
        ("acct", libc::SYS_acct, [BAD, 0, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [BAD, BAD, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [BAD, 0, 0, 0, 0]),
        ("clock_settime", libc::SYS_clock_settime, [0, BAD, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0]),
        ("clone_newuser", libc::SYS_clone, [0x1000_0000 | 0x200, 0, 0, 0, 0]),
        ("delete_module", libc::SYS_delete_module, [BAD, 0, 0, 0, 0]),
        ("finit_module", libc::SYS_finit_module, [BAD, BAD, 0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [BAD, 0, 0, 0, 0]),
        ("get_mempolicy", libc::SYS_get_mempolicy, [0, 0, 0, 0, 0xff]),
        ("init_module", libc::SYS_init_module, [BAD, 0, BAD, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0, BAD, 0, 0, 0]),
        ("ioperm", libc::SYS_ioperm, [0x3f8, BAD, 0, 0, 0]),
        ("iopl", libc::SYS_iopl, [4, 0, 0, 0, 0]),
        ("kcmp", libc::SYS_kcmp, [BAD, BAD, 0, 0, 0]),
        ("kexec_load", libc::SYS_kexec_load, [0, 99, 0, 0xff, 0]),
        ("keyctl", libc::SYS_keyctl, [BAD, 0, 0, 0, 0]),
        ("lookup_dcookie", libc::SYS_lookup_dcookie, [BAD, 0, 0, 0, 0]),
        ("mbind", libc::SYS_mbind, [1, 0, BAD, 0, 0]),
        ("mount", libc::SYS_mount, [BAD, BAD, BAD, 0, 0]),
        ("move_pages", libc::SYS_move_pages, [0, 0, 0, 0, 0xff]),
        ("name_to_handle_at", libc::SYS_name_to_handle_at, [BAD, 0, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [BAD, 0, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [BAD, 0, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, BAD, 0]),
        ("personality_other", libc::SYS_personality, [0x0004_0000, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [BAD, 0, 0, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [BAD, BAD, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [BAD, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [12, BAD, 0, 0, 0]),
        ("quotactl", libc::SYS_quotactl, [BAD, BAD, 0, 0, 0]),
        ("request_key", libc::SYS_request_key, [BAD, BAD, 0, 0, 0]),
        ("setdomainname", libc::SYS_setdomainname, [BAD, 1, 0, 0, 0]),
        ("sethostname", libc::SYS_sethostname, [BAD, 1, 0, 0, 0]),
        ("setns", libc::SYS_setns, [BAD, 0, 0, 0, 0]),
        ("settimeofday", libc::SYS_settimeofday, [BAD, 0, 0, 0, 0]),
        ("socket_vsock", libc::SYS_socket, [40, 1, 0, 0, 0]),
        ("swapon", libc::SYS_swapon, [BAD, 0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0]),
        ("umount2", libc::SYS_umount2, [BAD, 0, 0, 0, 0]),
        ("unshare_newns", libc::SYS_unshare, [0x0002_0000 | 0x1, 0, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0xff, 0, 0, 0, 0]),
    ];
    let mut ends = BTreeMap::new();
    for (name, number, [a, b, c, d, e]) in calls {
        // SAFETY: pointers among the arguments are invalid on purpose: the kernel answers EFAULT
        // or refuses earlier, and touches no memory of ours.
        let result = unsafe { libc::syscall(number, a, b, c, d, e) };
        ends.insert(name, outcome(result == -1));
    }
    ends.insert("chroot", chroot());
    ends
}

fn outcome(failed: bool) -> &'static str {
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EPERM) if failed => "refused",
        Some(libc::ENOSYS) if failed => "unknown",
        _ => "reached",
    }
}

fn chroot() -> &'static str {
    let Ok(root) = CString::new("/") else { return "reached" };
    // SAFETY: the path is a valid C string; the new root is the old one.
    outcome(unsafe { libc::chroot(root.as_ptr()) } == -1)
}
