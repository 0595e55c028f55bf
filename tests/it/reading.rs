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
async fn one_odd_item_leaves_the_others_as_they_are_and_is_passed_on_with_what_it_has() {
    let user = |id: usize| json!({ "id": id.to_string(), "name": "x", "email": "x", "created_at": "x" });
    let ticket = |id: usize| {
        json!({
            "id": id.to_string(), "title": "x", "description": "x", "priority": "low", "status": "open",
            "created_at": "x", "updated_at": "x",
        })
    };
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for (tool, item, odd, expected) in [
        ("list_users", &user as &dyn Fn(usize) -> Value, json!({ "id": 7 }), json!({ "id": "7" })),
        (
            "list_users",
            &user,
            json!({ "id": "7", "name": null, "created_at": 1_700_000_000 }),
            json!({ "id": "7", "created_at": "1700000000" }),
        ),
        (
            "list_tickets",
            &ticket,
            json!({ "id": 7, "priority": "P1", "status": "on_hold", "updated_at": "yesterday", "title": null }),
            json!({ "id": "7", "priority": "P1", "status": "on_hold", "updated_at": "yesterday" }),
        ),
        ("list_tickets", &ticket, json!({ "id": "7" }), json!({ "id": "7" })),
    ] {
        let page = |odd: &Value| {
            let items = (0..10).map(|id| if id == 9 { odd.clone() } else { item(id) });
            json!({ "total": 10, "items": items.collect::<Vec<_>>() })
        };
        app.stand_ins.backend.set_fault([FaultRule::status(200).body(page(&odd).to_string())]);
        for era in Era::ALL {
            let result = app.call(era, tool, json!({})).await;
            assert_eq!(result.structured(), &page(&expected));
            assert!(schemas[tool].output.is_valid(result.structured()));
        }
    }
}

