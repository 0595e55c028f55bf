//! What the fuzz targets in `fuzz/` call: one function for each, which panics when a promise is broken. No release holds this.
//!
//! The clock stands still while anything can happen without it, so that patience costs no time, and nothing leaves the process:
//! Entra refuses every exchange, so no call gets as far as the backend.
#![allow(clippy::panic, clippy::indexing_slicing, clippy::expect_used, reason = "a target fails by panicking")]

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body::Frame;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backend::{self, BackendClient, Failure, Route};
use crate::identity::simulated;
use crate::problem::check::assert_well_formed;
use crate::settings::{BackendSettings, WebSettings};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{RequestTrace, TRACEPARENT, TRACESTATE, TraceContext};
use crate::tools::{self, TOOL_NAMES, ToolServer, Wiring};
use crate::web::{self, Health, Limits, Web};

/// A server without sockets.
struct Bench {
    runtime: Runtime,
    backend: Arc<BackendClient>,
    web: Arc<Web>,
    limits: Limits,
}

impl Bench {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        let metrics = Arc::new(Metrics::new(&TOOL_NAMES, &Route::TEMPLATES));
        let url = url::Url::parse("http://127.0.0.1:1/api").expect("an address");
        let settings = BackendSettings { max_response_bytes: 4_096, ..BackendSettings::new(url) };
        let identity = runtime.block_on(async { simulated::no_token() });
        let backend = BackendClient::new(&settings, identity, Arc::clone(&metrics)).expect("TLS");
        let backend = Arc::new(backend);
        let wiring = Wiring {
            backend: Arc::clone(&backend),
            metrics: Arc::clone(&metrics),
            audit: Arc::default(),
            spans: None,
            max_in_flight_per_tool: 512,
            tell_causes: false,
            out_of_time: CancellationToken::new(),
            tracker: TaskTracker::new(),
        };
        let tools = ToolServer::new(wiring, |_, _| true);
        let settings = WebSettings {
            allowed_origins: vec!["https://app.example".to_owned()],
            allowed_hosts: Some(["localhost", "mcp.example:8443"].map(str::to_owned).to_vec()),
            ..WebSettings::default()
        };
        let health = Arc::new(Health::new(|| false, false));
        let web = Arc::new(Web::new(&settings, tools, metrics, health, None));
        Self { runtime, backend, web, limits: Limits::from(&settings) }
    }

    /// Runs something with this server. Whatever it waits for has to end within some virtual minutes.
    fn run<T>(run: impl AsyncFnOnce(&Self) -> T) -> T {
        thread_local! {
            static BENCH: Bench = Bench::new();
        }
        BENCH.with(|bench| {
            let run = async { tokio::time::timeout(Duration::from_secs(300), run(bench)).await };
            bench.runtime.block_on(run).expect("no end in sight")
        })
    }
}

/// A server for tests that bring their own sockets.
#[cfg(test)]
pub(crate) fn web() -> Arc<Web> {
    Bench::new().web
}

/// The first byte says how the rest is taken, if there is one.
fn split(bytes: &[u8]) -> (u8, &[u8]) {
    bytes.split_first().map_or((0, bytes), |(first, rest)| (*first, rest))
}

/// Bytes on a connection. The first says in pieces of which size they come, and whether the client hangs up after them.
pub fn http(bytes: &[u8]) {
    let (how, bytes) = split(bytes);
    let pieces: Vec<&[u8]> = match usize::from(how >> 1) {
        0 => vec![bytes],
        size => bytes.chunks(size * 16).collect(),
    };
    let answer =
        Bench::run(async |bench| web::fuzzing::converse(&bench.web, &bench.limits, &pieces, how & 1 == 1).await);
    if answer.is_empty() {
        return;
    }
    let head = String::from_utf8_lossy(&answer[..answer.len().min(12)]);
    let status = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "));
    let status: u16 = status.and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status: {head:?}"));
    assert!(status < 500 || status == 503 || status == 504, "a client causes a {status}");
}

