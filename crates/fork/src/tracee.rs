//! A thread that is traced, and system calls in its name.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use libc::{c_long, c_uint, c_void};

use crate::error::{ForkError, step};

/// Registers of a stopped thread. `orig_rax` of -1: it is in no system call.
pub(crate) type Registers = libc::user_regs_struct;

/// Length of the instruction `syscall`.
const SYSCALL: u64 = 2;
/// Bytes of the extended state, more than any processor has.
const EXTENDED: usize = 16 << 10;
/// Number of the register set of the extended state (`NT_X86_XSTATE`, elf.h).
const NT_X86_XSTATE: usize = 0x202;
/// ptrace(2): the tracee's system call filters rest. Not in the C library's header.
const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;
/// What the kernel calls a signal set has so many bytes.
const SIGNAL_SET: usize = 8;
/// Codes by which the kernel says to itself that a system call is to be made again (errno.h of
/// the kernel): `ERESTARTSYS`, `ERESTARTNOINTR`, `ERESTARTNOHAND`, `ERESTART_RESTARTBLOCK`.
const RESTARTS: [i64; 4] = [-512, -513, -514, -516];

/// How long threads that were killed have, and how often that is looked at.
const DEATH_STEPS: u32 = 5000;
const DEATH_STEP: Duration = Duration::from_millis(1);

/// A thread that we trace, at a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tracee(pub i32);

/// A system call to make: its number and arguments.
pub(crate) struct Call(pub c_long, pub [u64; 6]);

impl Call {
    pub(crate) fn new<const N: usize>(number: c_long, arguments: [u64; N]) -> Self {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&arguments);
        Self(number, all)
    }
}

impl Tracee {
    /// Begins to trace a thread that runs, and stops it. What it clones is traced from birth.
    pub(crate) fn seize(tid: i32) -> Result<Self, ForkError> {
        let options = (libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL) as usize;
        let this = Self(tid);
        let seized = this.request(libc::PTRACE_SEIZE, 0, options | PTRACE_O_SUSPEND_SECCOMP);
        seized.map_err(step("trace a thread", tid))?;
        this.request(libc::PTRACE_INTERRUPT, 0, 0).map_err(step("stop a thread", tid))?;
        this.stopped()?;
        Ok(this)
    }

    /// A ptrace request whose data is a number.
    fn request(self, request: c_uint, address: usize, data: usize) -> io::Result<()> {
        // SAFETY: requests that read or write our memory go by way of `with_data`; the others
        // act on the tracee alone.
        match unsafe { libc::ptrace(request, self.0, address, data) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// A ptrace request that reads or writes a `T`.
    fn with_data<T>(self, request: c_uint, address: usize, data: &mut T) -> io::Result<()> {
        let data: *mut c_void = std::ptr::from_mut(data).cast();
        // SAFETY: who calls chooses the request that has a `T` there, which lives as long.
        match unsafe { libc::ptrace(request, self.0, address, data) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Waits until it stops; gives the event it stopped for, if there was one.
    pub(crate) fn stopped(self) -> Result<i32, ForkError> {
        let mut status = 0;
        // SAFETY: writes the status, and nothing else.
        while unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(step("wait for a thread", self.0)(error));
            }
        }
        match libc::WIFSTOPPED(status) {
            true => Ok(status >> 16),
            false => Err(ForkError::Ended(self.0)),
        }
    }

    /// Whether it has not ended. What it stopped for is not of interest any more.
    pub(crate) fn lives(self) -> bool {
        let mut status = 0;
        // SAFETY: writes the status, and nothing else.
        match unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL | libc::WNOHANG) } {
            0 => true,
            -1 => false,
            _ => libc::WIFSTOPPED(status),
        }
    }

    pub(crate) fn registers(self) -> Result<Registers, ForkError> {
        // SAFETY: all zero bytes are valid registers.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        self.with_data(libc::PTRACE_GETREGS, 0, &mut registers)
            .map_err(step("read the registers", self.0))?;
        Ok(registers)
    }

    pub(crate) fn set_registers(self, mut registers: Registers) -> Result<(), ForkError> {
        self.with_data(libc::PTRACE_SETREGS, 0, &mut registers)
            .map_err(step("set the registers", self.0))
    }

    /// Floating point and vector registers, as XSAVE has them.
    pub(crate) fn extended(self) -> Result<Vec<u8>, ForkError> {
        let mut state = vec![0; EXTENDED];
        let mut buffer = libc::iovec { iov_base: state.as_mut_ptr().cast(), iov_len: state.len() };
        self.with_data(libc::PTRACE_GETREGSET, NT_X86_XSTATE, &mut buffer)
            .map_err(step("read the vector registers", self.0))?;
        state.truncate(buffer.iov_len);
        Ok(state)
    }

    pub(crate) fn set_extended(self, state: &[u8]) -> Result<(), ForkError> {
        // The kernel only reads it.
        let base = state.as_ptr().cast_mut().cast();
        let mut buffer = libc::iovec { iov_base: base, iov_len: state.len() };
        self.with_data(libc::PTRACE_SETREGSET, NT_X86_XSTATE, &mut buffer)
            .map_err(step("set the vector registers", self.0))
    }

    pub(crate) fn blocked_signals(self) -> Result<u64, ForkError> {
        let mut mask = 0u64;
        self.with_data(libc::PTRACE_GETSIGMASK, SIGNAL_SET, &mut mask)
            .map_err(step("read the blocked signals", self.0))?;
        Ok(mask)
    }

