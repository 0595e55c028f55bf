//! A small HTTP/1.1 client that does nothing behind its caller's back: no pool, no repetition, no hidden second connection.
//! With it, MCP calls of both eras as bytes, and what an answer to one means.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A call that has no answer after this never gets one: longer than any deadline of the server.
const STUCK: Duration = Duration::from_secs(30);

/// The two ways to speak MCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    Legacy,
    Modern,
}

/// The bytes of a tool call.
pub(crate) fn call(era: Era, tool: &str, arguments: &Value) -> Bytes {
    let mut params = json!({ "name": tool, "arguments": arguments });
    let (version, more) = match era {
        Era::Legacy => ("2025-11-25", String::new()),
        Era::Modern => {
            params["_meta"] = json!({
                "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                "io.modelcontextprotocol/clientCapabilities": {},
            });
            ("2026-07-28", format!("Mcp-Method: tools/call\r\nMcp-Name: {tool}\r\n"))
        }
    };
    post(version, &more, &json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params }))
}

/// The bytes of the request that opens the older lifecycle.
pub(crate) fn initialize() -> Bytes {
    let params = json!({
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": { "name": "endure", "version": "1" },
    });
    post("2025-11-25", "", &json!({ "jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params }))
}

/// All five tools in both eras, each call of them right.
pub(crate) fn all_tools() -> Vec<Bytes> {
    let ticket = json!({ "title": "Printer", "description": "It prints nothing but zeros." });
    let tools = [
        ("get_user_profile", json!({ "user_id": "42" })),
        ("list_users", json!({ "limit": 10 })),
        ("list_tickets", json!({ "limit": 5 })),
        ("query_data", json!({ "dataset": "sales", "limit": 20 })),
        ("create_ticket", ticket),
    ];
    let both =
        tools.iter().flat_map(|(tool, arguments)| [Era::Legacy, Era::Modern].map(|era| call(era, tool, arguments)));
    both.collect()
}

/// The reads among them.
pub(crate) fn all_reads() -> Vec<Bytes> {
    all_tools().into_iter().filter(|call| !call.windows(13).any(|part| part == b"create_ticket")).collect()
}

/// The same request with a bearer token.
pub(crate) fn with_token(call: &Bytes, token: &str) -> Bytes {
    let text = String::from_utf8_lossy(call);
    Bytes::from(text.replacen("\r\n", &format!("\r\nAuthorization: Bearer {token}\r\n"), 1))
}

fn post(version: &str, more: &str, message: &Value) -> Bytes {
    post_text(version, more, &message.to_string())
}

/// The bytes of a request with this body.
pub(crate) fn post_text(version: &str, more: &str, body: &str) -> Bytes {
    let head = format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\nMcp-Protocol-Version: {version}\r\n{more}\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    Bytes::from(head + body)
}

/// An HTTP answer.
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: Vec<u8>,
}

/// What an answer means to the caller of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meaning {
    Done,
    /// Turned away, with the time to come back.
    Shed,
    /// Failed, with the error's code.
    Failed(String),
}

impl Answer {
    /// A header's value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields.into_iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// What it says to a call of a tool.
    pub(crate) fn meaning(&self) -> Meaning {
        if self.status == 503 && self.header("retry-after").is_some() {
            return Meaning::Shed;
        }
        let body: Value = serde_json::from_slice(&self.body).unwrap_or_default();
        let result = &body["result"];
        if self.status == 200 && result["isError"] == false {
            return Meaning::Done;
        }
        let text = result["content"][0]["text"].as_str().unwrap_or_default();
        let problem: Value = serde_json::from_str(text).unwrap_or_default();
        match problem["error"].as_str() {
            Some("SERVICE_ERROR") if problem["details"]["retry_after_seconds"].is_u64() => Meaning::Shed,
            Some(code) => Meaning::Failed(code.to_owned()),
            None => Meaning::Failed(format!("HTTP {}", self.status)),
        }
    }
}

/// One connection at a time, kept open while both sides want it.
pub(crate) struct Client {
    address: SocketAddr,
    stream: Option<TcpStream>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, stream: None }
    }

    /// Sends a request and reads its answer. A connection that was closed while it idled is replaced before anything is sent;
    /// after that nothing is repeated.
    pub(crate) async fn ask(&mut self, request: &[u8]) -> io::Result<Answer> {
        match tokio::time::timeout(STUCK, self.exchange(request)).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer at all")),
        }
    }

    /// Gives the connection up.
    pub(crate) fn hang_up(&mut self) {
        self.stream = None;
    }

    async fn exchange(&mut self, request: &[u8]) -> io::Result<Answer> {
        let mut stream = match self.stream.take().filter(is_open) {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        stream.write_all(request).await?;
        let answer = read_answer(&mut stream).await?;
        if !answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            self.stream = Some(stream);
        }
        Ok(answer)
    }
}

/// Whether the other side has neither closed an idle connection nor said something unasked.
fn is_open(stream: &TcpStream) -> bool {
    matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

async fn read_answer(stream: &mut TcpStream) -> io::Result<Answer> {
    let mut read = Vec::with_capacity(4_096);
    let mut head_end = None;
    loop {
        if stream.read_buf(&mut read).await? == 0 {
            let so_far = if read.is_empty() { "closed without an answer" } else { "closed within the answer" };
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, so_far));
        }
        let end = head_end.or_else(|| read.windows(4).position(|window| window == b"\r\n\r\n"));
        head_end = end;
        let Some(end) = end else { continue };
        let head = String::from_utf8_lossy(read.get(..end).unwrap_or_default()).into_owned();
        let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_default();
        let mut answer = Answer { status, head, body: Vec::new() };
        let length = answer.header("content-length").and_then(|length| length.parse::<usize>().ok());
        let length = length.ok_or_else(|| io::Error::other("an answer without a length"))?;
        let mut body = read.split_off(end + 4);
        let missing = length.saturating_sub(body.len());
        if missing > 0 {
            let have = body.len();
            body.resize(length, 0);
            stream.read_exact(body.get_mut(have..).unwrap_or_default()).await?;
        }
        answer.body = body;
        return Ok(answer);
    }
}
