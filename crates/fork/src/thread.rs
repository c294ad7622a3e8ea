//! What a thread is made of.

use crate::error::{ForkError, step};
use crate::tracee::{Call, Memory, Registers, Tracee, again};

/// `PR_GET_TID_ADDRESS` of prctl(2), which the C library's header lacks.
const GET_TID_ADDRESS: u64 = 40;
/// `CLONE_*` of a thread as the C library makes it (clone(2)).
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_CHILD_CLEARTID;

/// A thread that stands still, and all that the kernel knows of it.
#[derive(Debug)]
pub(crate) struct Thread {
    pub tracee: Tracee,
    /// Its number in its own PID namespace.
    number: i32,
    pub registers: Registers,
    extended: Vec<u8>,
    blocked: u64,
    /// Head and length of the list of locks that the kernel lets go when it dies.
    robust: [u64; 2],
    /// Where the kernel writes a zero when it ends.
    tid_address: u64,
    /// Address, length and signature of its restartable sequences.
    sequences: [u64; 3],
}

impl Thread {
    /// Looks at a thread that has just been stopped while it waited. `scratch`: memory of its process that is free
    /// to be used.
    pub(crate) fn of(tracee: Tracee, scratch: u64, memory: &Memory) -> Result<Self, ForkError> {
        let registers = tracee.registers()?;
        let sequences = tracee.sequences()?;
        let where_to = Call::new(libc::SYS_prctl, [GET_TID_ADDRESS, scratch]);
        tracee.ask("find the thread's number in the memory", &registers, where_to)?;
        Ok(Self {
            tracee,
            number: number(tracee.0)?,
            registers,
            extended: tracee.extended()?,
            blocked: tracee.blocked_signals()?,
            robust: robust_list(tracee.0)?,
            tid_address: memory.read_word(scratch)?,
            sequences: [
                sequences.rseq_abi_pointer,
                sequences.rseq_abi_size.into(),
                sequences.signature.into(),
            ],
        })
    }

    /// What `clone3` makes a process of whose first thread is to be this one: `flags` of it.
    pub(crate) fn first_arguments(&self, flags: i32) -> CloneArguments {
        let flags = (flags | libc::CLONE_CHILD_CLEARTID) as u64;
        CloneArguments { flags, child_tid: self.tid_address, ..CloneArguments::default() }
    }

    /// What `clone3` makes this thread of in another process. `number_at` is where its number
    /// is written.
    pub(crate) fn arguments(&self, number_at: u64) -> CloneArguments {
        CloneArguments {
            flags: THREAD as u64,
            child_tid: self.tid_address,
            // Its registers are set later, so any place will do.
            stack: self.registers.rsp & !0xf,
            stack_size: 16,
            tls: self.registers.fs_base,
            set_tid: number_at,
            set_tid_size: 1,
        }
    }

    /// The number that a fork of it has to have.
    pub(crate) fn number(&self) -> i32 {
        self.number
    }

    /// Makes a newborn this thread, with these capabilities (arguments of capset(2)). It still
    /// stands.
    pub(crate) fn dress(&self, newborn: Tracee, kept: [u64; 2]) -> Result<(), ForkError> {
        let call = Call::new(libc::SYS_capset, kept);
        newborn.ask("drop privileges", &self.registers, call)?;
        let [head, length] = self.robust;
        let call = Call::new(libc::SYS_set_robust_list, [head, length]);
        newborn.ask("set the list of locks", &self.registers, call)?;
        let [address, length, signature] = self.sequences;
        // The first thread of a process inherits them.
        if address != 0 && newborn.sequences()?.rseq_abi_pointer == 0 {
            let call = Call::new(libc::SYS_rseq, [address, length, 0, signature]);
            newborn.ask("register the restartable sequences", &self.registers, call)?;
        }
        newborn.set_registers(again(self.registers))?;
        newborn.set_extended(&self.extended)?;
        newborn.block_signals(self.blocked)
    }
}

/// Arguments of clone3(2), its second version.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CloneArguments {
    flags: u64,
    child_tid: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
}

impl CloneArguments {
    /// As the kernel reads them.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let Self { flags, child_tid, stack, stack_size, tls, set_tid, set_tid_size } = *self;
        // A parent that never runs is not to be told of the end.
        let (pidfd, parent_tid, exit_signal) = (0, 0, 0);
        [flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls]
            .into_iter()
            .chain([set_tid, set_tid_size])
            .flat_map(u64::to_ne_bytes)
            .collect()
    }
}

/// The number of a thread in its own PID namespace.
fn number(tid: i32) -> Result<i32, ForkError> {
    let failed = step("read the number", tid);
    let status = match std::fs::read_to_string(format!("/proc/{tid}/status")) {
        Ok(status) => status,
        Err(error) => return Err(failed(error)),
    };
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let last = numbers.and_then(|numbers| numbers.split_ascii_whitespace().last());
    last.and_then(|number| number.parse().ok())
        .ok_or_else(|| failed(std::io::ErrorKind::InvalidData.into()))
}

fn robust_list(tid: i32) -> Result<[u64; 2], ForkError> {
    let [mut head, mut length] = [0u64; 2];
    // SAFETY: writes these two words.
    let asked =
        unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) };
    match asked {
        0 => Ok([head, length]),
        _ => Err(step("read the list of locks", tid)(std::io::Error::last_os_error())),
    }
}
