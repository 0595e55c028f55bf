//! More than fits: what is turned away, how fast, in which words, and what goes on beside it; and how a backend in trouble is spared.

use std::time::Duration;

use futures_util::future::join_all;
use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::{CallResult, Era, TestApp, error_object, until};

const REFUSALS: usize = 21;

/// Starts a call that the backend never answers, and returns when the backend has it. Later calls are answered.
async fn hanging_call(app: &TestApp) -> JoinHandle<reqwest::Result<reqwest::Response>> {
    app.until_ready().await;
    app.stand_ins.backend.set_fault([FaultRule::hang().times(1)]);
    let seen = app.stand_ins.backend.request_count().get();
    let params = json!({ "name": "get_user_profile", "arguments": { "user_id": "42" } });
    let call = tokio::spawn(app.request(Era::Legacy, "tools/call", params).header("connection", "close").send());
    app.stand_ins.backend.request_count().reaches(seen + 1).await;
    call
}

async fn read(app: &TestApp) -> CallResult {
    app.call(Era::Legacy, "get_user_profile", json!({ "user_id": "42" })).await
}

async fn assert_healthy(app: &TestApp) {
    for probe in ["/health/live", "/health/ready"] {
        assert_eq!(app.http.get(app.url(probe)).send().await.unwrap().status(), 200);
    }
}

