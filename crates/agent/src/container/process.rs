//! What a process is made of: identity, limits, priorities, environment, program.

use super::failure::{Context, Failure, FailureKind, Step, reason};
use kata_oci::{IoPriority, Process, Rlimit, Scheduler};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::fs::{Access, AtFlags, CWD, FileType, accessat, fchown, fstat, stat};
use rustix::process::{Pid, Resource, prlimit};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longest `/etc/passwd` that is looked at.
const MAX_PASSWD: u64 = 1 << 20;

/// Sets the limits of another process, or of this one.
pub(super) fn set_limits(pid: Option<i32>, limits: &[Rlimit]) -> Step {
    for limit in limits {
        let Some(resource) = resource(&limit.kind) else {
            return Err(Failure::setup(format!("rlimit {:?} is unknown", limit.kind)));
        };
        let finite = |value: u64| (value != u64::MAX).then_some(value);
        let new =
            rustix::process::Rlimit { current: finite(limit.soft), maximum: finite(limit.hard) };
        prlimit(pid.and_then(Pid::from_raw), resource, new)
            .context(|| format!("error setting rlimit type {}", limit.kind))?;
    }
    Ok(())
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        _ => return None,
    })
}

/// Takes on user and groups. The standard streams become the user's, so that it may open
/// them again by `/dev/stdout`.
pub(super) fn take_identity(process: &Process, stdio: [BorrowedFd<'_>; 3]) -> Step {
    let user = &process.user;
    for fd in stdio {
        give_to(fd, user.uid)?;
    }
    let groups: Vec<_> = user.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    setgroups(&groups).context(|| "set the additional groups")?;
    setresgid(gid, gid, gid).context(|| format!("set group {}", user.gid))?;
    setresuid(uid, uid, uid).context(|| format!("set user {}", user.uid))
}

fn give_to(fd: BorrowedFd<'_>, uid: u32) -> Step {
    let stat = fstat(fd).context(|| "look at a standard stream")?;
    if stat.st_uid == uid || super::devices::is_null(fd) {
        return Ok(());
    }
    match fchown(fd, Some(rustix::fs::Uid::from_raw(uid)), None) {
        // Not ours to give: it is then as it came.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM | rustix::io::Errno::ROFS) => Ok(()),
        result => result.context(|| "give a standard stream to the user"),
    }
}

/// Sets the CPU and I/O priorities and the personality.
pub(super) fn set_priorities(process: &Process) -> Step {
    if let Some(scheduler) = &process.scheduler {
        set_scheduler(scheduler)?;
    }
    if let Some(priority) = &process.io_priority {
        set_io_priority(priority)?;
    }
    Ok(())
}

fn set_scheduler(scheduler: &Scheduler) -> Step {
    let unknown = |what: &str| Failure::setup(format!("scheduler {what} is unknown"));
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(unknown(&format!("policy {other:?}"))),
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(unknown(&format!("flag {other:?}"))),
        };
    }
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(48),
        sched_policy: policy,
        sched_flags: flags,
        sched_nice: scheduler.nice,
        sched_priority: scheduler.priority.cast_unsigned(),
        sched_runtime: scheduler.runtime,
        sched_deadline: scheduler.deadline,
        sched_period: scheduler.period,
    };
    // SAFETY: the structure lives through the call and holds its own size.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    check(result).context(|| "set the scheduling policy")
}

fn set_io_priority(priority: &IoPriority) -> Step {
    const WHO_PROCESS: libc::c_int = 1;
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(Failure::setup(format!("I/O priority class {other:?} is unknown"))),
    };
    let value = class << 13 | (priority.priority & 0x1fff);
    // SAFETY: takes three numbers.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, value) };
    check(result).context(|| "set the I/O priority")
}

