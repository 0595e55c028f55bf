//! What is counted, and where it can be read.

use std::collections::BTreeMap;

use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};

use crate::support::{Era, TestApp};

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
    assert_eq!(content_type, "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(text.ends_with("# EOF\n"), "{text}");
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
async fn every_call_is_counted_once_under_its_tool_and_outcome() {
    let app = TestApp::spawn().await;
    let call = async |tool, arguments| {
        app.call(Era::Legacy, tool, arguments).await;
    };
    for _ in 0..3 {
        call("list_users", json!({})).await;
    }
    call("list_users", json!({ "limit": 0 })).await;
    call("get_user_profile", json!({ "user_id": "nobody" })).await;
    app.stand_ins.backend.set_fault([FaultRule::status(500)]);
    call("query_data", json!({ "dataset": "orders" })).await;
    call("query_data", json!({ "dataset": "orders" })).await;
    app.stand_ins.backend.set_fault([FaultRule::status(401)]);
    call("list_tickets", json!({})).await;
    app.send(Era::Legacy, "tools/list", json!({})).await;

    let (_, _, text) = get(&app, app.metrics_address, "/metrics").await;
    let counted: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| line.strip_prefix("mcp_server_operation_duration_seconds_count{")?.split_once("} "))
        .filter(|(_, count)| *count != "0")
        .map(|(labels, count)| (labels.to_owned(), count.parse::<u64>().unwrap()))
        .collect();
    let expected = [
        ("list_users", "", 3),
        ("list_users", "VALIDATION_ERROR", 1),
        ("get_user_profile", "SERVICE_ERROR", 1),
        ("query_data", "SERVICE_ERROR", 2),
        ("list_tickets", "AUTHENTICATION_ERROR", 1),
    ];
    let expected = expected.map(|(tool, outcome, count)| {
        let labels = format!(r#"mcp_method_name="tools/call",gen_ai_tool_name="{tool}",error_type="{outcome}""#);
        (labels, count)
    });
    assert_eq!(counted, BTreeMap::from(expected));
    assert!(text.contains("\nhttp_server_active_requests 0\n"), "{text}");
    assert!(text.contains("\nhttp_server_open_connections 1\n"), "{text}");
}
