//! What the guest writes on its console: nothing that moves a cursor or forges a line is shown.
//! And the notes of a kernel's file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for line in kata_hypervisor::fuzzing::console(bytes) {
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
    kata_hypervisor::fuzzing::kernel_notes(bytes);
});
