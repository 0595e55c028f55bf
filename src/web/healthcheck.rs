//! The other end of the probes: asks a running server for its health, for images that have neither a shell nor curl.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A probe that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(3);
/// The answer's status line and headers fit; the body is not needed.
const LONGEST_ANSWER: u64 = 4_096;

/// Which question to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Probe {
    /// Does the process answer?
    Live,
    /// Should it get calls?
    Ready,
}

impl Probe {
    fn path(self) -> &'static str {
        match self {
            Self::Live => "/health/live",
            Self::Ready => "/health/ready",
        }
    }
}

/// Asks the server at `address`. Plain blocking IO: nothing else runs in this process.
///
/// # Errors
///
/// When it cannot be asked, or answers anything but 200.
pub fn ask(address: SocketAddr, probe: Probe) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n", probe.path())?;
    let mut answer = Vec::new();
    stream.take(LONGEST_ANSWER).read_to_end(&mut answer)?;
    let status = answer.split(|byte| *byte == b'\r').next().unwrap_or_default();
    match String::from_utf8_lossy(status) {
        line if line.starts_with("HTTP/1.1 200 ") => Ok(()),
        line => Err(io::Error::other(format!("{} was answered with `{}`", probe.path(), line.escape_default()))),
    }
}
