//! Image archives, and layers unpacked from them, as `kata-ctl run` is given them.
#![no_main]
#![allow(dead_code)]

#[path = "../../crates/cli/src/image/mod.rs"]
mod image;

use std::path::{Path, PathBuf};

use image::Source;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let place = Place::new();
    let archive = place.0.join("image.tar");
    if std::fs::write(&archive, bytes).is_ok() {
        let _ = Source::open(&archive);
    }
    let root = place.0.join("root");
    if std::fs::create_dir(&root).is_ok() {
        let _ = image::fuzz_layer(bytes, &root);
    }
    let outside = std::fs::read_dir(&place.0).map_or(0, |entries| entries.count());
    assert_eq!(outside, 2, "a layer wrote outside of its root");
});

/// A directory in memory, gone with the value.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        let path = Path::new("/dev/shm").join(format!("kata-fuzz-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        let _ = std::fs::create_dir(&path);
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
