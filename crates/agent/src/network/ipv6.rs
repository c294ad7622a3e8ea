//! IPv6 is on where it is on in the container's network namespace on the host.
//!
//! Docker switches it off in networks without it, which programs notice: there is no `::1`, and
//! nobody waits for an answer by IPv6. A container may switch it for itself afterwards (sysctls),
//! so what the host says again is not done again.

use std::io::ErrorKind;

use kata_netlink::{Ipv6, Link};

use super::{NetworkError, Wanted};

/// What is off because the host said so. Linux starts with nothing off.
#[derive(Debug, Default)]
pub(super) struct Switches {
    all: bool,
    loopback: bool,
}

impl Switches {
    /// Switches IPv6 off and on as is wanted, for interfaces that are not in use yet.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn set(
        &mut self,
        wanted: &Wanted,
        links: &[Link],
        indexes: &[u32],
    ) -> Result<(), NetworkError> {
        let all = wanted.ipv6_off;
        let changed = self.all != all;
        if changed {
            switch(Ipv6::All, all)?;
            (self.all, self.loopback) = (all, all);
        }
        if self.loopback != wanted.loopback_ipv6_off {
            switch(Ipv6::On("lo"), wanted.loopback_ipv6_off)?;
            self.loopback = wanted.loopback_ipv6_off;
        }
        for (index, interface) in indexes.iter().zip(&wanted.interfaces) {
            let Some(link) = links.iter().find(|link| link.index == *index) else { continue };
            let off = if changed { all } else { link.ipv6_off };
            if off != interface.ipv6_off && !interface.is_made_of(link) {
                switch(Ipv6::On(&link.name), interface.ipv6_off)?;
            }
        }
        Ok(())
    }
}

/// Where there is none it is off, and whoever wants an address of it hears that from the kernel.
fn switch(what: Ipv6<'_>, off: bool) -> Result<(), NetworkError> {
    match what.switch(off) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            let name = if let Ipv6::On(name) = what { name } else { "all interfaces" };
            Err(NetworkError::Ipv6(name.to_owned(), error))
        }
        _ => Ok(()),
    }
}
