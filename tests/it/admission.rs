//! When a request takes a place from others, and when it gives it back: not while its body comes, and for as long as its work goes on.

use std::time::Duration;

use mcp_server::demo::entra::DemoCaller;
use mcp_server::demo::fault::FaultRule;
use serde_json::{Value, json};

use crate::connections::Wire;
use crate::support::{Era, TestApp, error_object, message, until};

const ACTIVE: &str = "http_server_active_requests";

fn user(user_id: &str) -> Value {
    json!({ "name": "get_user_profile", "arguments": { "user_id": user_id } })
}

fn ticket(title: &str) -> Value {
    json!({ "name": "create_ticket", "arguments": { "title": title, "description": "long enough" } })
}

/// Head and body of a call that waits for leave before it sends the body.
fn upload(headers: &str, params: Value) -> (String, String) {
    let body = message(Era::Legacy, "tools/call", params).to_string();
    let head = format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n\
         Accept: application/json, text/event-stream\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    (head, body)
}

/// A connection on which the server reads the body of a request, of which this much has been sent.
async fn uploading(app: &TestApp, head: &str, beginning: &str) -> Wire {
    let mut wire = Wire::to(app).await;
    wire.say(head).await;
    assert_eq!(wire.informed().await, 100);
    wire.say(beginning).await;
    wire
}

#[tokio::test]
async fn a_body_that_comes_slowly_takes_no_place_from_other_requests() {
    let app = TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.web.max_in_flight = 2;
            settings.web.rate_limit.in_flight = 1;
        },
    )
    .await;
    let (slow, other) = (app.token(DemoCaller::Reader), app.token(DemoCaller::Writer));
    let (head, body) = upload(&format!("Authorization: Bearer {slow}\r\n"), user("42"));
    let (beginning, rest) = body.split_at(20);
    let mut uploads = Vec::new();
    for _ in 0..4 {
        uploads.push(uploading(&app, &head, beginning).await);
    }
    for token in [&other, &slow] {
        let answer = app.send_as(token, Era::Modern, "tools/call", user("42")).await;
        assert_eq!(answer.status(), 200);
    }
    assert_eq!(app.metric(ACTIVE).await, 0.0);
    for mut upload in uploads {
        upload.say(rest).await;
        assert_eq!(upload.answer().await.0, 200);
    }
}

#[tokio::test]
async fn every_request_costs_its_caller_one_of_their_rate_before_its_body_is_read() {
    let app = TestApp::spawn_with(|settings| {
        (settings.web.rate_limit.per_address, settings.web.rate_limit.burst) = (0.001, 2);
    })
    .await;
    app.until_ready().await;
    let (head, body) = upload("", user("42"));
    let mut first = uploading(&app, &head, "").await;
    let _second = uploading(&app, &head, "").await;
    assert_eq!(app.send(Era::Modern, "tools/call", user("42")).await.status(), 429);
    first.say(&body).await;
    assert_eq!(first.answer().await.0, 200);
}

#[tokio::test]
async fn a_body_that_takes_too_long_is_answered_with_408_and_nothing_is_run() {
    let app = TestApp::spawn_with(|settings| {
        settings.web.request_body_timeout = Duration::from_millis(300);
        settings.web.max_in_flight = 1;
    })
    .await;
    app.until_ready().await;
    let (head, body) = upload("", ticket("slow"));
    for sent in [0, 1, body.len() - 1] {
        let mut wire = uploading(&app, &head, &body[..sent]).await;
        let (status, head, answer) = wire.answer().await;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let problem = error_object(&answer);
        assert_eq!((status, &answer["error"]["code"], &problem["error"]), (408, &json!(408), &json!("TIMEOUT_ERROR")));
        let details = &problem["details"];
        assert_eq!((&details["status_code"], &details["retryable"]), (&json!(408), &json!(true)), "{details}");
        assert_eq!(details["timeout_seconds"], json!(0.3), "{details}");
        assert!(head.contains("connection: close"), "{head}");
        wire.closed().await;
    }
    // Also where something comes all the time.
    let mut wire = uploading(&app, &head, "").await;
    let mut dripping = body.bytes();
    while tokio::time::timeout(Duration::from_millis(20), wire.0.readable()).await.is_err() {
        wire.say(char::from(dripping.next().expect("the whole body was read")).encode_utf8(&mut [0; 4])).await;
    }
    assert_eq!(wire.answer().await.0, 408);
    assert!(app.backend_requests().is_empty());
    app.call(Era::Modern, "create_ticket", ticket("quick")["arguments"].clone()).await.structured();
}

