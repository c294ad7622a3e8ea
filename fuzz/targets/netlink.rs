//! Answers of netlink, of which some parts are named by whoever made an interface.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    kata_netlink::fuzzing::datagram(bytes);
});
