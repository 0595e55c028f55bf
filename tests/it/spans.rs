//! Traces, as a collector receives them: one connected trace for each request, and no request that suffers from the collector.

use std::time::{Duration, Instant};

use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::{RootSampler, Sampling, Settings, TraceSettings};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::{Value, json};

use crate::support::canaries::{DESCRIPTION, FILTER, TITLE, leak};
use crate::support::collector::{Collector, Seen, base_url};
use crate::support::process::{Program, ReservedPort};
use crate::support::{Era, TestApp};

const IN_META: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const IN_HEADER: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "00f067aa0ba902b7";
const GATEWAY: &str = "b7ad6b7169203331";

/// Exports to this collector, at once.
fn traced(base: &url::Url) -> impl FnOnce(&mut Settings) + use<> {
    let endpoint = base.join("v1/traces").unwrap();
    move |settings| {
        let delay = Duration::from_millis(10);
        settings.telemetry.traces = Some(TraceSettings { schedule_delay: delay, ..TraceSettings::new(endpoint) });
    }
}

async fn traced_app() -> (TestApp, Collector) {
    let (collector, base) = Collector::start().await;
    (TestApp::spawn_with(traced(&base)).await, collector)
}

/// Calls a tool with these parents, where there are any.
async fn call(app: &TestApp, tool: &str, arguments: Value, meta: Option<String>, header: Option<String>) -> Value {
    let mut params = json!({ "name": tool, "arguments": arguments });
    if let Some(traceparent) = meta {
        params["_meta"] = json!({ "traceparent": traceparent });
    }
    let mut request = app.request(Era::Modern, "tools/call", params);
    if let Some(header) = header {
        request = request.header("traceparent", header);
    }
    serde_json::from_str(&request.send().await.unwrap().text().await.unwrap()).unwrap()
}

fn of_kind(spans: &[Seen], kind: SpanKind) -> Vec<&Seen> {
    spans.iter().filter(|span| span.kind == kind).collect()
}

/// The one span of the server, and its children in the order of the attempts, after checking that they hang together.
fn connected<'a>(spans: &'a [Seen], trace_id: &str, app: &TestApp) -> (&'a Seen, Vec<&'a Seen>) {
    let (servers, clients) = (of_kind(spans, SpanKind::Server), of_kind(spans, SpanKind::Client));
    let [server] = servers.as_slice() else { panic!("{spans:#?}") };
    assert!(spans.iter().all(|span| span.trace_id == trace_id), "{spans:#?}");
    assert!(clients.iter().all(|client| client.parent == server.span_id), "{spans:#?}");
    assert!(clients.iter().all(|client| client.nanoseconds <= server.nanoseconds), "{spans:#?}");
    let told: Vec<_> = app.backend_requests().iter().map(|r| r.header("traceparent").unwrap().to_owned()).collect();
    let expected: Vec<_> = clients.iter().map(|client| format!("00-{trace_id}-{}-01", client.span_id)).collect();
    assert_eq!(told, expected, "the backend is told the attempt's span");
    (server, clients)
}

