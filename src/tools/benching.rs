//! Ways in for micro-benchmarks: the messages, arguments and results of tools, and what is told of a failure.

use super::*;
use crate::backend::{BackendError, User};

/// Checks and decodes the arguments of a tool.
pub(crate) fn decode(tool: &str, arguments: JsonObject) -> Result<(), Problem> {
    fn decode<T: Tool>(arguments: JsonObject) -> Result<(), Problem> {
        find(T::NAME).map_or(Ok(()), |entry| args::decode::<T>(&entry.rules, arguments).map(drop))
    }
    match tool {
        tickets::CreateTicket::NAME => decode::<tickets::CreateTicket>(arguments),
        data::QueryData::NAME => decode::<data::QueryData>(arguments),
        _ => decode::<users::GetUserProfile>(arguments),
    }
}

/// Reads the message of a plain call.
pub(crate) fn read_call(server: &ToolServer, body: &[u8], extensions: &http::Extensions) -> bool {
    let head = Head { protocol: "2025-11-25", method: None, name: None };
    server.plain_call(head, body, extensions).is_some()
}

/// Writes the response of a plain call.
pub(crate) fn write_response(result: String) -> Vec<u8> {
    plain::response(&rmcp::model::RequestId::Number(1), Ok(result.into()), None).into_vec()
}

/// A user as the text of a result.
pub(crate) fn render(user: &User) -> Result<String, serde_json::Error> {
    super::render(user)
}

/// What a caller is told of a failure.
pub(crate) fn advice(error: &BackendError) -> Problem {
    error::advice(error, || "user `42`".to_owned())
}
