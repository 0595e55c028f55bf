//! Every tool under every fault of the backend: the class of the error, how often the backend was asked, how long it took, and how
//! many tickets there are afterwards.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::BackendSettings;
use serde_json::{Value, json};

use crate::errors::{CAP, persistent, status};
use crate::support::wire::{WireBackend, WireFault};
use crate::support::{CallResult, Era, TestApp};

/// The deadline of calls to a backend that hangs, and of those to one that answers.
const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(10);
/// What ends so much later than its deadline is not ended by it, however busy the machine is; that calls end exactly then is what
/// `src/backend/simulation.rs` holds, with a clock that is turned by hand.
const LATENESS: Duration = Duration::from_secs(30);

const SERVICE: &str = "SERVICE_ERROR";
const TIMEOUT: &str = "TIMEOUT_ERROR";
const AUTHENTICATION: &str = "AUTHENTICATION_ERROR";

/// The tools, each with the beginning of the request that it makes.
const TOOLS: [(&str, &str); 5] = [
    ("get_user_profile", "GET /users/"),
    ("list_users", "GET /users?"),
    ("create_ticket", "POST /tickets"),
    ("list_tickets", "GET /tickets?"),
    ("query_data", "GET /query/"),
];

enum Fault {
    Rule(FaultRule),
    Down,
    Wire(WireFault),
}

/// A fault that lasts, and what has to come of it.
struct Row {
    name: &'static str,
    fault: Fault,
    timeout: Duration,
    class: &'static str,
    /// How often a read is made, and a write that may be repeated like one.
    read: usize,
    write: usize,
    /// Whether the fate of a write is unknown afterwards.
    doubt: bool,
}

fn rows() -> Vec<Row> {
    let rule = |name, fault, class, read, write, doubt| {
        let timeout = if class == TIMEOUT { SHORT } else { LONG };
        Row { name, fault: Fault::Rule(fault), timeout, class, read, write, doubt }
    };
    let wire = |name, fault, read, write, doubt| {
        let (timeout, class) = if read == 0 { (SHORT, TIMEOUT) } else { (LONG, SERVICE) };
        Row { name, fault: Fault::Wire(fault), timeout, class, read, write, doubt }
    };
    let long = Duration::from_secs(60);
    vec![
        Row { name: "refused", fault: Fault::Down, timeout: LONG, class: SERVICE, read: 0, write: 0, doubt: false },
        wire("reset before the head", WireFault::ResetBeforeHead, 3, 1, true),
        wire("reset after the head", WireFault::ResetAfterHead, 3, 1, true),
        wire("hangs at the connection", WireFault::HangAtConnect, 0, 0, false),
        rule("closes before the head", FaultRule::close_before_head(), SERVICE, 3, 1, true),
        rule("closes in the body", FaultRule::close_mid_body(), SERVICE, 3, 1, true),
        rule("hangs before the head", FaultRule::hang(), TIMEOUT, 1, 1, true),
        rule("hangs in the body", FaultRule::delay_mid_body(long), TIMEOUT, 1, 1, true),
        rule("400", status(400), SERVICE, 1, 1, false),
        rule("401", status(401), AUTHENTICATION, 2, 2, false),
        rule("403", status(403), SERVICE, 1, 1, false),
        rule("404", status(404), SERVICE, 1, 1, false),
        rule("408", status(408), SERVICE, 3, 1, true),
        rule("409", status(409), SERVICE, 1, 1, false),
        rule("422", status(422), SERVICE, 1, 1, false),
        rule("429", status(429), SERVICE, 3, 3, false),
        rule("500", status(500), SERVICE, 1, 1, true),
        rule("502", status(502), SERVICE, 3, 1, true),
        rule("503", status(503), SERVICE, 3, 1, true),
        rule("504", status(504), SERVICE, 3, 1, true),
        rule("broken JSON", FaultRule::broken_json(), SERVICE, 1, 1, true),
        rule("wrong types", FaultRule::wrong_types(), SERVICE, 1, 1, true),
        rule("too large", FaultRule::huge_body(CAP), SERVICE, 1, 1, true),
        rule("without end", FaultRule::endless_body(), SERVICE, 1, 1, true),
    ]
}

fn arguments(tool: &str, title: &str) -> Value {
    match tool {
        "get_user_profile" => json!({ "user_id": "42" }),
        "create_ticket" => json!({ "title": title, "description": "long enough" }),
        "query_data" => json!({ "dataset": "sales", "limit": 3 }),
        _ => json!({}),
    }
}

async fn spawn(stand_ins: &Arc<StandIns>, change: impl FnOnce(&mut BackendSettings)) -> TestApp {
    let app = TestApp::spawn_against(Arc::clone(stand_ins), |settings| {
        persistent(&mut settings.backend);
        change(&mut settings.backend);
    })
    .await;
    app.until_ready().await;
    app
}

/// Calls a tool, which has to end by its deadline.
async fn call_in_time(app: &TestApp, tool: &str, title: &str, deadline: Duration) -> CallResult {
    let call = app.call(Era::Modern, tool, arguments(tool, title));
    tokio::time::timeout(deadline + LATENESS, call).await.unwrap_or_else(|_| panic!("{tool} outlives {deadline:?}"))
}

async fn tickets(stand_ins: &StandIns, app: &TestApp, title: &str) -> usize {
    stand_ins.backend.set_fault([]);
    let page = app.call(Era::Modern, "list_tickets", json!({ "limit": 100 })).await;
    page.structured()["items"].as_array().unwrap().iter().filter(|ticket| ticket["title"] == title).count()
}