/// Sets `personality(2)`.
pub(super) fn set_personality(personality: &kata_oci::Personality) -> Step {
    let domain = match personality.domain.as_str() {
        "LINUX" => 0,
        "LINUX32" => 8,
        other => return Err(Failure::setup(format!("personality {other:?} is unknown"))),
    };
    if !personality.flags.is_empty() {
        return Err(Failure::setup("personality flags are not supported"));
    }
    // SAFETY: takes a number.
    let result = unsafe { libc::personality(domain) };
    check(result.into()).context(|| "set the personality")
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The environment: the last of several values of a name wins, and there is a `HOME`.
#[derive(Debug)]
pub(super) struct Environment(Vec<(String, String)>);

impl Environment {
    /// Takes `KEY=value` texts.
    pub fn new(texts: &[String]) -> Step<Self> {
        let mut pairs: Vec<(String, String)> = Vec::with_capacity(texts.len() + 1);
        for text in texts {
            let Some((name, value)) = text.split_once('=').filter(|(name, _)| !name.is_empty())
            else {
                return Err(Failure::setup(format!("invalid environment variable: {text:?}")));
            };
            match pairs.iter_mut().find(|(known, _)| known == name) {
                Some((_, old)) => value.clone_into(old),
                None => pairs.push((name.to_owned(), value.to_owned())),
            }
        }
        Ok(Self(pairs))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Sets `HOME` from the container's `/etc/passwd` where nothing else did.
    pub fn complete_home(&mut self, uid: u32) {
        if self.get("HOME").is_some_and(|home| !home.is_empty()) {
            return;
        }
        let home = home_of(uid).unwrap_or_else(|| "/".to_owned());
        match self.0.iter_mut().find(|(name, _)| name == "HOME") {
            Some((_, value)) => *value = home,
            None => self.0.push(("HOME".to_owned(), home)),
        }
    }

    /// As execve takes it.
    pub fn strings(&self) -> Step<Vec<CString>> {
        self.0.iter().map(|(name, value)| c_string(format!("{name}={value}"))).collect()
    }
}

fn home_of(uid: u32) -> Option<String> {
    // Not to wait for a writer, should it be a FIFO.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOCTTY)
        .open("/etc/passwd")
        .ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_PASSWD).read_to_end(&mut bytes).ok()?;
    home_in(&bytes, uid)
}

fn home_in(passwd: &[u8], uid: u32) -> Option<String> {
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let line = std::str::from_utf8(line).ok()?;
        let mut fields = line.trim().split(':');
        let found: u32 = fields.nth(2)?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then(|| home.to_owned())
    })
}

/// A text for a system call.
pub(super) fn c_string(text: impl Into<Vec<u8>>) -> Step<CString> {
    CString::new(text).map_err(|_| Failure::setup("a text has a NUL byte in it"))
}

/// Finds the program as Go's `exec.LookPath` does, and fails in its words: engines look
/// for them.
pub(super) fn look_up(program: &str, environment: &Environment) -> Step<PathBuf> {
    let failed = |kind, why: String| Failure { kind, text: format!("exec: {program:?}: {why}") };
    if program.contains('/') {
        let path = PathBuf::from(program);
        return match executable(&path) {
            Ok(()) => Ok(path),
            Err((error, stat)) => {
                let missing = error.raw_os_error() == Some(libc::ENOENT);
                let kind = if missing { FailureKind::NotFound } else { FailureKind::NotExecutable };
                let doing = if stat { format!("stat {program}: ") } else { String::new() };
                Err(failed(kind, format!("{doing}{}", reason(&error))))
            }
        };
    }
    environment
        .get("PATH")
        .unwrap_or_default()
        .split(':')
        .map(|directory| {
            Path::new(if directory.is_empty() { "." } else { directory }).join(program)
        })
        .find(|path| executable(path).is_ok())
        .ok_or_else(|| {
            failed(FailureKind::NotFound, "executable file not found in $PATH".to_owned())
        })
}

