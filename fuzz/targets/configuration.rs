//! Any text as `configuration.toml`.
#![no_main]

use std::path::PathBuf;

use kata_config::Places;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let file = PathBuf::from(format!("/dev/shm/kata-fuzz-{}.toml", std::process::id()));
    if std::fs::write(&file, text).is_ok() {
        let _ = kata_config::load_from(Some(&file), &Places::default());
        let _ = std::fs::remove_file(&file);
    }
});