    pub(crate) fn block_signals(self, mut mask: u64) -> Result<(), ForkError> {
        self.with_data(libc::PTRACE_SETSIGMASK, SIGNAL_SET, &mut mask)
            .map_err(step("set the blocked signals", self.0))
    }

    /// Where the C library has its restartable sequences, if it has.
    pub(crate) fn sequences(self) -> Result<libc::ptrace_rseq_configuration, ForkError> {
        // SAFETY: all zero bytes are a valid configuration.
        let mut found: libc::ptrace_rseq_configuration = unsafe { std::mem::zeroed() };
        self.with_data(libc::PTRACE_GET_RSEQ_CONFIGURATION, size_of_val(&found), &mut found)
            .map_err(step("read the restartable sequences", self.0))?;
        Ok(found)
    }

    /// Lets it run, and forgets it.
    pub(crate) fn release(self) -> Result<(), ForkError> {
        self.request(libc::PTRACE_DETACH, 0, 0).map_err(step("let a thread run", self.0))
    }

    /// Makes a system call in the thread's name, which must return no error. `at`: registers of a
    /// thread that stopped in a system call, so that the instruction is known; they are not
    /// put back.
    pub(crate) fn ask(
        self,
        what: &'static str,
        at: &Registers,
        call: Call,
    ) -> Result<u64, ForkError> {
        self.set_up(at, call)?;
        self.run()?;
        self.answer(what)
    }

    /// What a system call returned.
    fn answer(self, what: &'static str) -> Result<u64, ForkError> {
        let answer = self.registers()?.rax.cast_signed();
        u64::try_from(answer).map_err(|_| {
            let number = i32::try_from(-answer).unwrap_or(libc::EIO);
            step(what, self.0)(io::Error::from_raw_os_error(number))
        })
    }

    /// Makes the system call `clone3` in the thread's name. Gives the newborn, stopped, and by
    /// which number the thread knows it.
    pub(crate) fn bear(
        self,
        what: &'static str,
        at: &Registers,
        call: Call,
    ) -> Result<(Self, i32), ForkError> {
        self.set_up(at, call)?;
        if self.run()? != libc::PTRACE_EVENT_CLONE {
            self.answer(what)?;
            return Err(ForkError::Unfit {
                pid: self.0,
                what: "its children go untraced".to_owned(),
            });
        }
        let mut tid: libc::c_ulong = 0;
        self.with_data(libc::PTRACE_GETEVENTMSG, 0, &mut tid).map_err(step(what, self.0))?;
        let born = Self(i32::try_from(tid).unwrap_or_default());
        born.stopped()?;
        // To the end of the system call.
        self.run()?;
        Ok((born, i32::try_from(self.answer(what)?).unwrap_or_default()))
    }

    fn set_up(self, at: &Registers, Call(number, arguments): Call) -> Result<(), ForkError> {
        let mut registers = *at;
        registers.rip = at.rip - SYSCALL;
        registers.rax = number.cast_unsigned();
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] =
            arguments;
        self.set_registers(registers)
    }

    /// One instruction; gives the event that it stopped for, if that was another.
    fn run(self) -> Result<i32, ForkError> {
        self.request(libc::PTRACE_SINGLESTEP, 0, 0).map_err(step("run a system call", self.0))?;
        self.stopped()
    }

    /// What it has in memory.
    pub(crate) fn memory(self) -> Result<Memory, ForkError> {
        let path = format!("/proc/{}/mem", self.0);
        let file = File::options().read(true).write(true).open(path);
        Ok(Memory { pid: self.0, file: file.map_err(step("open the memory", self.0))? })
    }
}

/// Takes note of the end of threads that were killed: each stays until its tracer has. The last
/// one of a PID namespace's first process ends when all the others are gone, whichever it is,
/// so none can be waited for alone.
pub(crate) fn take_note(tracees: &[Tracee]) {
    let mut left = tracees.to_vec();
    for _ in 0..DEATH_STEPS {
        left.retain(|tracee| tracee.lives());
        if left.is_empty() {
            return;
        }
        std::thread::sleep(DEATH_STEP);
    }
}

/// Whether a thread that stopped was in a system call.
pub(crate) fn waits(registers: &Registers) -> bool {
    registers.orig_rax.cast_signed() >= 0
}

/// Registers with which a thread that stopped in a system call makes it again.
pub(crate) fn again(mut registers: Registers) -> Registers {
    if waits(&registers) && RESTARTS.contains(&registers.rax.cast_signed()) {
        registers.rax = registers.orig_rax;
        registers.rip -= SYSCALL;
    }
    registers.orig_rax = u64::MAX;
    registers
}

/// The memory of a process that stands still.
pub(crate) struct Memory {
    pid: i32,
    file: File,
}

impl Memory {
    pub(crate) fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), ForkError> {
        self.file.read_exact_at(bytes, at).map_err(step("read the memory", self.pid))
    }

    pub(crate) fn read_word(&self, at: u64) -> Result<u64, ForkError> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), ForkError> {
        self.file.write_all_at(bytes, at).map_err(step("write the memory", self.pid))
    }

    pub(crate) fn write_words(&self, at: u64, words: &[u64]) -> Result<(), ForkError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.write(at, &bytes)
    }
}
