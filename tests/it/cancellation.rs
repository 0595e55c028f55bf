//! What happens to the backend's work when the client does not wait for it.

use std::time::Duration;

use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};

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
    }
}

#[tokio::test]
async fn a_read_whose_client_leaves_is_not_repeated() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(503).header("retry-after", "5")]);
    call_and_leave(&app, Era::Modern, "get_user_profile", json!({ "user_id": "42" })).await;
    app.stand_ins.backend.set_fault([]);
    let finished = || async {
        let metrics = app.http.get(format!("http://{}/metrics", app.metrics_address)).send().await.unwrap();
        metrics.text().await.unwrap().contains(
            r#"_count{mcp_method_name="tools/call",gen_ai_tool_name="get_user_profile",error_type="cancelled"} 1"#,
        )
    };
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
