//! System call filters: the specification's profile compiled to the kernel's classic BPF.
//!
//! Meaning and quirks are runc's and libseccomp's, so that a profile does the same here:
//! * a rule whose action is the default one is left out; of several rules for one call an
//!   unconditional one wins, else the first that matches;
//! * a rule that names one argument twice means "or", else its conditions mean "and";
//! * 32-bit architectures (i386, x32) compare the lower half of an argument only;
//! * a call newer than every call the profile names gets `ENOSYS`, unless the default
//!   allows: a C library then falls back to an older call (runc's "patchbpf").
//!
//! Not done: rules for `socket` and the like do not reach i386's `socketcall`; profiles
//! name that call itself.

mod bpf;
mod calls;
mod compile;

use super::failure::{Context, Step};
use kata_oci::{Seccomp, SyscallArg};
use serde::{Deserialize, Serialize};
use std::io;

/// `SECCOMP_RET_*`.
const KILL_PROCESS: u32 = 0x8000_0000;
const KILL_THREAD: u32 = 0;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SeccompError {
    /// An action, operator or flag that the specification does not have.
    #[error("seccomp: {what} {name:?} is unknown")]
    Unknown {
        /// What it is.
        what: &'static str,
        /// As it was given.
        name: String,
    },
    /// A supervisor on the host cannot answer for a process in the VM.
    #[error(
        "seccomp: SCMP_ACT_NOTIFY is not supported: its listener is on the host, the process is \
         in the VM"
    )]
    Notify,
    /// An argument beyond the sixth.
    #[error("seccomp: argument index {0} is out of range: 0 to 5 are possible")]
    Argument(u32),
    /// A number that does not fit the action's 16 bits.
    #[error("seccomp: errnoRet {0} is out of range")]
    Errno(u32),
    /// More instructions than the kernel takes.
    #[error("seccomp: the profile compiles to {0} instructions, the kernel takes 4096")]
    TooLong(usize),
}

/// A compiled filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    flags: u32,
    program: bpf::Program,
}

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// `(argument & mask) == value`
    Masked(u64),
}

/// One comparison of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Condition {
    index: u8,
    operator: Operator,
    value: u64,
}

impl Filter {
    /// Compiles a profile.
    pub fn compile(profile: &Seccomp) -> Result<Self, SeccompError> {
        let mut flags = 0;
        for flag in &profile.flags {
            flags |= match flag.as_str() {
                "SECCOMP_FILTER_FLAG_TSYNC" => 1,
                "SECCOMP_FILTER_FLAG_LOG" => 2,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
                other => {
                    return Err(SeccompError::Unknown { what: "flag", name: other.to_owned() });
                }
            };
        }
        Ok(Self { flags, program: bpf::Program(compile::compile(profile)?) })
    }

    /// Puts the filter on this process, for good.
    pub fn install(&self) -> Step {
        const SET_MODE_FILTER: libc::c_uint = 1;
        let mut program: Vec<libc::sock_filter> = self.program.0.iter().map(|i| i.raw()).collect();
        let description = libc::sock_fprog {
            len: u16::try_from(program.len()).unwrap_or(u16::MAX),
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the description and the instructions it points to live through the call.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, self.flags, &raw const description)
        };
        let result = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        result.context(|| "unable to init seccomp: install the filter")
    }
}

/// The kernel's return value for an action.
fn action(name: &str, errno: Option<u32>) -> Result<u32, SeccompError> {
    let data = || {
        let errno = errno.unwrap_or(libc::EPERM.cast_unsigned());
        if errno > 0xffff { Err(SeccompError::Errno(errno)) } else { Ok(errno) }
    };
    Ok(match name {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_ERRNO" => ERRNO | data()?,
        "SCMP_ACT_TRACE" => TRACE | data()?,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_NOTIFY" => return Err(SeccompError::Notify),
        other => return Err(SeccompError::Unknown { what: "action", name: other.to_owned() }),
    })
}

impl Condition {
    fn read(argument: &SyscallArg) -> Result<Self, SeccompError> {
        let index = u8::try_from(argument.index)
            .ok()
            .filter(|index| *index < 6)
            .ok_or(SeccompError::Argument(argument.index))?;
        let (operator, value) = match argument.op.as_str() {
            "SCMP_CMP_EQ" => (Operator::Equal, argument.value),
            "SCMP_CMP_NE" => (Operator::NotEqual, argument.value),
            "SCMP_CMP_LT" => (Operator::Less, argument.value),
            "SCMP_CMP_LE" => (Operator::LessOrEqual, argument.value),
            "SCMP_CMP_GT" => (Operator::Greater, argument.value),
            "SCMP_CMP_GE" => (Operator::GreaterOrEqual, argument.value),
            "SCMP_CMP_MASKED_EQ" => (Operator::Masked(argument.value), argument.value_two),
            other => {
                return Err(SeccompError::Unknown { what: "operator", name: other.to_owned() });
            }
        };
        Ok(Self { index, operator, value })
    }
}
