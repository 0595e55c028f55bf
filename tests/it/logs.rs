//! What the real binary writes to stdout, and what it must never write anywhere: secrets, and what callers sent.

use mcp_server::demo::entra::CLIENT_SECRET;
use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use serde_json::{Value, json};

use crate::support::canaries::{DESCRIPTION, FILTER, INBOUND, ROW, TITLE, UNKNOWN, assert_clean};
use crate::support::process::{Client, Finished, Program, ReservedPort, Running, assert_form};
use crate::support::until;

#[tokio::test]
async fn no_line_names_the_user_or_dataset_of_a_call_however_it_fails() {
    const USER: &str = "canary@example.com";
    const DATASET: &str = "canary-salaries";
    let mut recorded = Recorded::start(|program, _| program.env("LOG_LEVEL", "DEBUG")).await;
    for rule in [
        FaultRule::status(404),
        FaultRule::status(302),
        FaultRule::status(422),
        FaultRule::status(500),
        FaultRule::status(503),
        FaultRule::status(200).body("no JSON"),
        FaultRule::status(200).body("[]"),
        FaultRule::close_before_head(),
        FaultRule::hang(),
        FaultRule::status(401),
    ] {
        recorded.fail_with([rule]);
        recorded.call("get_user_profile", json!({ "user_id": USER })).await;
        recorded.call("query_data", json!({ "dataset": DATASET, "filters": { "region": FILTER } })).await;
    }
    recorded.call("get_user_profile", json!({ "user_id": format!("{USER}/..") })).await;
    let (_, finished, _) = recorded.end().await;
    for line in &finished.stdout {
        assert_clean(line);
    }
    let causes = finished.stdout.iter().filter(|line| line.contains("/users/{user_id}")).count();
    assert!(causes > 0, "the route is named");
}

/// A server with everything that happened to it on record.
struct Recorded {
    stand_ins: StandIns,
    server: Running,
    client: Client,
    metrics_port: ReservedPort,
    /// Heads of all answers, and the bodies of those that were errors.
    answers: String,
}

impl Recorded {
    async fn start(change: impl FnOnce(Program, &StandIns) -> Program) -> Self {
        let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
        let metrics_port = ReservedPort::new();
        let program = Program::serve(&stand_ins)
            .env("METRICS_PORT", &metrics_port.number().to_string())
            .env("BACKEND_API_TIMEOUT", "0.5");
        let server = change(program, &stand_ins).start();
        let client = server.client().await;
        client.until_ready().await;
        Self { stand_ins, server, client, metrics_port, answers: String::new() }
    }

    /// Makes one call and returns the trace id of its answer.
    async fn call(&mut self, tool: &str, arguments: Value) -> String {
        let request = self.client.call(tool, arguments).header("authorization", format!("Bearer {INBOUND}"));
        let answer = request.send().await.unwrap();
        self.answers += &format!("{:?}\n", answer.headers());
        let trace_id = answer.headers()["traceparent"].to_str().unwrap()[3..35].to_owned();
        let text = answer.text().await.unwrap();
        if text.contains(r#""isError":true"#) {
            self.answers += &text;
        }
        trace_id
    }

    fn fail_with(&self, rules: impl IntoIterator<Item = FaultRule>) {
        self.stand_ins.backend.set_fault(rules);
    }

