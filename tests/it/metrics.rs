//! What is counted, and where it can be read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt as _;
use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::scrape::{Sample, Scrape};
use crate::support::{Era, TestApp, message, until};

async fn get(app: &TestApp, address: std::net::SocketAddr, path: &str) -> (u16, String, String) {
    let answer = app.http.get(format!("http://{address}{path}")).send().await.unwrap();
    let content_type = answer.headers()["content-type"].to_str().unwrap().to_owned();
    (answer.status().as_u16(), content_type, answer.text().await.unwrap())
}

#[tokio::test]
async fn metrics_are_on_the_management_port_alone() {
    let app = TestApp::spawn().await;
    let (status, content_type, text) = get(&app, app.metrics_address, "/metrics").await;
    assert_eq!(status, 200);
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
    assert!(text.contains(concat!("mcp_server_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1")), "{text}");

    for (address, path) in [
        (app.address, "/metrics"),
        (app.metrics_address, "/mcp"),
        (app.metrics_address, "/health/live"),
        (app.metrics_address, "/"),
    ] {
        let (status, content_type, text) = get(&app, address, path).await;
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON from {path}: `{text}`"));
        assert_eq!((status, &*content_type), (404, "application/json"), "{path}");
        assert_eq!((&error["error"], &error["details"]["path"]), (&json!("VALIDATION_ERROR"), &json!(path)));
    }
    let post = app.http.post(format!("http://{}/metrics", app.metrics_address)).send().await.unwrap();
    assert_eq!((post.status().as_u16(), &post.headers()["allow"]), (405, &"GET,HEAD".parse().unwrap()));
}

#[tokio::test]
async fn open_metrics_is_for_those_that_ask_and_text_has_the_same_figures() {
    let app = TestApp::spawn().await;
    app.until_ready().await;
    app.call(Era::Legacy, "list_users", json!({})).await;
    let ask = async |accept| {
        let request = app.http.get(format!("http://{}/metrics", app.metrics_address)).header("accept", accept);
        let answer = request.send().await.unwrap();
        (answer.headers()["content-type"].to_str().unwrap().to_owned(), answer.text().await.unwrap())
    };
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    let (content_type, open_metrics) = ask(prometheus).await;
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(open_metrics.ends_with("# EOF\n"), "{open_metrics}");
    let (content_type, text) = ask("text/html,application/xml;q=0.9,*/*;q=0.8").await;
    assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");

    let series = |text: &str| -> Vec<String> {
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
    };
    assert_eq!(series(&text), series(&open_metrics));
    // Each sample follows the type of its family, which in this format has the name of a counter's samples.
    let (mut family, mut kind) = ("", "");
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("# TYPE ") {
            (family, kind) = typed.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", family.ends_with("_total"), "{line}");
        } else if let Some(comment) = line.strip_prefix('#') {
            assert!(comment.starts_with(" HELP "), "{line}");
        } else {
            let suffix = line.split(['{', ' ']).next().unwrap().strip_prefix(family).unwrap();
            assert_eq!(kind == "histogram", ["_bucket", "_count", "_sum"].contains(&suffix), "{line}");
            assert!(kind == "histogram" || suffix.is_empty(), "{line}");
        }
    }
}