#[tokio::test]
async fn a_call_is_one_connected_trace_from_the_caller_to_each_attempt() {
    let (app, collector) = traced_app().await;
    app.stand_ins.backend.set_fault([FaultRule::status(503).times(1)]);
    let header = format!("00-{IN_HEADER}-{CALLER}-01");
    let answer = call(&app, "list_users", json!({ "limit": 3 }), None, Some(header)).await;
    assert_eq!(answer["result"]["isError"], false, "{answer}");

    let spans = collector.until(3).await;
    let (server, attempts) = connected(&spans, IN_HEADER, &app);
    assert_eq!((server.parent.as_str(), server.links.len(), server.failed), (CALLER, 0, false));
    assert_eq!(server.name, "tools/call list_users");
    for (name, value) in [
        ("mcp.method.name", "tools/call"),
        ("gen_ai.tool.name", "list_users"),
        ("gen_ai.operation.name", "execute_tool"),
        ("mcp.protocol.version", "2026-07-28"),
        ("jsonrpc.request.id", "7"),
        ("network.transport", "tcp"),
        ("network.protocol.name", "http"),
        ("client.address", "127.0.0.1"),
    ] {
        assert_eq!(server.attribute(name), Some(value), "{server:#?}");
    }
    assert_eq!(server.attribute("error.type"), None);

    let backend = app.stand_ins.backend.base_url();
    let port = backend.port().unwrap().to_string();
    for (attempt, (status, error, resends)) in
        attempts.iter().zip([("503", Some("503"), None), ("200", None, Some("1"))])
    {
        assert_eq!(attempt.name, "GET /users");
        for (name, value) in [
            ("http.request.method", Some("GET")),
            ("url.template", Some("/users")),
            ("server.address", backend.host_str()),
            ("server.port", Some(port.as_str())),
            ("http.response.status_code", Some(status)),
            ("error.type", error),
            ("http.request.resend_count", resends),
        ] {
            assert_eq!(attempt.attribute(name), value, "{name}: {attempt:#?}");
        }
        assert_eq!(attempt.failed, error.is_some());
    }
    for (name, value) in [("service.name", "mcp-server"), ("service.version", env!("CARGO_PKG_VERSION"))] {
        assert_eq!(server.resource[name], value);
    }
}

#[tokio::test]
async fn the_message_names_the_parent_and_the_header_becomes_a_link() {
    let (app, collector) = traced_app().await;
    let (meta, header) = (format!("00-{IN_META}-{CALLER}-01"), format!("00-{IN_HEADER}-{GATEWAY}-01"));
    call(&app, "list_users", json!({}), Some(meta.clone()), Some(header)).await;
    let spans = collector.until(2).await;
    let (server, attempts) = connected(&spans, IN_META, &app);
    assert_eq!((server.parent.as_str(), attempts.len()), (CALLER, 1));
    assert_eq!(server.links, [(IN_HEADER.to_owned(), GATEWAY.to_owned())]);

    // The same in both is no link, and without either the trace begins here.
    call(&app, "list_users", json!({}), Some(meta.clone()), Some(meta)).await;
    assert!(collector.until(4).await.iter().skip(2).all(|span| span.links.is_empty()));
    call(&app, "list_users", json!({}), None, None).await;
    let spans = collector.until(6).await;
    let root = of_kind(&spans[4..], SpanKind::Server)[0];
    assert_eq!((root.parent.as_str(), root.links.len()), ("", 0));
    assert!(spans[4..].iter().all(|span| span.trace_id == root.trace_id && span.trace_id != IN_META));
}

