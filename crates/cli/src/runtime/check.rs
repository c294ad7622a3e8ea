//! `kata-check`: can this host run containers in virtual machines, and what is missing.

use super::Call;
use anyhow::Result;
use kata_config::{Accelerator, Channel, SandboxConfig};
use kata_hypervisor::{
    AcceleratorChoice, VHOST_VSOCK, accelerator, find_firmware, vsock_available,
};
use std::io;
use std::path::Path;

/// One line of the report.
struct Finding {
    what: &'static str,
    found: Result<String, String>,
    /// Without it nothing runs.
    needed: bool,
}

/// `kata-check`.
pub fn check(call: &Call) -> Result<u8> {
    kata_check(call.global.config.as_deref())
}

/// Prints what was found; 1 when something that is needed is missing.
///
/// # Errors
/// The configuration cannot be read.
pub fn kata_check(config: Option<&Path>) -> Result<u8> {
    let config = kata_config::load(config)?;
    for warning in &config.warnings {
        println!("warning   configuration: {warning}");
    }
    let mut able = true;
    for Finding { what, found, needed } in findings(&config) {
        match found {
            Ok(text) => println!("ok        {what}: {text}"),
            Err(text) if needed => {
                able = false;
                println!("missing   {what}: {text}");
            }
            Err(text) => println!("without   {what}: {text}"),
        }
    }
    println!();
    if able {
        println!("System can run containers in virtual machines");
    } else {
        println!("System cannot run containers in virtual machines: see what is missing above");
    }
    Ok(u8::from(!able))
}

fn findings(config: &SandboxConfig) -> Vec<Finding> {
    let hypervisor = &config.hypervisor;
    let verdict = accelerator::choose(match hypervisor.accelerator {
        Accelerator::Auto => AcceleratorChoice::Auto,
        Accelerator::Kvm => AcceleratorChoice::Kvm,
        Accelerator::Tcg => AcceleratorChoice::Tcg,
    });
    let file = |what, path: &Path, remedy: &str, needed| Finding {
        what,
        found: match std::fs::metadata(path) {
            Ok(_) => Ok(path.display().to_string()),
            Err(error) => Err(format!("{}: {error}; {remedy}", path.display())),
        },
        needed,
    };
    vec![
        Finding { what: "accelerator", found: Ok(verdict.to_string()), needed: true },
        file("hypervisor", &hypervisor.path, "apt-get install qemu-system-x86", true),
        file(
            "guest kernel",
            &hypervisor.kernel,
            "make install, or set kernel in configuration.toml",
            true,
        ),
        file(
            "guest initramfs",
            &hypervisor.initrd,
            "make install, or set initrd in configuration.toml",
            true,
        ),
        Finding {
            what: "firmware",
            found: find_firmware(kata_hypervisor::Machine::Q35)
                .map(|path| path.display().to_string())
                .ok_or_else(|| "no qboot.rom: the machine starts a little slower".to_owned()),
            needed: false,
        },
        file("tap devices", Path::new("/dev/net/tun"), "modprobe tun", true),
        channel(hypervisor.channel, vsock_available()),
        Finding {
            what: "control groups",
            found: kata_cgroups::Hierarchy::detect()
                .map(|hierarchy| match hierarchy {
                    kata_cgroups::Hierarchy::V2 { .. } => "version 2".to_owned(),
                    _ => "version 1".to_owned(),
                })
                .map_err(|error| error.to_string()),
            needed: true,
        },
    ]
}

/// By what the agent will be reached.
fn channel(wanted: Channel, vsock: io::Result<()>) -> Finding {
    let found = match (wanted, vsock) {
        (Channel::Serial, _) => Ok("a serial port, as the configuration says".to_owned()),
        (_, Ok(())) => Ok(format!("vsock ({VHOST_VSOCK})")),
        (Channel::Auto, Err(error)) => {
            Ok(format!("a serial port (no vsock: {VHOST_VSOCK}: {error})"))
        }
        (Channel::Vsock, Err(error)) => {
            Err(format!("{VHOST_VSOCK}: {error}; modprobe vhost_vsock, or say channel = \"auto\""))
        }
    };
    Finding { what: "agent channel", found, needed: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_vsock_is_able_unless_the_configuration_wants_vsock() {
        let none = || Err(io::ErrorKind::NotFound.into());
        assert!(channel(Channel::Auto, none()).found.unwrap().contains("a serial port (no vsock"));
        assert!(channel(Channel::Auto, Ok(())).found.unwrap().starts_with("vsock"));
        assert!(channel(Channel::Serial, none()).found.is_ok());
        assert!(channel(Channel::Vsock, none()).found.unwrap_err().contains("modprobe"));
    }
}
