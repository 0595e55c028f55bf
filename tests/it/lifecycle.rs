//! How the server comes and goes: what readiness says, and what a signal does to the real binary and the calls in it.

use std::path::Path;
use std::time::{Duration, Instant};

use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::support::process::{Client, Program, parsed, result_of};
use crate::support::{CallResult, Era, TestApp, until};

async fn stand_ins() -> StandIns {
    StandIns::start(DemoOptions::default()).await.unwrap()
}

/// Starts a call, and returns when the backend has it.
async fn call_in_flight(stand_ins: &StandIns, client: &Client, tool: &str, arguments: Value) -> JoinHandle<CallResult> {
    let seen = stand_ins.backend.requests().len();
    let request = client.call(tool, arguments);
    let call = tokio::spawn(async move { result_of(request.send().await.unwrap()).await });
    until(async || stand_ins.backend.requests().iter().skip(seen).any(|request| request.target != "/health")).await;
    call
}

fn user() -> Value {
    json!({ "user_id": "42" })
}

fn ticket() -> Value {
    json!({ "title": "Printer", "description": "It burns, and nobody looks." })
}

fn delayed(seconds: f64) -> [FaultRule; 1] {
    [FaultRule::delay(Duration::from_secs_f64(seconds)).on("GET /users")]
}

#[tokio::test]
async fn a_signal_drains_answers_what_is_in_flight_and_ends_with_0() {
    for signal in ["TERM", "INT", "HUP"] {
        let stand_ins = stand_ins().await;
        let server = Program::serve(&stand_ins).env("DRAIN_DELAY", "0.5").start();
        let client = server.client().await;
        client.until_ready().await;
        stand_ins.backend.set_fault(delayed(1.0));
        let slow = call_in_flight(&stand_ins, &client, "get_user_profile", user()).await;
        stand_ins.backend.set_fault([]);

        server.signal(signal);
        until(async || client.readiness().await.1["status"] == "draining").await;
        let (status, report) = client.readiness().await;
        assert_eq!((status, &report["dependencies"]["backend_service"]), (503, &json!("healthy")), "{report}");
        assert_eq!(client.get("/health/live").send().await.unwrap().status(), 200);
        let answer = client.call("get_user_profile", user()).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), &answer.headers()["connection"]), (200, &"close".parse().unwrap()));
        assert_eq!(result_of(answer).await.structured()["id"], "42");

        assert_eq!(slow.await.unwrap().structured()["id"], "42");
        let finished = server.ended().await;
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        assert!(finished.stderr.is_empty(), "{finished:#?}");
        assert_eq!(finished.log().last().unwrap()["message"], "stopped");
    }
}

#[tokio::test]
async fn a_server_that_was_started_under_nohup_outlives_its_terminal() {
    let stand_ins = stand_ins().await;
    let server = Program::serve(&stand_ins).under_nohup().start();
    let client = server.client().await;
    client.until_ready().await;
    stand_ins.backend.set_fault(delayed(1.0));
    let slow = call_in_flight(&stand_ins, &client, "get_user_profile", user()).await;
    server.signal("HUP");
    // Another signal, so that the first has been seen when this one has.
    server.signal("USR1");
    server.stdout.line("the log is at DEBUG from now on").await;
    assert_eq!(client.readiness().await.0, 200);
    assert_eq!(slow.await.unwrap().structured()["id"], "42");
    server.signal("TERM");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
}

#[tokio::test]
async fn a_call_that_is_slower_than_the_drain_delay_is_still_finished() {
    let stand_ins = stand_ins().await;
    let server = Program::serve(&stand_ins).start();
    let client = server.client().await;
    client.until_ready().await;
    stand_ins.backend.set_fault(delayed(0.7));
    let slow = call_in_flight(&stand_ins, &client, "get_user_profile", user()).await;
    server.signal("TERM");
    assert_eq!(slow.await.unwrap().structured()["id"], "42");
    assert_eq!(server.ended().await.code, Some(0));
    assert!(TcpStream::connect(client.address).await.is_err());
}

