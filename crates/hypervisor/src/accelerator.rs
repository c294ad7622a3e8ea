//! KVM or TCG: tried, not assumed.
//!
//! That `/dev/kvm` opens says little: there are kernels whose KVM interprets a guest
//! instruction by instruction, or fails on it. So a child process ([`crate::kvm_test`])
//! runs the same loop natively and in a tiny VM; KVM is good if the VM is nearly as fast.
//! A ratio, so that it holds on an emulated host, too. The child is killed if it is not
//! done in time, and never waited for: it may be stuck in the kernel.
//!
//! What was found is kept for as long as the host is up.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use kata_jail::{Child, Launch, Role};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::config::{Accelerator, AcceleratorChoice};
use crate::kvm_test::{self, Outcome};
use crate::tsc;

/// Where the verdict is kept.
pub const CACHE: &str = "/run/kata-containers/host.json";
/// How long the self-test may take.
const PATIENCE: Duration = Duration::from_millis(45);
/// An emulated host is for tests: everything takes many times as long, and there is no hurry.
const PATIENCE_EMULATED: Duration = Duration::from_secs(5);
/// How fast the loop must be in the VM, as a part of its native speed.
const GOOD_RATIO: f64 = 0.3;
/// The KVM device.
const KVM: &str = "/dev/kvm";

/// What guests run on, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// What guests run on.
    pub accelerator: Accelerator,
    /// Why, in words.
    pub reason: String,
    /// Rate of the host's time stamp counter, kHz; 0 if it has no constant one.
    pub tsc_khz: u64,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.accelerator, self.reason)
    }
}

/// The verdict as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    #[serde(flatten)]
    verdict: Verdict,
}

/// Decides by the configuration and the (kept) self-test. Takes up to 50 ms the first
/// time after the host booted, next to nothing later.
///
/// Uses the role `kvm-self-test` of this binary.
pub fn choose(choice: AcceleratorChoice) -> Verdict {
    choose_kept_at(choice, Path::new(CACHE))
}

/// As [`choose`], with the verdict kept elsewhere.
pub fn choose_kept_at(choice: AcceleratorChoice, cache: &Path) -> Verdict {
    let found = measured(cache);
    match choice {
        AcceleratorChoice::Auto => found,
        AcceleratorChoice::Kvm => forced(found, Accelerator::Kvm),
        AcceleratorChoice::Tcg => forced(found, Accelerator::Tcg),
    }
}

fn forced(found: Verdict, accelerator: Accelerator) -> Verdict {
    let reason = if found.accelerator == accelerator {
        format!("the configuration says so ({})", found.reason)
    } else {
        format!("the configuration says so, though the self-test found: {}", found.reason)
    };
    Verdict { accelerator, reason, ..found }
}

/// What was found since the host booted, or is found now.
fn measured(cache: &Path) -> Verdict {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot_id = boot_id.trim();
    if let Some(verdict) = kept(cache, boot_id) {
        return verdict;
    }
    let verdict = measure();
    let Verdict { accelerator, reason, tsc_khz } = &verdict;
    tracing::info!(%accelerator, reason, tsc_khz, "chose what guests run on");
    let kept = Kept { boot_id: boot_id.to_owned(), verdict };
    if let Err(error) = keep(cache, &kept) {
        tracing::warn!(path = %cache.display(), %error, "cannot keep the accelerator's verdict");
    }
    kept.verdict
}

fn kept(cache: &Path, boot_id: &str) -> Option<Verdict> {
    let kept: Kept = serde_json::from_slice(&std::fs::read(cache).ok()?).ok()?;
    (kept.boot_id == boot_id && !boot_id.is_empty()).then_some(kept.verdict)
}

/// Writes it whole or not at all, whoever else does the same meanwhile.
fn keep(cache: &Path, kept: &Kept) -> io::Result<()> {
    let directory = cache.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(directory)?;
    let new = directory.join(format!(".host.json.{}", std::process::id()));
    let result = std::fs::write(&new, serde_json::to_vec_pretty(kept)?)
        .and_then(|()| std::fs::rename(&new, cache));
    if result.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    result
}

fn measure() -> Verdict {
    let clock = tsc::read();
    let (accelerator, reason) = match self_test() {
        Ok(Outcome { native_ns, vm_ns }) => judge(native_ns, vm_ns),
        Err(reason) => (Accelerator::Tcg, reason),
    };
    // TCG's own counter runs evenly, though it does not say so.
    let tsc_khz = if tsc::is_constant() || is_emulated() { tsc::khz_since(clock) } else { 0 };
    Verdict { accelerator, reason, tsc_khz }
}