fn requests_of<'a>(requests: &'a [RecordedRequest], beginning: &str) -> Vec<&'a RecordedRequest> {
    requests.iter().filter(|request| format!("{} {}", request.method, request.target).starts_with(beginning)).collect()
}

/// Checks one call that failed.
fn assert_failure(row: &Row, tool: &str, result: &CallResult) {
    let error = result.error();
    let (title, write) = (row.name, tool == "create_ticket");
    assert_eq!(error["error"], row.class, "{tool}, {title}: {error}");
    assert_eq!(error["details"]["outcome"].is_string(), write && row.doubt, "{tool}, {title}: {error}");
    assert_eq!(error["details"]["idempotency_key"].is_string(), write && row.doubt, "{tool}, {title}: {error}");
    let retryable = error["details"]["retryable"].as_bool().unwrap();
    assert!(!(write && row.doubt && retryable), "{tool}, {title}: {error}");
}

async fn assert_matrix(keyed: bool) {
    let stand_ins = Arc::new(StandIns::start(DemoOptions::default()).await.unwrap());
    let with = |timeout: Duration| {
        spawn(&stand_ins, move |backend| {
            backend.timeout = timeout;
            backend.idempotent_creates = keyed;
        })
    };
    let (long, short) = (with(LONG).await, with(SHORT).await);
    for row in rows() {
        let app = if row.timeout == LONG { &long } else { &short };
        let title = format!("{keyed} {}", row.name);
        let attempts = |tool: &str| if tool == "create_ticket" && !keyed { row.write } else { row.read };
        if let Fault::Wire(fault) = row.fault {
            let wire = WireBackend::start(fault).await;
            let app = spawn(&stand_ins, |backend| {
                backend.base_url = wire.base_url();
                backend.timeout = row.timeout;
                backend.idempotent_creates = keyed;
            })
            .await;
            for (tool, _) in TOOLS {
                let result = call_in_time(&app, tool, &title, row.timeout).await;
                assert_failure(&row, tool, &result);
                assert_eq!(wire.take_requests(), attempts(tool), "{tool}, {}", row.name);
            }
            continue;
        }
        match &row.fault {
            Fault::Rule(rule) => stand_ins.backend.set_fault([rule.clone()]),
            _ => stand_ins.backend.set_down(true).await.unwrap(),
        }
        stand_ins.backend.forget_requests();
        if row.class == AUTHENTICATION {
            // A token is forced out once in a while only: each tool has a server of its own.
            for (tool, _) in TOOLS {
                let app = with(LONG).await;
                assert_failure(&row, tool, &call_in_time(&app, tool, &title, row.timeout).await);
            }
        } else {
            let calls = TOOLS.map(|(tool, _)| call_in_time(app, tool, &title, row.timeout));
            for ((tool, _), result) in TOOLS.iter().zip(join_all(calls).await) {
                assert_failure(&row, tool, &result);
            }
        }
        let requests = stand_ins.backend.requests();
        for (tool, beginning) in TOOLS {
            let made = requests_of(&requests, beginning);
            assert_eq!(made.len(), attempts(tool), "{tool}, {}: {made:#?}", row.name);
            assert!(made.windows(2).all(|two| two[0].header("idempotency-key") == two[1].header("idempotency-key")));
        }
        stand_ins.backend.set_down(false).await.unwrap();
        assert!(tickets(&stand_ins, &long, &title).await <= 1, "{}", row.name);
    }
    long.until_idle().await;
    short.until_idle().await;
}

#[tokio::test]
async fn a_fault_that_lasts_ends_every_tool_with_its_class_after_its_attempts_and_before_its_deadline() {
    assert_matrix(false).await;
}

#[tokio::test]
async fn with_keys_writes_are_repeated_like_reads_and_never_make_a_second_ticket() {
    assert_matrix(true).await;
}

#[tokio::test]
async fn a_fault_that_passes_leaves_one_ticket_or_none_and_the_answer_knows_which() {
    let stand_ins = Arc::new(StandIns::start(DemoOptions::default()).await.unwrap());
    for keyed in [false, true] {
        let with = |timeout| {
            spawn(&stand_ins, move |backend| {
                backend.timeout = timeout;
                backend.idempotent_creates = keyed;
            })
        };
        let (long, short) = (with(LONG).await, with(SHORT).await);
        for row in rows() {
            let Fault::Rule(rule) = &row.fault else { continue };
            let app = if row.timeout == LONG { &long } else { &short };
            let title = format!("{keyed} {} once", row.name);
            stand_ins.backend.forget_requests();
            stand_ins.backend.set_fault([rule.clone().on("POST /tickets").times(1)]);
            let result = call_in_time(app, "create_ticket", &title, row.timeout).await;
            let attempts = stand_ins.backend.requests().len();
            let (count, failed) = (tickets(&stand_ins, &long, &title).await, result.0["isError"] == true);
            let repeated = if keyed { row.read > 1 } else { row.write > 1 };
            assert_eq!((attempts, failed), (if repeated { 2 } else { 1 }, !repeated), "{}: {result:?}", row.name);
            if failed {
                let told = result.error()["details"]["outcome"].is_string();
                assert!(count == 0 || (count == 1 && told), "{}: {count} tickets, {result:?}", row.name);
            } else {
                assert_eq!(count, 1, "{}", row.name);
            }
        }
    }
}
