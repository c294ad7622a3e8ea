//! The host's end of the channel against a guest that says anything.
#![no_main]

use std::time::Duration;

use kata_channel::HostChannel;
use kata_protocol::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        let (ours, mut guests) = tokio::io::duplex(1 << 16);
        let channel = HostChannel::multiplexed(ours);
        let stream = channel.open(&StreamHeader::rpc()).await;
        let guest = async {
            guests.write_all(bytes).await.ok();
            let mut sink = vec![0; 4096];
            // What the host says is taken, so that it never waits for room.
            while let Ok(Ok(1..)) =
                tokio::time::timeout(Duration::from_millis(1), guests.read(&mut sink)).await
            {
            }
            drop(guests);
        };
        let host = async {
            if let Ok(mut stream) = stream {
                let mut heard = Vec::new();
                (&mut stream).take(1 << 20).read_to_end(&mut heard).await.ok();
            }
            channel.closed().await
        };
        // With the guest gone, the host must come to an end by itself.
        let both = async { tokio::join!(guest, host) };
        let ended = tokio::time::timeout(Duration::from_secs(5), both).await;
        assert!(ended.is_ok(), "the host waits for a guest that is gone");
    });
});
