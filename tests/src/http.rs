//! Asking a web server as a user's browser would.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;

use crate::command::{self, PATIENCE};

/// What the web server at `address` (`127.0.0.1:80`, `[::1]:80`) answers, headers and all;
/// waits until there is one.
pub fn page(address: &str) -> Result<String> {
    let mut text = String::new();
    command::eventually(&format!("{address} answers"), PATIENCE, || {
        // A connection begun while the host's own address is still tentative never comes about.
        let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        text.clear();
        stream.read_to_string(&mut text)?;
        Ok(!text.is_empty())
    })?;
    Ok(text)
}
