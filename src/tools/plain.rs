//! The short way of a plain call: `tools/call` of a tool that the caller may call, in a message without anything out of the ordinary.
//!
//! Nearly all requests are such calls, and for one of them the protocol has little to do. rmcp decodes each message as one of some
//! twenty kinds, serves it in two tasks of its own and builds its result as a tree; that costs as much as all the rest of a
//! call. So the message is read here first, strictly: what is not exactly a plain call is rmcp's to read and to answer. Both ways
//! lead through [`ToolServer::finish`], and their answers are written by [`response`]: the same to the byte.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::Extensions;
use rmcp::model::{JsonObject, ProtocolVersion, RequestId, RequestMetaObject};
use serde::Deserialize;

use super::answer::{ResponseBody, escape};
use super::call::{Ended, Origin};
use super::{Entry, PROTOCOL_VERSIONS, ToolServer, is_modern};
use crate::auth::Caller;

/// The key of `params._meta` with which requests of 2026-07-28 name their revision.
const PROTOCOL_VERSION_KEY: &str = "io.modelcontextprotocol/protocolVersion";

/// What the head of an HTTP request says of the message in its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head<'a> {
    /// `MCP-Protocol-Version`.
    pub protocol: &'a str,
    /// `Mcp-Method`.
    pub method: Option<&'a str>,
    /// `Mcp-Name`.
    pub name: Option<&'a str>,
}

/// A call that needs nothing of the protocol but its answer.
pub struct PlainCall {
    entry: &'static Entry,
    arguments: JsonObject,
    origin: Origin,
}

/// Where the response to a call that came through rmcp waits for the HTTP side, which sends it in the place of rmcp's; and the message,
/// which rmcp hands over as a tree only.
#[derive(Clone, Default)]
pub struct Written {
    response: Arc<Mutex<Option<ResponseBody>>>,
    message: Bytes,
}

impl Written {
    /// No response yet, to this message.
    pub fn to(message: Bytes) -> Self {
        Self { message, ..Self::default() }
    }

    /// The message, as it came.
    pub(super) fn message(&self) -> &[u8] {
        &self.message
    }

    /// Takes the response, once the call has ended.
    pub fn response(&self) -> Option<ResponseBody> {
        self.response.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn leave(&self, response: ResponseBody) {
        *self.response.lock().unwrap_or_else(PoisonError::into_inner) = Some(response);
    }
}

/// The message of a plain call. Fields that are not named here, stand twice or have another type make it another's.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Message<'a> {
    jsonrpc: &'a str,
    id: RequestId,
    method: &'a str,
    #[serde(borrow)]
    params: Params<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params<'a> {
    name: &'a str,
    arguments: Option<JsonObject>,
    #[serde(rename = "_meta")]
    meta: Option<RequestMetaObject>,
}

impl ToolServer {
    /// Reads a plain call. `extensions` are those of its HTTP request. `None` says nothing against a message: rmcp has to see it.
    pub fn plain_call(&self, head: Head<'_>, body: &[u8], extensions: &Extensions) -> Option<PlainCall> {
        let protocol = PROTOCOL_VERSIONS.iter().find(|version| version.as_str() == head.protocol)?;
        let message: Message<'_> = serde_json::from_slice(body).ok()?;
        let Params { name, arguments, meta } = message.params;
        let is_call = message.jsonrpc == "2.0" && message.method == "tools/call";
        if !(is_call && is_spoken_as(protocol, head, name, meta.as_ref())) {
            return None;
        }
        let entry = self.find(name)?;
        // A call that is refused leaves more traces than its answer.
        if !extensions.get::<Caller>()?.may(entry.permission) {
            return None;
        }
        let origin = Origin::new(extensions, meta.as_deref(), message.id, Some(protocol.clone()));
        let mut arguments = arguments.unwrap_or_default();
        entry.rules.keep_digits(&mut arguments, body);
        Some(PlainCall { entry, arguments, origin })
    }

    /// Runs a plain call, and gives the JSON-RPC response, whose HTTP status is 200. A caller who leaves drops it.
    pub async fn answer(&self, call: PlainCall) -> ResponseBody {
        let PlainCall { entry, arguments, origin } = call;
        let (id, meta) = (origin.request_id.clone(), self.meta(origin.protocol.as_ref()));
        response(&id, Box::pin(self.finish(entry, arguments, origin)).await, meta)
    }

    /// `_meta` of a result, where the revision wants one.
    pub(super) fn meta(&self, protocol: Option<&ProtocolVersion>) -> Option<&str> {
        is_modern(protocol).then_some(&*self.shared.result_meta_json)
    }
}

/// The response to a call, as rmcp would write it. The result stands in it twice: as text, and as it is. `meta` is what its `_meta` holds
/// where the revision wants one.
pub(super) fn response(id: &RequestId, ended: Ended, meta: Option<&str>) -> ResponseBody {
    let mut head = Vec::with_capacity(256);
    head.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"id\":");
    // Neither a number nor a string can fail to be written to memory.
    let _ = serde_json::to_writer(&mut head, id);
    head.extend_from_slice(b",\"result\":{");
    if meta.is_some() {
        head.extend_from_slice(b"\"resultType\":\"complete\",");
    }
    head.extend_from_slice(b"\"content\":[{\"type\":\"text\",\"text\":\"");
    match ended {
        Ok(result) => ResponseBody::of_result(head, result, &tail(",\"isError\":false", meta)),
        Err(problem) => {
            escape(problem.to_json().as_bytes(), &mut head);
            head.extend_from_slice(&tail("\"}],\"isError\":true", meta));
            head.into()
        }
    }
}

