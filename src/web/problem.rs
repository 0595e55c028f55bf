//! Our HTTP errors: the error object as a body, whoever made the error. On `/mcp` it is the `data` of a JSON-RPC error, whose code is the
//! HTTP status: of other bodies, several official clients show nothing.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use http_body_util::BodyExt as _;
use serde::Serialize;
use serde_json::value::RawValue;

use super::message::Id;
use crate::problem::{ErrorCode, Problem};
use crate::telemetry::metrics::PROTOCOL_VERSIONS;
use crate::telemetry::trace::RequestTrace;
use crate::visible;

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

/// The `id` of the request that a response is for.
#[derive(Clone)]
struct To(Id);

/// Notes whom a response is for, in case that it is an error.
pub(super) fn to_request(mut response: Response, id: Option<Id>) -> Response {
    if let Some(id) = id {
        response.extensions_mut().insert(To(id));
    }
    response
}

/// The second response, for the request that the first one answers.
pub(super) fn in_place_of(first: &Response, second: Response) -> Response {
    to_request(second, first.extensions().get().map(|To(id)| id.clone()))
}

/// The body of a JSON-RPC error.
pub(super) fn json_rpc_error(id: Option<&RawValue>, code: i32, message: &str, data: Option<&Problem>) -> Vec<u8> {
    #[derive(Serialize)]
    struct Failure<'a> {
        jsonrpc: &'static str,
        id: Option<&'a RawValue>,
        error: Error<'a>,
    }
    #[derive(Serialize)]
    struct Error<'a> {
        code: i32,
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<Box<RawValue>>,
    }
    let message = &visible::text(message);
    let data = data.and_then(|problem| RawValue::from_string(problem.to_json()).ok());
    let failure = Failure { jsonrpc: "2.0", id, error: Error { code, message, data } };
    serde_json::to_vec(&failure).unwrap_or_default()
}

fn refusal(status: StatusCode, message: impl Into<String>) -> Response {
    response(status, Problem::new(ErrorCode::ValidationError, message))
}

/// `Host` has to name one host (RFC 9112 section 3.2).
pub(super) fn malformed_host() -> Response {
    refusal(StatusCode::BAD_REQUEST, "The `Host` header is missing or names no host: send `host` or `host:port`.")
}

/// A name under which this server is not known.
pub(super) fn foreign_host() -> Response {
    let message = "This server does not answer to this `Host`. Its operators can add the host name to ALLOWED_HOSTS.";
    refusal(StatusCode::FORBIDDEN, message)
}

/// A page in a browser that may not call this server.
pub(super) fn foreign_origin() -> Response {
    let message = "Pages of this origin may not call this server. Its operators can add the origin to ALLOWED_ORIGINS.";
    refusal(StatusCode::FORBIDDEN, message)
}

/// The client takes no JSON.
pub(super) fn not_acceptable() -> Response {
    let message = "The answers of this server are JSON, which the `Accept` header excludes: send \
                   `Accept: application/json, text/event-stream`, or no such header.";
    refusal(StatusCode::NOT_ACCEPTABLE, message)
}

/// The body says that it is no JSON.
pub(super) fn not_json() -> Response {
    refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, "MCP messages are JSON: send `Content-Type: application/json`.")
}

/// A revision of the protocol that is unknown, or not spoken here.
pub(super) fn unserved_revision() -> Response {
    let message = format!(
        "The `MCP-Protocol-Version` header names no revision that this server speaks: {}.",
        PROTOCOL_VERSIONS.join(", ")
    );
    refusal(StatusCode::BAD_REQUEST, message)
}

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
    let mut response = response(StatusCode::BAD_REQUEST, Problem::new(ErrorCode::ValidationError, INCOMPLETE));
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// The body was not complete in time.
pub(super) fn body_too_slow(timeout: Duration) -> Response {
    let seconds = timeout.as_secs_f64();
    let message = format!(
        "The body of the request did not arrive as a whole within {seconds} s (REQUEST_BODY_TIMEOUT). Nothing was run: send the \
         request again."
    );
    let mut problem = Problem::new(ErrorCode::TimeoutError, message);
    problem.details.timeout_seconds = Some(seconds);
    problem.details.retryable = true;
    let mut response = response(StatusCode::REQUEST_TIMEOUT, problem);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
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
    nothing_at(
        &uri,
        match uri.path() {
            "/metrics" => {
                "Metrics are not served on this port, but on the management port (METRICS_PORT, 9090 by default)."
            }
            _ => "There is nothing at this path. MCP is served at /mcp, health at /health/live and /health/ready.",
        },
    )
}

/// The same on the management port.
pub(super) async fn not_on_the_management_port(uri: Uri) -> Response {
    let message = "This is the management port, which serves /metrics alone. MCP and health have the main port (PORT, 8000 by default).";
    nothing_at(&uri, message)
}

fn nothing_at(uri: &Uri, message: &str) -> Response {
    let mut problem = Problem::new(ErrorCode::ValidationError, message);
    // The path may hold anything and is cut: the answer must not grow with the question.
    problem.details.path = Some(uri.path().chars().take(256).collect());
    response(StatusCode::NOT_FOUND, problem)
}

/// A route that exists, asked with a method that it does not take. axum adds `Allow`.
pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> Response {
    refusal(
        StatusCode::METHOD_NOT_ALLOWED,
        match uri.path() {
            "/" => "This address only says what this server is, to GET. MCP is served at /mcp: send the message there.",
            "/mcp" | "/mcp/" if method == Method::GET || method == Method::DELETE => {
                "This method is not allowed here. /mcp takes POST only: this server keeps no sessions and opens no streams by itself."
            }
            "/mcp" | "/mcp/" => "This method is not allowed here: /mcp takes POST only.",
            _ => "This method is not allowed here: this address takes GET only.",
        },
    )
}

/// Gives every error a JSON body. Successes, and what is JSON already, pass untouched.
pub(super) async fn speak_plainly(response: &mut Response, trace: &RequestTrace, is_mcp: bool) {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) {
        return;
    }
    let problem = match response.extensions_mut().remove::<Unsaid>() {
        Some(Unsaid(problem)) => problem,
        None if is_json(response.headers()) => return,
        None => {
            let mut problem = if status.is_client_error() {
                Problem::new(ErrorCode::ValidationError, INCOMPLETE)
            } else {
                Problem::internal()
            };
            problem.details.status_code = Some(status.as_u16());
            problem
        }
    };
    let problem = problem.traced(trace.context().trace_id());
    let body = if is_mcp {
        let id = response.extensions_mut().remove::<To>();
        let id = id.as_ref().map(|To(id)| &**id);
        Body::from(json_rpc_error(id, status.as_u16().into(), &problem.message, Some(&problem)))
    } else {
        Body::from(problem.to_json())
    };
    if status == StatusCode::PAYLOAD_TOO_LARGE {
        // The rest of it is not read, so that no other request can come after it.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    *response.body_mut() = body;
}

fn is_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| value.as_bytes().starts_with(b"application/json"))
}

/// rmcp's text for an error.
pub(super) async fn text_of(body: Body) -> String {
    match http_body_util::Limited::new(body, LONGEST_TEXT).collect().await {
        Ok(collected) => String::from_utf8_lossy(&collected.to_bytes()).into_owned(),
        Err(_) => String::new(),
    }
}
