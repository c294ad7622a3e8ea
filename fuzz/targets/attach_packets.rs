//! Packets between the sandbox's server and the processes that stand for containers'.
#![no_main]

use kata_shim::attach::{Hello, ToServer, ToStandIn};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = serde_json::from_slice::<Hello>(bytes);
    let _ = serde_json::from_slice::<ToServer>(bytes);
    let _ = serde_json::from_slice::<ToStandIn>(bytes);
    // Options of a create call, and ids in any call.
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = text.parse::<kata_protocol::Id>();
    }
});
