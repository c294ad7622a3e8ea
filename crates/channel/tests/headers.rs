//! What the guest's end makes of the first bytes of a stream.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kata_channel::Acceptor;
use kata_protocol::{StreamHeader, StreamKind};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// A yamux frame that opens stream `id` with `body`, or goes on with it.
fn frame(id: u32, syn: bool, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, u8::from(syn)];
    bytes.extend(id.to_be_bytes());
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend(body);
    bytes
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_header_in_any_pieces_is_read_and_not_a_byte_more(
        container in "[a-z0-9]{1,128}",
        exec in "([a-z0-9]{1,128})?",
        cuts in prop::collection::vec(1usize..60, 0..8),
        tail in prop::collection::vec(any::<u8>(), 1..100),
    ) {
        let exec = (!exec.is_empty()).then(|| exec.parse().unwrap());
        let header =
            StreamHeader::process(StreamKind::Stdin, container.parse().unwrap(), exec);
        let mut bytes = header.encode();
        bytes.extend(&tail);
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let mut acceptor = Acceptor::multiplexed(guest);
            let mut rest = bytes.as_slice();
            let mut syn = true;
            for cut in cuts {
                let (head, more) = rest.split_at(cut.min(rest.len()));
                host.write_all(&frame(1, syn, head)).await.unwrap();
                syn = false;
                rest = more;
            }
            host.write_all(&frame(1, syn, rest)).await.unwrap();
            let (seen, mut stream) = acceptor.accept().await.unwrap();
            assert_eq!(seen, header);
            let mut got = vec![0; tail.len()];
            stream.read_exact(&mut got).await.unwrap();
            assert_eq!(got, tail);
        });
    }

    #[test]
    fn garbage_resets_its_stream_and_the_next_is_taken(
        garbage in prop::collection::vec(any::<u8>(), 4..300),
    ) {
        prop_assume!(!garbage.starts_with(b"KS"));
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let mut acceptor = Acceptor::multiplexed(guest);
            host.write_all(&frame(1, true, &garbage)).await.unwrap();
            host.write_all(&frame(3, true, &StreamHeader::rpc().encode())).await.unwrap();
            let (header, _stream) = acceptor.accept().await.unwrap();
            assert_eq!(header, StreamHeader::rpc());
        });
    }

    #[test]
    fn any_bytes_on_the_connection_end_it_or_are_ignored(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        run(async {
            let (mut host, guest) = UnixStream::pair().unwrap();
            let mut acceptor = Acceptor::multiplexed(guest);
            // The other side may close before all is written.
            let _ = host.write_all(&bytes).await;
            drop(host);
            while acceptor.accept().await.is_ok() {}
        });
    }
}
