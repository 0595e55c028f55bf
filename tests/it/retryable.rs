//! What an answer says about calling again is true: a write that may have been sent is never invited a second time, whatever ended it.

use std::time::Duration;

use mcp_server::demo::fault::FaultRule;
use mcp_server::settings::Settings;
use serde_json::{Value, json};

use crate::connections::Wire;
use crate::support::wire::{WireBackend, WireFault};
use crate::support::{Era, TestApp, error_object, message};

/// A call can take so long, and the answers that never come take it.
const DEADLINE: Duration = Duration::from_millis(700);

fn ticket() -> Value {
    json!({ "name": "create_ticket", "arguments": { "title": "Printer", "description": "It prints nothing but zeros." } })
}

/// What a row changes in the settings.
type Change<'a> = &'a dyn Fn(&mut Settings);

async fn app_with(change: impl FnOnce(&mut Settings)) -> TestApp {
    let app = TestApp::spawn_with(|settings| {
        settings.backend.timeout = DEADLINE;
        settings.backend.circuit_breaker = false;
        settings.backend.retry_floor = 1_000;
        change(settings);
    })
    .await;
    app.until_ready().await;
    app
}

/// The error object of an answer, whichever form it has.
fn error_of(answer: &Value) -> Value {
    match answer["result"]["content"][0]["text"].as_str() {
        Some(text) => serde_json::from_str(text).unwrap(),
        None => error_object(answer).clone(),
    }
}

/// Creates a ticket by way of rmcp or without it: what is said of the failure.
async fn failure_of(app: &TestApp, by_rmcp: bool) -> Value {
    let mut call = app.request(Era::Legacy, "tools/call", ticket());
    if by_rmcp {
        call = call.header("mcp-param-none", "none");
    }
    error_of(&serde_json::from_str(&call.send().await.unwrap().text().await.unwrap()).unwrap())
}

fn posts(app: &TestApp) -> usize {
    app.backend_requests().iter().filter(|request| request.method == "POST").count()
}

#[track_caller]
fn assert_not_invited(error: &Value, case: &str) {
    let details = &error["details"];
    assert_eq!(details["retryable"], false, "{case}: {error}");
    assert!(["unknown", "created"].contains(&details["outcome"].as_str().unwrap_or_default()), "{case}: {error}");
}

#[tokio::test]
async fn a_write_that_may_have_been_sent_is_not_invited_again_whatever_the_backend_does() {
    let app = app_with(|settings| settings.backend.max_response_bytes = 64 << 10).await;
    let status = FaultRule::status;
    let one = |rule: FaultRule| vec![rule];
    for faults in [
        one(FaultRule::hang()),
        one(FaultRule::delay_mid_body(Duration::from_secs(60))),
        one(FaultRule::delay(Duration::from_secs(60))),
        one(FaultRule::close_before_head()),
        one(FaultRule::close_mid_body()),
        one(status(408)),
        one(status(500)),
        one(status(502)),
        one(status(503)),
        one(status(503).header("retry-after", "1")),
        one(status(504)),
        one(status(302).header("location", "/tickets")),
        one(FaultRule::redirect("/tickets")),
        one(FaultRule::broken_json()),
        one(FaultRule::wrong_types()),
        one(status(201).body("")),
        one(status(201).body("null")),
        one(FaultRule::huge_body(64 << 10)),
        one(FaultRule::endless_body()),
        // The first attempt was refused, and the second one was not.
        vec![status(429).times(1), FaultRule::hang()],
        vec![status(429).times(1), FaultRule::close_before_head()],
    ] {
        for by_rmcp in [false, true] {
            app.stand_ins.backend.forget_requests();
            app.stand_ins.backend.set_fault(faults.iter().map(|rule| rule.clone().on("POST /tickets")));
            let error = failure_of(&app, by_rmcp).await;
            assert!(posts(&app) >= 1, "{faults:?}");
            assert_not_invited(&error, &format!("{faults:?}"));
        }
    }
    // A token is replaced once in a while only, and so once in this test.
    app.stand_ins.backend.set_fault([status(401).times(1), status(503)].map(|rule| rule.on("POST /tickets")));
    assert_not_invited(&failure_of(&app, false).await, "a token that was refused first");
}

