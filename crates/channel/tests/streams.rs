//! Both ends over a socket pair.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod pair;

use std::io::ErrorKind;
use std::time::Duration;

use kata_channel::{Acceptor, ChannelError, CloseReason, HostChannel, Stream};
use kata_protocol::{StreamHeader, StreamKind, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use pair::pair;

fn header(kind: StreamKind, number: usize) -> StreamHeader {
    StreamHeader::process(kind, format!("c{number}").parse().unwrap(), None)
}

async fn open(host: &HostChannel, guest: &mut Acceptor, number: usize) -> (Stream, Stream) {
    let header = header(StreamKind::Stdout, number);
    let ours = host.open(&header).await.unwrap();
    let (seen, theirs) = guest.accept().await.unwrap();
    assert_eq!(seen, header);
    (ours, theirs)
}

/// Bytes that tell their place.
fn pattern(at: usize, buffer: &mut [u8]) {
    for (index, byte) in buffer.iter_mut().enumerate() {
        *byte = ((at + index) as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0];
    }
}

async fn send(stream: &mut Stream, total: usize) {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < total {
        let count = buffer.len().min(total - at);
        pattern(at, &mut buffer[..count]);
        stream.write_all(&buffer[..count]).await.unwrap();
        at += count;
    }
    stream.shutdown().await.unwrap();
}

async fn check(stream: &mut Stream, total: usize) {
    let mut buffer = vec![0; 64 << 10];
    let mut wanted = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let count = stream.read(&mut buffer).await.unwrap();
        if count == 0 {
            break;
        }
        pattern(at, &mut wanted[..count]);
        assert!(buffer[..count] == wanted[..count], "bytes differ after {at}");
        at += count;
    }
    assert_eq!(at, total);
}

#[tokio::test]
async fn a_hundred_megabytes_each_way_arrive_intact() {
    const TOTAL: usize = 100_000_000;
    let (host, mut guest) = pair();
    let (ours, theirs) = open(&host, &mut guest, 0).await;
    let (mut our_in, mut our_out) = tokio::io::split(ours);
    let (mut their_in, mut their_out) = tokio::io::split(theirs);
    let mut buffer = vec![0; 64 << 10];
    pattern(0, &mut buffer);
    let write = async |out: &mut (dyn tokio::io::AsyncWrite + Unpin + Send)| {
        let mut left = TOTAL;
        while left > 0 {
            let count = buffer.len().min(left);
            out.write_all(&buffer[..count]).await.unwrap();
            left -= count;
        }
        out.shutdown().await.unwrap();
    };
    let read = async |input: &mut (dyn tokio::io::AsyncRead + Unpin + Send)| {
        let mut got = vec![0; 64 << 10];
        let mut at = 0;
        loop {
            let count = input.read(&mut got).await.unwrap();
            if count == 0 {
                return at;
            }
            for (index, byte) in got[..count].iter().enumerate() {
                assert_eq!(*byte, buffer[(at + index) % buffer.len()]);
            }
            at += count;
        }
    };
    let ((), (), a, b) = tokio::join!(
        write(&mut our_out),
        write(&mut their_out),
        read(&mut our_in),
        read(&mut their_in)
    );
    assert_eq!((a, b), (TOTAL, TOTAL));
}