#[tokio::test]
async fn failures_are_named_by_the_conventions_and_what_was_said_is_in_no_span() {
    let (app, collector) = traced_app().await;
    let ticket = json!({ "title": TITLE, "description": DESCRIPTION });
    let query = json!({ "dataset": "no-dataset-marked", "filters": { "region": FILTER } });
    let mut seen = 0;
    for (tool, arguments, expected) in [
        ("create_ticket", ticket, vec![("POST /tickets", None), ("tools/call create_ticket", None)]),
        ("create_ticket", json!({ "title": TITLE }), vec![("tools/call create_ticket", Some("tool_error"))]),
        (
            "get_user_profile",
            json!({ "user_id": "nobody-called-marked" }),
            vec![("GET /users/{user_id}", Some("404")), ("tools/call get_user_profile", Some("tool_error"))],
        ),
        (
            "query_data",
            query,
            vec![("GET /query/{dataset}", Some("404")), ("tools/call query_data", Some("tool_error"))],
        ),
        ("no-tool-marked", json!({}), vec![("tools/call", Some("-32602"))]),
    ] {
        call(&app, tool, arguments, None, None).await;
        let spans = collector.until(seen + expected.len()).await;
        let mut found: Vec<_> = spans[seen..].iter().map(|s| (s.name.as_str(), s.attribute("error.type"))).collect();
        found.sort_unstable();
        assert_eq!(found, expected, "{tool}");
        assert!(spans[seen..].iter().all(|span| span.failed == span.attribute("error.type").is_some()), "{spans:#?}");
        seen += expected.len();
    }
    app.stand_ins.backend.set_fault([FaultRule::close_before_head()]);
    call(&app, "list_users", json!({}), None, None).await;
    let unsent = collector.until(seen + 4).await;
    let errors: Vec<_> = unsent[seen..].iter().map(|span| span.attribute("error.type").unwrap()).collect();
    assert_eq!(errors, ["interrupted", "interrupted", "interrupted", "tool_error"]);
    seen += 4;

    app.result(Era::Modern, "tools/list", json!({})).await;
    app.result(Era::Modern, "server/discover", json!({})).await;
    let about =
        json!({ "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": { "name": "x", "version": "1" } });
    app.result(Era::Legacy, "initialize", about).await;
    let names: Vec<_> = collector.until(seen + 3).await.iter().skip(seen).map(|span| span.name.clone()).collect();
    assert_eq!(names, ["tools/list", "server/discover", "initialize"]);
    let told = collector.everything();
    assert_eq!((leak(&told), told.contains("marked")), (None, false), "{told}");
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_ends_its_spans_as_cancelled() {
    let (app, collector) = traced_app().await;
    app.stand_ins.backend.set_fault([FaultRule::hang()]);
    let request = app.request(Era::Modern, "tools/call", json!({ "name": "list_users", "arguments": {} }));
    let waiting = tokio::spawn(request.send());
    crate::support::until(async || !app.backend_requests().is_empty()).await;
    waiting.abort();
    for span in collector.until(2).await {
        assert_eq!((span.attribute("error.type"), span.failed), (Some("cancelled"), true), "{span:#?}");
    }
}

#[tokio::test]
async fn the_sampler_decides_and_the_backend_is_told() {
    let sampled_by_caller = |flags: &str| Some(format!("00-{IN_HEADER}-{CALLER}-{flags}"));
    let (parent_based, share) = (true, RootSampler::Share(0.0));
    for (sampling, header, spans) in [
        (Sampling { parent_based, root: RootSampler::All }, sampled_by_caller("01"), 2),
        (Sampling { parent_based, root: RootSampler::All }, sampled_by_caller("00"), 0),
        (Sampling { parent_based, root: RootSampler::All }, None, 2),
        (Sampling { parent_based, root: RootSampler::None }, sampled_by_caller("01"), 2),
        (Sampling { parent_based, root: share }, None, 0),
        (Sampling { parent_based: false, root: RootSampler::All }, sampled_by_caller("00"), 2),
        (Sampling { parent_based: false, root: RootSampler::None }, sampled_by_caller("01"), 0),
        (Sampling { parent_based: false, root: RootSampler::Share(1.0) }, sampled_by_caller("00"), 2),
    ] {
        let (collector, base) = Collector::start().await;
        let traced = traced(&base);
        let mut app = TestApp::spawn_with(|settings| {
            traced(settings);
            settings.telemetry.traces.as_mut().unwrap().sampling = sampling;
        })
        .await;
        call(&app, "list_users", json!({}), None, header.clone()).await;
        let told = app.backend_requests()[0].header("traceparent").unwrap().to_owned();
        assert!(told.ends_with(if spans > 0 { "-01" } else { "-00" }), "{sampling:?} {header:?}: {told}");
        // What is left is sent when the server stops.
        app.begin_shutdown();
        app.stopped().await.unwrap();
        assert_eq!(collector.spans().len(), spans, "{sampling:?} {header:?}");
    }
}

#[tokio::test]
async fn no_call_fails_or_waits_because_of_the_collector() {
    const CALLS: usize = 200;
    let stand_ins = std::sync::Arc::new(StandIns::start(DemoOptions::default()).await.unwrap());
    let nobody = ReservedPort::new();
    // Accepts connections, for the system does that by itself, and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (way, address) in [
        ("off", None),
        ("refused", Some(([127, 0, 0, 1], nobody.number()).into())),
        ("silent", Some(silent.local_addr().unwrap())),
    ] {
        let mut app = TestApp::spawn_against(std::sync::Arc::clone(&stand_ins), |settings| {
            if let Some(address) = address {
                traced(&base_url(address))(settings);
                let traces = settings.telemetry.traces.as_mut().unwrap();
                (traces.max_queue, traces.max_batch) = (8, 8);
            }
        })
        .await;
        let begun = Instant::now();
        for _ in 0..CALLS {
            let answer = call(&app, "list_users", json!({}), None, None).await;
            assert_eq!(answer["result"]["isError"], false, "{way}: {answer}");
        }
        // Calls that waited for the collector would take this: its connections have 2 s, its answers 10 s.
        assert!(begun.elapsed() < CALLS as u32 * Duration::from_secs(1), "{way}: {:?}", begun.elapsed());
        if address.is_some() {
            crate::support::until(async || app.metric("mcp_server_spans_dropped_total").await > 0.0).await;
            assert_eq!(app.metric("mcp_server_spans_exported_total").await, 0.0);
        }
        app.begin_shutdown();
        tokio::time::timeout(Duration::from_secs(60), app.stopped()).await.expect("it does not stop").unwrap();
    }
}

