//! The host's calls against an agent that answers anything.
//!
//! The channel itself is in order (see `host_channel` for one that is not). Each answer is
//! framed as ttRPC wants it, unless the first byte asks for raw bytes.
#![no_main]

use std::time::Duration;

use kata_channel::{Acceptor, HostChannel};
use kata_protocol::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (channel, mut acceptor) =
            (HostChannel::multiplexed(ours), Acceptor::multiplexed(theirs));
        let Ok(stream) = channel.open(&StreamHeader::rpc()).await else { return };
        let guest = async {
            let Ok((_, mut stream)) = acceptor.accept().await else { return };
            stream.write_all(&answers(bytes)).await.ok();
            let mut sink = vec![0; 4096];
            while let Ok(1..) = stream.read(&mut sink).await {}
        };
        let both = async { tokio::join!(guest, kata_sandbox::fuzzing::calls(stream)) };
        let ended = tokio::time::timeout(Duration::from_secs(5), both).await;
        assert!(ended.is_ok(), "the host waits for answers that never come");
    });
});

/// Answers to the first, second, … call, each of some of the bytes.
fn answers(bytes: &[u8]) -> Vec<u8> {
    const RESPONSE: u8 = 2;
    let Some((how, mut rest)) = bytes.split_first() else { return Vec::new() };
    if how % 8 == 0 {
        return rest.to_vec();
    }
    let mut out = Vec::new();
    let mut call = 1u32;
    while let Some((length, after)) = rest.split_first() {
        let (answer, after) = after.split_at(usize::from(*length).min(after.len()));
        out.extend((answer.len() as u32).to_be_bytes());
        out.extend(call.to_be_bytes());
        out.extend([RESPONSE, 0]);
        out.extend(answer);
        // Clients count in odd numbers.
        call += 2;
        rest = after;
    }
    out
}
