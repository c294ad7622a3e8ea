//! The host's calls against an agent that answers anything.
//!
//! The channel itself is in order (see `host_channel` for one that is not). Each answer has the
//! length that its head tells, unless the first byte asks for raw bytes.
#![no_main]

use std::time::Duration;

use kata_channel::{Acceptor, HostChannel};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (channel, mut acceptor) =
            (HostChannel::multiplexed(ours), Acceptor::multiplexed(theirs));
        let guest = async {
            let mut answers = answers(bytes).into_iter();
            while let Ok((_, mut stream)) = acceptor.accept().await {
                // The request is taken, so that the host never waits for room.
                let mut request = [0; 4096];
                stream.read(&mut request).await.ok();
                stream.write_all(&answers.next().unwrap_or_default()).await.ok();
            }
        };
        let both = async { tokio::join!(guest, kata_sandbox::fuzzing::calls(channel)) };
        let ended = tokio::time::timeout(Duration::from_secs(5), both).await;
        assert!(ended.is_ok(), "the host waits for answers that never come");
    });
});

/// Answers to the first, second, … call, each of some of the bytes.
fn answers(bytes: &[u8]) -> Vec<Vec<u8>> {
    let Some((how, mut rest)) = bytes.split_first() else { return Vec::new() };
    let mut out = Vec::new();
    while let Some((length, after)) = rest.split_first() {
        let (answer, after) = after.split_at(usize::from(*length).min(after.len()));
        out.push(match (how % 8, answer.split_first()) {
            (1.., Some((tag, body))) => {
                [&[*tag % 3], &(body.len() as u32).to_be_bytes()[..], body].concat()
            }
            _ => answer.to_vec(),
        });
        rest = after;
    }
    out
}
