//! How fast one stream is over a socket pair; printed, with a floor that only a mistake misses.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Instant;

use kata_channel::{Acceptor, HostChannel};
use kata_protocol::StreamHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const TOTAL: usize = 256 << 20;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn one_stream_is_no_bottleneck() {
    let (host, guest) = std::os::unix::net::UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    guest.set_nonblocking(true).unwrap();
    let writer = std::thread::spawn(move || {
        runtime().block_on(async {
            let mut acceptor = Acceptor::multiplexed(UnixStream::from_std(guest).unwrap());
            let (_, mut stream) = acceptor.accept().await.unwrap();
            let chunk = vec![1_u8; 64 << 10];
            for _ in 0..TOTAL / chunk.len() {
                stream.write_all(&chunk).await.unwrap();
            }
            stream.shutdown().await.unwrap();
            let _ = stream.read(&mut [0; 1]).await;
        });
    });
    let start = Instant::now();
    runtime().block_on(async {
        let channel = HostChannel::serial(UnixStream::from_std(host).unwrap());
        let mut stream = channel.open(&StreamHeader::rpc()).await.unwrap();
        let mut buffer = vec![0_u8; 64 << 10];
        let mut total = 0;
        loop {
            let count = stream.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            total += count;
        }
        assert_eq!(total, TOTAL);
    });
    let rate = TOTAL as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s");
    writer.join().unwrap();
    assert!(rate > 20.0, "{rate:.0} MB/s");
}
