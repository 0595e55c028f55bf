//! Calls with a known trace, schemas as published, and requests that no HTTP client would write.

use std::collections::BTreeMap;
use std::time::Duration;

use jsonschema::Validator;
use mcp_server::demo::backend::RecordedRequest;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{CallResult, Era, TestApp};

/// The trace of every [`TestApp::call_traced`].
pub const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";
pub const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// The tools, by name.
pub const TOOLS: [&str; 5] = ["create_ticket", "get_user_profile", "list_tickets", "list_users", "query_data"];

/// A tool's schemas, ready to check.
pub struct Schemas {
    pub input: Validator,
    pub output: Validator,
}

/// An answer as it came over the wire.
#[derive(Debug)]
pub struct RawAnswer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl TestApp {
    /// Calls a tool under the trace [`TRACE_ID`].
    pub async fn call_traced(&self, era: Era, tool: &str, arguments: Value) -> CallResult {
        let meta = json!({ "traceparent": TRACEPARENT });
        CallResult(self.result(era, "tools/call", json!({ "name": tool, "arguments": arguments, "_meta": meta })).await)
    }

    /// Calls a tool, and gives the result together with what the backend was asked for it.
    pub async fn call_and_watch(&self, era: Era, tool: &str, arguments: Value) -> (CallResult, Vec<RecordedRequest>) {
        self.stand_ins.backend.forget_requests();
        let result = self.call_traced(era, tool, arguments).await;
        (result, self.backend_requests())
    }

    /// The schemas of every tool, as the server publishes them.
    pub async fn schemas(&self) -> BTreeMap<String, Schemas> {
        let list = self.result(Era::Modern, "tools/list", json!({})).await;
        let schema = |tool: &Value, which: &str| jsonschema::draft202012::new(&tool[which]).unwrap();
        let tools = list["tools"].as_array().unwrap().iter();
        tools
            .map(|tool| {
                let schemas = Schemas { input: schema(tool, "inputSchema"), output: schema(tool, "outputSchema") };
                (tool["name"].as_str().unwrap().to_owned(), schemas)
            })
            .collect()
    }

    /// Posts this body to the endpoint as a client would post a message.
    pub fn post(&self, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        self.http
            .post(self.url("/mcp"))
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .body(body)
    }

    /// Sends these bytes over a connection of their own and reads until the server closes it.
    pub async fn raw(&self, request: impl AsRef<[u8]>) -> RawAnswer {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(request.as_ref()).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(Duration::from_secs(60), exchange).await.expect("an answer, then the end");
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        RawAnswer { status: status.unwrap_or_default(), head: head.to_owned(), body: body.to_owned() }
    }
}

/// Whether the text is a UUID of version 4.
pub fn is_uuid(text: &str) -> bool {
    uuid::Uuid::parse_str(text).is_ok_and(|uuid| uuid.get_version_num() == 4)
}
