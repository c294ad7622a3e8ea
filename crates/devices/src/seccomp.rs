//! The system calls that are left once the guest can speak.
//!
//! The process needs no new sockets, no programs, no other processes, no mounts, and never
//! executable memory. What is not in the lists kills it, which ends the sandbox.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Calls allowed with any arguments.
#[rustfmt::skip]
const ALLOWED: &[i64] = &[
    // files, on behalf of the guest
    libc::SYS_openat, libc::SYS_openat2, libc::SYS_close, libc::SYS_read, libc::SYS_readv,
    libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_write, libc::SYS_writev,
    libc::SYS_pwrite64, libc::SYS_pwritev, libc::SYS_pwritev2, libc::SYS_copy_file_range,
    libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx, libc::SYS_fstatfs,
    libc::SYS_getdents64, libc::SYS_lseek, libc::SYS_readlinkat, libc::SYS_linkat,
    libc::SYS_symlinkat, libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_unlinkat,
    libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_fchmod, libc::SYS_fchmodat,
    libc::SYS_fchownat, libc::SYS_utimensat, libc::SYS_ftruncate, libc::SYS_fallocate,
    libc::SYS_fsync, libc::SYS_fdatasync, libc::SYS_syncfs, libc::SYS_flock, libc::SYS_dup,
    libc::SYS_fcntl, libc::SYS_fchdir, libc::SYS_umask,
    libc::SYS_fgetxattr, libc::SYS_fsetxattr, libc::SYS_flistxattr, libc::SYS_fremovexattr,
    libc::SYS_getxattr, libc::SYS_setxattr, libc::SYS_listxattr, libc::SYS_removexattr,
    // as which user
    libc::SYS_setresuid, libc::SYS_setresgid, libc::SYS_setgroups, libc::SYS_geteuid,
    libc::SYS_getegid, libc::SYS_capget, libc::SYS_capset,
    // the VMM's socket, its queues' event descriptors
    libc::SYS_accept4, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_eventfd2,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_wait, libc::SYS_epoll_pwait,
    // memory, threads, time, the end
    libc::SYS_brk, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_madvise, libc::SYS_futex,
    libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity, libc::SYS_clock_gettime, libc::SYS_gettimeofday,
    libc::SYS_getrandom, libc::SYS_getpid, libc::SYS_gettid, libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall, libc::SYS_exit, libc::SYS_exit_group,
    libc::SYS_clock_nanosleep,
];

/// What a new thread may not bring along: namespaces of its own.
const NEW_NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Installs the filters for this thread and all it starts. `pid` is the process's own.
pub(crate) fn install(pid: u32) -> Result<(), seccompiler::Error> {
    // glibc starts threads with clone3, whose flags a filter cannot see, and falls back to
    // clone when there is no clone3. Of two filters the stricter action counts.
    seccompiler::apply_filter(&without_clone3()?)?;
    seccompiler::apply_filter(&allow_list(pid)?)
}

fn without_clone3() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    build(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

fn allow_list(pid: u32) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_clone3, Vec::new());
    let thread_only = libc::CLONE_THREAD | NEW_NAMESPACES;
    rules.insert(libc::SYS_clone, vec![masked(0, thread_only, libc::CLONE_THREAD)?]);
    // Each worker thread has a working directory of its own.
    rules.insert(libc::SYS_unshare, vec![equal(0, libc::CLONE_FS)?]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![masked(2, libc::PROT_EXEC, 0)?]);
    }
    // A panic ends the process with a signal to itself.
    rules.insert(libc::SYS_tgkill, vec![equal(0, pid as i32)?]);
    rules.insert(libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME)?]);
    // Of no descriptor that it has these mean something else.
    let requests = kata_pager::REQUESTS.iter().map(|request| equal(1, *request as i32));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    build(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn build(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, matched, architecture)?.try_into()
}

/// The lower half of argument `index` is `value`.
fn equal(index: u8, value: i32) -> Result<SeccompRule, BackendError> {
    let value = u64::from(value as u32);
    let is = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
    SeccompRule::new(vec![is])
}

/// Of the bits `mask` in the lower half of argument `index` exactly `value` are set.
fn masked(index: u8, mask: i32, value: i32) -> Result<SeccompRule, BackendError> {
    let is = SeccompCondition::new(
        index,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(u64::from(mask as u32)),
        u64::from(value as u32),
    )?;
    SeccompRule::new(vec![is])
}