#[tokio::test]
async fn idle_and_silent_connections_do_not_hold_up_the_end() {
    let stand_ins = stand_ins().await;
    let server = Program::serve(&stand_ins).start();
    let address = server.address().await;
    let _silent = TcpStream::connect(address).await.unwrap();
    let mut idle = TcpStream::connect(address).await.unwrap();
    idle.write_all(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    assert!(idle.read(&mut [0; 4_096]).await.unwrap() > 0);

    server.signal("TERM");
    // `ended` waits for less than the grace, which calls in flight would have.
    assert_eq!(server.ended().await.code, Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once_and_not_with_0() {
    let stand_ins = stand_ins().await;
    let server = Program::serve(&stand_ins).start();
    let client = server.client().await;
    client.until_ready().await;
    stand_ins.backend.set_fault([FaultRule::hang()]);
    let request = client.call("get_user_profile", user());
    let seen = stand_ins.backend.request_count().get();
    let call = tokio::spawn(async move { request.send().await.is_err() });
    stand_ins.backend.request_count().reaches(seen + 1).await;

    server.signal("TERM");
    server.stdout.line("stopping: ").await;
    server.signal("INT");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.log().iter().any(|line| line["message"].as_str().unwrap().contains("told to stop twice")));
    assert!(call.await.unwrap(), "the call was cut off");
}

#[tokio::test]
async fn calls_that_outlast_the_grace_are_told_so_and_the_end_is_in_time() {
    let stand_ins = stand_ins().await;
    let server = Program::serve(&stand_ins).env("SHUTDOWN_GRACE", "1").start();
    let client = server.client().await;
    client.until_ready().await;
    stand_ins.backend.set_fault([FaultRule::hang()]);
    let read = call_in_flight(&stand_ins, &client, "get_user_profile", user()).await;
    let write = call_in_flight(&stand_ins, &client, "create_ticket", ticket()).await;

    let told = Instant::now();
    server.signal("TERM");
    let (read, write) = (read.await.unwrap().error(), write.await.unwrap().error());
    let finished = server.ended().await;
    assert!(told.elapsed() >= Duration::from_secs(1), "{:?}", told.elapsed());
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!((&read["error"], &read["details"]["retryable"]), (&json!("TIMEOUT_ERROR"), &json!(true)), "{read}");
    assert_eq!((&write["error"], &write["details"]["retryable"]), (&json!("TIMEOUT_ERROR"), &json!(false)), "{write}");
    assert_eq!(write["details"]["outcome"], "unknown", "{write}");
    assert!(write["message"].as_str().unwrap().contains("list_tickets"), "{write}");
    let ended: Vec<_> = finished.log().into_iter().filter(|line| line["outcome"].is_string()).collect();
    for (error, outcome) in [(&read, "TIMEOUT_ERROR"), (&write, "unknown")] {
        let told = ended.iter().filter(|line| line["trace_id"] == error["details"]["trace_id"]).collect::<Vec<_>>();
        assert_eq!(told.len(), 1, "{ended:#?}");
        assert_eq!(told[0]["outcome"], outcome, "{ended:#?}");
    }
}

/// The same call as a message that is not a plain one, so that rmcp serves it.
fn through_rmcp(request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
    let body = request.try_clone().unwrap().build().unwrap();
    let mut body: Value = serde_json::from_slice(body.body().unwrap().as_bytes().unwrap()).unwrap();
    body["not_in_the_schema"] = json!(true);
    request.body(body.to_string())
}

/// The tool calls in an audit file, and those in the log, as `(trace id, outcome)`, sorted.
fn calls_in_file_and_log(file: &Path, log: &[Value]) -> [Vec<(String, String)>; 2] {
    let call = |event: &Value| {
        let of = |field: &str| event[field].as_str().unwrap().to_owned();
        (event["event.name"] == "tool_call").then(|| (of("trace_id"), of("event.outcome")))
    };
    let lines = std::fs::read_to_string(file).unwrap();
    let mut in_file: Vec<_> = lines.lines().filter_map(|line| call(&parsed(line)["event"])).collect();
    let mut in_log: Vec<_> = log.iter().filter_map(call).collect();
    in_file.sort();
    in_log.sort();
    [in_file, in_log]
}

#[tokio::test]
async fn a_write_whose_client_has_left_is_finished_before_the_end_and_its_outcome_recorded() {
    for path in [|request| request, through_rmcp] {
        let stand_ins = stand_ins().await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("audit.jsonl");
        let server = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", file.to_str().unwrap()).start();
        let client = server.client().await;
        client.until_ready().await;
        stand_ins.backend.set_fault([FaultRule::delay(Duration::from_secs(1)).on("POST /tickets")]);
        let seen = stand_ins.backend.requests().len();
        let call = tokio::spawn(path(client.call("create_ticket", ticket())).send());
        let written =
            async || stand_ins.backend.requests().into_iter().skip(seen).find(|request| request.method == "POST");
        until(async || written().await.is_some()).await;
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());

        server.signal("TERM");
        let finished = server.ended().await;
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        assert_eq!(written().await.unwrap().status.map(|status| status.as_u16()), Some(201), "the ticket was made");
        let [in_file, in_log] = calls_in_file_and_log(&file, &finished.log());
        assert!(matches!(in_file.as_slice(), [(_, outcome)] if outcome == "ok"), "{in_file:?}");
        assert_eq!(in_file, in_log);
        assert_eq!(finished.log().last().unwrap()["message"], "stopped");
    }
}

#[tokio::test]
async fn calls_that_the_stop_gives_up_are_all_in_the_audit_file() {
    for required in ["false", "true"] {
        let stand_ins = stand_ins().await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("audit.jsonl");
        let server = Program::serve(&stand_ins)
            .env("AUDIT_LOG_FILE", file.to_str().unwrap())
            .env("AUDIT_REQUIRED", required)
            .env("SHUTDOWN_GRACE", "1")
            .start();
        let client = server.client().await;
        client.until_ready().await;
        stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets"), FaultRule::hang().on("GET /users")]);
        let mut calls = Vec::new();
        for request in [
            client.call("create_ticket", ticket()),
            through_rmcp(client.call("create_ticket", ticket())),
            client.call("create_ticket", ticket()),
            through_rmcp(client.call("create_ticket", ticket())),
            client.call("get_user_profile", user()),
            through_rmcp(client.call("get_user_profile", user())),
        ] {
            let seen = stand_ins.backend.requests().iter().filter(|request| request.target != "/health").count();
            calls.push(tokio::spawn(async move { result_of(request.send().await.unwrap()).await }));
            let asked = || stand_ins.backend.requests().iter().filter(|request| request.target != "/health").count();
            until(async || asked() > seen).await;
        }
        // The clients of two writes leave, one on each path.
        for left in [calls.remove(0), calls.remove(0)] {
            left.abort();
            assert!(left.await.unwrap_err().is_cancelled());
        }

        server.signal("TERM");
        for call in calls {
            assert_eq!(call.await.unwrap().error()["error"], "TIMEOUT_ERROR");
        }
        let finished = server.ended().await;
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let log = finished.log();
        let [in_file, in_log] = calls_in_file_and_log(&file, &log);
        assert_eq!(in_file, in_log, "AUDIT_REQUIRED={required}");
        let outcomes = |outcome: &str| in_file.iter().filter(|(_, other)| other == outcome).count();
        assert_eq!((outcomes("unknown"), outcomes("TIMEOUT_ERROR"), in_file.len()), (4, 2, 6), "{in_file:?}");
        let closed = log.iter().position(|line| line["event.name"] == "file_closed").unwrap();
        assert!(log.iter().skip(closed).all(|line| line["event.name"] != "tool_call"), "{log:#?}");
        let whole = Program::new(&["audit", "verify", file.to_str().unwrap()]).run().await;
        assert_eq!(whole.code, Some(0), "{whole:#?}");
    }
}

/// One server under calls of all kinds, whose clients leave when they like, with a backend that fails in all ways, and a stop in the middle.
async fn stopped_in_the_middle(seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let stand_ins = stand_ins().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit.jsonl");
    let server = Program::serve(&stand_ins)
        .env("AUDIT_LOG_FILE", file.to_str().unwrap())
        .env("AUDIT_REQUIRED", if random.bool() { "true" } else { "false" })
        .env("SHUTDOWN_GRACE", ["0.2", "1"][random.usize(..2)])
        .env("DRAIN_DELAY", ["0", "0.1"][random.usize(..2)])
        .env("BACKEND_API_TIMEOUT", "0.8")
        .start();
    let client = server.client().await;
    client.until_ready().await;
    stand_ins.backend.set_fault([
        FaultRule::hang().on("POST /tickets").probability(0.2),
        FaultRule::delay(Duration::from_millis(150)).on("POST /tickets").probability(0.4),
        FaultRule::close_before_head().probability(0.1),
        FaultRule::close_mid_body().probability(0.1),
        FaultRule::status(503).probability(0.1),
        FaultRule::delay_mid_body(Duration::from_millis(100)).probability(0.2),
    ]);
    let calls: Vec<_> = (0..40)
        .map(|_| {
            let request = match random.u8(..4) {
                0 => client.call("get_user_profile", user()),
                1 => through_rmcp(client.call("create_ticket", ticket())),
                _ => client.call("create_ticket", ticket()),
            };
            let begins = Duration::from_millis(random.u64(..400));
            let leaves = random.bool().then(|| Duration::from_millis(random.u64(1..300)));
            tokio::spawn(async move {
                tokio::time::sleep(begins).await;
                let answer = async { request.send().await.ok()?.text().await.ok() };
                match leaves {
                    Some(leaves) => tokio::time::timeout(leaves, answer).await.ok().flatten(),
                    None => answer.await,
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(random.u64(..500))).await;
    server.signal("TERM");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0), "seed {seed}: {finished:#?}");

    let [in_file, in_log] = calls_in_file_and_log(&file, &finished.log());
    assert_eq!(in_file, in_log, "seed {seed}: every call in the log is in the file");
    let whole = Program::new(&["audit", "verify", file.to_str().unwrap()]).run().await;
    assert_eq!(whole.code, Some(0), "seed {seed}: {whole:#?}");
    let written: Vec<_> = stand_ins.backend.requests().into_iter().filter(|request| request.method == "POST").collect();
    let events = std::fs::read_to_string(&file).unwrap();
    for write in &written {
        let key = write.header("idempotency-key").unwrap();
        assert!(events.contains(key), "seed {seed}: a write without an outcome: {key}");
    }
    for answer in calls {
        let Some(text) = answer.await.unwrap() else { continue };
        let is_write_at_backend =
            |write: &&RecordedRequest| text.contains(&write.header("traceparent").unwrap()[3..35]);
        if text.replace('\\', "").contains(r#""retryable":true"#) {
            assert!(!written.iter().any(|write| is_write_at_backend(&write)), "seed {seed}: invited again: {text}");
        }
    }
}

#[tokio::test]
async fn with_a_stop_in_the_middle_no_call_is_lost_and_no_write_is_invited_again() {
    for seed in 0..6 {
        stopped_in_the_middle(seed).await;
    }
}

#[tokio::test]
async fn a_write_that_the_stop_gives_up_before_it_was_sent_may_be_repeated() {
    for (what, attempts) in [("no token", 0), ("told to wait", 1)] {
        let stand_ins = stand_ins().await;
        match what {
            "no token" => stand_ins.entra.set_fault([FaultRule::hang()]),
            _ => stand_ins.backend.set_fault([FaultRule::status(429).header("retry-after", "5")]),
        }
        let mut app = TestApp::spawn_against(stand_ins, |settings| {
            settings.web.shutdown_grace = Duration::from_millis(300);
        })
        .await;
        let request = app.request(Era::Legacy, "tools/call", json!({ "name": "create_ticket", "arguments": ticket() }));
        let call = tokio::spawn(async move { result_of(request.send().await.unwrap()).await });
        until(async || app.metric(r#"mcp_server_active_calls{gen_ai_tool_name="create_ticket"}"#).await == 1.0).await;
        app.stand_ins.backend.request_count().reaches(attempts).await;
        app.begin_shutdown();
        let error = call.await.unwrap().error();
        assert_eq!(
            (&error["error"], &error["details"]["retryable"]),
            (&json!("TIMEOUT_ERROR"), &json!(true)),
            "{what}"
        );
        assert_eq!(error["details"].get("outcome"), None, "{what}: {error}");
        app.stopped().await.unwrap();
    }
}

#[tokio::test]
async fn a_server_in_this_process_stops_when_told_and_frees_its_port() {
    let mut app = TestApp::spawn().await;
    app.until_ready().await;
    let address = app.address;
    app.begin_shutdown();
    app.stopped().await.unwrap();
    until(async || std::net::TcpListener::bind(address).is_ok()).await;
}

/// The status and the body of `/health/ready`.
async fn readiness(app: &TestApp) -> (u16, Value) {
    let answer = app.http.get(app.url("/health/ready")).send().await.unwrap();
    (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap())
}

fn health_checks(stand_ins: &StandIns) -> usize {
    stand_ins.backend.requests().iter().filter(|request| request.target == "/health").count()
}

#[tokio::test]
async fn three_bad_answers_of_the_backend_make_it_unhealthy_and_one_good_answer_heals_it() {
    let app = TestApp::spawn_with(|settings| settings.backend.check_in_readiness = true).await;
    app.until_ready().await;
    let (status, report) = readiness(&app).await;
    assert_eq!((status, &report["status"]), (200, &json!("ready")), "{report}");
    assert_eq!(
        report["dependencies"],
        json!({ "mcp_server": "healthy", "azure_auth": "healthy", "backend_service": "healthy" })
    );
    assert_eq!(report["service_version"], env!("CARGO_PKG_VERSION"));

    app.stand_ins.backend.set_healthy(false);
    app.stand_ins.backend.forget_requests();
    until(async || readiness(&app).await.0 == 503).await;
    assert_eq!(health_checks(&app.stand_ins), 3);
    let (_, report) = readiness(&app).await;
    assert_eq!(report["status"], "not_ready");
    assert_eq!(
        report["dependencies"],
        json!({ "mcp_server": "healthy", "azure_auth": "healthy", "backend_service": "unhealthy" })
    );

    app.stand_ins.backend.set_healthy(true);
    app.until_ready().await;
    assert!(health_checks(&app.stand_ins) <= 5);
}

#[tokio::test]
async fn a_backend_that_does_not_count_is_skipped_and_never_asked() {
    let app = TestApp::spawn().await;
    app.stand_ins.backend.set_down(true).await.unwrap();
    app.until_ready().await;
    assert_eq!(readiness(&app).await.1["dependencies"]["backend_service"], "skipped");
    assert_eq!(app.stand_ins.backend.request_count().get(), 0);
}

#[tokio::test]
async fn a_thousand_probes_cost_the_backend_and_entra_nothing() {
    let app = TestApp::spawn_with(|settings| settings.backend.check_in_readiness = true).await;
    app.until_ready().await;
    let (before, begin) = (health_checks(&app.stand_ins), Instant::now());
    for probe in ["/health/ready", "/health/live"].iter().cycle().take(1_000) {
        assert_eq!(app.http.get(app.url(probe)).send().await.unwrap().status(), 200);
    }
    let own_checks = begin.elapsed().as_secs() / 2 + 1;
    assert!((health_checks(&app.stand_ins) - before) as u64 <= own_checks);
    assert_eq!(app.stand_ins.entra.token_request_count().get(), 1);
}
