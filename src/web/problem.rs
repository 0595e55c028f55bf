//! Our HTTP errors: the error object of contract §5 as a body, whoever made the error.
//!
//! rmcp answers malformed requests with bare text and, for JSON that it cannot read, with a 415; [`speak_plainly`] puts the
//! right words in their place.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use http_body_util::BodyExt as _;

use crate::problem::{ErrorCode, Problem};
use crate::telemetry::trace::RequestTrace;

/// rmcp's own error texts are shorter than this.
const LONGEST_TEXT: usize = 4_096;
const BODY_TOO_LARGE: &str =
    "The request is larger than this server reads (MAX_REQUEST_BYTES). No legal call is: shorten its texts.";
const INCOMPLETE: &str = "The request could not be read: check its headers and that its body is complete.";
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A problem as the answer to a request. [`speak_plainly`] adds the trace id on the way out.
pub(super) fn response(status: StatusCode, mut problem: Problem) -> Response {
    problem.details.status_code = Some(status.as_u16());
    let mut response = status.into_response();
    if let Some(wait) = problem.details.retry_after_seconds {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs().max(1)));
    }
    response.extensions_mut().insert(Unsaid(problem));
    response
}

/// A problem that still has to become the body of its response.
#[derive(Clone)]
struct Unsaid(Problem);

/// Two readers could take the request for two different ones, and what follows on its connection as well: nothing more is read there.
pub(super) fn ambiguous(message: &str) -> Response {
    let mut response = response(StatusCode::BAD_REQUEST, Problem::new(ErrorCode::ValidationError, message));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// More header fields, or longer ones, than any client has reason to send.
pub(super) fn head_too_large() -> Response {
    let message = "The request has too many header fields, or too long ones. Send only those that MCP needs.";
    response(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, Problem::new(ErrorCode::ValidationError, message))
}

/// A body that is larger than we read, by its own account or as it came.
pub(super) fn body_too_large() -> Response {
    response(StatusCode::PAYLOAD_TOO_LARGE, Problem::new(ErrorCode::ValidationError, BODY_TOO_LARGE))
}

/// The body has not come as a whole.
pub(super) fn broken_off() -> Response {
    response(StatusCode::BAD_REQUEST, Problem::new(ErrorCode::ValidationError, INCOMPLETE))
}

/// There is no room now.
pub(super) fn overloaded(message: &str) -> Response {
    let mut problem = Problem::new(ErrorCode::ServiceError, format!("{message} Try again in a second."));
    problem.details.retryable = true;
    problem.details.retry_after_seconds = Some(Duration::from_secs(1));
    response(StatusCode::SERVICE_UNAVAILABLE, problem)
}

/// This caller has asked enough for now.
pub(super) fn too_many_requests(wait: Duration) -> Response {
    wait_longer(
        wait,
        "This caller sends more requests than the server takes from one caller. Nothing was done; wait for `retry_after_seconds`, \
         and send fewer.",
    )
}

/// So many tokens from this address were refused that another one is not looked at now.
pub(super) fn too_many_refused_tokens(wait: Duration) -> Response {
    wait_longer(
        wait,
        "Too many tokens from this address were refused, so this one was not looked at: it may be good. Nothing was done; wait for \
         `retry_after_seconds`, and send it again.",
    )
}

fn wait_longer(wait: Duration, message: &str) -> Response {
    let mut problem = Problem::new(ErrorCode::ServiceError, message);
    problem.details.retryable = true;
    // In whole seconds, so that header and body agree and nobody comes too early.
    problem.details.retry_after_seconds = Some(Duration::from_secs(wait.as_secs_f64().ceil().max(1.0) as u64));
    response(StatusCode::TOO_MANY_REQUESTS, problem)
}

/// Any path that has no route.
pub(super) async fn not_found(uri: Uri) -> Response {
    let mut problem = Problem::new(
        ErrorCode::ValidationError,
        "There is nothing at this path. MCP is served at /mcp, health at /health/live and /health/ready.",
    );
    // The path may hold anything and is cut: the answer must not grow with the question.
    problem.details.path = Some(uri.path().chars().take(256).collect());
    response(StatusCode::NOT_FOUND, problem)
}

/// A route that exists, asked with a method that it does not take. axum adds `Allow`.
pub(super) async fn method_not_allowed(method: Method) -> Response {
    let message = if method == Method::GET || method == Method::DELETE {
        "This method is not allowed here. /mcp takes POST only: this server keeps no sessions and opens no streams by itself."
    } else {
        "This method is not allowed here; see the `Allow` header."
    };
    response(StatusCode::METHOD_NOT_ALLOWED, Problem::new(ErrorCode::ValidationError, message))
}

/// Gives every error a JSON body: ours, or a JSON-RPC error where a message could not be read. Successes pass untouched.
pub(super) async fn speak_plainly(response: &mut Response, trace: &RequestTrace) {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) {
        return;
    }
    let (status, body) = match response.extensions_mut().remove::<Unsaid>() {
        Some(Unsaid(problem)) => (status, problem.traced(trace.context().trace_id()).to_json()),
        None if is_json(response.headers()) => return,
        None => {
            let text = text_of(std::mem::take(response.body_mut())).await;
            match unreadable_message(status, &text) {
                Some(error) => (StatusCode::BAD_REQUEST, error.to_owned()),
                None => {
                    let (status, mut problem) = in_our_words(status, &text);
                    problem.details.status_code = Some(status.as_u16());
                    (status, problem.traced(trace.context().trace_id()).to_json())
                }
            }
        }
    };
    *response.status_mut() = status;
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        // The rest of it is not read, so that no other request can come after it.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    *response.body_mut() = Body::from(body);
}

