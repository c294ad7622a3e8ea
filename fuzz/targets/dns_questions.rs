//! The stream on which the guest asks for names, and the engine's resolv.conf.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    let questions = runtime.block_on(kata_network::fuzz_questions(bytes));
    assert!(questions <= bytes.len() / 6);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let found = kata_network::loopback_nameserver(text);
        assert!(found.is_none_or(|address| address.is_loopback()));
    }
});
