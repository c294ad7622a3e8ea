//! Annotations, which come from whoever may create a pod: `name=value` lines.
#![no_main]

use std::collections::BTreeMap;

use kata_config::Places;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let annotations: BTreeMap<String, String> = pairs
        .map(|(name, value)| (format!("io.katacontainers.config.{name}"), value.to_owned()))
        .collect();
    let Ok(mut config) = kata_config::load_from(None, &Places::default()) else { return };
    let _ = config.annotate(&annotations);
});
