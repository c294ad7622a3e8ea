//! A profile compiles or is refused.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(spec) = kata_oci::Spec::parse(bytes) else { return };
    if let Some(profile) = spec.linux.and_then(|linux| linux.seccomp) {
        let _ = kata_agent::container::fuzz_seccomp(&profile);
    }
});
