//! What is ours on the way of a call, each piece by itself: `cargo bench --features benches`.
//!
//! For comparing a change with what was before it on one machine; `docs/performance.md` has the figures of whole calls.
#![allow(clippy::expect_used, reason = "a benchmark whose setting is wrong ends")]

use bytes::Bytes;
use divan::{Bencher, black_box};
use http::HeaderMap;
use mcp_server::benching::{self, Inside};
use mcp_server::telemetry::audit::Tool;
use mcp_server::telemetry::trace::RequestTrace;
use serde_json::{Map, Value, json};

/// The server's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

const USER: &[u8] = br#"{"id":"u000000042","name":"User u000000042","email":"u000000042@example.com","created_at":"2026-03-04T05:06:07Z","details":{"department":"Engineering","title":"Site Reliability Engineer","phone":"+1-555-0100","location":"Rotterdam","manager_id":"u000000007","floor":4,"remote":true,"groups":["eng","oncall","platform"]}}"#;

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// Rows of about 1 KiB each.
fn rows(count: usize) -> Bytes {
    let row = |number: usize| json!({ "id": number, "ratio": 0.25, "tags": ["a", "b"], "note": "x".repeat(960) });
    json!({ "data": (0..count).map(row).collect::<Vec<_>>() }).to_string().into()
}

#[divan::bench]
fn read_call(bencher: Bencher<'_, '_>) {
    const CALL: &[u8] = br#"{"jsonrpc":"2.0","id":4711,"method":"tools/call","params":{"name":"get_user_profile","arguments":{"user_id":"u000000042","include_details":true},"_meta":{"progressToken":4711}}}"#;
    let inside = Inside::default();
    assert!(inside.read_call(CALL));
    bencher.bench_local(|| inside.read_call(black_box(CALL)));
}

#[divan::bench(args = ["get_user_profile", "create_ticket", "query_data"])]
fn decode_arguments(bencher: Bencher<'_, '_>, tool: &str) {
    let inside = Inside::default();
    let arguments = object(match tool {
        "create_ticket" => {
            json!({ "title": "Printer", "description": "It prints nothing but zeros. ".repeat(20), "priority": "high" })
        }
        "query_data" => json!({ "dataset": "sales", "filters": { "region": "eu", "year": 2026 }, "limit": 100 }),
        _ => json!({ "user_id": "u000000042", "include_details": true }),
    });
    assert!(inside.decode_arguments(tool, arguments.clone()));
    bencher.with_inputs(|| arguments.clone()).bench_values(|arguments| inside.decode_arguments(tool, arguments));
}

#[divan::bench]
fn refuse_arguments(bencher: Bencher<'_, '_>) {
    let inside = Inside::default();
    let arguments = object(json!({ "title": "", "priority": "urgent", "colour": "red" }));
    let inputs = bencher.with_inputs(|| arguments.clone());
    inputs.bench_values(|arguments| inside.refuse_arguments("create_ticket", arguments));
}

#[divan::bench]
fn render_failure(bencher: Bencher<'_, '_>) {
    let (inside, trace) = (Inside::default(), RequestTrace::new(&HeaderMap::new()));
    bencher.bench_local(|| inside.render_failure(&trace));
}

#[divan::bench]
fn read_token(bencher: Bencher<'_, '_>) {
    let inside = Inside::default();
    bencher.bench_local(|| inside.read_token());
}

#[divan::bench]
fn build_path(bencher: Bencher<'_, '_>) {
    let inside = Inside::default();
    bencher.bench_local(|| inside.build_path(black_box("u000000042")));
}

#[divan::bench]
fn decode_user(bencher: Bencher<'_, '_>) {
    let inside = Inside::default();
    bencher.bench_local(|| inside.decode_user(black_box(USER)));
}

#[divan::bench]
fn render_user(bencher: Bencher<'_, '_>) {
    let inside = Inside::default();
    let user = inside.decode_user(USER);
    bencher.bench_local(|| inside.render_user(black_box(&user)));
}

#[divan::bench(args = [1, 100, 1_000])]
fn decode_rows(bencher: Bencher<'_, '_>, count: usize) {
    let (inside, body) = (Inside::default(), rows(count));
    bencher.counter(divan::counter::BytesCount::new(body.len())).bench_local(|| inside.decode_rows(black_box(&body)));
}

#[divan::bench(args = [1, 100, 1_000])]
fn write_response(bencher: Bencher<'_, '_>, count: usize) {
    let result = String::from_utf8_lossy(&rows(count)).into_owned();
    assert!(benching::write_response(&result).len() > 2 * result.len());
    let size = divan::counter::BytesCount::new(result.len());
    bencher.counter(size).bench_local(|| benching::write_response(black_box(&result)));
}

/// A request's trace id, and the span that log lines take it from.
#[divan::bench]
fn follow_request(bencher: Bencher<'_, '_>) {
    let (dispatch, _guard) = benching::logs();
    tracing::dispatcher::with_default(&dispatch, || bencher.bench_local(benching::follow_request));
}

/// How a call ends in the log and in the audit, with the hash of its arguments: handed to one writer's thread, or to both, which drop
/// what they cannot take.
#[divan::bench(args = [false, true])]
fn end_call(bencher: Bencher<'_, '_>, to_file: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let (dispatch, _guard) = benching::logs();
    tracing::dispatcher::with_default(&dispatch, || {
        let audit = benching::audit(to_file.then(|| folder.path().join("audit")));
        let (trace, tool) =
            (RequestTrace::new(&HeaderMap::new()), Box::leak(Box::new(Tool::new("get_user_profile", &"schema"))));
        bencher.bench_local(|| benching::end_call(&audit, &trace, tool));
    });
}

/// Begun, ended, and queued for a collector that is not there.
#[divan::bench]
fn trace_call(bencher: Bencher<'_, '_>) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let nobody = url::Url::parse("http://127.0.0.1:9").expect("an address");
    let (spans, trace) = (benching::spans(nobody), RequestTrace::new(&HeaderMap::new()));
    let described = benching::descriptions();
    bencher.bench_local(|| benching::trace_call(&spans, &trace, &described));
}
