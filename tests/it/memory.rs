//! Memory is bounded by bytes: what large answers and costly requests may take together, from when to when, and who is refused.

use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::{Era, TestApp, message, until};

const IN_USE: &str = r#"mcp_server_limit_in_use{limit="memory"}"#;
const SHED: &str = r#"mcp_server_shed_total{limit="memory"}"#;

async fn with_memory(bytes: usize) -> TestApp {
    let app = TestApp::spawn_with(|settings| {
        settings.backend.max_buffered_bytes = bytes;
        settings.backend.max_response_bytes = 32 << 20;
    })
    .await;
    app.until_ready().await;
    app
}

fn large_answers(app: &TestApp, bytes: usize) {
    app.stand_ins.backend.set_fault([FaultRule::huge_body(bytes).on("GET /query")]);
}

fn assert_refused(error: &Value) {
    assert_eq!(error["error"], "SERVICE_ERROR", "{error}");
    let details = &error["details"];
    assert_eq!((&details["retryable"], &details["retry_after_seconds"]), (&json!(true), &json!(1)), "{error}");
}

async fn query(app: &TestApp) -> crate::support::CallResult {
    app.call(Era::Legacy, "query_data", json!({ "dataset": "sales" })).await
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_refused_as_retryable_and_gives_back_what_it_took() {
    let app = with_memory(3 << 20).await;
    // The second of these fits as it comes, but not with its copy.
    for (bytes, shed) in [(4 << 20, 1.0), (2 << 20, 2.0)] {
        large_answers(&app, bytes);
        assert_refused(&query(&app).await.error());
        assert_eq!((app.metric(SHED).await, app.metric(IN_USE).await), (shed, 0.0));
    }
    assert_eq!(app.metric(r#"mcp_server_limit{limit="memory"}"#).await, f64::from(3 << 20));
    app.call(Era::Modern, "list_users", json!({})).await.structured();
    large_answers(&app, 1 << 20);
    for era in [Era::Legacy, Era::Modern] {
        let answer = app.call(era, "query_data", json!({ "dataset": "sales" })).await;
        assert_eq!(answer.structured()["data"][0]["filler"].as_str().map(str::len), Some(1 << 20));
    }
    until(async || app.metric(IN_USE).await == 0.0).await;
}

#[tokio::test]
async fn an_answer_holds_its_memory_until_its_client_has_taken_it_or_left() {
    let app = with_memory(48 << 20).await;
    // Twice as large on the wire, which is more than the buffers of both sockets hold.
    large_answers(&app, 16 << 20);
    let body = message(Era::Legacy, "tools/call", json!({ "name": "query_data", "arguments": { "dataset": "sales" } }))
        .to_string();
    let head = format!(
        "POST /mcp HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nmcp-protocol-version: 2025-11-25\r\n\
         accept: application/json, text/event-stream\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let address = app.url("").trim_start_matches("http://").trim_end_matches('/').to_owned();
    let mut silent = TcpStream::connect(&address).await.unwrap();
    silent.write_all((head + &body).as_bytes()).await.unwrap();
    let succeeded = r#"mcp_server_calls_total{gen_ai_tool_name="query_data",outcome="ok",fault="none"}"#;
    until(async || app.metric(succeeded).await == 1.0).await;
    let held = app.metric(IN_USE).await;
    assert!((f64::from(16 << 20)..f64::from(17 << 20)).contains(&held), "{held}");
    // The next one finds too little, and finds enough once the first client has left.
    assert_refused(&query(&app).await.error());
    drop(silent);
    until(async || app.metric(IN_USE).await == 0.0).await;
    query(&app).await.structured();
}

#[tokio::test]
async fn a_write_is_refused_before_it_is_sent_and_its_answer_is_kept_whatever_comes_meanwhile() {
    let ticket = json!({ "title": "Printer", "description": "It prints nothing but zeros." });
    let app = with_memory(32 << 10).await;
    app.stand_ins.backend.forget_requests();
    assert_refused(&app.call(Era::Legacy, "create_ticket", ticket.clone()).await.error());
    assert!(app.backend_requests().iter().all(|request| request.method != "POST"));

    // Large answers, as many as may be asked for, leave room for it.
    let app = with_memory(1 << 20).await;
    app.stand_ins.backend.set_fault([FaultRule::huge_body(2 << 20).on("GET /query")]);
    let long = json!({ "title": "Printer", "description": "ü".repeat(5_000) });
    for _ in 0..5 {
        let reads = futures_util::future::join_all((0..4).map(|_| query(&app)));
        let (created, refused) = tokio::join!(app.call(Era::Legacy, "create_ticket", long.clone()), reads);
        created.structured();
        refused.iter().for_each(|refused| assert_refused(&refused.error()));
    }
    until(async || app.metric(IN_USE).await == 0.0).await;

    // An answer that no ticket has: the ticket is there, and nobody is told to make it again.
    app.stand_ins.backend.set_fault([FaultRule::huge_body(1 << 20).on("POST /tickets")]);
    let error = app.call(Era::Legacy, "create_ticket", ticket).await.error();
    assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("SERVICE_ERROR"), &json!(false)), "{error}");
    assert_eq!(error["details"]["outcome"], "created", "{error}");
}

#[tokio::test]
async fn a_request_is_weighed_by_what_parsing_makes_of_it() {
    let app = with_memory(8 << 20).await;
    let text = "x".repeat(90_000);
    let costly = format!("[{}0]", r#"{"":0},"#.repeat(12_000));
    for (filler, status) in [(json!(text).to_string(), 200), (costly, 503)] {
        let body = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{{"_meta":{{"a":{filler}}}}}}}"#);
        let answer = app.post(body).header("mcp-protocol-version", "2025-11-25").send().await.unwrap();
        assert_eq!(answer.status(), status);
        assert_eq!(answer.headers().contains_key("retry-after"), status == 503);
    }
    assert_eq!((app.metric(SHED).await, app.metric(IN_USE).await), (1.0, 0.0));
}
