//! Calls of the agent: each on a stream of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod pair;

use std::time::Duration;

use kata_channel::{Acceptor, CallError, Stream};
use kata_protocol::StreamKind;
use kata_protocol::agent::{
    ConnectResponse, Empty, Failure, ProcessId, StatsResponse, WaitResponse, failure,
};
use kata_protocol::call::{self, InvalidCall, Method};
use kata_protocol::limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use pair::pair;

async fn accept(guest: &mut Acceptor) -> Stream {
    let (header, stream) = guest.accept().await.unwrap();
    assert_eq!(header.kind, StreamKind::Rpc);
    stream
}

fn of(container: String) -> ProcessId {
    ProcessId { container_id: container, ..ProcessId::default() }
}

#[tokio::test]
async fn a_call_and_its_answer_arrive_whole() {
    let (host, mut guest) = pair();
    // Longer than what a stream takes at once.
    let long = "x".repeat(1 << 20);
    let agent = async {
        let mut stream = accept(&mut guest).await;
        let (method, request) = stream.receive_call().await.unwrap().unwrap();
        assert_eq!((method, request.len()), (Method::Wait, (1 << 20) + 4));
        let answer = WaitResponse { exit_code: 7, ..WaitResponse::default() };
        stream.answer_call(&call::answer::<call::Wait>(&answer).unwrap()).await.unwrap();
    };
    let request = of(long);
    let (answer, ()) = tokio::join!(host.call::<call::Wait>(&request), agent);
    assert_eq!(answer.unwrap().exit_code, 7);
}

/// The agent lets go of the stream behind its answer: nothing of what is on the way is lost.
#[tokio::test]
async fn the_longest_answer_arrives_whole() {
    let (host, mut guest) = pair();
    let answer =
        ConnectResponse { agent_version: "x".repeat(limits::MESSAGE - 8), ..Default::default() };
    let agent = async {
        let stream = accept(&mut guest).await;
        stream.answer_call(&call::answer::<call::Connect>(&answer).unwrap()).await.unwrap();
    };
    let request = Default::default();
    let (heard, ()) = tokio::join!(host.call::<call::Connect>(&request), agent);
    assert!(heard.unwrap() == answer);
}

#[tokio::test]
async fn a_call_that_waits_keeps_nobody() {
    let (host, mut guest) = pair();
    let waiting = host.clone();
    let waiting =
        tokio::spawn(async move { waiting.call::<call::NextEvent>(&Empty::default()).await });
    let held = accept(&mut guest).await;
    let agent = async {
        let mut stream = accept(&mut guest).await;
        let (method, _) = stream.receive_call().await.unwrap().unwrap();
        assert_eq!(method, Method::Sync);
        stream.answer_call(&call::answer::<call::Sync>(&Empty::default()).unwrap()).await.unwrap();
    };
    let request = Empty::default();
    let (answer, ()) = tokio::join!(host.call::<call::Sync>(&request), agent);
    answer.unwrap();
    assert!(!waiting.is_finished());
    drop(held);
    assert!(matches!(waiting.await.unwrap(), Err(CallError::Cut(_))));
}

#[tokio::test]
async fn a_failure_is_the_agents_own_words() {
    let (host, mut guest) = pair();
    let agent = async {
        let failure = Failure {
            code: failure::Code::NotFound.into(),
            message: "container c does not exist".into(),
            ..Failure::default()
        };
        let stream = accept(&mut guest).await;
        stream.answer_call(&call::failure(&failure).unwrap()).await.unwrap();
    };
    let request = of("c".into());
    let (answer, ()) = tokio::join!(host.call::<call::Wait>(&request), agent);
    let Err(CallError::Failed(failure)) = answer else { panic!("{answer:?}") };
    assert_eq!(failure.code, failure::Code::NotFound.into());
    assert_eq!(failure.message, "container c does not exist");
}

/// The guest says anything: the host has an error at once, and memory for what came only.
#[tokio::test]
async fn what_is_no_answer_is_refused() {
    let too_long = [&[0], &u32::MAX.to_be_bytes()[..]].concat();
    let answers = [
        (&b""[..], "the call was cut off"),
        (b"\0\0\0\0\x09cut", "the call was cut off"),
        (b"\x07\0\0\0\0", "an answer starts with 7"),
        (b"\0\0\0\0\x01\xff", "the message cannot be read"),
        (&too_long, "a message of 4294967295 bytes is too long: 4194304 is the limit"),
    ];
    let (host, mut guest) = pair();
    for (bytes, expected) in answers {
        let agent = async { accept(&mut guest).await.answer_call(bytes).await.unwrap() };
        let request = Default::default();
        let call = timeout(Duration::from_secs(10), host.call::<call::Stats>(&request));
        let (answer, ()) = tokio::join!(call, agent);
        let answer: Result<StatsResponse, CallError> = answer.unwrap();
        assert_eq!(answer.unwrap_err().to_string(), expected, "{bytes:?}");
    }
}

#[tokio::test]
async fn what_is_no_call_is_refused() {
    let (host, mut guest) = pair();
    for (bytes, expected) in [
        (&b"\x63\0\0\0\0"[..], "call 99 is unknown"),
        (b"\x01\xff\0\0\0", "a message of 4278190080 bytes is too long: 4194304 is the limit"),
    ] {
        let mut stream = host.open(&kata_protocol::StreamHeader::rpc()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let error = accept(&mut guest).await.receive_call().await.unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    // Who opens a stream and closes it has asked nothing.
    let mut stream = host.open(&kata_protocol::StreamHeader::rpc()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(accept(&mut guest).await.receive_call().await.unwrap().is_none());
}

#[tokio::test]
async fn a_request_that_is_too_long_is_not_sent() {
    let (host, mut guest) = pair();
    let request = of("x".repeat(limits::MESSAGE));
    let error = host.call::<call::Wait>(&request).await.unwrap_err();
    assert!(matches!(error, CallError::Request(InvalidCall::TooLong(_))), "{error:?}");
    let accepted = timeout(Duration::from_millis(50), guest.accept()).await;
    assert!(accepted.is_err(), "a stream was opened for it");
}

/// The answer of a caller that has gone goes nowhere, and the channel carries on.
#[tokio::test]
async fn a_caller_may_give_up() {
    let (host, mut guest) = pair();
    let request = Empty::default();
    let call = timeout(Duration::from_millis(20), host.call::<call::Sync>(&request));
    assert!(call.await.is_err());
    let mut stream = accept(&mut guest).await;
    stream.receive_call().await.unwrap().unwrap();
    // Whether the host's reset is here already or not.
    let _ = stream.answer_call(&call::answer::<call::Sync>(&Empty::default()).unwrap()).await;
    let mut echo = host.open(&kata_protocol::StreamHeader::rpc()).await.unwrap();
    echo.write_all(b"on").await.unwrap();
    let mut heard = [0; 2];
    accept(&mut guest).await.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"on");
}
