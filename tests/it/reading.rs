//! What the backend sends is read as it is meant, and nothing of it is changed.

use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::{Value, json};

use crate::support::{Era, TestApp};

const BYTE_ORDER_MARK: &str = "\u{feff}";

fn arguments(tool: &str) -> Value {
    match tool {
        "get_user_profile" => json!({ "user_id": "42", "include_details": true }),
        "create_ticket" => json!({ "title": "x", "description": "long enough" }),
        "query_data" => json!({ "dataset": "sales" }),
        _ => json!({}),
    }
}

#[tokio::test]
async fn halves_of_characters_and_byte_order_marks_in_answers_are_read() {
    const USER: &str =
        r#"{"id":"u2","name":"cut \ud83d","email":"\udE00 a@b.example","created_at":"x","more\ud83d":1}"#;
    const TICKET: &str = r#"{"id":"T","title":"\ud83d\ude00 \ud83d\ud83d","description":"d","priority":"low","status":"open",
        "created_at":"x","updated_at":"x"}"#;
    let user = json!({ "id": "u2", "name": "cut \u{fffd}", "email": "\u{fffd} a@b.example", "created_at": "x" });
    let ticket = json!({
        "id": "T", "title": "😀 \u{fffd}\u{fffd}", "description": "d", "priority": "low", "status": "open",
        "created_at": "x", "updated_at": "x",
    });
    let details = USER.replace("}", r#","details":{"\uDFFFk":["\ud800"]}}"#);
    let mut with_details = user.clone();
    with_details["details"] = json!({ "\u{fffd}k": ["\u{fffd}"] });
    let app = TestApp::spawn().await;
    for (tool, sent, expected) in [
        ("get_user_profile", details, with_details),
        ("list_users", format!(r#"{{"total":1,"items":[{USER}]}}"#), json!({ "total": 1, "items": [user] })),
        ("create_ticket", TICKET.to_owned(), ticket.clone()),
        ("list_tickets", format!(r#"{{"total":1,"items":[{TICKET}]}}"#), json!({ "total": 1, "items": [ticket] })),
        (
            "query_data",
            r#"{"data":[{"\ud83d":"a\\ud83d\ud83dz","n":1.5}]}"#.to_owned(),
            json!({ "dataset": "sales", "rows": 1, "data": [{ "\u{fffd}": "a\\ud83d\u{fffd}z", "n": 1.5 }] }),
        ),
    ] {
        for mark in ["", BYTE_ORDER_MARK] {
            app.stand_ins.backend.set_fault([FaultRule::status(200).body(format!("{mark}{sent}"))]);
            for era in Era::ALL {
                assert_eq!(app.call(era, tool, arguments(tool)).await.structured(), &expected, "{mark}{sent}");
            }
        }
    }
}

#[tokio::test]
async fn a_byte_order_mark_before_its_health_does_not_make_a_backend_unhealthy() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let healthy = format!(r#"{BYTE_ORDER_MARK}{{"status":"healthy"}}"#);
    stand_ins.backend.set_fault([FaultRule::status(200).body(healthy).on("GET /health")]);
    let app = TestApp::spawn_against(stand_ins, |settings| settings.backend.check_in_readiness = true).await;
    app.until_ready().await;
}
