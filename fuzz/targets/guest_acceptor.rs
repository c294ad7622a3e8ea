//! The guest's end of the channel.
#![no_main]

use std::time::Duration;

use kata_channel::Acceptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        let (ours, mut hosts) = tokio::io::duplex(1 << 16);
        let mut acceptor = Acceptor::multiplexed(ours);
        let host = async {
            hosts.write_all(bytes).await.ok();
            let mut sink = vec![0; 4096];
            while let Ok(Ok(1..)) =
                tokio::time::timeout(Duration::from_millis(1), hosts.read(&mut sink)).await
            {
            }
            drop(hosts);
        };
        let guest = async {
            while let Ok((_, mut stream)) = acceptor.accept().await {
                let mut heard = [0; 64];
                tokio::time::timeout(Duration::from_millis(1), stream.read(&mut heard)).await.ok();
            }
        };
        let both = async { tokio::join!(host, guest) };
        let ended = tokio::time::timeout(Duration::from_secs(5), both).await;
        assert!(ended.is_ok(), "the guest waits for a host that is gone");
    });
});