#[tokio::test]
async fn a_single_user_or_ticket_needs_an_id_and_no_more() {
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for tool in ["get_user_profile", "create_ticket"] {
        for id in ["7", "\"7\""] {
            app.stand_ins.backend.set_fault([FaultRule::status(200).body(format!(r#"{{"id":{id},"status":null}}"#))]);
            for era in Era::ALL {
                let result = app.call(era, tool, arguments(tool)).await;
                assert_eq!(result.structured(), &json!({ "id": "7" }));
                assert!(schemas[tool].output.is_valid(result.structured()));
            }
        }
    }
}

#[tokio::test]
async fn what_is_no_item_is_an_error_whose_cause_names_the_place() {
    let app = TestApp::spawn_with(|settings| settings.log.debug = true).await;
    for (tool, sent, cause) in [
        ("list_users", r#"{"total":2,"items":[{"id":"a"},{"name":"canary"}]}"#, "items[1].id is missing"),
        ("list_users", r#"{"total":2,"items":[{"id":"a"},"canary"]}"#, "items[1] is not a user"),
        ("list_tickets", r#"{"total":1,"items":[{"id":["canary"]}]}"#, "items[0].id is not a string or an integer"),
        ("create_ticket", r#"{"title":"canary"}"#, "missing field `id`"),
        ("query_data", r#"{"data":[{},{},["canary"]]}"#, "data[2] is not an object"),
    ] {
        app.stand_ins.backend.set_fault([FaultRule::status(200).body(sent)]);
        for era in Era::ALL {
            let result = app.call(era, tool, arguments(tool)).await;
            let error = result.error();
            assert_eq!(error["error"], "SERVICE_ERROR");
            let told = error["details"]["cause"].as_str().unwrap();
            assert!(told.contains(cause) && !told.contains("canary"), "{told} should say: {cause}");
        }
    }
}

#[tokio::test]
async fn no_result_has_more_than_was_asked_for() {
    let item = |id: usize| json!({ "id": id.to_string() });
    let items = |count: usize| (0..count).map(item).collect::<Vec<_>>();
    let app = TestApp::spawn().await;
    let schemas = app.schemas().await;
    for (tool, limit, sent) in [
        ("list_users", 10, 10),
        ("list_users", 10, 11),
        ("list_users", 1, 2_000),
        ("list_tickets", 10, 10),
        ("list_tickets", 10, 11),
        ("query_data", 100, 100),
        ("query_data", 100, 101),
        ("query_data", 100, 2_000),
        ("query_data", 1, 2),
    ] {
        let body = match tool {
            "query_data" => json!({ "data": items(sent) }),
            _ => json!({ "total": 2_000, "items": items(sent) }),
        };
        app.stand_ins.backend.set_fault([FaultRule::status(200).body(body.to_string())]);
        let mut expected = match tool {
            "query_data" => json!({ "dataset": "sales", "rows": limit, "data": items(limit) }),
            _ => json!({ "total": 2_000, "items": items(limit) }),
        };
        if sent > limit {
            expected["truncated"] = true.into();
        }
        let mut arguments = arguments(tool);
        arguments["limit"] = limit.into();
        for era in Era::ALL {
            let result = app.call(era, tool, arguments.clone()).await;
            assert_eq!(result.structured(), &expected, "{tool} {sent}");
            assert!(schemas[tool].output.is_valid(result.structured()));
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

/// The result as it stands in the response, twice: inside a string, and as it is.
fn assert_holds(response: &str, json: &str) {
    let escaped = Value::from(json).to_string();
    assert!(response.contains(json), "{response} lacks {json}");
    assert!(response.contains(escaped.trim_matches('"')), "{response} lacks the text of {json}");
}

#[tokio::test]
async fn numbers_reach_the_caller_with_the_digits_that_the_backend_sent() {
    const NUMBERS: &str =
        r#"{"id":12345678901234567890123,"amount":12345678901234567890.12,"tiny":1e-400,"price":1.50,"zero":-0}"#;
    let app = TestApp::spawn().await;
    for (tool, sent) in [
        ("query_data", format!(r#"{{"data":[{NUMBERS}]}}"#)),
        ("query_data", format!(r#"{{"data":[{{"hidden":"a\u200bb"}},{NUMBERS},{{"twice":1,"twice":2}}]}}"#)),
        ("get_user_profile", format!(r#"{{"id":"42","name":"\u200b","details":{NUMBERS}}}"#)),
        ("get_user_profile", format!(r#"{{"id":"42","details":{{ "more" : {NUMBERS} }} }}"#)),
    ] {
        app.stand_ins.backend.set_fault([FaultRule::status(200).body(sent)]);
        for era in Era::ALL {
            for mirrored in [false, true] {
                let call = json!({ "name": tool, "arguments": arguments(tool) });
                let mut request = app.request(era, "tools/call", call);
                if mirrored {
                    request = request.header("mcp-param-none", "none");
                }
                let response = request.send().await.unwrap().text().await.unwrap();
                assert_holds(&response, NUMBERS);
            }
        }
    }
}

#[tokio::test]
async fn numbers_in_filters_reach_the_backend_with_the_digits_that_the_caller_sent() {
    const INEXACT: &str = r#"{"tiny":1e-400,"id":12345678901234567890123,"amount":[12345678901234567890.12,0.10]}"#;
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(200).body(r#"{"data":[]}"#)]);
    for (filters, expected) in [
        (INEXACT.to_owned(), INEXACT),
        (INEXACT.replace(':', " : "), INEXACT),
        (Value::from(INEXACT).to_string(), INEXACT),
        (
            r#"{"id":12345678901234567890123,"\u0069d":12345678901234567890124}"#.to_owned(),
            r#"{"id":12345678901234567890124}"#,
        ),
        (r#"{"n":18446744073709551615,"price":1.5}"#.to_owned(), r#"{"n":18446744073709551615,"price":1.5}"#),
    ] {
        for era in Era::ALL {
            for mirrored in [false, true] {
                let call = json!({ "name": "query_data", "arguments": { "filters": "FILTERS", "dataset": "sales" } });
                let body = crate::support::message(era, "tools/call", call).to_string();
                let body = body.replace("\"FILTERS\"", &filters);
                let mut request = app.request(era, "tools/call", json!({ "name": "query_data" })).body(body);
                if mirrored {
                    request = request.header("mcp-param-none", "none");
                }
                app.stand_ins.backend.forget_requests();
                let response: Value = request.send().await.unwrap().json().await.unwrap();
                assert_eq!(response["result"]["isError"], false, "{filters}: {response}");
                let url = reqwest::Url::parse(&format!("http://backend{}", app.backend_requests()[0].target)).unwrap();
                let sent: Vec<_> = url.query_pairs().filter(|(name, _)| name == "filters").collect();
                assert_eq!(sent[0].1, expected, "{era:?} {mirrored}");
            }
        }
    }
}
