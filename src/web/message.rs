//! The JSON-RPC envelope of a message, read before rmcp reads the rest: whom the answer is for, and what is wrong with the message.
//!
//! rmcp has one text for whatever it cannot decode, and no `id` for it. Parameters are not read here: the tools and rmcp do that.

use std::borrow::Cow;
use std::fmt;

use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, header};
use http_body_util::{BodyExt as _, Collected};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::problem;

const PARSE_ERROR: i32 = -32700;
const INVALID_REQUEST: i32 = -32600;
const METHOD_NOT_FOUND: i32 = -32601;

/// The `id` of a request, as it was written.
pub(super) type Id = Box<RawValue>;

/// A request or a notification.
#[derive(Debug)]
pub(super) struct Message<'a> {
    /// `None` for a notification.
    pub(super) id: Option<Id>,
    pub(super) method: Cow<'a, str>,
    params: Option<&'a RawValue>,
}

/// Why a body is no message, for a JSON-RPC error.
#[derive(Debug)]
pub(super) struct Unreadable {
    /// Where it could be read.
    pub(super) id: Option<Id>,
    code: i32,
    message: Cow<'static, str>,
}

impl<'a> Message<'a> {
    pub(super) fn read(body: &'a [u8]) -> Result<Self, Unreadable> {
        let not_json = || Unreadable::new(None, PARSE_ERROR, "Parse error: the body is not valid JSON in UTF-8.");
        let text = str::from_utf8(body).map_err(|_| not_json())?;
        let whole: &RawValue = serde_json::from_str(text).map_err(|_| not_json())?;
        match whole.get().as_bytes().first() {
            Some(b'{') => {}
            Some(b'[') => {
                let message = "Invalid Request: the body is a batch, which MCP no longer has: send each message as a request of its own.";
                return Err(Unreadable::new(None, INVALID_REQUEST, message));
            }
            _ => {
                let message = "Invalid Request: the body is JSON, but no object: send one JSON-RPC 2.0 message.";
                return Err(Unreadable::new(None, INVALID_REQUEST, message));
            }
        }
        let members: Members<'_> = serde_json::from_str(whole.get()).map_err(|_| not_json())?;
        members.message()
    }

    /// The revision that the message names itself, as all of 2026-07-28 do.
    pub(super) fn has_protocol_version(&self) -> bool {
        let version = self.params.and_then(|params| member(params, "_meta"));
        version.and_then(|meta| member(meta, "io.modelcontextprotocol/protocolVersion")).is_some_and(is_string)
    }

    /// Whether the parameters decode as these.
    pub(super) fn params_are<T: DeserializeOwned>(&self) -> bool {
        self.params.is_some_and(|params| serde_json::from_str::<T>(params.get()).is_ok())
    }

    /// Whether this server has the method, in every revision.
    pub(super) fn is_served(&self) -> bool {
        matches!(&*self.method, "tools/call" | "tools/list" | "server/discover")
    }

    /// Says in a sentence that there is no such method, where rmcp says it with the bare name.
    pub(super) async fn in_a_sentence(&self, response: Response) -> Response {
        let (parts, body) = response.into_parts();
        // In memory, and no larger than the request.
        let body = body.collect().await.map(Collected::to_bytes).unwrap_or_default();
        let is_unknown = serde_json::from_slice::<Failure>(&body).is_ok_and(|f| f.error.code == METHOD_NOT_FOUND);
        if !is_unknown {
            return Response::from_parts(parts, body.into());
        }
        let is_harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"/_-.".contains(&byte);
        let message = match &*self.method {
            method @ ("initialize" | "ping") => {
                format!("`{method}` is not a method of protocol revision 2026-07-28; send `server/discover`.")
            }
            method if method.len() <= 64 && !method.is_empty() && method.bytes().all(is_harmless) => {
                format!(
                    "This server has no method `{method}`: it offers tools only, with `tools/list` and `tools/call`."
                )
            }
            _ => "This server has no such method: it offers tools only, with `tools/list` and `tools/call`.".to_owned(),
        };
        let body = problem::json_rpc_error(self.id.as_deref(), METHOD_NOT_FOUND, &message, None);
        Response::from_parts(parts, body.into())
    }

    /// What rmcp's refusal to decode a message means that has the right envelope.
    pub(super) fn undecodable(&self, why: &str) -> Unreadable {
        let (code, message) = if why.contains("recursion limit") {
            (PARSE_ERROR, "Parse error: the message is nested too deeply; 128 levels are read at most.")
        } else if why.contains("number out of range") {
            (PARSE_ERROR, "Parse error: the message holds a number that is too large to be read.")
        } else {
            (INVALID_REQUEST, "Invalid Request: the message is no request or notification of MCP.")
        };
        Unreadable::new(self.id.clone(), code, message)
    }
}