/// Everything that can happen to a call, a request and an attempt, and the figures that must add up to it.
#[tokio::test]
async fn every_call_request_and_attempt_is_counted_once_under_what_became_of_it() {
    let app = TestApp::spawn().await;
    app.until_ready().await;
    let probes = app.scrape().await.sum("http_server_request_duration_seconds_count", &[]);
    let backend = &app.stand_ins.backend;
    let call = async |era, tool, arguments| {
        app.call(era, tool, arguments).await;
    };
    for _ in 0..3 {
        call(Era::Legacy, "list_users", json!({})).await;
    }
    call(Era::Modern, "list_users", json!({ "skip": 1 })).await;
    call(Era::Legacy, "list_users", json!({ "limit": 0 })).await;
    call(Era::Legacy, "get_user_profile", json!({ "user_id": "nobody" })).await;
    let ticket = json!({ "title": "A title", "description": "Something is broken." });
    call(Era::Modern, "create_ticket", ticket).await;
    backend.set_fault([FaultRule::status(500)]);
    for _ in 0..2 {
        call(Era::Legacy, "query_data", json!({ "dataset": "sales" })).await;
    }
    backend.set_fault([FaultRule::status(503).times(1)]);
    call(Era::Legacy, "query_data", json!({ "dataset": "sales" })).await;
    backend.set_fault([FaultRule::status(401)]);
    call(Era::Legacy, "list_tickets", json!({})).await;
    backend.set_fault([FaultRule::hang().times(1)]);
    let seen = backend.request_count().get();
    let params = json!({ "name": "list_tickets", "arguments": {} });
    let leaving = tokio::spawn(app.request(Era::Legacy, "tools/call", params).header("connection", "close").send());
    backend.request_count().reaches(seen + 1).await;
    leaving.abort();
    app.until_idle().await;
    backend.set_fault([]);

    for era in Era::ALL {
        app.send(era, "tools/list", json!({})).await;
        app.send(era, "tools/call", json!({ "name": "no_such_tool", "arguments": {} })).await;
        app.send(era, "prompts/list", json!({})).await;
        app.send(era, "no/such/method", json!({})).await;
    }
    app.send(Era::Modern, "server/discover", json!({})).await;
    app.send(Era::Legacy, "ping", json!({})).await;
    let client = json!({ "name": "client", "version": "1" });
    let params = json!({ "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client });
    app.post(message(Era::Legacy, "initialize", params).to_string()).send().await.unwrap();
    for path in ["/", "/nowhere", "/mcp"] {
        app.http.get(app.url(path)).send().await.unwrap();
    }
    app.http.request("BREW".parse().unwrap(), app.url("/health/live")).send().await.unwrap();
    app.post("no JSON").send().await.unwrap();
    app.until_idle().await;

    let scrape = app.scrape().await;
    let calls = |outcome, fault| scrape.sum("mcp_server_calls_total", &[("outcome", outcome), ("fault", fault)]);
    assert_eq!(calls("ok", "none"), 6.0, "{}", scrape.text);
    assert_eq!(calls("VALIDATION_ERROR", "caller"), 1.0);
    assert_eq!(calls("cancelled", "caller"), 1.0);
    assert_eq!(calls("SERVICE_ERROR", "backend"), 3.0, "404, and 500 twice");
    assert_eq!(calls("AUTHENTICATION_ERROR", "server"), 1.0);
    assert_eq!(scrape.sum("mcp_server_calls_total", &[]), 12.0, "{}", scrape.text);

    let operations = |labels: &[(&str, &str)]| scrape.sum("mcp_server_operation_duration_seconds_count", labels);
    let (old, new) = (("mcp_protocol_version", "2025-11-25"), ("mcp_protocol_version", "2026-07-28"));
    let tool = |tool, error| [("mcp_method_name", "tools/call"), ("gen_ai_tool_name", tool), ("error_type", error)];
    for (labels, count) in [
        (&[&tool("list_users", "")[..], &[old]].concat(), 3.0),
        (&[&tool("list_users", "")[..], &[new]].concat(), 1.0),
        (&tool("list_users", "VALIDATION_ERROR").to_vec(), 1.0),
        (&tool("get_user_profile", "SERVICE_ERROR").to_vec(), 1.0),
        (&[&tool("create_ticket", "")[..], &[new]].concat(), 1.0),
        (&tool("query_data", "SERVICE_ERROR").to_vec(), 2.0),
        (&tool("query_data", "").to_vec(), 1.0),
        (&tool("list_tickets", "AUTHENTICATION_ERROR").to_vec(), 1.0),
        (&tool("list_tickets", "cancelled").to_vec(), 1.0),
        (&tool("_OTHER", "-32602").to_vec(), 2.0),
        (&vec![("mcp_method_name", "tools/list"), ("error_type", ""), old], 1.0),
        (&vec![("mcp_method_name", "tools/list"), ("error_type", ""), new], 1.0),
        (&vec![("mcp_method_name", "_OTHER"), ("error_type", "-32601"), old], 2.0),
        (&vec![("mcp_method_name", "_OTHER"), ("error_type", "-32601"), new], 2.0),
        (&vec![("mcp_method_name", "server/discover"), ("error_type", ""), new], 1.0),
        (&vec![("mcp_method_name", "ping"), ("error_type", ""), old], 1.0),
        (&vec![("mcp_method_name", "initialize"), ("mcp_protocol_version", "2025-06-18")], 1.0),
        (&vec![("network_transport", "tcp")], 23.0),
    ] {
        assert_eq!(operations(labels), count, "{labels:?}");
    }
    assert_eq!(scrape.sum("mcp_server_operation_overhead_seconds_count", &[]), 5.0, "reads that succeeded");

    // The retried 503 and the 401, which is replayed with a new token, make two attempts of one call.
    let attempts = |labels: &[(&str, &str)]| scrape.sum("http_client_request_duration_seconds_count", labels);
    assert_eq!(attempts(&[]), app.backend_requests().len() as f64);
    let query = ("url_template", "/query/{dataset}");
    for (labels, count) in [
        (&[("url_template", "/users"), ("outcome", "2xx")][..], 4.0),
        (&[("url_template", "/users/{user_id}"), ("outcome", "4xx")], 1.0),
        (&[query, ("outcome", "5xx")], 3.0),
        (&[query, ("outcome", "2xx")], 1.0),
        (&[("url_template", "/tickets"), ("http_request_method", "POST"), ("outcome", "2xx")], 1.0),
        (&[("url_template", "/tickets"), ("outcome", "4xx")], 2.0),
        (&[("url_template", "/tickets"), ("outcome", "cancelled")], 1.0),
    ] {
        assert_eq!(attempts(labels), count, "{labels:?}");
    }
    for (reason, count) in [("status", 1.0), ("unauthorized", 1.0), ("interrupted", 0.0)] {
        assert_eq!(scrape.sum("mcp_server_backend_retries_total", &[("reason", reason)]), count, "{reason}");
    }
    assert_eq!(scrape.sum("mcp_server_token_refreshes_total", &[("result", "success")]), 2.0);
    assert_eq!(scrape.sum("mcp_server_token_refreshes_forced_total", &[]), 1.0);

    let requests = |labels: &[(&str, &str)]| scrape.sum("http_server_request_duration_seconds_count", labels);
    let status = |status| ("http_response_status_code", status);
    let (post, get, mcp) = (("http_request_method", "POST"), ("http_request_method", "GET"), ("http_route", "/mcp"));
    for (labels, count) in [
        (&[post, mcp, status("499")][..], 1.0),
        (&[post, mcp, status("400")], 1.0),
        (&[get, mcp, status("405")], 1.0),
        (&[get, ("http_route", "/"), status("200")], 1.0),
        (&[get, ("http_route", "_OTHER"), status("404")], 1.0),
        (&[("http_request_method", "_OTHER"), ("http_route", "/health/live"), status("405")], 1.0),
        // All operations came by a request, and one request held none.
        (&[post, mcp], 23.0 + 1.0),
        (&[], probes + 24.0 + 4.0),
    ] {
        assert_eq!(requests(labels), count, "{labels:?}: {}", scrape.text);
    }
    assert_histograms_add_up(&scrape);
}

/// Buckets grow towards `+Inf`, which is the count; a sum is there with each.
fn assert_histograms_add_up(scrape: &Scrape) {
    let mut last: Option<&Sample> = None;
    for sample in &scrape.samples {
        let Some(name) = sample.name.strip_suffix("_bucket") else { continue };
        let mut labels = sample.labels.clone();
        let bound = labels.remove("le").unwrap();
        if let Some(last) = last.filter(|last| last.labels["le"] != "+Inf") {
            assert!(last.value <= sample.value, "{last:?}, {sample:?}");
        }
        if bound == "+Inf" {
            let beside = |end: &str| {
                let name = format!("{name}{end}");
                scrape.samples.iter().find(|other| other.name == name && other.labels == labels).unwrap().value
            };
            assert_eq!(beside("_count"), sample.value, "{sample:?}");
            assert_eq!(beside("_sum") > 0.0, sample.value > 0.0, "{sample:?}");
        }
        last = Some(sample);
    }
    assert!(last.is_some());
}

/// Names of tools and methods, HTTP methods and paths: whoever makes them up makes no series.
#[tokio::test]
async fn ten_thousand_made_up_names_add_no_series() {
    let app = TestApp::spawn().await;
    app.until_ready().await;
    let ask = async |number: usize| {
        let name = format!("made_up_{:016x}", fastrand::u64(..));
        let era = Era::ALL[number % 2];
        let answer = match number % 10 {
            8 => app.http.get(app.url(&format!("/{name}"))).send().await.unwrap(),
            9 => app.http.request(name.parse().unwrap(), app.url("/mcp")).send().await.unwrap(),
            0..4 => app.send(era, "tools/call", json!({ "name": name, "arguments": {} })).await,
            _ => app.send(era, &name, json!({})).await,
        };
        answer.bytes().await.unwrap();
    };
    for number in 0..40 {
        ask(number).await;
    }
    let before = app.scrape().await;
    futures_util::stream::iter(40..10_040).for_each_concurrent(8, ask).await;
    let after = app.scrape().await;
    assert_eq!(before.series(), after.series());
    let count = |scrape: &Scrape| scrape.sum("http_server_request_duration_seconds_count", &[]);
    assert_eq!(count(&after) - count(&before), 10_000.0);
    assert!(!after.text.contains("made_up"));
    assert_eq!(after.sum("mcp_server_calls_total", &[]), 0.0, "what is no tool of ours is no call");
}

#[tokio::test]
async fn metrics_are_answered_while_the_main_listener_takes_nothing_more() {
    const CONNECTIONS: usize = 4;
    let app = TestApp::spawn_with(|settings| {
        settings.web.max_connections = CONNECTIONS;
        settings.web.request_header_timeout = Duration::from_secs(600);
        settings.web.max_in_flight = 1;
        settings.backend.max_concurrency = 1;
    })
    .await;
    app.until_ready().await;
    // A client of its own, whose one connection is the one that there may be.
    let call = app.request(Era::Legacy, "tools/call", json!({ "name": "list_users", "arguments": {} }));
    app.stand_ins.backend.set_fault([FaultRule::hang()]);
    let hanging = tokio::spawn(call.send());
    until(async || app.metric("http_client_active_requests").await == 1.0).await;
    let mut crowd = Vec::new();
    while crowd.len() < CONNECTIONS - 1 {
        let mut stream = TcpStream::connect(app.address).await.unwrap();
        // A silent connection would make room for those that come later.
        stream.write_all(b"GET /").await.unwrap();
        crowd.push(stream);
    }
    until(async || app.metric("http_server_open_connections").await == CONNECTIONS as f64).await;
    // Each of its requests comes by a new connection.
    let elsewhere = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().unwrap();
    for _ in 0..50 {
        let refused = elsewhere.get(app.url("/")).send().await.unwrap();
        assert_eq!(refused.status(), 503);
        let answer = elsewhere.get(format!("http://{}/metrics", app.metrics_address)).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.text().await.unwrap().contains("\nmcp_server_ready 1"));
    }
    let scrape = app.scrape().await;
    for limit in ["connections", "server", "tool", "backend"] {
        let taken = if limit == "connections" { CONNECTIONS as f64 } else { 1.0 };
        assert_eq!(scrape.sum("mcp_server_limit_in_use", &[("limit", limit)]), taken, "{limit}: {}", scrape.text);
        let most = scrape.sum("mcp_server_limit", &[("limit", limit)]);
        assert!(if limit == "tool" { most > taken } else { most == taken }, "{limit}: {most}");
    }
    assert_eq!(scrape.sum("mcp_server_shed_total", &[("limit", "connections")]), 50.0);
    assert_eq!(scrape.sum("mcp_server_active_calls", &[("gen_ai_tool_name", "list_users")]), 1.0);
    hanging.abort();
}

#[tokio::test]
async fn the_process_the_runtime_and_the_identity_tell_their_state() {
    let mut app = TestApp::spawn().await;
    app.until_ready().await;
    let scrape = app.scrape().await;
    let value = |name| scrape.sum(name, &[]);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    for (name, least, most) in [
        ("process_resident_memory_bytes", 4e6, 2e9),
        ("process_virtual_memory_bytes", 4e6, 1e15),
        ("process_cpu_seconds_total", 0.0, 1e5),
        ("process_threads", 2.0, 1e4),
        ("process_open_fds", 8.0, value("process_max_fds")),
        ("process_start_time_seconds", now - 600.0, now),
        ("tokio_workers", 1.0, 64.0),
        ("tokio_alive_tasks", 3.0, 1e4),
        ("tokio_global_queue_depth", 0.0, 1e4),
        ("tokio_workers_busy_seconds_total", 0.0, 1e5),
        ("mcp_server_ready", 1.0, 1.0),
        ("mcp_server_token_age_seconds", 0.0, 60.0),
        ("mcp_server_token_expires_in_seconds", 60.0, 86_400.0),
        ("mcp_server_backend_circuit_breaker", 0.0, 0.0),
    ] {
        assert!((least..=most).contains(&value(name)), "{name} is {}, not in {least}..={most}", value(name));
    }
    let credential = scrape.samples.iter().find(|sample| sample.name == "mcp_server_identity_info").unwrap();
    assert_eq!((credential.labels["credential"].is_empty(), credential.value), (false, 1.0));

    app.stand_ins.backend.set_fault([FaultRule::hang()]);
    let hanging =
        tokio::spawn(app.request(Era::Legacy, "tools/call", json!({ "name": "list_users", "arguments": {} })).send());
    until(async || app.metric("http_client_active_requests").await == 1.0).await;
    app.begin_shutdown();
    until(async || app.metric("mcp_server_ready").await == 0.0).await;
    hanging.abort();
}
