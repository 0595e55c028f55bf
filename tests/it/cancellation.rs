//! What happens to the backend's work when the client does not wait for it.

use std::time::Duration;

use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::support::calls::TOOLS;
use crate::support::{Era, TestApp, until};

/// Sends a call, waits until the backend has it, and closes the connection.
async fn call_and_leave(app: &TestApp, era: Era, tool: &str, arguments: Value) {
    let seen = app.stand_ins.backend.request_count().get();
    let call = app.request(era, "tools/call", json!({ "name": tool, "arguments": arguments }));
    let call = tokio::spawn(call.header("connection", "close").send());
    app.stand_ins.backend.request_count().reaches(seen + 1).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn a_read_whose_client_leaves_is_given_up_at_once() {
    let app = TestApp::spawn().await;
    for (given_up, (era, fault)) in [
        (Era::Legacy, FaultRule::hang()),
        (Era::Modern, FaultRule::hang()),
        (Era::Legacy, FaultRule::delay_mid_body(Duration::from_secs(60))),
        (Era::Modern, FaultRule::delay_mid_body(Duration::from_secs(60))),
    ]
    .into_iter()
    .enumerate()
    {
        app.stand_ins.backend.set_fault([fault]);
        call_and_leave(&app, era, "get_user_profile", json!({ "user_id": "42" })).await;
        let cancelled = app.stand_ins.backend.cancelled_count().reaches(given_up as u64 + 1);
        tokio::time::timeout(Duration::from_secs(1), cancelled).await.expect("the backend's work goes on for nobody");
        app.until_idle().await;
    }
}

#[tokio::test]
async fn nothing_is_left_of_calls_whose_clients_left() {
    let app = TestApp::spawn_with(|settings| {
        settings.backend.timeout = Duration::from_secs(2);
        settings.backend.max_concurrency = 50;
        // The tickets, which nobody waits for, end in timeouts.
        settings.backend.circuit_breaker = false;
        settings.web.max_in_flight_per_tool = 10;
        settings.web.max_in_flight = 50;
    })
    .await;
    app.stand_ins.backend.set_fault([FaultRule::hang()]);
    for round in 1..=2 {
        let calls: Vec<_> = (0..10)
            .flat_map(|_| TOOLS)
            .map(|tool| {
                let arguments = match tool {
                    "get_user_profile" => json!({ "user_id": "42" }),
                    "query_data" => json!({ "dataset": "sales" }),
                    "create_ticket" => json!({ "title": "left", "description": "long enough" }),
                    _ => json!({}),
                };
                let call = app.request(Era::Modern, "tools/call", json!({ "name": tool, "arguments": arguments }));
                tokio::spawn(call.header("connection", "close").send())
            })
            .collect();
        until(async || app.stand_ins.backend.request_count().get() == round * 50).await;
        calls.iter().for_each(JoinHandle::abort);
        app.until_idle().await;
        until(async || app.metric("http_server_open_connections").await == 0.0).await;
    }
    app.stand_ins.backend.set_fault([]);
    app.call(Era::Modern, "create_ticket", json!({ "title": "after", "description": "long enough" }))
        .await
        .structured();
    assert_eq!(app.stand_ins.backend.request_count().get(), 101);
}

#[tokio::test]
async fn a_read_whose_client_leaves_is_not_repeated() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(503).header("retry-after", "5")]);
    call_and_leave(&app, Era::Modern, "get_user_profile", json!({ "user_id": "42" })).await;
    app.stand_ins.backend.set_fault([]);
    let ended = r#"mcp_server_calls_total{gen_ai_tool_name="get_user_profile",outcome="cancelled",fault="caller"}"#;
    let finished = async || app.metric(ended).await == 1.0;
    until(finished).await;
    assert_eq!(app.backend_requests().len(), 1);
}

#[tokio::test]
async fn a_ticket_whose_client_leaves_is_still_created() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::delay(Duration::from_millis(200)).on("POST /tickets")]);
    for era in Era::ALL {
        let title = format!("left by {era:?}");
        call_and_leave(&app, era, "create_ticket", json!({ "title": title, "description": "long enough" })).await;
        let created = || async {
            let newest = app.call(Era::Modern, "list_tickets", json!({ "limit": 1 })).await;
            newest.structured()["items"][0]["title"] == title
        };
        until(created).await;
    }
    assert_eq!(app.stand_ins.backend.cancelled_count().get(), 0);
}
