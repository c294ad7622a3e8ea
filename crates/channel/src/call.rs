//! Calls over the channel: one stream each. See [`kata_protocol::call`] for the bytes.

use std::io;

use kata_protocol::StreamHeader;
use kata_protocol::agent::Failure;
use kata_protocol::call::{self, Call, Head, InvalidCall, Method};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{ChannelError, HostChannel, Stream};

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It could not be made.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The agent has said why, in words that are the guest's.
    #[error("the agent refused: {}", .0.message)]
    Failed(Failure),
    /// It is asked with more than the other side would take.
    #[error("cannot ask the agent")]
    Request(#[source] InvalidCall),
    /// What the other side sent is no call, or no answer.
    #[error(transparent)]
    Invalid(#[from] InvalidCall),
    /// The stream ended before the answer did.
    #[error("the call was cut off")]
    Cut(#[source] io::Error),
}

impl HostChannel {
    /// Makes a call and waits for its answer, for which the caller sets a time. The agent does
    /// what was asked also when nobody waits any more.
    ///
    /// # Errors
    /// When there is no answer; [`CallError::Failed`] is the agent's own.
    pub async fn call<C: Call>(&self, request: &C::Request) -> Result<C::Answer, CallError> {
        let request = call::request::<C>(request).map_err(CallError::Request)?;
        let mut stream = self.open_with(&StreamHeader::rpc(), &request).await?;
        let head = read_head(&mut stream).await.map_err(CallError::Cut)?;
        let head = Head::decode(head)?;
        let body = read_body(&mut stream, head).await?;
        head.answer::<C>(&body)?.map_err(CallError::Failed)
    }
}

impl Stream {
    /// Takes the call that this stream was opened for; none if the host has let go of it.
    ///
    /// # Errors
    /// When what came is no call.
    pub async fn receive_call(&mut self) -> Result<Option<(Method, Vec<u8>)>, CallError> {
        let Ok(head) = read_head(self).await else { return Ok(None) };
        let head = Head::decode(head)?;
        let method = head.method()?;
        Ok(Some((method, read_body(self, head).await?)))
    }

    /// Answers the call and lets go of the stream: its end follows what was written, so that
    /// nothing more has to be said by either side.
    ///
    /// # Errors
    /// When the host has gone.
    pub async fn answer_call(mut self, answer: &[u8]) -> io::Result<()> {
        self.write_all(answer).await
    }
}

async fn read_head(stream: &mut Stream) -> io::Result<[u8; Head::LENGTH]> {
    let mut head = [0; Head::LENGTH];
    stream.read_exact(&mut head).await?;
    Ok(head)
}

/// Memory is taken as bytes come, not as the other side says they will.
async fn read_body(stream: &mut Stream, head: Head) -> Result<Vec<u8>, CallError> {
    let mut body = Vec::new();
    let read = stream.take(head.length as u64).read_to_end(&mut body).await;
    match read.map_err(CallError::Cut)? {
        count if count == head.length => Ok(body),
        _ => Err(CallError::Cut(io::ErrorKind::UnexpectedEof.into())),
    }
}
