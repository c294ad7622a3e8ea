//! KVM or TCG: decided by trying, once per boot of the host.
//!
//! That `/dev/kvm` opens says little: behind it may be a KVM that interprets a guest at a
//! thousandth of its speed, or hangs. So a child process (role `kvm-self-test`) runs a
//! loop in a virtual machine and natively; only a machine that comes near the native speed
//! counts. The child has [`DEADLINE`]; then it is killed and not waited for.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::Duration;

use kata_jail::{Launch, Role};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::config::{Accelerator, AcceleratorChoice};
use crate::{kvm_test, tsc};

/// How long the self-test may take.
pub const DEADLINE: Duration = Duration::from_millis(50);
/// Least speed of the loop in a guest, in terms of the native one.
const LEAST_RATIO: f64 = 0.3;
const CACHE: &str = "host.json";

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// What runs guests.
    pub accelerator: Accelerator,
    /// Why, in words.
    pub reason: String,
    /// Rate of the host's time stamp counter, kHz; 0 if it is not constant.
    pub tsc_khz: u64,
    /// The boot of the host that it holds for.
    pub boot_id: String,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.accelerator, self.reason)
    }
}

/// Decides for `choice`. Takes up to [`DEADLINE`] the first time after a boot.
pub fn choose(choice: AcceleratorChoice) -> Verdict {
    let verdict = known().unwrap_or_else(|| {
        let verdict = test();
        cache::write(CACHE, &verdict);
        tracing::info!(%verdict, "accelerator chosen");
        verdict
    });
    let configured = |accelerator| Verdict {
        accelerator,
        reason: "the configuration says so".to_owned(),
        ..verdict.clone()
    };
    match choice {
        AcceleratorChoice::Auto => verdict,
        AcceleratorChoice::Kvm => configured(Accelerator::Kvm),
        AcceleratorChoice::Tcg => configured(Accelerator::Tcg),
    }
}

fn known() -> Option<Verdict> {
    cache::read::<Verdict>(CACHE).filter(|verdict| verdict.boot_id == boot_id())
}

fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

fn test() -> Verdict {
    let clock = tsc::is_constant().then(tsc::read);
    let (accelerator, reason) = match try_kvm() {
        Ok(ratio) if ratio >= LEAST_RATIO => {
            (Accelerator::Kvm, format!("a KVM guest runs at {ratio:.2} of native speed"))
        }
        Ok(ratio) => (
            Accelerator::Tcg,
            format!("a KVM guest runs at only {ratio:.3} of native speed on this host"),
        ),
        Err(reason) => (Accelerator::Tcg, reason),
    };
    Verdict { accelerator, reason, tsc_khz: clock.map_or(0, tsc::khz_since), boot_id: boot_id() }
}

/// Runs the self-test in a child; gives the guest's speed in terms of the native one.
fn try_kvm() -> Result<f64, String> {
    if !std::path::Path::new("/dev/kvm").exists() {
        return Err("there is no /dev/kvm".to_owned());
    }
    let failed = |error: &dyn fmt::Display| format!("the KVM self-test cannot be run: {error}");
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|error| failed(&error))?;
    let child = Launch::role(Role::KvmSelfTest, "kata-kvm-self-test", &())
        .and_then(|launch| launch.stdout(write).die_with_parent().spawn())
        .map_err(|error| failed(&error))?;
    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(DEADLINE.subsec_nanos()) };
    let mut ready = [PollFd::new(&read, PollFlags::IN)];
    let answered = poll(&mut ready, Some(&timeout)).is_ok_and(|count| count > 0);
    if !answered {
        let _ = child.kill(libc::SIGKILL);
        return Err(format!("a KVM guest did not run a short loop within {DEADLINE:?}"));
    }
    let mut text = String::new();
    let _ = File::from(read).take(1024).read_to_string(&mut text);
    let _ = child.kill(libc::SIGKILL);
    // It has answered and ends: this does not take long.
    let _ = child.pidfd().as_fd();
    let _ = child.try_wait();
    text.trim().parse().map_err(|_| format!("the KVM self-test failed: {}", text.trim()))
}

/// The role `kvm-self-test`: prints the ratio, or what went wrong.
pub fn self_test_main() -> i32 {
    match kvm_test::ratio() {
        Ok(ratio) => {
            println!("{ratio}");
            0
        }
        Err(error) => {
            println!("{error}");
            1
        }
    }
}

/// Small facts about the host, kept until it boots again.
pub(crate) mod cache {
    use serde::{Serialize, de::DeserializeOwned};
    use std::fs;
    use std::path::Path;

    const DIR: &str = "/run/kata-containers";

    /// What was written; none when there is nothing, or nothing that can be read.
    pub(crate) fn read<T: DeserializeOwned>(name: &str) -> Option<T> {
        serde_json::from_slice(&fs::read(Path::new(DIR).join(name)).ok()?).ok()
    }

    /// Writes; without it the fact is found out again.
    pub(crate) fn write(name: &str, value: &impl Serialize) {
        let write = || {
            fs::create_dir_all(DIR)?;
            let new = Path::new(DIR).join(format!("{name}.{}", std::process::id()));
            fs::write(&new, serde_json::to_vec(value)?)?;
            fs::rename(new, Path::new(DIR).join(name))
        };
        let written: std::io::Result<()> = write();
        if let Err(error) = written {
            tracing::debug!(%error, name, "cannot keep a fact about the host");
        }
    }
}