    /// A call for each way to end, with the outcome that the log should name. The backend refuses all tokens afterwards.
    async fn every_outcome(&mut self) -> Vec<(String, &'static str)> {
        let mut calls = Vec::new();
        let ticket = json!({ "title": TITLE, "description": DESCRIPTION });
        let query = json!({ "dataset": "sales", "filters": { "region": FILTER } });
        calls.push((self.call("create_ticket", ticket.clone()).await, "ok"));
        calls.push((self.call("query_data", query.clone()).await, "ok"));
        let bad = json!({ "title": TITLE.repeat(50), "description": DESCRIPTION, "secret": UNKNOWN });
        calls.push((self.call("create_ticket", bad).await, "VALIDATION_ERROR"));
        calls.push((self.call("get_user_profile", json!({ "user_id": "nobody" })).await, "SERVICE_ERROR"));
        self.fail_with([FaultRule::status(500).body(json!({ "stack": ROW }).to_string())]);
        calls.push((self.call("create_ticket", ticket.clone()).await, "SERVICE_ERROR"));
        self.fail_with([FaultRule::status(200).body(format!(r#"{{"data":[{{"{ROW}":"{ROW}"}}],"data":"{ROW}"}}"#))]);
        calls.push((self.call("query_data", query.clone()).await, "SERVICE_ERROR"));
        self.fail_with([FaultRule::hang()]);
        calls.push((self.call("create_ticket", ticket.clone()).await, "TIMEOUT_ERROR"));
        calls.push((self.given_up("query_data", query.clone()).await, "cancelled"));
        self.fail_with([FaultRule::status(401)]);
        calls.push((self.call("query_data", query).await, "AUTHENTICATION_ERROR"));
        calls
    }

    /// A call whose client leaves while the backend has it; returns its trace id.
    async fn given_up(&self, tool: &str, arguments: Value) -> String {
        let trace_id = "0af7651916cd43dd8448eb211c80319c";
        let request =
            self.client.call(tool, arguments).header("traceparent", format!("00-{trace_id}-b7ad6b7169203331-01"));
        let seen = || {
            let requests = self.stand_ins.backend.requests();
            requests.iter().any(|request| request.header("traceparent").is_some_and(|text| text.contains(trace_id)))
        };
        let call = tokio::spawn(request.send());
        until(async || seen()).await;
        call.abort();
        self.server.stdout.line("its client left").await;
        trace_id.to_owned()
    }

    async fn metrics(&self) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.metrics_port.number());
        self.client.http.get(url).send().await.unwrap().text().await.unwrap()
    }

    async fn end(self) -> (StandIns, Finished, String) {
        self.server.signal("TERM");
        let finished = self.server.ended().await;
        assert_eq!(finished.code, Some(0));
        assert!(finished.stderr.is_empty(), "{finished:#?}");
        (self.stand_ins, finished, self.answers)
    }
}

#[tokio::test]
async fn every_line_is_an_object_and_every_call_has_one_whatever_its_end_and_the_level() {
    for level in ["INFO", "DEBUG", "trace"] {
        let mut recorded = Recorded::start(|program, _| program.env("LOG_LEVEL", level)).await;
        let calls = recorded.every_outcome().await;
        let (_, finished, _) = recorded.end().await;
        let log = finished.log();
        log.iter().for_each(assert_form);
        let ended: Vec<_> = log.iter().filter(|line| line["outcome"].is_string()).collect();
        assert_eq!(ended.len(), calls.len(), "{ended:#?}");
        for (trace_id, outcome) in &calls {
            let line = ended.iter().find(|line| line["trace_id"] == **trace_id);
            let line = line.unwrap_or_else(|| panic!("no line for {outcome} with {trace_id} in {ended:#?}"));
            assert_eq!(line["outcome"], *outcome, "{line}");
            assert_eq!(line["logger"], "mcp_server::tools::call", "{line}");
            assert!(line["gen_ai.tool.name"].is_string() && line["duration_ms"].is_number(), "{line}");
            assert!(line["backend.attempts"].is_u64(), "{line}");
        }
        let attempts = |outcome| {
            let line = ended.iter().find(|line| line["outcome"] == outcome).unwrap();
            (line["backend.attempts"].as_u64(), line["backend.status_code"].as_u64())
        };
        assert_eq!(attempts("ok"), (Some(1), Some(201)));
        assert_eq!(attempts("VALIDATION_ERROR"), (Some(0), None));
        assert_eq!(attempts("AUTHENTICATION_ERROR"), (Some(2), Some(401)));
    }
}

#[tokio::test]
async fn what_the_backend_says_about_an_error_is_logged_on_one_short_line_and_told_to_no_caller() {
    let mut recorded = Recorded::start(|program, _| program.env("LOG_LEVEL", "INFO")).await;
    let problem =
        json!({ "title": "Not possible", "detail": "no such team\nhere\u{202e}", "errors": { "team": ["gone"] } });
    let long = json!({ "message": "ü".repeat(3_000) }).to_string();
    let mut calls = Vec::new();
    for (rule, expected) in [
        (
            FaultRule::status(422)
                .header("content-type", "application/problem+json; charset=utf-8")
                .body(problem.to_string()),
            Some("Not possible; no such team\\nhere\\u{202e}; errors: {\"team\":[\"gone\"]}".to_owned()),
        ),
        (
            FaultRule::status(500).body(r#"{"message":"no connection to the database"}"#),
            Some("no connection to the database".to_owned()),
        ),
        // As much as arrives of a body that stalls.
        (FaultRule::status(409).body(r#"{"title":"Taken","detail":"it sta"#).stalled(), Some("Taken".to_owned())),
        (FaultRule::status(400).body(long), Some(format!("{}…", "ü".repeat(500)))),
        (FaultRule::status(400).header("content-type", "text/html").body("<html>"), None),
        (FaultRule::status(400).body("{}"), None),
    ] {
        recorded.fail_with([rule]);
        calls.push((recorded.call("list_users", json!({})).await, expected));
    }
    assert!(
        !recorded.answers.contains("no such team") && !recorded.answers.contains("database"),
        "{}",
        recorded.answers
    );
    let (_, finished, _) = recorded.end().await;
    let log = finished.log();
    for (trace_id, expected) in calls {
        let line = log.iter().find(|line| line["outcome"].is_string() && line["trace_id"] == *trace_id).unwrap();
        assert_eq!(line["backend_detail"].as_str(), expected.as_deref(), "{line}");
    }
}

#[tokio::test]
async fn secrets_and_what_callers_sent_appear_nowhere_else() {
    for workload_identity in [false, true] {
        let mut assertion = String::new();
        let mut recorded = Recorded::start(|program, stand_ins| {
            let program = program.env("LOG_LEVEL", "trace");
            if !workload_identity {
                return program;
            }
            assertion = stand_ins.entra.service_account_token(&json!({}));
            let path = program.path("token").to_str().unwrap().to_owned();
            program.without("AZURE_CLIENT_SECRET").file("token", &assertion).env("AZURE_FEDERATED_TOKEN_FILE", &path)
        })
        .await;
        recorded.every_outcome().await;
        let metrics = recorded.metrics().await;
        let (stand_ins, finished, answers) = recorded.end().await;

        let requests = stand_ins.backend.requests();
        let tokens: Vec<_> = requests
            .iter()
            .map(|request| request.authorization_raw.as_deref().unwrap().strip_prefix("Bearer ").unwrap())
            .collect();
        assert!(!tokens.is_empty());
        for request in &requests {
            assert!(!format!("{:?} {:?}", request.headers, request.authorization_raw).contains(INBOUND), "{request:?}");
        }
        let signatures = tokens.iter().map(|token| token.rsplit('.').next().unwrap());
        let assertion_signature = assertion.rsplit('.').next().filter(|text| !text.is_empty());
        let canaries = [CLIENT_SECRET, TITLE, DESCRIPTION, FILTER, UNKNOWN, INBOUND, ROW];
        assert_clean(&metrics);
        assert_clean(&answers);
        for canary in canaries.into_iter().chain(signatures).chain(assertion_signature) {
            for line in &finished.stdout {
                assert!(!line.contains(canary), "`{canary}` in the log: {line}");
            }
            assert!(!metrics.contains(canary), "`{canary}` in the metrics");
            assert!(!answers.contains(canary), "`{canary}` in {answers}");
        }
    }
}

#[tokio::test]
async fn with_debug_the_lines_are_for_people() {
    let mut recorded = Recorded::start(|program, _| program.env("DEBUG", "yes")).await;
    recorded.call("list_users", json!({})).await;
    let (_, finished, _) = recorded.end().await;
    let line = finished.stdout.iter().find(|line| line.contains("tool `list_users` succeeded")).unwrap();
    assert!(line.contains("INFO") && line.contains("outcome=\"ok\"") && line.contains("trace_id="), "{line}");
    for line in &finished.stdout {
        assert!(!line.starts_with('{') && !line.contains('\u{1b}'), "{line}");
    }
}

#[tokio::test]
async fn libraries_repeat_nothing_at_info_that_we_say_ourselves() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    stand_ins.entra.set_fault([FaultRule::status(503)]);
    let server = Program::serve(&stand_ins).env("LOG_LEVEL", "INFO").start();
    let client = server.client().await;
    server.stdout.line("calls to the backend fail").await;
    client.call("list_users", json!({})).send().await.unwrap();
    server.stdout.line("failed with AUTHENTICATION_ERROR").await;
    server.signal("TERM");
    for line in server.ended().await.log() {
        let logger = line["logger"].as_str().unwrap();
        assert!(logger.starts_with("mcp_server") || logger == "audit", "{line}");
    }
}

#[tokio::test]
async fn a_signal_takes_the_level_to_debug_and_back_while_calls_go_on() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let server = Program::serve(&stand_ins).env("LOG_LEVEL", "mcp_server::app=info,error").start();
    let client = server.client().await;
    client.until_ready().await;
    let call = async || {
        stand_ins.backend.set_fault([FaultRule::status(503).times(1)]);
        client.call("list_users", json!({})).send().await.unwrap();
    };
    call().await;
    for (message, calls) in [("at DEBUG from now on", 1), ("goes back to the level", 0)] {
        server.signal("USR1");
        let told = server.stdout.line(message).await;
        assert!(told.contains("mcp_server::app=info,error"), "{told}");
        call().await;
        server.stdout.lines("succeeded after", calls).await;
    }
    server.signal("TERM");
    let log = server.ended().await.log();
    let of = |logger: &str, level: &str| {
        log.iter().filter(|line| line["logger"] == logger && line["level"] == level).count()
    };
    // Of three calls one was made while the level was raised; the audit has all three.
    assert_eq!(
        (of("mcp_server::tools::call", "INFO"), of("mcp_server::backend", "DEBUG"), of("audit", "INFO")),
        (1, 1, 3)
    );
}

#[tokio::test]
async fn nothing_is_lost_at_the_end_of_a_busy_server() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let server = Program::serve(&stand_ins).env("LOG_LEVEL", "INFO").start();
    let client = server.client().await;
    client.until_ready().await;
    let calls = (0..400).map(|_| client.call("list_users", json!({})).send());
    let answers = futures_util::future::join_all(calls).await;
    server.signal("TERM");
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().status() == 200));
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0));
    for logger in ["mcp_server::tools::call", "audit"] {
        let lines = finished.log().iter().filter(|line| line["logger"] == logger).count();
        assert_eq!(lines, 400, "{logger}");
    }
    assert!(finished.log().last().unwrap()["message"].as_str().unwrap().contains("stopped"));
}
