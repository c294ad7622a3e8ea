//! The machine grows when the limits of its containers do.
//!
//! Its first size is decided before it starts (`kata_config::Sizing`). Limits that rise above
//! it, by an update or by a pod's further container, are met by adding memory and virtual
//! CPUs, as far as the monitor and the configuration allow. What cannot be added is logged
//! and no error: the limits in the guest are what the engine asked for all the same.

use crate::SandboxError;
use crate::container::Container;
use crate::machine::Machine;
use crate::process::{ProcessStatus, lock};
use crate::sandbox::Sandbox;
use kata_config::{Limits, Sizing};
use kata_hypervisor::{Hypervisor, Size};
use kata_oci::Resources;
use kata_protocol::{Id, chain};
use std::sync::Arc;

impl Sandbox {
    /// Makes the machine large enough for its living containers, `container` with these
    /// resources among them.
    pub(crate) async fn make_room(
        &self,
        machine: &Machine,
        container: &Id,
        resources: Option<&Resources>,
    ) {
        let others: Vec<_> = lock(&self.containers).values().cloned().collect();
        let counts = |other: &&Arc<Container>| {
            other.in_guest
                && other.id != *container
                && !matches!(other.init.status(), ProcessStatus::Exited(_))
        };
        let mut limits: Vec<Limits> =
            others.iter().filter(counts).map(|other| other.limits()).collect();
        limits.push(Limits::of_container(resources));
        machine.grow(&limits).await;
    }
}

impl Machine {
    async fn grow(&self, limits: &[Limits]) {
        let (memory_mib, vcpus) = Sizing::for_containers(limits);
        let wanted = Size { memory_mib, vcpus };
        let (before, resized, after, keeps_back) = {
            let mut hypervisor = self.hypervisor().lock().await;
            let before = hypervisor.size();
            let resized = hypervisor.resize(wanted).await;
            let keeps_back = hypervisor.capabilities().keeps_memory_back;
            (before, resized, hypervisor.size(), keeps_back)
        };
        let sandbox = self.sandbox();
        if let Err(error) = resized {
            tracing::warn!(%sandbox, error = %chain(&error), "the virtual machine could not grow");
        } else if after.memory_mib < memory_mib || after.vcpus < vcpus {
            tracing::warn!(%sandbox, ?wanted, has = ?after,
                "limits are above what the virtual machine can become");
        }
        if after == before {
            return;
        }
        if let Err(error) = self.make_use_of(before, after, keeps_back).await {
            tracing::warn!(%sandbox, error = %error.text(),
                "the guest does not use all that the virtual machine got");
        }
        tracing::info!(%sandbox, "the virtual machine grew from {} MiB and {} vCPUs to {} MiB and {} vCPUs",
            before.memory_mib, before.vcpus, after.memory_mib, after.vcpus);
    }

    /// The guest's kernel uses memory as it comes, but no processor before it is told to, and no
    /// memory that it was told to keep off.
    async fn make_use_of(
        &self,
        before: Size,
        after: Size,
        keeps_back: bool,
    ) -> Result<(), SandboxError> {
        let kept_back = if keeps_back { after.memory_mib - before.memory_mib } else { 0 };
        if after.vcpus == before.vcpus && kept_back == 0 {
            return Ok(());
        }
        self.call(self.agent().grow(after.vcpus, kept_back)).await
    }
}

/// The limits of `now` after an update: what that does not name stays.
pub(crate) fn updated(now: &Resources, update: &Resources) -> Resources {
    let mut merged = now.clone();
    if let Some(limit) = update.memory.as_ref().and_then(|memory| memory.limit) {
        merged.memory.get_or_insert_default().limit = Some(limit);
    }
    if let Some(cpu) = &update.cpu {
        let mine = merged.cpu.get_or_insert_default();
        mine.quota = cpu.quota.or(mine.quota);
        mine.period = cpu.period.or(mine.period);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> Resources {
        Resources::parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_an_update_does_not_name_stays() {
        let now = resources(r#"{"memory":{"limit":1048576},"cpu":{"quota":50000,"period":10000}}"#);
        let limits = |update: &str| Limits::of_container(Some(&updated(&now, &resources(update))));
        let before = Limits { memory: Some(1 << 20), millicpus: Some(5000), pod: false };
        assert_eq!(limits("{}"), before);
        assert_eq!(limits(r#"{"memory":{"swap":-1},"cpu":{"shares":2}}"#), before);
        assert_eq!(limits(r#"{"memory":{"limit":-1}}"#), Limits { memory: None, ..before });
        let cpu = |millicpus| Limits { millicpus, ..before };
        assert_eq!(limits(r#"{"cpu":{"quota":20000}}"#), cpu(Some(2000)));
        assert_eq!(limits(r#"{"cpu":{"period":100000}}"#), cpu(Some(500)));
        assert_eq!(limits(r#"{"cpu":{"quota":-1}}"#), cpu(None));
    }
}
