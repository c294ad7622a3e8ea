//! The stand-in's side door: `attach.sock`.
//!
//! For a caller of the OCI command line each container process has a *stand-in*, a tiny
//! host process whose pid the engine knows. It hands its standard streams to the sandbox
//! server over this socket, forwards signals, and ends with the process's exit code.
//!
//! The socket is `SOCK_SEQPACKET`; each packet is one JSON object of at most
//! [`MAX_PACKET`] bytes. The first one is [`Hello`], with three descriptors (standard
//! input, output, error; with a terminal three times its slave side) as `SCM_RIGHTS`.
//! The server learns the stand-in's pid from the kernel (`SO_PEERCRED`).
//! When the server ends the connection without [`ToStandIn::Exit`], the sandbox is lost.

use serde::{Deserialize, Serialize};

/// Longest packet, bytes.
pub const MAX_PACKET: usize = 4096;

/// Descriptors that come with [`Hello`].
pub const HELLO_FDS: usize = 3;

/// The stand-in says for which process it stands.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Hello {
    /// The container.
    pub container: String,
    /// The exec; empty for the container's first process.
    pub exec: String,
    /// The descriptors are a terminal.
    pub terminal: bool,
    /// Its height in characters; 0: unknown.
    pub rows: u16,
    /// Its width in characters; 0: unknown.
    pub columns: u16,
}

/// What a stand-in sends after its [`Hello`].
#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ToServer {
    /// It got this signal; the process is to have it.
    Signal(i32),
    /// The terminal has a new size.
    Resize {
        /// Height in characters.
        rows: u16,
        /// Width in characters.
        columns: u16,
    },
}

/// What the server sends.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ToStandIn {
    /// The [`Hello`] was taken.
    Ready,
    /// The process ended with this code, and all its output is delivered.
    Exit(u8),
    /// The [`Hello`] was refused.
    Error(String),
}