#[tokio::test]
async fn a_batch_that_the_collector_cannot_take_now_is_sent_again() {
    let (app, collector) = traced_app().await;
    collector.refuse([503, 429]);
    call(&app, "list_users", json!({}), None, None).await;
    collector.until(2).await;
    assert_eq!(app.metric("mcp_server_spans_dropped_total").await, 0.0);
    collector.refuse([400]);
    call(&app, "list_users", json!({}), None, None).await;
    crate::support::until(async || app.metric("mcp_server_spans_dropped_total").await == 2.0).await;
    assert_eq!(app.metric("mcp_server_spans_exported_total").await, 2.0);
}

#[tokio::test]
async fn no_request_to_the_collector_holds_more_spans_than_it_may() {
    for max_batch in [1, 2, 4, 6] {
        let (collector, base) = Collector::start().await;
        let app = TestApp::spawn_with(|settings| {
            traced(&base)(settings);
            let traces = settings.telemetry.traces.as_mut().unwrap();
            // So long that nothing but a full batch is sent, until the server stops.
            (traces.max_batch, traces.schedule_delay) = (max_batch, Duration::from_secs(600));
        });
        let mut app = app.await;
        for _ in 0..2 {
            app.stand_ins.backend.set_fault([FaultRule::status(503).times(1)]);
            call(&app, "list_users", json!({}), None, None).await;
        }
        // One batch at least is full before that. How the rest is divided is the SDK's affair.
        collector.until_at_least(max_batch).await;
        app.begin_shutdown();
        app.stopped().await.unwrap();
        collector.until(6).await;
        assert!(collector.batches().iter().all(|spans| *spans <= max_batch), "{:?}", collector.batches());
    }
}

#[tokio::test]
async fn the_binary_takes_the_standard_variables_and_sends_what_is_left_when_it_stops() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let (collector, base) = Collector::start().await;
    let server = Program::serve(&stand_ins)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", base.as_str())
        .env("OTEL_EXPORTER_OTLP_HEADERS", "api-key=canary%20of%20a%20key,x-tenant=t")
        .env("OTEL_SERVICE_NAME", "tickets")
        .env("OTEL_RESOURCE_ATTRIBUTES", "service.name=loses,deployment.environment.name=a%2Cb")
        .env("OTEL_TRACES_SAMPLER", "always_on")
        .start();
    let client = server.client().await;
    client.until_ready().await;
    client.call("list_users", json!({})).send().await.unwrap();
    server.signal("TERM");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    let spans = collector.until(2).await;
    let about = &spans[0].resource;
    assert_eq!((about["service.name"].as_str(), about["deployment.environment.name"].as_str()), ("tickets", "a,b"));
    assert_eq!(
        (&collector.headers()["api-key"], &collector.headers()["x-tenant"]),
        (&"canary of a key".parse().unwrap(), &"t".parse().unwrap())
    );

    // Switched off by its own variable.
    let server = Program::serve(&stand_ins)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", base.as_str())
        .env("OTEL_SDK_DISABLED", "true")
        .start();
    let client = server.client().await;
    client.until_ready().await;
    client.call("list_users", json!({})).send().await.unwrap();
    server.signal("TERM");
    server.ended().await;
    assert_eq!(collector.spans().len(), 2);
}
