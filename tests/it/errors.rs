//! The error table, row by row, with the exact object, and how often the backend was asked before it was given.

use std::time::{Duration, SystemTime};

use mcp_server::demo::backend::{BackendOptions, RecordedRequest, StandInBackend};
use mcp_server::demo::fault::FaultRule;
use mcp_server::settings::BackendSettings;
use serde_json::{Value, json};

use crate::support::calls::{TRACE_ID, is_uuid};
use crate::support::{CallResult, Era, TestApp};

/// What a failing backend says about the error: for the log, and in no answer of ours.
const DETAIL: &str = "what the backend says about it";
/// Stands in every body of a failing backend; may stand in no answer of ours.
const CANARY: &str = "canary-7f3a-in-the-body";
pub const CAP: usize = 64 << 10;

const NOT_FOUND: &str = "The backend has no user `42`.";
const NO_TICKETS: &str = "The backend has no place for tickets.";
const FORBIDDEN: &str = "The backend does not allow this. Its operators have to grant the right to it to the MCP server's identity, or to the user where the server acts on a user's behalf; calling again will not help.";
const CONFLICT: &str =
    "The backend refused this because it conflicts with what is there already. Read the current state first.";
const TOO_MUCH: &str =
    "The backend is being asked too much or too slowly. Wait before you call again, and ask for less.";
const UNREACHABLE: &str = "The backend could not be reached; nothing was sent to it. It may be restarting: call again in a few seconds, and if that goes on, tell the operators.";
const INTERRUPTED: &str = "The backend broke the connection off before its answer was complete. It may be restarting: call again in a few seconds.";
const UNREADABLE: &str = "The backend sent an answer that does not have the agreed form. Its developers have to mend that; calling again will not help.";
const TOO_LARGE: &str = "The backend's answer is larger than the 65536 bytes that this server reads. Ask for less: a lower `limit`, or more `filters`.";
const TOKEN_REFUSED: &str = "The backend does not accept the MCP server's token, not even a new one. Its operators have to mend that: the token's audience (AZURE_SCOPES) and the rights of the server's identity in the backend. Calling again will not help.";

const TOKEN_NOT_REPLACED: &str = "The backend does not accept the MCP server's token (401). No other token was tried: a token is replaced at most once in 30 seconds, and only while Entra ID gives new ones and the call has time left. Its operators have to check the token's audience (AZURE_SCOPES) and the rights of the server's identity in the backend. Calling again at once will not help.";

fn not_accepted(status: u16) -> String {
    format!("The backend did not accept the arguments ({status}). Check that the values exist and fit together.")
}

fn failed(status: u16) -> String {
    format!(
        "The backend failed ({status}). The fault is on its side: call again a little later, and if that goes on, tell the operators."
    )
}

fn refused(status: u16) -> String {
    format!("The backend refused the call ({status}). Calling again without a change will not help.")
}

fn redirected(status: u16) -> String {
    format!(
        "The backend answered with a redirection ({status}), which this server does not follow. Its operators have to correct BACKEND_API_URL."
    )
}

fn perhaps_created(what: &str) -> String {
    format!(
        "The backend {what} after the ticket was sent to it, so the ticket may have been created. Look for it with `list_tickets` before you call again, or it may be there twice. The backend's operators can find the attempt under its Idempotency-Key KEY."
    )
}

fn created(what: &str) -> String {
    format!(
        "The backend created the ticket, but {what}. Do not create it again: find it with `list_tickets`. The backend's operators can find the attempt under its Idempotency-Key KEY."
    )
}

/// The error object as it has to stand in the text; `details` without the trace id. `KEY` stands for the idempotency key.
fn object(error: &str, message: &str, details: &str) -> String {
    format!(
        r#"{{"error":"{error}","message":{},"details":{{{details},"trace_id":"{TRACE_ID}"}}}}"#,
        Value::from(message)
    )
}

