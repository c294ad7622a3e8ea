//! Lines from a QEMU that was taken over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kata_hypervisor::fuzzing::qmp(bytes));