fn judge(native_ns: u64, vm_ns: u64) -> (Accelerator, String) {
    let ratio = native_ns as f64 / vm_ns.max(1) as f64;
    let accelerator = if ratio >= GOOD_RATIO { Accelerator::Kvm } else { Accelerator::Tcg };
    let reason = format!("a loop in a KVM guest runs at {ratio:.2} of its native speed");
    (accelerator, reason)
}

/// Runs the child. The error says in words why KVM is not to be used.
fn self_test() -> Result<Outcome, String> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open(KVM) {
        return Err(format!("{KVM} cannot be used: {error}"));
    }
    let cannot = |error: &dyn std::fmt::Display| format!("the self-test did not run: {error}");
    let (mut answer, writer) = io::pipe().map_err(|error| cannot(&error))?;
    let child = Launch::role(Role::KvmSelfTest, Role::KvmSelfTest.as_str(), &())
        .and_then(|launch| launch.stdout(OwnedFd::from(writer)).die_with_parent().spawn())
        .map_err(|error| cannot(&error))?;
    let patience = if is_emulated() { PATIENCE_EMULATED } else { PATIENCE };
    let text = read_until(&mut answer, Instant::now() + patience);
    end(child);
    let text = text.map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => {
            format!("a KVM guest did not finish a short loop within {} ms", patience.as_millis())
        }
        _ => cannot(&error),
    })?;
    let outcome: Result<Outcome, String> = serde_json::from_slice(&text)
        .map_err(|_| "the self-test ended without an answer".to_owned())?;
    outcome.map_err(|error| format!("KVM does not work: {error}"))
}

/// Ends the child without waiting for it here.
fn end(child: Child) {
    let _ = child.kill(libc::SIGKILL);
    if child.try_wait().is_ok_and(|status| status.is_some()) {
        return;
    }
    // Whoever started it must fetch its status some time; that may be never.
    let builder = std::thread::Builder::new().name("self-test".to_owned()).stack_size(32 << 10);
    let _ = builder.spawn(move || child.wait_blocking());
}

/// Everything up to the end of the pipe, or `TimedOut`.
fn read_until(pipe: &mut io::PipeReader, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: i64::from(rest.subsec_nanos()) };
        let mut polled = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let mut buffer = [0; 512];
        match pipe.read(&mut buffer)? {
            0 => return Ok(text),
            length => text.extend(&buffer[..length]),
        }
    }
}

/// Whether this host is itself a guest of QEMU's TCG.
fn is_emulated() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
        let name: Vec<u8> =
            [leaf.ebx, leaf.ecx, leaf.edx].iter().flat_map(|part| part.to_le_bytes()).collect();
        name == *b"TCGTCGTCGTCG"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Plays the role `kvm-self-test`; gives the exit code.
pub fn self_test_main() -> i32 {
    let answer: Result<Outcome, String> = kvm_test::run().map_err(|error| error.to_string());
    match serde_json::to_vec(&answer) {
        Ok(text) => i32::from(io::stdout().write_all(&text).is_err()),
        Err(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Verdict {
        Verdict { accelerator: Accelerator::Tcg, reason: "tried".to_owned(), tsc_khz: 7 }
    }

    #[test]
    fn kvm_must_be_nearly_as_fast_as_the_processor() {
        assert_eq!(judge(1000, 1000).0, Accelerator::Kvm);
        assert_eq!(judge(1000, 3000).0, Accelerator::Kvm);
        assert_eq!(judge(1000, 4000).0, Accelerator::Tcg);
        assert_eq!(judge(0, 0).0, Accelerator::Tcg);
    }

    #[test]
    fn a_verdict_is_kept_until_the_host_boots_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path().join("new/host.json");
        assert_eq!(kept(&cache, "boot"), None);
        keep(&cache, &Kept { boot_id: "boot".to_owned(), verdict: sample() }).unwrap();
        assert_eq!(kept(&cache, "boot"), Some(sample()));
        assert_eq!(kept(&cache, "another"), None);
        assert_eq!(std::fs::read_dir(cache.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_record_is_as_good_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let cache = directory.path().join("host.json");
        std::fs::write(&cache, "{\"boot_id\":").unwrap();
        assert_eq!(kept(&cache, "boot"), None);
    }

    #[test]
    fn the_configuration_has_the_last_word_and_the_reason_says_so() {
        let verdict = forced(sample(), Accelerator::Kvm);
        assert_eq!(verdict.accelerator, Accelerator::Kvm);
        assert_eq!(verdict.tsc_khz, 7);
        assert!(verdict.reason.contains("tried"));
    }
}