/// An answer of the backend with the canary in its body.
pub fn status(code: u16) -> FaultRule {
    FaultRule::status(code)
        .body(json!({ "title": DETAIL, "detail": DETAIL, "stack": CANARY, "status": code }).to_string())
}

/// A server that goes on asking a backend that goes on failing, so that each row stands for itself.
async fn app() -> TestApp {
    app_with(|_| {}).await
}

async fn app_with(change: impl FnOnce(&mut BackendSettings)) -> TestApp {
    TestApp::spawn_with(|settings| {
        persistent(&mut settings.backend);
        change(&mut settings.backend);
    })
    .await
}

/// Neither the breaker nor the budget stops it.
pub fn persistent(backend: &mut BackendSettings) {
    backend.max_response_bytes = CAP;
    backend.circuit_breaker = false;
    backend.retry_floor = 1_000;
}

async fn read(app: &TestApp, era: Era) -> (CallResult, Vec<RecordedRequest>) {
    app.call_and_watch(era, "get_user_profile", json!({ "user_id": "42" })).await
}

/// Eight calls, so many that the circuit breaker of their route opens.
async fn fail_for_two_users(app: &TestApp) {
    for user in ["42", "43"].repeat(4) {
        let (result, requests) = app.call_and_watch(Era::Modern, "get_user_profile", json!({ "user_id": user })).await;
        assert_eq!((&result.error()["details"]["status_code"], requests.len()), (&json!(503), 1), "{result:?}");
    }
}

async fn create(app: &TestApp, era: Era, title: &str) -> (CallResult, Vec<RecordedRequest>) {
    app.call_and_watch(era, "create_ticket", json!({ "title": title, "description": "long enough" })).await
}

async fn tickets_with_title(app: &TestApp, title: &str) -> usize {
    app.stand_ins.backend.set_fault([]);
    let page = app.call(Era::Modern, "list_tickets", json!({ "limit": 100 })).await;
    page.structured()["items"].as_array().unwrap().iter().filter(|ticket| ticket["title"] == title).count()
}

/// The one key of all these attempts.
fn key(requests: &[RecordedRequest]) -> &str {
    let keys: Vec<_> = requests.iter().map(|request| request.header("idempotency-key").unwrap()).collect();
    assert!(keys.iter().all(|key| *key == keys[0]) && is_uuid(keys[0]), "{keys:?}");
    keys[0]
}

