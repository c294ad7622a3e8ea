//! NICs that no driver has taken.
//!
//! A machine into which nothing can be plugged has as many NICs as it may ever need, and most
//! are of no use to most guests. Our kernel leaves them alone when it boots (its parameter
//! `sleeping_nics`), which saves their start and keeps them out of everybody's sight; one is
//! woken when there is an interface for it. They are in the order in which the host uses them.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most devices that are looked at.
const DEVICES: usize = 256;
/// What a network device is, on the bus of virtio ("Virtual I/O Device (VIRTIO)", section 5).
const NETWORK: &str = "0x0001";

/// Those that sleep, and how to wake them.
#[derive(Debug, Default)]
pub struct Sleeping {
    /// The bus of virtio in sysfs; none where the machine is not ours.
    bus: Option<PathBuf>,
    /// Not looked for yet, as long as it is none.
    nics: Option<VecDeque<String>>,
    woken: usize,
}

impl Sleeping {
    /// Of the machine that is all ours.
    pub fn of_guest() -> Self {
        Self { bus: Some("/sys/bus/virtio".into()), ..Self::default() }
    }

    /// Wakes NICs until `count` are, as far as there are so many.
    ///
    /// # Errors
    /// Those of [`Sleeping::wake_next`].
    pub(super) fn wake(&mut self, count: usize) -> io::Result<()> {
        while self.woken < count && self.wake_next()? {}
        Ok(())
    }

    /// Wakes the next one; false: there is none.
    ///
    /// # Errors
    /// When devices cannot be listed, or the driver does not take one.
    pub(super) fn wake_next(&mut self) -> io::Result<bool> {
        let Some(bus) = &self.bus else { return Ok(false) };
        let nics = match &mut self.nics {
            Some(nics) => nics,
            none => none.insert(find(bus)?),
        };
        let Some(nic) = nics.pop_front() else { return Ok(false) };
        fs::write(bus.join("drivers/virtio_net/bind"), nic)?;
        self.woken += 1;
        Ok(true)
    }
}

/// Names of NICs without a driver, in the order of their numbers.
fn find(bus: &Path) -> io::Result<VecDeque<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(bus.join("devices"))?.take(DEVICES) {
        let entry = entry?;
        let device = entry.path();
        let is_network = fs::read_to_string(device.join("device"))?.trim_end() == NETWORK;
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("virtio").and_then(|number| number.parse::<u32>().ok());
        if is_network && !device.join("driver").exists() {
            found.extend(number.map(|number| (number, name)));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nics_without_a_driver_are_woken_and_in_order() {
        let bus = tempfile::tempdir().unwrap();
        let driver = bus.path().join("drivers/virtio_net");
        fs::create_dir_all(&driver).unwrap();
        for (name, kind, awake) in [
            ("virtio10", NETWORK, false),
            ("virtio2", NETWORK, false),
            ("virtio3", NETWORK, true),
            ("virtio1", "0x0003", false),
        ] {
            let device = bus.path().join("devices").join(name);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("device"), format!("{kind}\n")).unwrap();
            if awake {
                std::os::unix::fs::symlink(&driver, device.join("driver")).unwrap();
            }
        }
        let mut sleeping = Sleeping { bus: Some(bus.path().to_owned()), ..Sleeping::default() };
        let bound = || fs::read_to_string(driver.join("bind")).unwrap();
        sleeping.wake(1).unwrap();
        assert_eq!(bound(), "virtio2");
        sleeping.wake(1).unwrap();
        assert_eq!(bound(), "virtio2");
        assert!(sleeping.wake_next().unwrap());
        assert_eq!(bound(), "virtio10");
        sleeping.wake(5).unwrap();
        assert!(!sleeping.wake_next().unwrap());
    }

    #[test]
    fn where_the_machine_is_not_ours_none_sleeps() {
        assert!(!Sleeping::default().wake_next().unwrap());
    }
}
