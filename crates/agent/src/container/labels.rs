//! AppArmor profiles and SELinux labels of a process.

use super::failure::{Context, Step};
use super::wire::Channel;
use kata_oci::Process;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

fn apparmor_enabled() -> bool {
    std::fs::read("/sys/module/apparmor/parameters/enabled")
        .is_ok_and(|text| text.first() == Some(&b'Y'))
}

fn selinux_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// The files through which a process's next program gets its label, opened while the
/// guest's own `/proc` is at hand.
pub(super) struct Labels {
    apparmor: Option<(OwnedFd, String)>,
    selinux: Option<(OwnedFd, String)>,
}

impl Labels {
    /// Prepares what the process asks for. A kernel without the security module runs the
    /// process without, as the VM is the boundary; the log says so.
    pub fn prepare(process: &Process, proc: BorrowedFd<'_>, channel: &Channel) -> Step<Self> {
        let open = |files: &[&str]| {
            let mut last = rustix::io::Errno::NOENT;
            for file in files {
                match openat(proc, *file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
                    Ok(fd) => return Ok(fd),
                    Err(error) => last = error,
                }
            }
            Err(last).context(|| "open the file of the security label")
        };
        let mut labels = Self { apparmor: None, selinux: None };
        let wanted = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(profile) = wanted(&process.apparmor_profile).filter(|p| p != "unconfined") {
            if apparmor_enabled() {
                let file = open(&["self/attr/apparmor/exec", "self/attr/exec"])?;
                labels.apparmor = Some((file, format!("exec {profile}")));
            } else {
                channel.log(format!("no AppArmor in the guest: profile {profile} is ignored"));
            }
        }
        if let Some(label) = wanted(&process.selinux_label) {
            if selinux_enabled() {
                labels.selinux = Some((open(&["self/attr/exec"])?, label));
            } else {
                channel.log(format!("no SELinux in the guest: label {label} is ignored"));
            }
        }
        Ok(labels)
    }

    /// Sets the labels for the next execve.
    pub fn apply(&self) -> Step {
        for (name, label) in [("AppArmor", &self.apparmor), ("SELinux", &self.selinux)] {
            if let Some((file, text)) = label {
                write(file, text.as_bytes())
                    .context(|| format!("apply the {name} label {text}"))?;
            }
        }
        Ok(())
    }
}