#[tokio::test]
async fn the_time_of_a_call_begins_when_its_body_is_there() {
    let app = TestApp::spawn_with(|settings| settings.backend.timeout = Duration::from_millis(1_000)).await;
    app.until_ready().await;
    app.stand_ins.backend.set_fault([FaultRule::delay(Duration::from_millis(400)).on("POST /tickets")]);
    let (head, body) = upload("", ticket("late"));
    let (beginning, rest) = body.split_at(20);
    let mut wire = uploading(&app, &head, beginning).await;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    wire.say(rest).await;
    let (status, _, answer) = wire.answer().await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, &answer["result"]["isError"]), (200, &json!(false)), "{answer}");
}

#[tokio::test]
async fn bodies_that_are_read_are_bounded_by_bytes_and_usual_ones_find_room_all_the_same() {
    const LARGEST: usize = 256 << 10;
    let app = TestApp::spawn_with(|settings| {
        settings.web.max_request_bytes = LARGEST;
        // Half as much again for bodies.
        settings.backend.max_buffered_bytes = 1 << 20;
        settings.backend.max_response_bytes = 256 << 10;
    })
    .await;
    app.until_ready().await;
    let head = format!("POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LARGEST}\r\n\r\n");
    let most = " ".repeat(LARGEST - 1);
    let mut uploads = Vec::new();
    // Two of them find room.
    for _ in 0..3 {
        let mut wire = Wire::to(&app).await;
        wire.say(&[&*head, &most].concat()).await;
        uploads.push(wire);
    }
    until(async || app.metric(r#"mcp_server_shed_total{limit="memory"}"#).await == 1.0).await;
    until(async || {
        let mut wire = Wire::to(&app).await;
        wire.say(&[&*head, &most, " "].concat()).await;
        let (status, head, _) = wire.answer().await;
        // Whatever is wrong with it otherwise.
        assert!([415, 503].contains(&status), "{head}");
        assert_eq!(head.contains("retry-after: 1"), status == 503, "{head}");
        status == 503
    })
    .await;
    let long = json!({ "title": "Printer", "description": "ü".repeat(5_000) });
    for _ in 0..3 {
        app.call(Era::Legacy, "create_ticket", long.clone()).await.structured();
        app.call(Era::Modern, "query_data", json!({ "dataset": "sales" })).await.structured();
    }
    drop(uploads);
    until(async || {
        let mut wire = Wire::to(&app).await;
        wire.say(&[&*head, &most, " "].concat()).await;
        wire.answer().await.0 == 415
    })
    .await;
}

/// Sends a write with a token, waits until the backend has it, and closes the connection. `headers` decide who reads the message.
async fn write_and_leave(app: &TestApp, token: &str, headers: &[(&'static str, &'static str)]) {
    let seen = app.stand_ins.backend.request_count().get();
    let mut call = app.request(Era::Legacy, "tools/call", ticket("left")).bearer_auth(token);
    for (name, value) in headers {
        call = call.header(*name, *value);
    }
    let call = tokio::spawn(call.header("connection", "close").send());
    app.stand_ins.backend.request_count().reaches(seen + 1).await;
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
}

/// A header that says nothing here, but leaves the message to rmcp.
const READ_BY_RMCP: (&str, &str) = ("mcp-param-none", "none");

#[tokio::test]
async fn a_write_keeps_its_places_until_it_has_ended_whether_or_not_its_client_stays() {
    let both_ways = [&[][..], &[READ_BY_RMCP]];
    let all = ["caller", "server"].into_iter().flat_map(|limit| both_ways.map(|headers| writes_keep(limit, headers)));
    futures_util::future::join_all(all).await;
}

async fn writes_keep(limit: &str, headers: &[(&'static str, &'static str)]) {
    let app = TestApp::guarded_with(
        |_| {},
        |settings| {
            settings.backend.timeout = Duration::from_secs(4);
            match limit {
                "caller" => settings.web.rate_limit.in_flight = 3,
                _ => settings.web.max_in_flight = 3,
            }
        },
    )
    .await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets")]);
    let (writer, reader) = (app.token(DemoCaller::Writer), app.token(DemoCaller::Reader));
    for _ in 0..3 {
        write_and_leave(&app, &writer, headers).await;
    }
    until(async || app.metric("http_server_open_connections").await == 0.0).await;
    assert_eq!(app.metric(ACTIVE).await, 3.0, "{limit}");
    let status = async |token: &str, params: Value| {
        app.send_as(token, Era::Modern, "tools/call", params).await.status().as_u16()
    };
    let (writers, others) = if limit == "caller" { (429, 200) } else { (503, 503) };
    for _ in 0..5 {
        assert_eq!(status(&writer, ticket("one more")).await, writers, "{limit}");
        assert_eq!(status(&reader, user("42")).await, others, "{limit}");
    }
    let posts = app.backend_requests().iter().filter(|request| request.method == "POST").count();
    assert_eq!(posts, 3, "{limit}");
    // What ended in a timeout has ended.
    app.until_idle().await;
    app.stand_ins.backend.set_fault([]);
    assert_eq!(status(&writer, ticket("at last")).await, 200, "{limit}");
}
