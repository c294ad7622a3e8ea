//! Specifications, processes and resources, as engines hand them in, and what becomes of
//! them on the host: the plan of mounts, the cgroup.
#![no_main]

use kata_oci::Wire as _;
use std::path::Path;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = kata_oci::Process::parse(bytes);
    let _ = kata_oci::Resources::parse(bytes);
    let Ok(spec) = kata_oci::Spec::parse(bytes) else { return };
    let Ok(container) = "c1".parse() else { return };
    let (share, bundle) = (Path::new("c1.1"), Path::new("/nonexistent"));
    if let Ok(plan) = kata_storage::plan(&container, share, bundle, &spec, &[], None) {
        // What the guest gets is a specification again.
        let bytes = plan.spec.to_wire().unwrap_or_default();
        assert!(kata_oci::Spec::from_wire(&bytes).is_ok());
    }
    let path = spec.linux.and_then(|linux| linux.cgroups_path);
    if let Ok(path) = kata_cgroups::container_path(path.as_deref(), "c1") {
        assert!(path.starts_with('/') && !path.split('/').any(|part| part == ".."));
    }
});
