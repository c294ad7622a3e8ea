//! NICs and disks are plugged into a running machine. QEMU gets every descriptor handed over;
//! what was made for a device that is refused is taken back.

use std::os::fd::{AsFd, BorrowedFd};

use serde_json::{Map, json};

use super::args::{port_name, vhost_net};
use super::qmp::{AddFd, BlockdevAdd, BlockdevDel, Closefd, DeviceAdd, Getfd, NetdevAddTap};
use super::qmp::{NetdevDel, RemoveFd};
use super::{Backend, COMMAND, Plugged, Qemu};
use crate::DeviceId;
use crate::config::{Disk, Nic};
use crate::error::HypervisorError;

impl Qemu {
    pub(super) async fn plug_nic(&mut self, nic: Nic) -> Result<DeviceId, HypervisorError> {
        self.up().await?;
        let running = self.running()?;
        let (port, number) = running.reserve()?;
        let id = format!("plugged{number}");
        let qmp = running.qmp.clone();

        let device = vhost_net(running.vhost_net);
        self.add_tap(&id, nic.tap.as_fd(), device.as_ref().map(AsFd::as_fd)).await?;
        let properties = Map::from_iter([
            ("netdev".to_owned(), json!(id)),
            ("mac".to_owned(), json!(nic.mac.to_string())),
            ("romfile".to_owned(), json!("")),
        ]);
        let bus = port_name(port as u32);
        let device = DeviceAdd { driver: "virtio-net-pci", id: id.clone(), bus, properties };
        if let Err(error) = self.ask("plug a network interface", &device).await {
            let _ = qmp.call(&NetdevDel { id }, COMMAND).await;
            return Err(error);
        }
        let id = DeviceId(id);
        self.running()?.ports[port] = Some(Plugged { id: id.clone(), backend: Backend::Tap });
        Ok(id)
    }

    pub(super) async fn plug_disk(&mut self, disk: Disk) -> Result<DeviceId, HypervisorError> {
        if disk.serial.is_empty()
            || disk.serial.len() > 20
            || !disk.serial.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return Err(HypervisorError::Config("a disk's serial has 1 to 20 letters and digits"));
        }
        self.up().await?;
        let running = self.running()?;
        let (port, fdset) = running.reserve()?;
        let id = format!("plugged{fdset}");
        let qmp = running.qmp.clone();

        let add = AddFd { fdset_id: fdset };
        let answer = qmp.call_with_fd(&add, Some(disk.file.as_fd()), COMMAND).await;
        self.explain("hand qemu a disk", answer).await?;
        let node = BlockdevAdd {
            driver: "raw",
            node_name: id.clone(),
            read_only: disk.readonly,
            file: json!({
                "driver": if disk.is_file { "file" } else { "host_device" },
                "filename": format!("/dev/fdset/{fdset}"),
            }),
        };
        if let Err(error) = self.ask("open a disk", &node).await {
            let _ = qmp.call(&RemoveFd { fdset_id: fdset }, COMMAND).await;
            return Err(error);
        }
        let properties = Map::from_iter([
            ("drive".to_owned(), json!(id)),
            ("serial".to_owned(), json!(disk.serial)),
        ]);
        let bus = port_name(port as u32);
        let device = DeviceAdd { driver: "virtio-blk-pci", id: id.clone(), bus, properties };
        if let Err(error) = self.ask("plug a disk", &device).await {
            let _ = qmp.call(&BlockdevDel { node_name: id }, COMMAND).await;
            let _ = qmp.call(&RemoveFd { fdset_id: fdset }, COMMAND).await;
            return Err(error);
        }
        let id = DeviceId(id);
        let backend = Backend::Disk { fdset };
        self.running()?.ports[port] = Some(Plugged { id: id.clone(), backend });
        Ok(id)
    }

    /// Makes the host's end of a NIC: `id` is its name, and those of the descriptors.
    async fn add_tap(
        &mut self,
        id: &str,
        tap: BorrowedFd<'_>,
        vhost: Option<BorrowedFd<'_>>,
    ) -> Result<(), HypervisorError> {
        let qmp = self.running()?.qmp.clone();
        let names = [Some(id.to_owned()), vhost.map(|_| format!("{id}-vhost"))];
        for (name, fd) in names.iter().zip([Some(tap), vhost]) {
            let (Some(name), Some(fd)) = (name, fd) else { continue };
            let answer = qmp.call_with_fd(&Getfd { fdname: name.clone() }, Some(fd), COMMAND).await;
            self.explain("hand qemu a tap or vhost-net", answer).await?;
        }
        let [fd, vhostfd] = names.clone();
        let netdev = NetdevAddTap {
            kind: "tap",
            id: id.to_owned(),
            fd: fd.unwrap_or_default(),
            vhost: vhostfd.is_some(),
            vhostfd,
        };
        let made = self.ask("make a network interface", &netdev).await.map(drop);
        if made.is_err() {
            for fdname in names.into_iter().flatten() {
                let _ = qmp.call(&Closefd { fdname }, COMMAND).await;
            }
        }
        made
    }
}