#[tokio::test]
async fn each_side_ends_its_direction_alone() {
    let (host, mut guest) = pair();
    let (mut ours, mut theirs) = open(&host, &mut guest, 0).await;
    ours.write_all(b"in").await.unwrap();
    ours.shutdown().await.unwrap();
    let mut text = String::new();
    theirs.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "in");
    theirs.write_all(b"out").await.unwrap();
    theirs.shutdown().await.unwrap();
    drop(theirs);
    text.clear();
    ours.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "out");
    assert_eq!(ours.write(b"x").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_was_written_before_a_drop_arrives_and_then_the_reset() {
    let (host, mut guest) = pair();
    let (mut ours, mut theirs) = open(&host, &mut guest, 0).await;
    theirs.write_all(&[7; 100_000]).await.unwrap();
    drop(theirs);
    let mut bytes = Vec::new();
    let error = ours.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(bytes, [7; 100_000]);
    assert_eq!(ours.write(b"x").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_writer_waits_for_its_reader_and_others_go_on() {
    let (host, mut guest) = pair();
    let (mut stuck, mut writer) = open(&host, &mut guest, 0).await;
    let mut written = 0;
    let chunk = vec![1; 64 << 10];
    while let Ok(count) = timeout(Duration::from_millis(200), writer.write(&chunk)).await {
        written += count.unwrap();
        assert!(written < 1 << 20, "{written} bytes were taken without a reader");
    }
    let (mut ours, mut theirs) = open(&host, &mut guest, 1).await;
    tokio::join!(send(&mut theirs, 10_000_000), check(&mut ours, 10_000_000));
    drop(writer);
    let mut rest = Vec::new();
    stuck.read_to_end(&mut rest).await.unwrap_err();
    assert_eq!(rest.len(), written);
}

#[tokio::test]
async fn many_streams_carry_their_own_bytes() {
    let (host, mut guest) = pair();
    let echo = tokio::spawn(async move {
        while let Ok((_, stream)) = guest.accept().await {
            tokio::spawn(async move {
                let (mut input, mut output) = tokio::io::split(stream);
                tokio::io::copy(&mut input, &mut output).await.unwrap();
                output.shutdown().await.unwrap();
            });
        }
    });
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..1000 {
        let host = host.clone();
        tasks.spawn(async move {
            let stream = host.open(&header(StreamKind::Stdin, number)).await.unwrap();
            let (mut input, mut output) = tokio::io::split(stream);
            let text = format!("stream {number} ").repeat(1000);
            let write = async {
                output.write_all(text.as_bytes()).await.unwrap();
                output.shutdown().await.unwrap();
            };
            let mut back = String::new();
            let (_, read) = tokio::join!(write, input.read_to_string(&mut back));
            read.unwrap();
            assert_eq!(back, text);
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
    drop(host);
    echo.await.unwrap();
}

#[tokio::test]
async fn silent_streams_do_not_keep_others_from_opening() {
    let (host, mut guest) = pair();
    let mut silent = Vec::new();
    for number in 0..600 {
        let opened = timeout(Duration::from_secs(5), open(&host, &mut guest, number)).await;
        silent.push(opened.expect("opening hangs"));
    }
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused_and_the_channel_lives() {
    let (host, mut guest) = pair();
    let mut held = Vec::new();
    for number in 0..limits::STREAMS {
        held.push(open(&host, &mut guest, number).await);
    }
    let refused = host.open(&StreamHeader::rpc()).await.unwrap_err();
    assert!(matches!(refused, ChannelError::TooManyStreams(limits::STREAMS)));
    held.truncate(limits::STREAMS - 1);
    let mut last = open(&host, &mut guest, 9999).await;
    tokio::join!(send(&mut last.1, 1000), check(&mut last.0, 1000));
}

#[tokio::test]
async fn a_lost_connection_ends_every_stream_with_an_error_and_a_reason() {
    let (host_socket, guest_socket) = UnixStream::pair().unwrap();
    let host = HostChannel::serial(host_socket);
    let mut ours = host.open(&header(StreamKind::Stdout, 0)).await.unwrap();
    drop(guest_socket);
    let error = ours.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert_eq!(host.closed().await, CloseReason::Ended);
    let error = host.open(&StreamHeader::rpc()).await.unwrap_err();
    assert!(matches!(error, ChannelError::Closed(CloseReason::Ended)), "{error}");
}

#[tokio::test]
async fn a_guest_that_closes_its_end_has_let_go_of_what_carries_it() {
    let (host_socket, guest_socket) = UnixStream::pair().unwrap();
    let host = HostChannel::serial(host_socket);
    let mut guest = Acceptor::multiplexed(guest_socket);
    let (mut ours, theirs) = open(&host, &mut guest, 0).await;
    guest.close().await;
    // Also where a stream of it is still held.
    assert_eq!(ours.read(&mut [0; 10]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(host.closed().await, CloseReason::Ended);
    drop(theirs);
}

#[tokio::test]
async fn garbage_from_the_guest_ends_the_channel_with_the_reason() {
    let (host_socket, mut guest_socket) = UnixStream::pair().unwrap();
    let host = HostChannel::serial(host_socket);
    guest_socket.write_all(&[0x55; 4096]).await.unwrap();
    let reason = timeout(Duration::from_secs(5), host.closed()).await.unwrap();
    assert!(matches!(reason, CloseReason::Protocol(_)), "{reason}");
}

#[tokio::test]
async fn a_guest_that_floods_pings_and_reads_nothing_is_not_answered_for_ever() {
    let (host_socket, mut guest_socket) = UnixStream::pair().unwrap();
    let host = HostChannel::serial(host_socket);
    let mut ping = [0_u8; 12];
    ping[1] = 2; // ping
    ping[3] = 1; // SYN
    let flood = ping.repeat(4096);
    let mut taken = 0;
    loop {
        let rest = &flood[taken % ping.len()..];
        let Ok(count) = timeout(Duration::from_millis(300), guest_socket.write(rest)).await else {
            break;
        };
        taken += count.unwrap();
        assert!(taken < 64 << 20, "the host answers without bound");
    }
    drop(host);
}

#[tokio::test]
async fn dropping_the_host_end_ends_the_guest_end() {
    let (host, mut guest) = pair();
    let (ours, mut theirs) = open(&host, &mut guest, 0).await;
    drop((host, ours));
    assert!(theirs.read(&mut [0; 1]).await.is_err());
    assert_eq!(guest.accept().await.unwrap_err(), CloseReason::Ended);
}

#[tokio::test]
async fn what_is_written_before_the_guest_listens_arrives() {
    let (host_socket, guest_socket) = UnixStream::pair().unwrap();
    let host = HostChannel::serial(host_socket);
    let mut ours = host.open(&StreamHeader::rpc()).await.unwrap();
    ours.write_all(b"early").await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let mut guest = Acceptor::multiplexed(guest_socket);
    let (header, mut theirs) = guest.accept().await.unwrap();
    assert_eq!(header, StreamHeader::rpc());
    let mut bytes = [0; 5];
    theirs.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"early");
}

#[tokio::test]
async fn over_vsock_a_call_can_be_made_before_the_guest_is_there() {
    // Nobody has this address: the guest never comes.
    let host = HostChannel::vsock(0x7fff_fff0);
    let opened = timeout(Duration::from_secs(1), host.open(&StreamHeader::rpc())).await;
    let mut stream = opened.unwrap().unwrap();
    stream.write_all(b"early").await.unwrap();
    drop(host);
    // Without the channel nobody waits for the guest any more.
    let read = timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await;
    assert_eq!(read.unwrap().unwrap(), 0);
}
