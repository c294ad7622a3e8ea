//! The terminal of a process: a pty of the container's own devpts.

use super::failure::{Context, Failure, Step};
use super::inside::{Inside, proc_path};
use super::mounts::is_devpts;
use super::wire::{Channel, ToAgent};
use nix::mount::{MsFlags, mount};
use rustix::fs::{OFlags, fstat, makedev};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Opens a pty, sends its master to the agent, and gives its slave. With `console` the
/// slave is also the container's `/dev/console`.
pub(super) fn open(
    inside: &Inside,
    size: Option<(u16, u16)>,
    console: bool,
    channel: &Channel,
) -> Step<OwnedFd> {
    let master = inside
        .open(Path::new("/dev/ptmx"), OFlags::RDWR | OFlags::NOCTTY)
        .context(|| "open /dev/ptmx of the container")?;
    let stat = fstat(&master).context(|| "look at /dev/ptmx")?;
    if stat.st_rdev != makedev(5, 2) || !is_devpts(master.as_fd()) {
        return Err(Failure::setup(
            "/dev/ptmx of the container is no pseudo-terminal: mount a devpts on /dev/pts",
        ));
    }
    unlockpt(&master).context(|| "unlock the terminal")?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).context(|| "open the terminal")?;
    if let Some((rows, columns)) = size.filter(|size| *size != (0, 0)) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&slave, size).context(|| "set the size of the terminal")?;
    }
    if console {
        bind_console(inside, &master, &slave)?;
    }
    channel.send(&ToAgent::Terminal, &[master.as_fd()]).context(|| "hand over the terminal")?;
    Ok(slave)
}

fn bind_console(inside: &Inside, master: &OwnedFd, slave: &OwnedFd) -> Step {
    let what = || "bind the terminal on /dev/console";
    let name = ptsname(master, Vec::new()).context(what)?;
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    let source = inside.handle(path).context(what)?;
    let (found, ours) = (fstat(&source).context(what)?, fstat(slave).context(what)?);
    if found.st_rdev != ours.st_rdev {
        return Err(Failure::setup(format!("{} is not the container's terminal", path.display())));
    }
    let target = inside.make_file(Path::new("/dev/console")).context(what)?;
    let none: Option<&str> = None;
    let (source, target) = (proc_path(source.as_fd()), proc_path(target.as_fd()));
    mount(Some(&source), &target, none, MsFlags::MS_BIND, none).context(what)
}
