//! Numbers of system calls by name.

/// The architectures of an x86_64 kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    X86_64,
    X86,
    X32,
}

/// Set in the number of every x32 call.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// Calls that x32 has at numbers of its own.
const X32_OWN: [(&str, u32); 36] = [
    ("rt_sigaction", 512),
    ("rt_sigreturn", 513),
    ("ioctl", 514),
    ("readv", 515),
    ("writev", 516),
    ("recvfrom", 517),
    ("sendmsg", 518),
    ("recvmsg", 519),
    ("execve", 520),
    ("ptrace", 521),
    ("rt_sigpending", 522),
    ("rt_sigtimedwait", 523),
    ("rt_sigqueueinfo", 524),
    ("sigaltstack", 525),
    ("timer_create", 526),
    ("mq_notify", 527),
    ("kexec_load", 528),
    ("waitid", 529),
    ("set_robust_list", 530),
    ("get_robust_list", 531),
    ("vmsplice", 532),
    ("move_pages", 533),
    ("preadv", 534),
    ("pwritev", 535),
    ("rt_tgsigqueueinfo", 536),
    ("recvmmsg", 537),
    ("sendmmsg", 538),
    ("process_vm_readv", 539),
    ("process_vm_writev", 540),
    ("setsockopt", 541),
    ("getsockopt", 542),
    ("io_setup", 543),
    ("io_submit", 544),
    ("execveat", 545),
    ("preadv2", 546),
    ("pwritev2", 547),
];

/// Names and numbers of one architecture, for many look-ups.
pub(super) struct Calls(Vec<(&'static str, u32)>);

impl Calls {
    pub fn of(architecture: Architecture) -> Self {
        fn all<C>(
            last: i32,
            get: impl Fn(usize) -> Option<C>,
            name: impl Fn(&C) -> &'static str,
        ) -> Vec<(&'static str, u32)> {
            (0..=last.cast_unsigned())
                .filter_map(|number| get(number as usize).map(|call| (name(&call), number)))
                .collect()
        }
        use syscalls::{x86, x86_64};
        let native = || all(x86_64::Sysno::last().id(), x86_64::Sysno::new, x86_64::Sysno::name);
        let mut calls = match architecture {
            Architecture::X86_64 => native(),
            Architecture::X86 => all(x86::Sysno::last().id(), x86::Sysno::new, x86::Sysno::name),
            Architecture::X32 => native()
                .into_iter()
                .map(|(name, number)| {
                    let own = X32_OWN.iter().find(|(own, _)| *own == name);
                    (name, own.map_or(number, |(_, own)| *own) | X32_BIT)
                })
                .collect(),
        };
        calls.sort_unstable();
        Self(calls)
    }

    pub fn number(&self, name: &str) -> Option<u32> {
        let at = self.0.binary_search_by_key(&name, |(name, _)| name).ok()?;
        Some(self.0[at].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        let native = Calls::of(Architecture::X86_64);
        assert_eq!(native.number("read"), Some(0));
        assert_eq!(native.number("openat2"), Some(libc::SYS_openat2 as u32));
        assert_eq!(native.number("clone3"), Some(libc::SYS_clone3 as u32));
        assert_eq!(native.number("socketcall"), None);
        let x86 = Calls::of(Architecture::X86);
        assert_eq!((x86.number("exit"), x86.number("socketcall")), (Some(1), Some(102)));
        let x32 = Calls::of(Architecture::X32);
        assert_eq!(x32.number("read"), Some(X32_BIT));
        assert_eq!(x32.number("execve"), Some(X32_BIT | 520));
    }
}