#[tokio::test]
async fn a_write_that_may_have_been_sent_is_not_invited_again_whatever_becomes_of_its_connection() {
    for (fault, is_sent) in
        [(WireFault::ResetBeforeHead, true), (WireFault::ResetAfterHead, true), (WireFault::HangAtConnect, false)]
    {
        let backend = WireBackend::start(fault).await;
        let app = app_with(|settings| settings.backend.base_url = backend.base_url()).await;
        let error = failure_of(&app, false).await;
        if is_sent {
            assert_not_invited(&error, &format!("{fault:?}"));
        } else {
            let details = &error["details"];
            assert_eq!((&details["retryable"], details.get("outcome")), (&json!(true), None), "{fault:?}: {error}");
        }
    }
}

#[tokio::test]
async fn a_write_that_may_have_been_sent_is_not_invited_again_whatever_ends_it_here() {
    // There is no memory for its answer.
    let app = app_with(|settings| {
        settings.backend.max_buffered_bytes = 1 << 20;
        settings.backend.max_response_bytes = 32 << 20;
    })
    .await;
    app.stand_ins.backend.set_fault([FaultRule::huge_body(2 << 20).on("POST /tickets")]);
    let error = failure_of(&app, false).await;
    assert_eq!(posts(&app), 1);
    assert_not_invited(&error, "no memory");

    // The server is stopped.
    let mut app = app_with(|settings| {
        settings.backend.timeout = Duration::from_secs(60);
        settings.web.shutdown_grace = Duration::from_millis(300);
    })
    .await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets")]);
    let seen = app.stand_ins.backend.request_count().get();
    let call = tokio::spawn(app.request(Era::Legacy, "tools/call", ticket()).send());
    app.stand_ins.backend.request_count().reaches(seen + 1).await;
    app.begin_shutdown();
    let answer = call.await.unwrap().unwrap().text().await.unwrap();
    assert_not_invited(&error_of(&serde_json::from_str(&answer).unwrap()), "stopped");

    // Its body came slowly, and then the backend did not answer.
    let app = app_with(|_| {}).await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets")]);
    let body = message(Era::Legacy, "tools/call", ticket()).to_string();
    let (beginning, rest) = body.split_at(20);
    let mut wire = Wire::to(&app).await;
    wire.say(&format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\nContent-Length: {}\r\n\r\n{beginning}",
        body.len()
    ))
    .await;
    tokio::time::sleep(DEADLINE).await;
    wire.say(rest).await;
    let (status, _, answer) = wire.answer().await;
    assert_eq!((status, posts(&app)), (200, 1));
    assert_not_invited(&error_of(&serde_json::from_str(&answer).unwrap()), "slow upload");
}

#[tokio::test]
async fn a_write_that_is_invited_again_was_not_sent_or_was_refused() {
    let memory = |settings: &mut Settings| settings.backend.max_buffered_bytes = 32 << 10;
    let rate = |settings: &mut Settings| {
        (settings.web.rate_limit.per_address, settings.web.rate_limit.burst) = (0.001, 1);
    };
    let backend = |settings: &mut Settings| settings.backend.max_concurrency = 1;
    let tool = |settings: &mut Settings| settings.web.max_in_flight_per_tool = 1;
    let server = |settings: &mut Settings| settings.web.max_in_flight = 1;
    let rows: [(&str, Change<'_>, usize); 5] = [
        ("memory", &memory, 0),
        ("rate", &rate, 1),
        ("backend", &backend, 1),
        ("tool", &tool, 1),
        ("server", &server, 1),
    ];
    for (limit, change, before) in rows {
        let app = app_with(|settings| {
            change(settings);
            settings.backend.timeout = Duration::from_secs(60);
        })
        .await;
        app.stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets")]);
        let seen = app.stand_ins.backend.request_count().get();
        let earlier: Vec<_> =
            (0..before).map(|_| tokio::spawn(app.request(Era::Legacy, "tools/call", ticket()).send())).collect();
        app.stand_ins.backend.request_count().reaches(seen + before as u64).await;
        let error = failure_of(&app, false).await;
        assert_eq!((&error["details"]["retryable"], posts(&app)), (&json!(true), before), "{limit}: {error}");
        earlier.iter().for_each(tokio::task::JoinHandle::abort);
    }

    let app = app_with(|_| {}).await;
    app.stand_ins.backend.set_fault([FaultRule::status(429).on("POST /tickets")]);
    assert_eq!(failure_of(&app, false).await["details"]["retryable"], true, "refused by the backend");
    app.stand_ins.backend.set_down(true).await.unwrap();
    assert_eq!(failure_of(&app, false).await["details"]["retryable"], true, "no connection");
}
