use super::*;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

const SOON: Duration = Duration::from_secs(5);

fn pair() -> (Qmp, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Qmp::new(ours).0, theirs)
}

/// Answers each command as told, until the socket is closed.
async fn play(stream: UnixStream, answer: impl Fn(&Value) -> String) {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).split(b'}');
    // Commands come without line ends; ours end in the id.
    let mut text = Vec::new();
    while let Ok(Some(piece)) = lines.next_segment().await {
        text.extend(piece);
        text.push(b'}');
        if let Ok(command) = serde_json::from_slice::<Value>(&text) {
            text.clear();
            writer.write_all(answer(&command).as_bytes()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn answers_find_their_calls_in_any_order() {
    let (qmp, theirs) = pair();
    let player = tokio::spawn(async move {
        let mut theirs = theirs;
        let mut held = Vec::new();
        let mut buffer = Vec::new();
        while held.len() < 2 {
            theirs.readable().await.unwrap();
            let _ = theirs.try_read_buf(&mut buffer);
            let text = String::from_utf8_lossy(&buffer).into_owned();
            held = text.matches("\"id\":").map(|_| ()).collect();
        }
        let answers = "{\"return\": {}, \"id\": 1}\n{\"id\": 0, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n";
        theirs.write_all(answers.as_bytes()).await.unwrap();
        theirs
    });
    let (stop, cont) = (Stop {}, Cont {});
    let (first, second) = tokio::join!(qmp.call(&stop, SOON), qmp.call(&cont, SOON));
    assert_eq!(first.unwrap_err().to_string(), "qemu refused \"stop\": no");
    second.unwrap();
    player.await.unwrap();
}

#[tokio::test]
async fn a_call_ends_at_once_when_qemu_does() {
    let (qmp, theirs) = pair();
    let stop = Stop {};
    let call = qmp.call(&stop, Duration::from_secs(60));
    let death = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(theirs);
    };
    let (result, ()) = tokio::join!(call, death);
    assert!(matches!(result, Err(QmpError::Closed("stop"))), "{result:?}");
    assert!(matches!(qmp.call(&stop, SOON).await, Err(QmpError::Closed(_) | QmpError::Send(..))));
}

#[tokio::test]
async fn a_silent_qemu_is_noticed() {
    let (qmp, _theirs) = pair();
    let result = qmp.call(&Stop {}, Duration::from_millis(30)).await;
    assert_eq!(result.unwrap_err().to_string(), "qemu did not answer \"stop\" within 0.03 s");
    assert!(qmp.0.waiting().as_ref().unwrap().is_empty(), "a call that is over is remembered");
}

#[tokio::test]
async fn a_line_without_end_closes_the_connection_not_our_memory() {
    let (qmp, mut theirs) = pair();
    let flood = tokio::spawn(async move { while theirs.write_all(&[b' '; 4096]).await.is_ok() {} });
    let result = qmp.call(&Stop {}, Duration::from_secs(20)).await;
    assert!(matches!(result, Err(QmpError::Closed(_))), "{result:?}");
    drop(qmp);
    flood.await.unwrap();
}

#[tokio::test]
async fn events_are_told_to_who_listens() {
    let (qmp, theirs) = pair();
    let mut events = qmp.events();
    let player = tokio::spawn(play(theirs, |command| {
        let id = &command["id"];
        format!("{{\"event\":\"STOP\",\"data\":{{\"a\":1}}}}\n{{\"return\":{{}},\"id\":{id}}}\n")
    }));
    qmp.call(&Stop {}, SOON).await.unwrap();
    let event = events.recv().await.unwrap();
    assert_eq!(event, Event { name: "STOP".to_owned(), data: json!({"a": 1}) });
    drop(qmp);
    player.abort();
}

#[test]
fn a_descriptor_goes_along_with_its_command() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (ours, theirs) = StdStream::pair().unwrap();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let player = std::thread::spawn(move || {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        let mut bytes = [0; 1024];
        let mut iov = [std::io::IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let message =
            recvmsg::<()>(theirs.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty());
        let fds: Vec<i32> = match message.unwrap().cmsgs().unwrap().next() {
            Some(ControlMessageOwned::ScmRights(fds)) => fds,
            other => panic!("{other:?}"),
        };
        // SAFETY: the kernel gave us this descriptor just now.
        let mut pipe = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fds[0]) });
        pipe.write_all(b"x").unwrap();
        (&theirs).write_all(b"{\"return\":{},\"id\":0}\n").unwrap();
        fds.len()
    });
    runtime.block_on(async {
        ours.set_nonblocking(true).unwrap();
        let (qmp, _) = Qmp::new(UnixStream::from_std(ours).unwrap());
        let command = Getfd { fdname: "tap".to_owned() };
        qmp.call_with_fd(&command, Some(writer.as_fd()), SOON).await.unwrap();
    });
    assert_eq!(player.join().unwrap(), 1);
    reader.read_exact(&mut [0]).unwrap();
}

#[test]
fn commands_are_written_as_qemu_wants_them() {
    let properties = Map::from_iter([("mac".to_owned(), json!("m"))]);
    let add = DeviceAdd { driver: "d", id: "i".to_owned(), bus: "b".to_owned(), properties };
    let expected = json!({"driver": "d", "id": "i", "bus": "b", "mac": "m"});
    assert_eq!(serde_json::to_value(&add).unwrap(), expected);
    assert_eq!(serde_json::to_value(Stop {}).unwrap(), json!({}));
}

#[test]
fn what_qmp_does_not_have_is_nothing() {
    for line in ["", "{}", "[]", "1", "{\"id\":\"x\",\"return\":{}}", "{\"id\":-1,\"return\":{}}"] {
        assert_eq!(parse(line.as_bytes()), None, "{line:?}");
    }
    let deep = "[".repeat(10_000);
    assert_eq!(parse(deep.as_bytes()), None);
}

#[test]
fn a_refusal_cannot_forge_a_line_of_a_log() {
    let line = br#"{"id":1,"error":{"desc":"a\nERROR forged\u001b[2J"}}"#;
    let expected = Message::Answer { id: 1, answer: Err("aERROR forged".to_owned()) };
    assert_eq!(parse(line), Some(expected));
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_nothing(line: Vec<u8>) {
        let _ = parse(&line);
    }

    #[test]
    fn odd_json_is_a_message_or_nothing(
        key in "(QMP|id|return|error|event|data|desc)",
        value in "(null|-1|1e400|18446744073709551616|\"x\"|\\{\\}|\\[\\]|\\{\"desc\":1\\})",
        other in "(QMP|id|return|error|event|data)",
    ) {
        let _ = parse(format!("{{\"{key}\":{value},\"{other}\":{value},\"id\":3}}").as_bytes());
        let _ = parse(format!("{{\"{key}\":{value},\"{other}\":{value}}}").as_bytes());
    }
}
