//! The CRI's streaming server, by WebSocket: what `kubectl exec` and `port-forward` use.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use crate::command::PATIENCE;

/// A connection whose messages begin with the number of a channel.
pub struct Channels(WebSocket<TcpStream>);

/// What came out of an exec.
#[derive(Debug, Default)]
pub struct Streamed {
    /// Standard output, or all of the terminal.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The status object in JSON, which comes last.
    pub status: String,
}

impl Channels {
    /// Connects to a URL that `Exec`, `Attach` or `PortForward` gave.
    pub fn connect(url: &str) -> Result<Self> {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request()?;
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
        let host = request.uri().authority().context("the URL has no host")?.to_string();
        let stream = TcpStream::connect(&host).with_context(|| format!("connect to {host}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (socket, _) = tungstenite::client(request, stream)
            .map_err(|error| anyhow::anyhow!("open the stream: {error}"))?;
        Ok(Self(socket))
    }

    /// Sends bytes on a channel.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let mut message = vec![channel];
        message.extend_from_slice(bytes);
        self.0.send(Message::binary(message)).context("send on the stream")
    }

    /// The next message: its channel and bytes; none at the end.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        loop {
            match self.0.read() {
                Ok(Message::Binary(bytes)) => {
                    let (channel, bytes) = bytes.split_first().context("an empty message")?;
                    return Ok(Some((*channel, bytes.to_vec())));
                }
                Ok(Message::Close(_)) => return Ok(None),
                Ok(_) => {}
                Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                    return Ok(None);
                }
                // It ends without a farewell.
                Err(tungstenite::Error::Protocol(_)) => return Ok(None),
                Err(error) => bail!("read from the stream: {error}"),
            }
        }
    }

    /// Reads until the terminal has shown `text`.
    pub fn until(&mut self, text: &str) -> Result<String> {
        let mut seen = String::new();
        let deadline = Instant::now() + PATIENCE;
        while !seen.contains(text) {
            ensure!(Instant::now() < deadline, "waited for {text:?}, saw {seen:?}");
            let (channel, bytes) =
                self.receive()?.with_context(|| format!("ended at {seen:?}, not {text:?}"))?;
            if channel == 1 {
                seen.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        Ok(seen)
    }

    /// Gathers what comes, to the end.
    pub fn finish(mut self) -> Result<Streamed> {
        let mut all = Streamed::default();
        while let Some((channel, bytes)) = self.receive()? {
            match channel {
                1 => all.stdout.extend(bytes),
                2 => all.stderr.extend(bytes),
                3 => all.status.push_str(&String::from_utf8_lossy(&bytes)),
                other => bail!("a message on channel {other}"),
            }
        }
        Ok(all)
    }

    /// How long a read may wait.
    pub fn set_patience(&self, patience: Duration) -> Result<()> {
        Ok(self.0.get_ref().set_read_timeout(Some(patience))?)
    }
}
