//! Whether IPv6 is switched off. Netlink tells it of interfaces; the rest, and every change, goes
//! by sysctl (Linux, `Documentation/networking/ip-sysctl.rst`, `disable_ipv6`), which means the
//! network namespace of the calling thread.

use std::fs;
use std::io;

/// What IPv6 is switched off for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6<'a> {
    /// Every interface there is, and those to come.
    All,
    /// The interface of this name.
    On(&'a str),
}

impl Ipv6<'_> {
    /// Whether it is off.
    ///
    /// # Errors
    /// `NotFound` where the kernel has no IPv6, or the interface none.
    pub fn is_off(self) -> io::Result<bool> {
        Ok(fs::read_to_string(self.path())?.trim() != "0")
    }

    /// Switches it off or on.
    ///
    /// # Errors
    /// As for [`Ipv6::is_off`]; or the kernel's refusal.
    pub fn switch(self, off: bool) -> io::Result<()> {
        fs::write(self.path(), if off { "1" } else { "0" })
    }

    /// A name of an interface has no `/`.
    fn path(self) -> String {
        let Self::On(name) = self else {
            return "/proc/sys/net/ipv6/conf/all/disable_ipv6".to_owned();
        };
        format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    }
}