/// Whether this process may execute a file; else why, and whether looking at it failed.
fn executable(path: &Path) -> Result<(), (io::Error, bool)> {
    let found = stat(path).map_err(|error| (error.into(), true))?;
    if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
        return Err((io::Error::from_raw_os_error(libc::EISDIR), false));
    }
    if found.st_mode & 0o111 == 0 {
        return Err((io::Error::from_raw_os_error(libc::EACCES), false));
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|error| (error.into(), false))
}

/// Replaces this process by the program; returns only when that fails.
pub(super) fn execute(path: &Path, args: &[CString], environment: &[CString]) -> Failure {
    let shown = path.display();
    let Ok(program) = CString::new(path.as_os_str().as_bytes()) else {
        return Failure::setup("the program's path has a NUL byte in it");
    };
    let pointers = |texts: &[CString]| -> Vec<*const libc::c_char> {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, environment) = (pointers(args), pointers(environment));
    // SAFETY: both arrays end with a null pointer, and all texts are NUL-terminated and
    // live through the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), environment.as_ptr()) };
    let error = io::Error::last_os_error();
    let missing = error.raw_os_error() == Some(libc::ENOENT);
    Failure {
        kind: if missing { FailureKind::NotFound } else { FailureKind::NotExecutable },
        text: format!("exec {shown}: {}", reason(&error)),
    }
}

/// Gives every signal its default effect and blocks none.
pub(super) fn reset_signals() {
    // Not by signal(3): a C library keeps two signals to itself, and those may be ignored
    // by whoever started the agent. All zero is the default effect, without flags.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: sets a disposition from a structure of the kernel's size that lives through
        // the call. It fails for the two that cannot be changed.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, size_of::<u64>())
        };
    }
    let mut none = std::mem::MaybeUninit::uninit();
    // SAFETY: the set is initialised by the first call before the second reads it.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Borrows the three standard streams.
pub(super) fn standard_streams() -> [BorrowedFd<'static>; 3] {
    // SAFETY: 0, 1 and 2 are open for as long as this process lives.
    [0, 1, 2].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn environment(texts: &[&str]) -> Environment {
        Environment::new(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn last_value_wins_at_the_first_place() {
        let strings = environment(&["A=1", "B=2", "A=3=4"]).strings().unwrap();
        assert_eq!(strings, [c"A=3=4".to_owned(), c"B=2".to_owned()]);
    }

    #[test]
    fn text_without_equals_sign_is_refused() {
        assert!(Environment::new(&["A".to_owned()]).is_err());
        assert!(Environment::new(&["=x".to_owned()]).is_err());
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\nu:x:7:7::/home/u:\n";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 7).as_deref(), Some("/home/u"));
        assert_eq!(home_in(passwd, 8), None);
    }

    #[test]
    fn missing_program_reads_as_docker_expects() {
        let failure = look_up("no-such-program", &environment(&["PATH=/bin"])).unwrap_err();
        assert_eq!(failure.text, r#"exec: "no-such-program": executable file not found in $PATH"#);
        assert_eq!(failure.kind, FailureKind::NotFound);
        let failure = look_up("/no/such", &environment(&[])).unwrap_err();
        assert_eq!(failure.text, r#"exec: "/no/such": stat /no/such: no such file or directory"#);
        assert_eq!(failure.kind, FailureKind::NotFound);
    }

    #[test]
    fn file_that_is_no_program_reads_as_docker_expects() {
        let failure = look_up("/etc/passwd", &environment(&[])).unwrap_err();
        assert_eq!(failure.text, r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(failure.kind, FailureKind::NotExecutable);
        assert_eq!(
            look_up("/etc", &environment(&[])).unwrap_err().kind,
            FailureKind::NotExecutable
        );
    }

    #[test]
    fn program_is_found_by_path() {
        let found = look_up("sh", &environment(&["PATH=/nonexistent::/bin"])).unwrap();
        assert_eq!(found, Path::new("/bin/sh"));
    }

    proptest! {
        #[test]
        fn any_passwd_is_read(bytes: Vec<u8>, uid: u32) {
            let _ = home_in(&bytes, uid);
        }
    }
}