impl Unreadable {
    fn new(id: Option<Id>, code: i32, message: impl Into<Cow<'static, str>>) -> Self {
        Self { id, code, message: message.into() }
    }

    pub(super) fn response(self) -> Response {
        let body = problem::json_rpc_error(self.id.as_deref(), self.code, &self.message, None);
        (StatusCode::BAD_REQUEST, [(header::CONTENT_TYPE, problem::JSON)], body).into_response()
    }
}

/// The part of a JSON-RPC error that tells errors apart.
#[derive(serde::Deserialize)]
struct Failure {
    error: Code,
}

#[derive(serde::Deserialize)]
struct Code {
    code: i32,
}

/// The members that JSON-RPC knows, each with how often it stands there.
#[derive(Default)]
struct Members<'a>([(Option<&'a RawValue>, usize); NAMES.len()]);

const NAMES: [&str; 6] = ["jsonrpc", "id", "method", "params", "result", "error"];

impl<'a> Members<'a> {
    fn message(self) -> Result<Message<'a>, Unreadable> {
        let Self([jsonrpc, id, method, params, result, error]) = self;
        let valid_id = id.0.filter(|raw| id.1 == 1 && is_id(raw)).map(ToOwned::to_owned);
        let wrong = |what: Cow<'static, str>| {
            Err(Unreadable::new(valid_id.clone(), INVALID_REQUEST, format!("Invalid Request: {what}.")))
        };
        let counts = [jsonrpc, id, method, params, result, error].map(|(_, count)| count);
        if let Some((name, _)) = NAMES.iter().zip(counts).find(|(_, count)| *count > 1) {
            return wrong(format!("`{name}` stands there more than once").into());
        }
        if jsonrpc.0.and_then(string).is_none_or(|version| version != "2.0") {
            return wrong("`jsonrpc` has to be the string \"2.0\"".into());
        }
        if id.0.is_some() && valid_id.is_none() {
            return wrong("`id` has to be a string or an integer".into());
        }
        let answers = [("result", result), ("error", error)].into_iter().find(|(_, (value, _))| value.is_some());
        let method = match (method.0, answers) {
            (Some(_), Some((name, _))) => return wrong(format!("a request has no `{name}`").into()),
            (None, Some(_)) => {
                return wrong("this is a response, but this server sends no requests that one could answer".into());
            }
            (None, None) => return wrong("`method` is missing".into()),
            (Some(method), None) => match string(method) {
                Some(method) => method,
                None => return wrong("`method` has to be a string".into()),
            },
        };
        let is_object = |raw: &RawValue| raw.get().starts_with('{');
        let is_null = |raw: &RawValue| raw.get() == "null";
        if params.0.is_some_and(|params| !is_object(params) && !is_null(params)) {
            return wrong("`params` has to be an object".into());
        }
        let meta = params.0.and_then(|params| member(params, "_meta"));
        if meta.is_some_and(|meta| !is_object(meta) && !is_null(meta)) {
            return wrong("`params._meta` has to be an object".into());
        }
        Ok(Message { id: valid_id, method, params: params.0 })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Known;
        impl<'de> Visitor<'de> for Known {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Members::default();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    let slot = NAMES.iter().position(|known| *known == name).and_then(|at| members.0.get_mut(at));
                    if let Some((last, count)) = slot {
                        (*last, *count) = (Some(value), *count + 1);
                    }
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Known)
    }
}

/// One member of an object, the last of its name.
fn member<'a>(object: &'a RawValue, name: &'static str) -> Option<&'a RawValue> {
    struct Named(&'static str);
    impl<'de> Visitor<'de> for Named {
        type Value = Option<&'de RawValue>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = None;
            while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                if name == self.0 {
                    found = Some(value);
                }
            }
            Ok(found)
        }
    }
    serde_json::Deserializer::from_str(object.get()).deserialize_map(Named(name)).ok().flatten()
}

fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::from_str::<String>(raw.get()).ok().map(Cow::Owned)
}

fn is_string(raw: &RawValue) -> bool {
    raw.get().starts_with('"')
}

/// A string, or an integer that every implementation of JSON keeps, in whatever form it is written (`1.0`).
fn is_id(raw: &RawValue) -> bool {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let text = raw.get();
    let is_integer = |float: f64| float.fract() == 0.0 && float.abs() < EXACT;
    is_string(raw) || text.parse::<i64>().is_ok() || text.parse::<f64>().is_ok_and(is_integer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_stands_there_is_read_or_refused(body in proptest::collection::vec(any::<u8>(), 0..40)) {
            let body = crate::json::repaired(&body);
            if let Err(unreadable) = Message::read(&body) {
                prop_assert!([PARSE_ERROR, INVALID_REQUEST].contains(&unreadable.code));
            }
        }
    }
}