/// What ends a response.
fn tail(is_error: &str, meta: Option<&str>) -> Vec<u8> {
    match meta {
        Some(meta) => [is_error, ",\"_meta\":", meta, "}}"].concat().into(),
        None => [is_error, "}}"].concat().into(),
    }
}

/// Whether head and message agree about the revision, and have what it asks for. 2026-07-28 wants every request to speak for itself.
fn is_spoken_as(protocol: &ProtocolVersion, head: Head<'_>, name: &str, meta: Option<&RequestMetaObject>) -> bool {
    if !is_modern(Some(protocol)) {
        return meta.is_none_or(|meta| !meta.contains_key(PROTOCOL_VERSION_KEY));
    }
    let agrees = |meta: &RequestMetaObject| {
        meta.get(PROTOCOL_VERSION_KEY).is_some_and(|version| version == protocol.as_str())
            && meta.missing_required_keys(protocol).is_empty()
    };
    head.method == Some("tools/call") && head.name == Some(name) && meta.is_some_and(agrees)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::problem::{ErrorCode, Problem};
    use crate::tools::call::tests::server;

    const LEGACY: Head<'_> = Head { protocol: "2025-11-25", method: None, name: None };
    const MODERN: Head<'_> = Head { protocol: "2026-07-28", method: Some("tools/call"), name: Some("list_users") };
    /// As the official clients in Python and TypeScript write it.
    const CALL: &str = r#"{"method":"tools/call","params":{"name":"list_users","arguments":{"limit":5},"_meta":{"progressToken":1}},"jsonrpc":"2.0","id":1}"#;
    const MODERN_CALL: &str = r#"{"jsonrpc":"2.0","id":"a","method":"tools/call","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"c","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}},"name":"list_users"}}"#;

    #[tokio::test]
    async fn the_calls_of_official_clients_are_plain_and_what_differs_is_not() {
        let server = server(1);
        let mut extensions = Extensions::new();
        let is_plain =
            |head, body: &str, extensions: &_| server.plain_call(head, body.as_bytes(), extensions).is_some();
        assert!(!is_plain(LEGACY, CALL, &extensions), "nobody has said who calls");
        extensions.insert(Caller::unauthenticated([127, 0, 0, 1].into()));
        for protocol in ["2025-03-26", "2025-06-18", "2025-11-25"] {
            assert!(is_plain(Head { protocol, ..LEGACY }, CALL, &extensions), "{protocol}");
        }
        assert!(is_plain(MODERN, MODERN_CALL, &extensions));
        for (head, body) in [
            (LEGACY, MODERN_CALL.to_owned()),
            (MODERN, CALL.to_owned()),
            (Head { protocol: "2024-11-05", ..LEGACY }, CALL.to_owned()),
            (Head { name: Some("list_tickets"), ..MODERN }, MODERN_CALL.to_owned()),
            (Head { name: None, ..MODERN }, MODERN_CALL.to_owned()),
            (Head { method: None, ..MODERN }, MODERN_CALL.to_owned()),
            (MODERN, MODERN_CALL.replace("clientCapabilities\":{}", "clientCapabilities\":[]")),
            (LEGACY, CALL.replace("list_users", "no_tool")),
            (LEGACY, CALL.replace("tools/call", "tools/list")),
            (LEGACY, CALL.replace("2.0", "1.0")),
            (LEGACY, CALL.replace("\"id\":1", "\"id\":1.5")),
            (LEGACY, CALL.replace("\"id\":1", "\"id\":1,\"more\":1")),
            (LEGACY, CALL.replace("\"_meta\"", "\"task\"")),
            (LEGACY, CALL.replace("{\"limit\":5}", "[]")),
            (LEGACY, format!("[{CALL}]")),
        ] {
            assert!(!is_plain(head, &body, &extensions), "{head:?} {body}");
        }
    }

    #[test]
    fn a_result_stands_in_its_response_as_text_and_as_it_is() {
        let id = RequestId::String("\"id\"".into());
        for result in [
            json!({}),
            json!({ "name": "Zoë \"Z\" \\ \n\t\u{1}\u{7f} 語 😀" }),
            json!({ "data": [{ "a": [1, -2.5, null, true, "", { "\"\\": {} }] }] }),
        ] {
            let response = response(&id, Ok(result.to_string().into()), Some(r#"{"a":{}}"#));
            let response: Value = serde_json::from_slice(&response.into_vec()).unwrap();
            assert_eq!((&response["jsonrpc"], &response["id"]), (&json!("2.0"), &json!("\"id\"")));
            assert_eq!(response["result"]["content"], json!([{ "type": "text", "text": result.to_string() }]));
            assert_eq!(response["result"]["structuredContent"], result);
            assert_eq!(response["result"]["_meta"], json!({ "a": {} }));
        }
        let problem = Problem::new(ErrorCode::ServiceError, "\"no\"");
        let response = response(&RequestId::Number(7), Err(problem.clone()), None).into_vec();
        let expected = json!({ "jsonrpc": "2.0", "id": 7, "result": {
            "content": [{ "type": "text", "text": problem.to_json() }], "isError": true,
        } });
        assert_eq!(serde_json::from_slice::<Value>(&response).unwrap(), expected);
    }
}
