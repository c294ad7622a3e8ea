//! A header that decodes encodes to the same bytes.
#![no_main]

use kata_protocol::StreamHeader;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok((header, taken)) = StreamHeader::decode(bytes) {
        assert!(taken <= StreamHeader::MAX);
        assert_eq!(header.encode(), &bytes[..taken]);
    }
});
