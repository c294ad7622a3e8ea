//! The agent's calls: what each is asked with and answers, and how that is framed.
//!
//! Each call has a stream of its own ([`StreamKind::Rpc`](crate::StreamKind::Rpc)). The host
//! sends the request behind the stream's header, the agent sends the answer and lets go of the
//! stream. So calls run side by side, none waits for another's bytes, and there is nothing to
//! number, to look up or to keep. Both directions are framed alike: a tag (1 byte; the
//! [`Method`], or whether the call succeeded), the length (`u32`, big-endian), a protobuf message.

use protobuf::Message;

use crate::agent::{
    ConnectRequest, ConnectResponse, ContainerId, CreateContainerRequest, Empty, Event,
    ExecRequest, Failure, GrowRequest, ListProcessesResponse, MountRequest, Network, ProcessId,
    ProcessStarted, ResizeTerminalRequest, SignalRequest, StartContainerRequest, StatsResponse,
    UpdateRequest, WaitResponse,
};
use crate::limits;

/// One of the agent's calls.
pub trait Call {
    /// Its number.
    const METHOD: Method;
    /// What the host asks with.
    type Request: Message;
    /// What the agent answers.
    type Answer: Message;
}

macro_rules! calls {
    ($($(#[$doc:meta])* $number:literal $name:ident($request:ty) -> $answer:ty;)*) => {
        /// Which call it is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Method { $($(#[$doc])* $name = $number,)* }

        impl TryFrom<u8> for Method {
            type Error = InvalidCall;

            fn try_from(number: u8) -> Result<Self, InvalidCall> {
                match number {
                    $($number => Ok(Self::$name),)*
                    other => Err(InvalidCall::Method(other)),
                }
            }
        }

        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub enum $name {}

            impl Call for $name {
                const METHOD: Method = Method::$name;
                type Request = $request;
                type Answer = $answer;
            }
        )*
    };
}

// A process is (container_id, exec_id); exec_id is empty for the container's first process.
calls! {
    /// The first on every connection: versions are compared, and the guest becomes this
    /// sandbox (clock, entropy, host name).
    1 Connect(ConnectRequest) -> ConnectResponse;
    /// Makes a container whose first process waits for its start.
    2 CreateContainer(CreateContainerRequest) -> ProcessStarted;
    /// Starts a container's first process.
    3 StartContainer(StartContainerRequest) -> Empty;
    /// Starts a further process.
    4 Exec(ExecRequest) -> ProcessStarted;
    /// Waits for the end of a process.
    5 Wait(ProcessId) -> WaitResponse;
    /// Sends a signal.
    6 Signal(SignalRequest) -> Empty;
    /// Tells a terminal its size.
    7 ResizeTerminal(ResizeTerminalRequest) -> Empty;
    /// Forgets a process, or a container with all that is in it.
    8 DeleteProcess(ProcessId) -> Empty;
    /// The processes of a container.
    9 ListProcesses(ContainerId) -> ListProcessesResponse;
    /// What a container has used.
    10 Stats(ContainerId) -> StatsResponse;
    /// Gives a container other limits.
    11 Update(UpdateRequest) -> Empty;
    /// Freezes a container.
    12 Pause(ContainerId) -> Empty;
    /// Thaws it.
    13 Resume(ContainerId) -> Empty;
    /// Makes use of what the machine got.
    14 Grow(GrowRequest) -> Empty;
    /// Sets up the guest's network.
    15 ConfigureNetwork(Network) -> Empty;
    /// Waits for the next event.
    16 NextEvent(Empty) -> Event;
    /// Writes everything to stable storage; the host ends the machine afterwards.
    17 Sync(Empty) -> Empty;
    /// Ends the connection, without what carries it being closed: who comes by it next is
    /// another host, to which the guest has no shares. Nobody waits for the answer.
    18 Leave(Empty) -> Empty;
    /// Mounts what containers share with the host.
    19 Mount(MountRequest) -> Empty;
}

/// Why bytes are no call, or no answer.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCall {
    /// Neither side takes so much.
    #[error("a message of {0} bytes is too long: {max} is the limit", max = limits::MESSAGE)]
    TooLong(usize),
    /// No such call.
    #[error("call {0} is unknown")]
    Method(u8),
    /// Neither an answer nor a failure.
    #[error("an answer starts with {0}")]
    Tag(u8),
    /// Not the message that it should be.
    #[error("the message cannot be read")]
    Message(#[from] protobuf::Error),
}

/// Tag of an answer.
const ANSWER: u8 = 0;
/// Tag of a [`Failure`] in an answer's place.
const FAILURE: u8 = 1;

/// What precedes a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    tag: u8,
    /// Of the message, bytes; at most [`limits::MESSAGE`].
    pub length: usize,
}