/// The refusals of calls beside one that hangs, after which there is room again.
async fn assert_refused(app: TestApp, limit: &str, words: &str) {
    let hanging = hanging_call(&app).await;
    for _ in 0..REFUSALS {
        let error = read(&app).await.error();
        assert_eq!(error["error"], "SERVICE_ERROR", "{error}");
        assert_eq!(
            (&error["details"]["retryable"], &error["details"]["retry_after_seconds"]),
            (&json!(true), &json!(1))
        );
        assert!(error["message"].as_str().unwrap().contains(words), "{error}");
    }
    assert_healthy(&app).await;
    assert!(!hanging.is_finished(), "whoever waited in a queue would have waited for this one");
    assert_eq!(app.backend_requests().len(), 1);
    assert_eq!(app.metric(&format!(r#"mcp_server_shed_total{{limit="{limit}"}}"#)).await, REFUSALS as f64);
    hanging.abort();
    app.until_idle().await;
    read(&app).await.structured();
}

#[tokio::test]
async fn a_backend_with_all_its_requests_gets_no_more_and_the_caller_knows_at_once() {
    let app = TestApp::spawn_with(|settings| settings.backend.max_concurrency = 1).await;
    assert_refused(app, "backend", "The backend has as many requests").await;
}

#[tokio::test]
async fn a_tool_with_all_its_calls_refuses_at_once_and_the_other_tools_go_on() {
    let app = TestApp::spawn_with(|settings| settings.web.max_in_flight_per_tool = 1).await;
    let hanging = hanging_call(&app).await;
    for tool in ["list_users", "list_tickets"] {
        app.call(Era::Modern, tool, json!({})).await.structured();
    }
    hanging.abort();
    app.until_idle().await;
    app.stand_ins.backend.forget_requests();
    assert_refused(app, "tool", "As many calls of this tool").await;
}

#[tokio::test]
async fn by_default_a_tool_that_hangs_leaves_room_for_all_others() {
    const MOST: usize = 512;
    let query = json!({ "dataset": "sales", "limit": 1 });
    // The limits are the defaults; with their timeout a busy machine might see the first call end before the last begins.
    let app = TestApp::spawn_with(|settings| settings.backend.timeout = Duration::from_secs(300)).await;
    app.until_ready().await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("GET /query")]);
    let params = json!({ "name": "query_data", "arguments": query });
    let call = || tokio::spawn(app.request(Era::Legacy, "tools/call", params.clone()).send());
    let in_flight = async || app.metric(r#"mcp_server_active_calls{gen_ai_tool_name="query_data"}"#).await as usize;
    let mut hanging = Vec::new();
    // Not all at once: they would not fit into the queue of connections that the stand-in has not accepted yet. A call that found no
    // place there is made again.
    for _ in 0..100 {
        let missing = MOST - in_flight().await;
        if missing == 0 {
            break;
        }
        let seen = app.backend_requests().len() as u64;
        hanging.extend((0..missing.min(32)).map(|_| call()));
        let all = app.stand_ins.backend.request_count().reaches(seen + missing.min(32) as u64);
        let _ = tokio::time::timeout(Duration::from_secs(5), all).await;
    }
    assert_eq!(in_flight().await, MOST);
    assert_eq!(app.call(Era::Modern, "query_data", query).await.error()["details"]["retryable"], true);
    for (tool, arguments) in [
        ("get_user_profile", json!({ "user_id": "42" })),
        ("list_users", json!({})),
        ("list_tickets", json!({})),
        ("create_ticket", json!({ "title": "Printer", "description": "It prints nothing but zeros." })),
    ] {
        app.call(Era::Modern, tool, arguments).await.structured();
    }
    assert_eq!(app.metric(r#"mcp_server_shed_total{limit="tool"}"#).await, 1.0);
    hanging.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn a_server_with_all_its_requests_answers_503_at_once_and_stays_healthy() {
    let app = TestApp::spawn_with(|settings| settings.web.max_in_flight = 1).await;
    let hanging = hanging_call(&app).await;
    for number in 0..REFUSALS {
        let (method, params) = match number % 3 {
            0 => ("tools/list", json!({})),
            1 => ("server/discover", json!({})),
            _ => ("tools/call", json!({ "name": "list_users", "arguments": {} })),
        };
        let answer = app.send(Era::Modern, method, params).await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (503, &"1".parse().unwrap()));
        assert_eq!(answer.headers()["content-type"], "application/json");
        let error: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        let error = error_object(&error);
        assert_eq!(error["error"], "SERVICE_ERROR", "{error}");
        assert_eq!(error["details"]["status_code"], 503, "{error}");
        assert_eq!(
            (&error["details"]["retryable"], &error["details"]["retry_after_seconds"]),
            (&json!(true), &json!(1))
        );
        assert!(error["message"].as_str().unwrap().contains("as many requests as it takes"), "{error}");
    }
    assert!(!hanging.is_finished(), "whoever waited in a queue would have waited for this one");
    assert_healthy(&app).await;
    assert_eq!(app.backend_requests().len(), 1);
    assert_eq!(app.metric(r#"mcp_server_shed_total{limit="server"}"#).await, REFUSALS as f64);
    hanging.abort();
    app.until_idle().await;
    read(&app).await.structured();
}

#[tokio::test]
async fn the_breaker_opens_tries_one_call_waits_longer_after_a_bad_one_and_closes_after_a_good_one() {
    let app = TestApp::spawn_with(|settings| {
        settings.backend.timeout = Duration::from_secs(3);
        settings.backend.max_attempts = 1;
    })
    .await;
    let state = async || app.metric(r#"mcp_server_backend_circuit_breaker{route="GET /users/{user_id}"}"#).await;
    let refused = async || {
        let error = read(&app).await.error();
        assert_eq!(
            (&error["error"], &error["details"]["retryable"]),
            (&json!("SERVICE_ERROR"), &json!(true)),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains("circuit breaker open"), "{error}");
        error["details"]["retry_after_seconds"].as_u64().unwrap()
    };
    let asked = || app.backend_requests().len();
    app.stand_ins.backend.set_fault([FaultRule::status(503).on("GET /users/")]);
    for number in 0..8 {
        assert_eq!(state().await, 0.0);
        let user = json!({ "user_id": (42 + number % 2).to_string() });
        let error = app.call(Era::Legacy, "get_user_profile", user).await.error();
        assert_eq!(error["details"]["status_code"], 503);
    }
    assert_eq!((state().await, refused().await, asked()), (2.0, 1, 8));
    assert_healthy(&app).await;
    app.call(Era::Legacy, "list_users", json!({})).await.structured();
    assert_eq!(app.metric(r#"mcp_server_backend_circuit_breaker{route="GET /users"}"#).await, 0.0);
    app.stand_ins.backend.forget_requests();

    until(async || read(&app).await.error()["details"]["status_code"] == 503).await;
    assert_eq!((state().await, asked()), (2.0, 1), "one trial, and a bad one");
    assert_eq!(refused().await, 3, "two seconds, and one in which others go first");

    app.stand_ins.backend.set_fault([FaultRule::delay(Duration::from_millis(500))]);
    let seen = app.stand_ins.backend.request_count().get();
    let probing = async {
        until(async || read(&app).await.0["isError"] == false).await;
    };
    let beside = async {
        app.stand_ins.backend.request_count().reaches(seen + 1).await;
        assert_eq!(state().await, 1.0);
        for result in join_all((0..10).map(|_| read(&app))).await {
            assert_eq!(result.error()["details"]["retry_after_seconds"], 1, "one probe at a time");
        }
    };
    futures_util::future::join(probing, beside).await;
    assert_eq!((state().await, asked()), (0.0, 2));
    app.stand_ins.backend.set_fault([]);
    read(&app).await.structured();
    assert!(app.metric(r#"mcp_server_shed_total{limit="breaker"}"#).await >= 12.0);
}

#[tokio::test]
async fn answers_other_than_502_503_and_504_never_open_the_breaker() {
    let app = TestApp::spawn_with(|settings| settings.backend.max_attempts = 1).await;
    for status in [400, 403, 404, 408, 409, 422, 429, 500, 501] {
        app.stand_ins.backend.set_fault([FaultRule::status(status)]);
        let read = |user: usize| app.call(Era::Legacy, "get_user_profile", json!({ "user_id": user.to_string() }));
        for result in join_all((0..25).map(read)).await {
            assert_eq!(result.error()["details"]["status_code"], status);
        }
    }
    assert_eq!(app.metric(r#"mcp_server_backend_circuit_breaker{route="GET /users/{user_id}"}"#).await, 0.0);
}

#[tokio::test]
async fn an_outage_is_not_multiplied_and_what_was_saved_is_counted() {
    const CALLS: usize = 200;
    let app = TestApp::spawn_with(|settings| {
        settings.backend.circuit_breaker = false;
        settings.backend.retry_floor = 1;
    })
    .await;
    app.stand_ins.backend.set_fault([FaultRule::status(503)]);
    for _ in 0..CALLS / 50 {
        for result in join_all((0..50).map(|_| read(&app))).await {
            assert_eq!(result.error()["details"]["status_code"], 503);
        }
    }
    let asked = app.backend_requests().len();
    // A fifth of the calls, and the floor of one a second for the ten seconds of the window.
    assert!((CALLS + 10..=CALLS + CALLS / 5 + 10).contains(&asked), "{asked}");
    assert_eq!(app.metric(r#"mcp_server_backend_retries_total{reason="status"}"#).await, (asked - CALLS) as f64);
    assert!(app.metric("mcp_server_backend_retry_budget_exhausted_total").await >= (CALLS / 2) as f64);
}