/// A body for the MCP endpoint. The first byte says in which era it is sent, and with how honest headers. The short way of plain
/// calls and rmcp's have to answer alike.
pub fn json_rpc(bytes: &[u8]) {
    let (how, body) = split(bytes);
    let mut request = http::Request::post("/mcp").header(header::HOST, "localhost");
    request = request.header(header::CONTENT_TYPE, "application/json");
    request = request.header(header::ACCEPT, "application/json, text/event-stream");
    request = request.header(TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let versions =
        [None, Some("2025-03-26"), Some("2025-06-18"), Some("2025-11-25"), Some("2026-07-28"), Some("2026-07-28")];
    if let Some(version) = versions[usize::from(how) % versions.len()] {
        request = request.header("mcp-protocol-version", version);
    }
    if usize::from(how) % versions.len() == 4 {
        let message: Value = serde_json::from_slice(body).unwrap_or_default();
        for (name, value) in [("mcp-method", &message["method"]), ("mcp-name", &message["params"]["name"])] {
            if let Some(value) = value.as_str().and_then(|value| HeaderValue::from_str(value).ok()) {
                request = request.header(name, value);
            }
        }
    }
    let request = request.body(body.to_vec()).expect("a request");
    let response = Bench::run(async |bench| web::fuzzing::ask_both_ways(&bench.web, request).await);
    let (status, body) = (response.status(), response.body());
    assert!(!status.is_server_error(), "{status} for {:?}", String::from_utf8_lossy(bytes));
    let kind = response.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    if !kind.starts_with(b"application/json") {
        assert!(!status.is_client_error(), "{status} without a JSON body");
        return;
    }
    let answer: Value = serde_json::from_slice(body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    let text = answer["result"]["content"][0]["text"].as_str();
    assert_eq!(answer["jsonrpc"], "2.0", "{answer}");
    if answer["result"]["isError"] == true {
        assert_well_formed(text.unwrap_or_default());
    } else if status.is_client_error() {
        web::fuzzing::assert_wrapped(body);
    }
}

/// A head for a plain call. The short way and rmcp's have to judge it alike; rmcp reads it with a header that says nothing before
/// 2026-07-28, and keeps the short way away.
#[cfg(test)]
pub(crate) fn head(fields: &[(HeaderName, HeaderValue)]) {
    const CALL: &[u8] = br#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"list_users"}}"#;
    let mut request = http::Request::post("/mcp").body(CALL.to_vec()).expect("a request");
    request
        .headers_mut()
        .insert(TRACEPARENT, HeaderValue::from_static("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"));
    request.headers_mut().extend(fields.iter().cloned());
    let mut by_rmcp = request.clone();
    by_rmcp.headers_mut().insert("mcp-param-none", HeaderValue::from_static("none"));
    let [answer, by_rmcp] = Bench::run(async |bench| {
        [web::fuzzing::ask(&bench.web, request.clone()).await, web::fuzzing::ask(&bench.web, by_rmcp).await]
    });
    let same = answer.status() == by_rmcp.status() && answer.body() == by_rmcp.body();
    assert!(same, "two answers to {:?}: {answer:?}, {by_rmcp:?}", request.headers());
}

/// JSON for the arguments of the tool that the first byte picks.
pub fn tool_arguments(bytes: &[u8]) {
    let (tool, json) = split(bytes);
    let Ok(arguments) = serde_json::from_slice(json) else { return };
    if let Err(problem) = tools::fuzzing::decode(tool, arguments) {
        let json = problem.to_json();
        assert_well_formed(&json);
        assert!(!problem.details.fields.is_empty(), "the check and the decoder disagree");
        assert!(json.len() < 8_192, "the answer grows with the mistake");
    }
}

/// An answer of the backend: which call it is for, two bytes of status, the size of its chunks, the length of its `Retry-After`,
/// that header, and the body.
pub fn backend_answer(bytes: &[u8]) {
    let [what, high, low, size, length, rest @ ..] = bytes else { return };
    let (wait, body) = rest.split_at(usize::from(*length).min(rest.len()));
    let status = StatusCode::from_u16(100 + u16::from_be_bytes([*high, *low]) % 900).expect("a status");
    let chunks = body.chunks(usize::from(*size).max(1) * 16).map(Bytes::copy_from_slice).collect();
    let mut response = http::Response::new(reqwest::Body::wrap(Chunks(chunks)));
    *response.status_mut() = status;
    if let Ok(wait) = HeaderValue::from_bytes(wait) {
        response.headers_mut().insert(header::RETRY_AFTER, wait);
    }
    let answer = Bench::run(async |bench| backend::fuzzing::read_answer(&bench.backend, *what, response.into()).await);
    let Err(error) = answer else { return assert!(status.is_success()) };
    assert_well_formed(&tools::fuzzing::advice(&error).to_json());
    // A final 1xx is no answer that HTTP knows: whatever sent it may have applied the write.
    let doubtful = !status.is_client_error() || status.as_u16() == 408;
    assert_eq!(error.unknown_write.is_some(), error.write && doubtful, "{error}");
    if let Failure::TooLarge(limit) = error.failure {
        assert!(body.len() > limit);
    }
}

struct Chunks(std::collections::VecDeque<Bytes>);

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop_front().map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// Values of the headers that we read from others, one a line, and below them an answer in Entra's place.
pub fn headers(bytes: &[u8]) {
    const NAMES: [HeaderName; 5] = [
        header::RETRY_AFTER,
        HeaderName::from_static("x-ms-retry-after-ms"),
        HeaderName::from_static("retry-after-ms"),
        TRACEPARENT,
        TRACESTATE,
    ];
    let mut lines = bytes.splitn(NAMES.len() + 2, |byte| *byte == b'\n');
    let status = lines.next().and_then(|status| str::from_utf8(status).ok()?.parse().ok()).unwrap_or(200);
    let values = NAMES
        .into_iter()
        .zip(lines.by_ref())
        .filter_map(|(name, value)| Some((name, HeaderValue::from_bytes(value).ok()?)));
    let headers: HeaderMap = values.collect();
    let body = lines.next().unwrap_or_default();

    let wait = backend::fuzzing::wait(&headers).unwrap_or_default();
    assert!(wait < Duration::from_secs(1 << 53), "{wait:?} is no number for JSON");
    let trace = RequestTrace::new(&headers);
    let header = trace.context().header();
    assert_eq!(TraceContext::parse(header.to_str().unwrap_or_default()), Some(trace.context()));
    assert!(trace.trace().state.as_ref().is_none_or(|state| state.len() <= 512 && state.to_str().is_ok()));
    let Ok(status) = StatusCode::from_u16(status) else { return };
    match simulated::read_answer(status, &headers, body) {
        Ok(token) => {
            assert!(serde_json::from_slice::<Value>(&token).is_ok_and(|token| token["access_token"].is_string()))
        }
        Err(error) => {
            let said = format!("{error} {} {}", error.hint(), error.detail().unwrap_or_default());
            assert!(!said.contains(char::is_control) && said.len() < 8_192, "{said:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Runs the committed seeds of a target: what the fuzzer begins with, and what it once found.
    #[expect(clippy::print_stdout, reason = "shown when the test fails: the last one is the culprit")]
    fn seeds(target: &str, run: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
        let mut count = 0;
        for seed in std::fs::read_dir(folder).unwrap() {
            let seed = seed.unwrap().path();
            println!("{}", seed.display());
            run(&std::fs::read(seed).unwrap());
            count += 1;
        }
        assert!(count >= 5, "{target} has {count} seeds");
    }

    #[test]
    fn a_call_over_the_pipe_goes_as_far_as_the_token() {
        let seed = include_bytes!("../fuzz/seeds/http/call");
        let answer =
            Bench::run(async |bench| web::fuzzing::converse(&bench.web, &bench.limits, &[&seed[1..]], false).await);
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("AUTHENTICATION_ERROR"), "{answer}");
    }

    #[test]
    fn connections_survive_every_seed() {
        seeds("http", http);
    }

    #[test]
    fn the_endpoint_survives_every_seed() {
        seeds("json_rpc", json_rpc);
    }

    #[test]
    fn the_tools_survive_every_seed() {
        seeds("tool_arguments", tool_arguments);
    }

    #[test]
    fn the_backend_client_survives_every_seed() {
        seeds("backend_answer", backend_answer);
    }

    #[test]
    fn the_readers_of_headers_survive_every_seed() {
        seeds("headers", headers);
    }
}