fn is_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/json"))
}

async fn text_of(body: Body) -> String {
    match http_body_util::Limited::new(body, LONGEST_TEXT).collect().await {
        Ok(collected) => String::from_utf8_lossy(&collected.to_bytes()).into_owned(),
        Err(_) => String::new(),
    }
}

/// The JSON-RPC error for a body that rmcp could not decode, which it reports as a 415. There is no request id to answer to.
fn unreadable_message(status: StatusCode, text: &str) -> Option<&'static str> {
    if status != StatusCode::UNSUPPORTED_MEDIA_TYPE || !text.starts_with("fail to deserialize request body") {
        return None;
    }
    // serde's text for JSON that is no JSON-RPC message; everything else is no JSON.
    Some(if text.ends_with("unrecognized JSON-RPC message") || text.contains("data did not match any variant") {
        r#"{"jsonrpc":"2.0","error":{"code":-32600,"message":"Invalid Request: the body is JSON, but no single JSON-RPC 2.0 message (batches are not accepted)"}}"#
    } else {
        r#"{"jsonrpc":"2.0","error":{"code":-32700,"message":"Parse error: the body is not valid JSON in UTF-8, or nested too deeply"}}"#
    })
}

/// rmcp's bare errors, in the contract's form.
fn in_our_words(status: StatusCode, text: &str) -> (StatusCode, Problem) {
    let (code, message) = match status {
        StatusCode::FORBIDDEN if text.contains("Origin") => (
            ErrorCode::ValidationError,
            "Pages of this origin may not call this server. Its operators can add the origin to ALLOWED_ORIGINS.",
        ),
        StatusCode::FORBIDDEN => (
            ErrorCode::ValidationError,
            "This server does not answer to this `Host`. Its operators can add the host name to ALLOWED_HOSTS.",
        ),
        StatusCode::NOT_ACCEPTABLE => (
            ErrorCode::ValidationError,
            "The client has to accept both answers: send `Accept: application/json, text/event-stream`.",
        ),
        StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            (ErrorCode::ValidationError, "MCP messages are JSON: send `Content-Type: application/json`.")
        }
        StatusCode::BAD_REQUEST if text.contains("MCP-Protocol-Version") => (
            ErrorCode::ValidationError,
            "The `MCP-Protocol-Version` header names no revision that this server speaks: 2025-03-26, 2025-06-18, 2025-11-25, 2026-07-28.",
        ),
        status if status.is_client_error() => (ErrorCode::ValidationError, INCOMPLETE),
        _ => return (status, Problem::internal()),
    };
    (status, Problem::new(code, message))
}