#[tokio::test]
async fn a_failed_read_is_repeated_where_that_may_help_and_told_in_these_words() {
    let app = app().await;
    let service = |message: &str, details: &str| object("SERVICE_ERROR", message, details);
    let with_status = |code: u16, message: &str, retryable: bool| {
        service(message, &format!(r#""status_code":{code},"path":"/users/42","retryable":{retryable}"#))
    };
    let without_status =
        |message: &str, retryable: bool| service(message, &format!(r#""path":"/users/42","retryable":{retryable}"#));
    let told_to_wait = |code: u16, message: &str| {
        let details = format!(r#""status_code":{code},"path":"/users/42","retryable":true,"retry_after_seconds":3600"#);
        service(message, &details)
    };
    let broken = FaultRule::status(200).body(format!(r#"{{"id":"{CANARY}","#));
    let unlike = FaultRule::status(200).body(json!({ "id": [CANARY], "name": CANARY }).to_string());
    for (fault, attempts, expected) in [
        (status(400), 1, with_status(400, &not_accepted(400), false)),
        (status(403), 1, with_status(403, FORBIDDEN, false)),
        (status(404), 1, with_status(404, NOT_FOUND, false)),
        (status(408), 3, with_status(408, TOO_MUCH, true)),
        (status(409), 1, with_status(409, CONFLICT, false)),
        (status(410), 1, with_status(410, &refused(410), false)),
        (status(422), 1, with_status(422, &not_accepted(422), false)),
        (status(429), 3, with_status(429, TOO_MUCH, true)),
        (status(429).header("retry-after", "3600"), 1, told_to_wait(429, TOO_MUCH)),
        (status(500), 1, with_status(500, &failed(500), true)),
        (status(501), 1, with_status(501, &failed(501), true)),
        (status(502), 3, with_status(502, &failed(502), true)),
        (status(503), 3, with_status(503, &failed(503), true)),
        (status(503).header("retry-after", "3600"), 1, told_to_wait(503, &failed(503))),
        (status(504), 3, with_status(504, &failed(504), true)),
        (status(302).header("location", "/users/43"), 1, with_status(302, &redirected(302), false)),
        (FaultRule::redirect("/users/43"), 1, with_status(307, &redirected(307), false)),
        (FaultRule::close_before_head(), 3, without_status(INTERRUPTED, true)),
        (FaultRule::close_mid_body(), 3, with_status(200, INTERRUPTED, true)),
        (broken, 1, with_status(200, UNREADABLE, false)),
        (unlike, 1, with_status(200, UNREADABLE, false)),
        (FaultRule::status(200).body(""), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::status(204).body(""), 1, with_status(204, UNREADABLE, false)),
        (FaultRule::status(200).body("null"), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::status(200).body("<html>"), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::status(200).body(b"\xff\xfe".as_slice()), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::status(200).body("[".repeat(10_000)), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::wrong_types(), 1, with_status(200, UNREADABLE, false)),
        (FaultRule::huge_body(CAP), 1, with_status(200, TOO_LARGE, false)),
        (FaultRule::endless_body(), 1, with_status(200, TOO_LARGE, false)),
    ] {
        app.stand_ins.backend.set_fault([fault.clone()]);
        for era in Era::ALL {
            let (result, requests) = read(&app, era).await;
            assert_eq!(result.text(), expected, "{fault:?}");
            result.error();
            assert_eq!(requests.len(), attempts, "{fault:?}");
        }
    }
}

#[tokio::test]
async fn a_failed_write_is_sent_once_unless_it_surely_did_nothing_and_says_when_its_fate_is_unknown() {
    let app = app().await;
    let service = |message: &str, details: &str| object("SERVICE_ERROR", message, details);
    let definite = |code: u16, message: &str, retryable: bool| {
        service(message, &format!(r#""status_code":{code},"path":"/tickets","retryable":{retryable}"#))
    };
    let unknown = |code: u16, reason: &str| {
        let details = format!(
            r#""status_code":{code},"path":"/tickets","outcome":"unknown","idempotency_key":"KEY","retryable":false"#
        );
        service(&perhaps_created(&format!("answered {code} {reason}")), &details)
    };
    let lost = |what: &str| {
        let details = r#""path":"/tickets","outcome":"unknown","idempotency_key":"KEY","retryable":false"#;
        service(&perhaps_created(what), details)
    };
    let created_but = |code: u16, what: &str| {
        let details = format!(
            r#""status_code":{code},"path":"/tickets","outcome":"created","idempotency_key":"KEY","retryable":false"#
        );
        service(&created(what), &details)
    };
    let no_form = "its answer does not have the agreed form";
    let too_large = "its answer is larger than the 65536 bytes that this server reads";
    let sign_in = FaultRule::status(200).header("content-type", "text/html; charset=utf-8").body("<html>");
    let unreadable = |code: u16| {
        let details = format!(
            r#""status_code":{code},"path":"/tickets","outcome":"unknown","idempotency_key":"KEY","retryable":false"#
        );
        service(&perhaps_created("sent an answer that cannot be read"), &details)
    };
    let told_to_wait = r#""status_code":429,"path":"/tickets","retryable":true,"retry_after_seconds":3600"#;
    let unlike = FaultRule::status(201).body(json!({ "id": [CANARY], "status": CANARY }).to_string());
    for (fault, attempts, created, expected) in [
        (status(400), 1, false, definite(400, &not_accepted(400), false)),
        (status(403), 1, false, definite(403, FORBIDDEN, false)),
        (status(404), 1, false, definite(404, NO_TICKETS, false)),
        (status(408), 1, false, unknown(408, "Request Timeout")),
        (status(409), 1, false, definite(409, CONFLICT, false)),
        (status(422), 1, false, definite(422, &not_accepted(422), false)),
        (status(429), 3, false, definite(429, TOO_MUCH, true)),
        (status(429).header("retry-after", "3600"), 1, false, service(TOO_MUCH, told_to_wait)),
        (status(500), 1, false, unknown(500, "Internal Server Error")),
        (status(502), 1, false, unknown(502, "Bad Gateway")),
        (status(503), 1, false, unknown(503, "Service Unavailable")),
        (status(504), 1, false, unknown(504, "Gateway Timeout")),
        (status(302).header("location", "/tickets"), 1, false, unknown(302, "Found")),
        (FaultRule::redirect("/tickets"), 1, false, unknown(307, "Temporary Redirect")),
        (FaultRule::close_before_head(), 1, true, lost("broke the connection off")),
        (FaultRule::close_mid_body(), 1, true, created_but(201, "the connection broke before its answer was complete")),
        (FaultRule::broken_json(), 1, false, created_but(200, no_form)),
        (unlike, 1, false, created_but(201, no_form)),
        (FaultRule::status(201).body(""), 1, false, created_but(201, no_form)),
        (FaultRule::status(204).body(""), 1, false, created_but(204, no_form)),
        (FaultRule::status(202).body(""), 1, false, unreadable(202)),
        (sign_in, 1, false, unreadable(200)),
        (FaultRule::huge_body(CAP), 1, false, created_but(200, too_large)),
        (FaultRule::endless_body(), 1, false, created_but(200, too_large)),
    ] {
        for era in Era::ALL {
            let title = format!("{era:?} {fault:?}").chars().take(200).collect::<String>();
            app.stand_ins.backend.set_fault([fault.clone().on("POST /tickets")]);
            let (result, requests) = create(&app, era, &title).await;
            assert_eq!(result.text(), expected.replace("KEY", key(&requests)), "{fault:?}");
            result.error();
            assert_eq!(requests.len(), attempts, "{fault:?}");
            assert_eq!(tickets_with_title(&app, &title).await, usize::from(created), "{fault:?}");
        }
    }
}

#[tokio::test]
async fn a_backend_that_is_down_gets_nothing_and_is_reported_as_such() {
    for era in Era::ALL {
        let app = TestApp::spawn().await;
        app.stand_ins.backend.set_down(true).await.unwrap();
        let unreachable =
            |path: &str| object("SERVICE_ERROR", UNREACHABLE, &format!(r#""path":"{path}","retryable":true"#));
        assert_eq!(create(&app, era, "x").await.0.text(), unreachable("/tickets"));
        assert_eq!(read(&app, era).await.0.text(), unreachable("/users/42"));

        app.stand_ins.backend.set_down(false).await.unwrap();
        create(&app, era, "x").await.0.structured();
        assert_eq!(tickets_with_title(&app, "x").await, 1);
    }
}

#[tokio::test]
async fn a_route_that_keeps_failing_is_not_called() {
    let app = TestApp::spawn_with(|settings| settings.backend.max_attempts = 1).await;
    app.stand_ins.backend.set_fault([status(503).times(8)]);
    fail_for_two_users(&app).await;
    let (result, requests) = read(&app, Era::Modern).await;
    let rejected = object(
        "SERVICE_ERROR",
        "The backend is failing, so calls are being rejected without contacting it (circuit breaker open). Call again after `retry_after_seconds`, and if that goes on, tell the operators.",
        r#""path":"/users/42","retryable":true,"retry_after_seconds":1"#,
    );
    assert_eq!((result.text(), requests.len()), (rejected.as_str(), 0));
    create(&app, Era::Modern, "x").await.0.structured();
}

#[tokio::test]
async fn a_short_failure_is_not_noticed_by_the_caller() {
    let app = app().await;
    for fault in [
        FaultRule::status(408),
        FaultRule::status(429),
        FaultRule::status(502),
        FaultRule::status(503).header("retry-after", "0"),
        FaultRule::status(504),
        FaultRule::close_before_head(),
        FaultRule::close_mid_body(),
    ] {
        app.stand_ins.backend.set_fault([fault.clone().times(2)]);
        let (result, requests) = read(&app, Era::Modern).await;
        assert_eq!(result.structured()["id"], "42", "{fault:?}");
        assert_eq!(requests.len(), 3, "{fault:?}");
        let spans: std::collections::BTreeSet<_> =
            requests.iter().map(|request| request.header("traceparent")).collect();
        assert_eq!(spans.len(), 3, "each attempt is a span of its own");
    }
    app.stand_ins.backend.set_fault([FaultRule::status(429).times(2)]);
    let (result, requests) = create(&app, Era::Modern, "throttled").await;
    result.structured();
    assert_eq!(requests.len(), 3);
    key(&requests);
    assert_eq!(tickets_with_title(&app, "throttled").await, 1);
}

#[tokio::test]
async fn a_write_is_repeated_under_its_key_where_the_backend_tells_repetitions_apart() {
    let app = app_with(|backend| backend.idempotent_creates = true).await;
    for fault in [FaultRule::close_before_head(), FaultRule::close_mid_body(), status(502), status(503), status(504)] {
        for era in Era::ALL {
            let title = format!("{era:?} {fault:?}").chars().take(200).collect::<String>();
            app.stand_ins.backend.set_fault([fault.clone().times(2)]);
            let (result, requests) = create(&app, era, &title).await;
            result.structured();
            assert_eq!(requests.len(), 3);
            key(&requests);
            assert_eq!(tickets_with_title(&app, &title).await, 1, "{fault:?}");
        }
    }
}

#[tokio::test]
async fn a_write_of_unknown_fate_stays_so_when_its_repetition_is_refused() {
    let app = app_with(|backend| backend.idempotent_creates = true).await;
    for second in [status(429).header("retry-after", "3600"), status(400), status(403), status(409)] {
        app.stand_ins.backend.set_fault([FaultRule::close_before_head().times(1), second.clone()]);
        let (result, requests) = create(&app, Era::Modern, "twice").await;
        let error = result.error();
        assert_eq!(error["details"]["outcome"], "unknown", "{second:?}: {error}");
        assert_eq!(error["details"]["idempotency_key"], key(&requests));
        assert_eq!(error["details"]["retryable"], false);
        assert!(error["message"].as_str().unwrap().contains("list_tickets"));
        assert_eq!(requests.len(), 2);
    }
}

#[tokio::test]
async fn a_write_of_unknown_fate_stays_so_when_the_breaker_keeps_its_repetition_back() {
    let app = app_with(|backend| {
        backend.idempotent_creates = true;
        backend.circuit_breaker = true;
    })
    .await;
    // Nobody is called again who wants to be called so late.
    let late = || status(503).header("retry-after", "60");
    app.stand_ins.backend.set_fault([late().times(15), FaultRule::close_before_head()]);
    // One caller alone opens the breaker of the writes only where another route fails as well.
    fail_for_two_users(&app).await;
    for _ in 0..7 {
        create(&app, Era::Modern, "kept back").await.0.error();
    }
    let (result, requests) = create(&app, Era::Modern, "kept back").await;
    assert_eq!(requests.len(), 1);
    assert_eq!(result.error()["details"]["outcome"], "unknown", "{result:?}");
}

#[tokio::test]
async fn the_backends_wish_to_wait_is_granted_when_it_fits_the_deadline() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_fault([FaultRule::status(429).header("retry-after", "1").times(1)]);
    let (result, requests) = create(&app, Era::Modern, "patient").await;
    result.structured();
    let [first, second] = requests.as_slice() else { panic!("{requests:?}") };
    assert!(second.at.duration_since(first.at).unwrap() >= Duration::from_secs(1));
    key(&requests);
}

#[tokio::test]
async fn the_backends_wish_to_wait_until_a_date_is_passed_on_as_seconds() {
    let app = TestApp::spawn().await;
    for code in [429, 503] {
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        app.stand_ins.backend.set_fault([status(code).header("retry-after", &date)]);
        let (result, requests) = read(&app, Era::Modern).await;
        let error = result.error();
        assert!((50..=60).contains(&error["details"]["retry_after_seconds"].as_u64().unwrap()), "{error}");
        assert_eq!((&error["details"]["retryable"], requests.len()), (&json!(true), 1));
    }
}

#[tokio::test]
async fn a_backend_that_hangs_ends_in_a_timeout_error_at_the_deadline() {
    let app = app_with(|backend| backend.timeout = Duration::from_millis(300)).await;
    app.until_ready().await;
    let read_expected = object(
        "TIMEOUT_ERROR",
        "The backend gave no answer within 0.3 seconds. Call again, or ask for less.",
        r#""path":"/users/42","timeout_seconds":0.3,"retryable":true"#,
    );
    let write_expected = object(
        "TIMEOUT_ERROR",
        &perhaps_created("gave no answer in time"),
        r#""path":"/tickets","timeout_seconds":0.3,"outcome":"unknown","idempotency_key":"KEY","retryable":false"#,
    );
    let read_stalled = object(
        "TIMEOUT_ERROR",
        "The backend answered 200, but its whole answer did not arrive within 0.3 seconds. Call again, or ask for less.",
        r#""status_code":200,"path":"/users/42","timeout_seconds":0.3,"retryable":true"#,
    );
    let write_stalled = object(
        "TIMEOUT_ERROR",
        &created("its whole answer did not arrive within 0.3 seconds"),
        r#""status_code":201,"path":"/tickets","timeout_seconds":0.3,"outcome":"created","idempotency_key":"KEY","retryable":false"#,
    );
    let long = Duration::from_secs(60);
    for (fault, read_expected, write_expected) in [
        (FaultRule::hang(), &read_expected, &write_expected),
        (FaultRule::delay(long), &read_expected, &write_expected),
        (FaultRule::delay_mid_body(long), &read_stalled, &write_stalled),
    ] {
        app.stand_ins.backend.set_fault([fault.clone()]);
        for era in Era::ALL {
            let (result, requests) = read(&app, era).await;
            assert_eq!((result.text(), requests.len()), (read_expected.as_str(), 1), "{fault:?}");
            let (result, requests) = create(&app, era, "slow").await;
            assert_eq!((result.text(), requests.len()), (write_expected.replace("KEY", key(&requests)).as_str(), 1));
        }
    }
    app.stand_ins.backend.cancelled_count().reaches(12).await;
}

#[tokio::test]
async fn the_status_of_an_error_decides_also_when_its_body_stalls() {
    // With a breaker, which must not count a 404 or 429 against the backend.
    let app = app_with(|backend| backend.circuit_breaker = true).await;
    for (code, attempts) in [(404, 1), (400, 1), (403, 1), (409, 1), (422, 1), (302, 1), (429, 3)] {
        let stalled = FaultRule::status(code).body("").stalled();
        app.stand_ins.backend.set_fault([stalled]);
        for era in Era::ALL {
            let (result, requests) = read(&app, era).await;
            let error = result.error();
            assert_eq!((&error["error"], &error["details"]["status_code"]), (&json!("SERVICE_ERROR"), &json!(code)));
            assert_eq!(requests.len(), attempts, "{error}");
            let (result, requests) = create(&app, era, "x").await;
            let error = result.error();
            assert_eq!((&error["error"], &error["details"]["status_code"]), (&json!("SERVICE_ERROR"), &json!(code)));
            assert_eq!(error["details"].get("outcome").is_some(), code == 302, "{error}");
            assert_eq!(requests.len(), attempts, "{error}");
        }
    }
    app.stand_ins.backend.set_fault([FaultRule::status(401).body("{").stalled().times(1)]);
    let (result, requests) = read(&app, Era::Modern).await;
    assert_eq!((&result.structured()["id"], requests.len()), (&json!("42"), 2));
    app.stand_ins.backend.set_fault([FaultRule::status(503).body("{").stalled().times(2)]);
    let (result, requests) = read(&app, Era::Modern).await;
    assert_eq!((&result.structured()["id"], requests.len()), (&json!("42"), 3));
    app.stand_ins.backend.set_fault([FaultRule::status(429).header("retry-after", "3600").stalled()]);
    let (result, requests) = read(&app, Era::Modern).await;
    assert_eq!((&result.error()["details"]["retry_after_seconds"], requests.len()), (&json!(3600), 1));
    app.stand_ins.backend.set_fault([FaultRule::status(500).stalled()]);
    assert_eq!(read(&app, Era::Modern).await.0.error()["details"]["status_code"], 500);
}

#[tokio::test]
async fn an_answer_with_a_content_coding_is_an_error_that_names_it() {
    let app = app().await;
    let gzip = b"\x1f\x8b\x08\x00".as_slice();
    for (coding, named) in [("gzip", Some("`gzip`")), ("BR", Some("`BR`")), ("identity", None), ("Identity", None)] {
        let body = FaultRule::status(200).body(gzip).header("content-encoding", coding);
        app.stand_ins.backend.set_fault([body.clone().on("GET /users"), body.on("POST /tickets")]);
        let (result, requests) = read(&app, Era::Modern).await;
        assert_eq!(
            requests.iter().map(|request| request.header("accept-encoding")).collect::<Vec<_>>(),
            [Some("identity")]
        );
        let error = result.error();
        assert_eq!((&error["error"], &error["details"]["status_code"]), (&json!("SERVICE_ERROR"), &json!(200)));
        assert_eq!(error["details"]["retryable"], false);
        assert_eq!(error["message"].as_str().unwrap().contains("`gzip`"), named == Some("`gzip`"), "{error}");
        assert!(named.is_none_or(|named| error["message"].as_str().unwrap().contains(named)), "{error}");
        let error = create(&app, Era::Modern, "x").await.0.error();
        assert_eq!((&error["details"]["outcome"], &error["details"]["retryable"]), (&json!("created"), &json!(false)));
        assert!(named.is_none_or(|named| error["message"].as_str().unwrap().contains(named)), "{error}");
    }
    // An error stays the error that its status names.
    app.stand_ins.backend.set_fault([FaultRule::status(404).body(gzip).header("content-encoding", "gzip")]);
    assert_eq!(read(&app, Era::Modern).await.0.error()["message"], NOT_FOUND);
    app.stand_ins.backend.set_fault([]);
    app.until_ready().await;
}

#[tokio::test]
async fn one_refused_token_costs_a_second_attempt_with_a_new_one() {
    for era in Era::ALL {
        let app = TestApp::spawn().await;
        app.stand_ins.backend.set_fault([status(401).times(1)]);
        let (result, requests) = create(&app, era, "once").await;
        result.structured();
        let [first, second] = requests.as_slice() else { panic!("{requests:?}") };
        assert_ne!(first.authorization_raw, second.authorization_raw);
        key(&requests);
        assert_eq!(tickets_with_title(&app, "once").await, 1);
    }
}

#[tokio::test]
async fn a_token_refused_twice_is_an_authentication_error() {
    for era in Era::ALL {
        let app = TestApp::spawn().await;
        app.stand_ins.backend.set_fault([status(401)]);
        let (result, requests) = read(&app, era).await;
        let details = r#""status_code":401,"path":"/users/42","retryable":false"#;
        assert_eq!(result.text(), object("AUTHENTICATION_ERROR", TOKEN_REFUSED, details));
        assert_eq!(requests.len(), 2);
        assert_ne!(requests[0].authorization_raw, requests[1].authorization_raw);

        let (result, requests) = create(&app, era, "x").await;
        let details = r#""status_code":401,"path":"/tickets","retryable":false"#;
        // Within 30 s of the first replacement there is none.
        assert_eq!(result.text(), object("AUTHENTICATION_ERROR", TOKEN_NOT_REPLACED, details));
        assert_eq!(requests.len(), 1, "{requests:?}");
    }
}

#[tokio::test]
async fn redirects_are_not_followed_so_the_other_origin_sees_nothing() {
    let app = TestApp::spawn().await;
    let other = StandInBackend::start(BackendOptions::new(app.stand_ins.entra.verifier())).await.unwrap();
    let location = other.base_url().join("/users/42").unwrap();
    for code in [301, 302, 303, 307, 308] {
        app.stand_ins.backend.set_fault([status(code).header("location", location.as_str())]);
        assert_eq!(read(&app, Era::Modern).await.0.error()["details"]["status_code"], code);
        assert_eq!(create(&app, Era::Modern, "x").await.0.error()["details"]["outcome"], "unknown");
    }
    assert_eq!(other.connection_count().get(), 0);
}

#[tokio::test]
async fn an_answer_is_read_up_to_the_cap_and_not_a_byte_beyond() {
    let app = app().await;
    let body = |length: usize| {
        let user = json!({ "id": "42", "name": "", "email": "a@b.example", "created_at": "2026-01-01T00:00:00Z" });
        let filler = length - user.to_string().len();
        let mut user = user;
        user["name"] = "x".repeat(filler).into();
        user.to_string()
    };
    app.stand_ins.backend.set_fault([FaultRule::status(200).body(body(CAP))]);
    read(&app, Era::Modern).await.0.structured();
    app.stand_ins.backend.set_fault([FaultRule::status(200).body(body(CAP + 1))]);
    assert_eq!(read(&app, Era::Modern).await.0.error()["message"], TOO_LARGE);
}

#[tokio::test]
async fn causes_are_told_in_debug_mode_only_and_the_backends_words_never() {
    let user = json!({ "id": "42", "name": "x", "email": "x", "created_at": CANARY, "details": CANARY });
    let ticket = json!({ "id": [CANARY], "title": CANARY, "status": CANARY });
    let quoting = json!({ "total": format!("\"{CANARY}, expected {CANARY}"), "items": [] });
    for debug in [false, true] {
        let app = TestApp::spawn_with(|settings| settings.log.debug = debug).await;
        for (tool, fault, cause) in [
            ("get_user_profile", status(500), "the backend answered 500"),
            ("get_user_profile", status(401), "the backend refused the token"),
            ("get_user_profile", FaultRule::status(200).body(user.to_string()), "expected an object at line 1 column"),
            ("get_user_profile", FaultRule::status(200).body(CANARY), "expected value at line 1 column 1"),
            ("get_user_profile", FaultRule::status(200).body(json!({ CANARY: 1 }).to_string()), "missing field `id`"),
            ("list_users", FaultRule::status(200).body(quoting.to_string()), "expected u64 at line 1 column"),
            ("create_ticket", FaultRule::status(201).body(ticket.to_string()), "id is not a string or an integer"),
            ("create_ticket", FaultRule::close_before_head(), "the backend broke the connection off"),
        ] {
            app.stand_ins.backend.set_fault([fault.clone()]);
            let arguments = match tool {
                "get_user_profile" => json!({ "user_id": "42", "include_details": true }),
                "create_ticket" => json!({ "title": "x", "description": "long enough" }),
                _ => json!({}),
            };
            let result = app.call_traced(Era::Modern, tool, arguments).await;
            let told = result.error()["details"]["cause"].as_str().map(str::to_owned);
            assert_eq!(told.is_some(), debug, "{fault:?}");
            assert!(told.as_ref().is_none_or(|told| told.contains(cause)), "{told:?} should say: {cause}");
            assert!(![CANARY, DETAIL].iter().any(|words| result.0.to_string().contains(words)), "{}", result.0);
        }
    }
}
