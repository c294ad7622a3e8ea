//! The guest's console, which the host shows where the guest is at fault.
//!
//! To open a terminal is five hundred blocks of code, and most guests say nothing. So the kernel
//! finds a plain file by the name of the console when it starts us, and then standard error is
//! the console without being open ([`keep`]); whoever has something to say opens it ([`say`]),
//! also a child of ours in a container's namespaces.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, stderr};

/// Standard error, wherever it leads.
const STDERR: &str = "/proc/self/fd/2";

/// Makes the terminal at `path` what [`say`] opens.
///
/// # Errors
/// When it is not there.
pub fn keep(path: &Path) -> io::Result<()> {
    Ok(dup2_stderr(open(path, OFlags::PATH, Mode::empty())?)?)
}

/// Opens the console where nothing is mounted yet.
///
/// # Errors
/// When there is none, or nowhere to name it.
pub fn open_early() -> io::Result<()> {
    const NODE: &str = "/console";
    mknodat(CWD, NODE, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(5, 1))?;
    open_as_stderr(NODE)
}

/// Says this, to the end. Nobody can be told about a console that does not take it.
pub fn say(text: &str) {
    let said = say_all(text.as_bytes());
    if let Err(Errno::BADF) = said
        && open_as_stderr(STDERR).is_ok()
    {
        let _ = say_all(text.as_bytes());
    }
}

fn open_as_stderr(path: &str) -> io::Result<()> {
    Ok(dup2_stderr(open(path, OFlags::WRONLY | OFlags::NOCTTY, Mode::empty())?)?)
}

fn say_all(mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(stderr().as_fd(), bytes))?;
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// Says why this process panics. To be called before it has threads.
pub fn say_panics() {
    std::panic::set_hook(Box::new(|panic| say(&format!("kata-agent: {panic}\n"))));
}
