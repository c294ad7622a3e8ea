//! Makes the guest this sandbox: clock, entropy, host name, processors.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use kata_protocol::agent::ConnectRequest;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::AgentError;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// Most entropy taken at once, bytes.
const ENTROPY: usize = 512;
/// Most processors that are looked for.
const CPUS: u32 = 1024;

/// Takes over what the host says of the machine.
///
/// # Errors
/// When the kernel refuses; it does not to PID 1.
pub fn adopt(request: &ConnectRequest) -> Result<(), AgentError> {
    if request.realtime_ns > 0 {
        set_clock(request.realtime_ns).map_err(|e| AgentError::System("set the clock", e))?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy)
            .map_err(|e| AgentError::System("seed the random number generator", e))?;
    }
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes())
            .map_err(|e| AgentError::System("set the host name", e.into()))?;
    }
    if request.online_cpus > 1 {
        let count = request.online_cpus;
        // Each takes a fifth of a second where the processor is emulated.
        std::thread::spawn(move || online_cpus(count));
    }
    Ok(())
}

fn set_clock(realtime_ns: i64) -> io::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    let time = Timespec { tv_sec: realtime_ns / SECOND, tv_nsec: realtime_ns % SECOND };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; ENTROPY],
    }
    let device = fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    let size = bytes.len().min(ENTROPY);
    let mut pool = Pool { bits: size as i32 * 8, size: size as i32, bytes: [0; ENTROPY] };
    pool.bytes[..size].copy_from_slice(&bytes[..size]);
    // SAFETY: the kernel reads `size` bytes of `bytes`, which are there.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings processors online until `count` are, as far as they are there.
pub fn online_cpus(count: u32) {
    for cpu in 1..count.min(CPUS) {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        if fs::read_to_string(&path).is_ok_and(|text| text.trim_end() == "0")
            && let Err(error) = fs::write(&path, "1")
        {
            tracing::warn!(cpu, %error, "cannot bring a processor online");
        }
    }
}

/// Makes the allocator keep what it has. By default it gives the end of the heap back at
/// each chance, so that buffers of streams come with page faults, which are what costs
/// most where the processor is emulated. One arena is enough for one thread.
pub fn keep_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, 4 << 20),
        (libc::M_TRIM_THRESHOLD, 8 << 20),
    ] {
        // SAFETY: no pointers; called before there is a second thread. Refused, it stays as
        // it was.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// The kernel's release, as `uname -r` shows it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// `CLOCK_BOOTTIME`, nanoseconds. Asked by the C library, which has found the way to the clock when
/// the program started; rustix would look for it once more.
pub fn boottime_ns() -> i64 {
    // Linux always has this clock.
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |now| now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec()))
}