impl Head {
    /// Length of a head, bytes.
    pub const LENGTH: usize = 5;

    /// Reads a head.
    ///
    /// # Errors
    /// When the message would be longer than is allowed.
    pub fn decode([tag, length @ ..]: [u8; Self::LENGTH]) -> Result<Self, InvalidCall> {
        let length = u32::from_be_bytes(length) as usize;
        if length > limits::MESSAGE {
            return Err(InvalidCall::TooLong(length));
        }
        Ok(Self { tag, length })
    }

    /// Which call this is the head of.
    ///
    /// # Errors
    /// When there is no such call.
    pub fn method(self) -> Result<Method, InvalidCall> {
        self.tag.try_into()
    }

    /// What the agent answered, from the message that followed this head.
    ///
    /// # Errors
    /// When that is neither an answer nor a failure.
    pub fn answer<C: Call>(self, body: &[u8]) -> Result<Result<C::Answer, Failure>, InvalidCall> {
        match self.tag {
            ANSWER => Ok(Ok(C::Answer::parse_from_bytes(body)?)),
            FAILURE => Ok(Err(Failure::parse_from_bytes(body)?)),
            other => Err(InvalidCall::Tag(other)),
        }
    }
}

/// The bytes that ask for a call.
///
/// # Errors
/// When the request is too long.
pub fn request<C: Call>(request: &C::Request) -> Result<Vec<u8>, InvalidCall> {
    frame(C::METHOD as u8, request)
}

/// The bytes that answer a call.
///
/// # Errors
/// When the answer is too long.
pub fn answer<C: Call>(answer: &C::Answer) -> Result<Vec<u8>, InvalidCall> {
    frame(ANSWER, answer)
}

/// The bytes that say why a call failed.
///
/// # Errors
/// When the words are too many.
pub fn failure(failure: &Failure) -> Result<Vec<u8>, InvalidCall> {
    frame(FAILURE, failure)
}

fn frame(tag: u8, message: &impl Message) -> Result<Vec<u8>, InvalidCall> {
    let mut bytes = vec![tag, 0, 0, 0, 0];
    message.write_to_vec(&mut bytes)?;
    let length = bytes.len() - Head::LENGTH;
    match u32::try_from(length) {
        Ok(fits) if length <= limits::MESSAGE => {
            bytes[1..Head::LENGTH].copy_from_slice(&fits.to_be_bytes());
            Ok(bytes)
        }
        _ => Err(InvalidCall::TooLong(length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(bytes: &[u8]) -> (Head, &[u8]) {
        let (head, body) = bytes.split_first_chunk().unwrap();
        (Head::decode(*head).unwrap(), body)
    }

    fn process(container: &str) -> ProcessId {
        ProcessId { container_id: container.into(), ..ProcessId::default() }
    }

    #[test]
    fn a_request_says_which_call_it_is() {
        let bytes = request::<Wait>(&process("c")).unwrap();
        let (head, body) = split(&bytes);
        assert_eq!(head.method().unwrap(), Method::Wait);
        assert_eq!(head.length, body.len());
        assert_eq!(ProcessId::parse_from_bytes(body).unwrap(), process("c"));
    }

    #[test]
    fn an_answer_and_a_failure_are_told_apart() {
        let bytes = answer::<Exec>(&ProcessStarted { guest_pid: 7, ..Default::default() }).unwrap();
        let (head, body) = split(&bytes);
        assert_eq!(head.answer::<Exec>(body).unwrap().unwrap().guest_pid, 7);
        let bytes = failure(&Failure { message: "no".into(), ..Default::default() }).unwrap();
        let (head, body) = split(&bytes);
        assert_eq!(head.answer::<Exec>(body).unwrap().unwrap_err().message, "no");
    }

    #[test]
    fn what_is_too_long_is_not_sent_and_not_taken() {
        let long = process(&"x".repeat(limits::MESSAGE));
        assert!(matches!(request::<Wait>(&long), Err(InvalidCall::TooLong(_))));
        assert!(matches!(Head::decode([0, 0, 0x40, 0, 1]), Err(InvalidCall::TooLong(0x40_0001))));
        assert!(Head::decode([0, 0, 0x40, 0, 0]).is_ok());
    }

    #[test]
    fn no_call_has_the_number_0_and_an_unknown_tag_is_no_answer() {
        assert!(matches!(Method::try_from(0), Err(InvalidCall::Method(0))));
        let (head, _) = split(&[9, 0, 0, 0, 0]);
        assert!(matches!(head.answer::<Sync>(&[]), Err(InvalidCall::Tag(9))));
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(head: [u8; 5], body: Vec<u8>) {
            if let Ok(head) = Head::decode(head) {
                let _ = head.answer::<Stats>(&body);
                let _ = head.answer::<NextEvent>(&body);
            }
        }
    }
}
