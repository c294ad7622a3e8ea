//! The end of a terminal.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;

use kata_channel::read_terminal;
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

fn terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
    let flags = rustix::fs::fcntl_getfl(&master).unwrap();
    rustix::fs::fcntl_setfl(&master, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    (master, slave)
}

/// The kernel says `EIO` too soon once in some 50,000 times: a short run shows it rarely, the
/// many that this project has show it.
#[test]
fn what_comes_as_the_other_end_closes_is_read() {
    let (slaves, ends) = mpsc::sync_channel::<OwnedFd>(0);
    let writer = thread::spawn(move || {
        for (round, slave) in ends.into_iter().enumerate() {
            // Ever later, so that the reader is met at every point of its way.
            (0..round % 997).for_each(|_| std::hint::spin_loop());
            rustix::io::write(&slave, b"hello\n").unwrap();
        }
    });
    for round in 0..10_000 {
        let (master, slave) = terminal();
        slaves.send(slave).unwrap();
        let (mut buffer, mut read) = ([0; 64], Vec::new());
        loop {
            match read_terminal(&master, &mut buffer) {
                Ok(0) => break,
                Ok(count) => read.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN) => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(read, b"hello\r\n", "round {round}");
    }
    drop(slaves);
    writer.join().unwrap();
}
