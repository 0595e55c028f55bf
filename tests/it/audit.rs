//! The audit: one event for each call, whatever becomes of it, in the log and in a file that shows every change to it.

use std::path::{Path, PathBuf};

use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::telemetry::audit::{self, Digest, digest_of_json};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::canaries::{DESCRIPTION, FILTER, TITLE, UNKNOWN, assert_clean};
use crate::support::process::{Client, Finished, Program, ReservedPort, assert_form, parsed, result_of};
use crate::support::{Era, TestApp, until};

/// A folder with an audit file in it, sooner or later.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("audit.jsonl")
    }

    fn text(&self) -> &'static str {
        Box::leak(self.file().to_str().unwrap().to_owned().into_boxed_str())
    }

    /// The calls in the file.
    fn calls(&self) -> Vec<Value> {
        let lines = std::fs::read_to_string(self.file()).unwrap();
        let events = lines.lines().map(|line| parsed(line)["event"].clone());
        events.filter(|event| event["event.name"] == "tool_call").collect()
    }
}

async fn verify(file: &Path) -> Finished {
    Program::new(&["audit", "verify", file.to_str().unwrap()]).run().await
}

async fn serving_with_audit(folder: &Folder, required: bool) -> TestApp {
    TestApp::spawn_with(|settings| {
        settings.telemetry.audit.file = Some(folder.file());
        settings.telemetry.audit.required = required;
    })
    .await
}

#[tokio::test]
async fn every_call_leaves_one_record_of_who_what_and_how_it_ended_and_none_of_what_was_said() {
    let folder = Folder::new();
    let mut app = serving_with_audit(&folder, true).await;
    let ticket = json!({ "title": TITLE, "description": DESCRIPTION });
    let bad = json!({ "title": TITLE, "secret": UNKNOWN });
    let query = json!({ "filters": { "region": FILTER }, "dataset": "sales" });
    let mut expected = Vec::new();
    for (tool, arguments, outcome, status, attempts) in [
        ("create_ticket", ticket, "ok", Some(201), 1),
        ("create_ticket", bad, "VALIDATION_ERROR", None, 0),
        ("query_data", query, "ok", Some(200), 1),
        ("get_user_profile", json!({ "user_id": "nobody" }), "SERVICE_ERROR", Some(404), 1),
    ] {
        app.call(Era::Modern, tool, arguments.clone()).await;
        expected.push((tool, arguments, outcome, status, attempts));
    }
    app.send(Era::Modern, "tools/call", json!({ "name": "canary-of-a-tool", "arguments": {} })).await;
    app.stand_ins.backend.set_fault([FaultRule::hang()]);
    let request = app.request(Era::Modern, "tools/call", json!({ "name": "list_users", "arguments": {} }));
    app.stand_ins.backend.forget_requests();
    let given_up = tokio::spawn(request.send());
    until(async || !app.backend_requests().is_empty()).await;
    given_up.abort();
    until(async || app.metric("http_client_active_requests").await == 0.0).await;
    let tools = app.result(Era::Modern, "tools/list", json!({})).await;
    app.begin_shutdown();
    app.stopped().await.unwrap();

    let calls = folder.calls();
    assert_eq!(calls.len(), 6, "{calls:#?}");
    for (call, (tool, arguments, outcome, status, attempts)) in calls.iter().zip(&expected) {
        let definition = tools["tools"].as_array().unwrap().iter().find(|known| known["name"] == *tool).unwrap();
        for (name, value) in [
            ("caller", json!("unauthenticated")),
            ("client.address", json!("127.0.0.1")),
            ("gen_ai.tool.name", json!(tool)),
            ("tool.schema_sha256", json!(digest_of_json(&definition["inputSchema"]).hex().as_str())),
            ("arguments_sha256", json!(digest_of_json(arguments).hex().as_str())),
            ("event.decision", json!("allowed")),
            ("event.outcome", json!(outcome)),
            ("backend.status_code", json!(status)),
            ("backend.attempts", json!(attempts)),
        ] {
            assert_eq!(call[name], value, "{name} of {call:#}");
        }
        assert!(call["event.duration_ms"].is_f64() && call["timestamp"].as_str().unwrap().ends_with('Z'), "{call:#}");
        assert_eq!(call["trace_id"].as_str().unwrap().len(), 32);
    }
    // Only a write that went out has a key, and it is the one that the backend was told.
    let with_key = |call: &&Value| call["idempotency_key"].is_string();
    assert_eq!(calls.iter().filter(with_key).count(), 1);
    // Anybody can work the hash of the arguments out.
    let text = format!(r#"{{"dataset":"sales","filters":{{"region":"{FILTER}"}}}}"#);
    assert_eq!(calls[2]["arguments_sha256"], Digest::of(text.as_bytes()).hex().as_str());

    let (unknown, cancelled) = (&calls[4], &calls[5]);
    assert_eq!((&unknown["event.outcome"], &unknown["event.decision"]), (&json!("UNKNOWN_TOOL"), &json!("refused")));
    assert_eq!(unknown["gen_ai.tool.name"], Value::Null);
    assert_eq!((&cancelled["event.outcome"], &cancelled["backend.attempts"]), (&json!("cancelled"), &json!(1)));
    let ids: std::collections::BTreeSet<_> = calls.iter().map(|call| call["event.id"].to_string()).collect();
    assert_eq!(ids.len(), 6);
    assert_clean(&std::fs::read_to_string(folder.file()).unwrap());
}

#[tokio::test]
async fn no_level_silences_the_audit_and_its_lines_have_the_form_of_all_others() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    for level in ["CRITICAL", "off", "error,audit=off", "trace"] {
        // It does not say where it listens, so it has to be told.
        let port = ReservedPort::new();
        let server = Program::serve(&stand_ins).env("LOG_LEVEL", level).env("PORT", &port.number().to_string()).start();
        let address = ([127, 0, 0, 1], port.number()).into();
        let client = Client { http: reqwest::Client::builder().no_proxy().build().unwrap(), address };
        until(async || client.get("/health/ready").send().await.is_ok_and(|answer| answer.status() == 200)).await;
        client.call("list_users", json!({ "limit": 1 })).send().await.unwrap();
        server.signal("TERM");
        let log = server.ended().await.log();
        let events: Vec<_> = log.iter().filter(|line| line["logger"] == "audit").collect();
        let [event] = events.as_slice() else { panic!("{level}: {events:#?}") };
        assert_form(event);
        assert_eq!((&event["event.name"], &event["event.outcome"]), (&json!("tool_call"), &json!("ok")));
        assert_eq!((&event["caller"], &event["gen_ai.tool.name"]), (&json!("unauthenticated"), &json!("list_users")));
        assert_eq!(event["arguments_sha256"], digest_of_json(&json!({ "limit": 1 })).hex().as_str());
        assert_eq!(event["trace_id"].as_str().unwrap().len(), 32);
        assert_eq!(log.len() == 1, level != "trace", "{log:#?}");
    }
}

#[tokio::test]
async fn the_command_finds_what_was_done_to_a_file_and_nothing_in_one_that_a_kill_has_left() {
    let folder = Folder::new();
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let mut anchors = Vec::new();
    for signal in ["TERM", "KILL", "TERM"] {
        let server = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", folder.text()).start();
        let client = server.client().await;
        client.until_ready().await;
        for _ in 0..5 {
            client.call("list_users", json!({})).send().await.unwrap();
        }
        let recorded = folder.calls().len();
        if signal == "KILL" {
            until(async || folder.calls().len() >= recorded.max(10)).await;
        }
        server.signal(signal);
        anchors.extend(server.ended().await.log().into_iter().filter(|line| line["event.name"] == "file_closed"));
    }
    let whole = verify(&folder.file()).await;
    assert_eq!((whole.code, whole.stdout.len()), (Some(0), 1), "{whole:#?}");
    assert!(whole.stdout[0].contains("whole, 20 records, 0 events lost"), "{whole:#?}");
    // The log names the same end, twice in good order and not for the kill.
    assert!(matches!(anchors.as_slice(), [_, last] if whole.stdout[0].contains(last["audit.hash"].as_str().unwrap())));

    let original = std::fs::read_to_string(folder.file()).unwrap();
    let lines: Vec<&str> = original.split_inclusive('\n').collect();
    let without = |at: usize| [&lines[..at], &lines[at + 1..]].concat().concat();
    let mut swapped = lines.clone();
    swapped.swap(3, 4);
    for (what, text, line) in [
        ("edited", original.replacen("list_users", "query_data", 1), 2),
        ("deleted", without(7), 8),
        ("reordered", swapped.concat(), 4),
        ("truncated", lines[..lines.len() - 1].concat(), 19),
        ("truncated to nothing", String::new(), 0),
        ("cut off", original[..original.len() - 10].to_owned(), 20),
        ("added to", format!("{original}{}", lines[5]), 21),
    ] {
        std::fs::write(folder.file(), text).unwrap();
        let broken = verify(&folder.file()).await;
        assert_eq!(broken.code, Some(1), "{what}: {broken:#?}");
        assert!(broken.stdout[0].contains(&format!("BROKEN, line {line}: ")), "{what}: {broken:#?}");
    }
    std::fs::write(folder.file(), &original).unwrap();
    assert_eq!(verify(&folder.file()).await.code, Some(0));
    std::fs::remove_file(folder.0.path().join("audit.jsonl.head")).unwrap();
    assert!(verify(&folder.file()).await.stdout[0].contains("the head was missing"));
    assert_eq!(verify(Path::new("/nowhere/audit.jsonl")).await.code, Some(1));
    assert_eq!(Program::new(&["audit"]).run().await.code, Some(64));
}

/// The file is there, and the disk is full.
fn full() -> Folder {
    let folder = Folder::new();
    std::os::unix::fs::symlink("/dev/full", folder.file()).unwrap();
    folder
}

#[tokio::test]
async fn a_full_disk_is_loud_and_costs_no_call_unless_the_audit_is_required() {
    for required in [false, true] {
        let app = serving_with_audit(&full(), required).await;
        until(async || app.metric("mcp_server_audit_writable").await == 0.0).await;
        let result = app.call(Era::Modern, "list_users", json!({})).await;
        if !required {
            assert_eq!(result.structured()["items"].as_array().unwrap().len(), 10);
            continue;
        }
        let error = result.error();
        assert_eq!((&error["error"], &error["details"]["retryable"]), (&json!("INTERNAL_ERROR"), &json!(true)));
        assert!(error["message"].as_str().unwrap().contains("audit log"), "{error}");
        assert_eq!(app.backend_requests().len(), 0);
    }

    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let folder = full();
    let server = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", folder.text()).start();
    let client = server.client().await;
    client.until_ready().await;
    let line = parsed(&server.stdout.line("AUDIT EVENTS CANNOT BE WRITTEN").await);
    assert_eq!(line["level"], "ERROR");
    result_of(client.call("list_users", json!({})).send().await.unwrap()).await.structured();
    server.signal("TERM");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert!(finished.stdout.iter().any(|line| line.contains("1 audit events are not in")), "{finished:#?}");
}

#[tokio::test]
async fn a_file_that_leaves_its_path_while_the_server_runs_is_noticed_and_begun_again() {
    type Act = fn(&Path, &Path);
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let rows: [(&str, Act); 6] = [
        ("both removed", |file, head| [file, head].into_iter().for_each(|path| std::fs::remove_file(path).unwrap())),
        ("removed", |file, _| std::fs::remove_file(file).unwrap()),
        ("renamed with its head", |file, head| {
            std::fs::copy(head, head.with_file_name("old.jsonl.head")).unwrap();
            std::fs::rename(file, file.with_file_name("old.jsonl")).unwrap();
        }),
        ("replaced", |file, _| {
            std::fs::write(file.with_file_name("new"), "").unwrap();
            std::fs::rename(file.with_file_name("new"), file).unwrap();
        }),
        ("truncated", |file, _| std::fs::write(file, "").unwrap()),
        ("head removed", |_, head| std::fs::remove_file(head).unwrap()),
    ];
    for (what, act) in rows {
        let folder = Folder::new();
        let head = folder.0.path().join("audit.jsonl.head");
        let server =
            Program::serve(&stand_ins).env("AUDIT_LOG_FILE", folder.text()).env("AUDIT_REQUIRED", "true").start();
        let client = server.client().await;
        client.until_ready().await;
        result_of(client.call("list_users", json!({})).send().await.unwrap()).await.structured();
        // Until the head names the record of the call.
        until(async || folder.calls().len() == 1 && verify(&folder.file()).await.code == Some(0)).await;
        until(async || std::fs::read_to_string(&head).is_ok_and(|head| parsed(&head)["sequence"] == 2)).await;
        act(&folder.file(), &head);
        let error = parsed(&server.stdout.line("WAS LOST").await);
        assert_eq!(error["level"], "ERROR", "{what}: {error}");
        server.stdout.line("audit events can be written again").await;
        result_of(client.call("list_users", json!({})).send().await.unwrap()).await.structured();
        server.signal("TERM");
        let log = server.ended().await.log();

        let whole = verify(&folder.file()).await;
        assert_eq!((whole.code, whole.stdout.len()), (Some(0), 2), "{what}: {whole:#?}");
        assert!(whole.stdout[1].contains("while the server was running"), "{what}: {whole:#?}");
        if what == "head removed" {
            assert_eq!(folder.calls().len(), 2);
            continue;
        }
        let calls = folder.calls();
        assert_eq!(calls.len(), 1, "{what}: {calls:#?}");
        // The new file and the log name the same end of the old one.
        let lost: Vec<_> = log.iter().filter(|line| line["event.name"] == "file_lost").collect();
        let [lost] = lost.as_slice() else { panic!("{what}: {log:#?}") };
        assert_eq!(lost["audit.sequence"], 2, "{what}");
        assert!(whole.stdout[1].contains(lost["audit.hash"].as_str().unwrap()), "{what}: {whole:#?}");
        if what == "renamed with its head" {
            let old = verify(&folder.0.path().join("old.jsonl")).await;
            assert_eq!(old.code, Some(0), "{old:#?}");
            assert!(old.stdout[0].contains(lost["audit.hash"].as_str().unwrap()), "{old:#?}");
        }
    }
}

#[tokio::test]
async fn no_call_begins_while_the_file_is_lost_where_the_audit_is_required() {
    for comes_back in [true, false] {
        let folder = Folder::new();
        let (inner, aside) = (folder.0.path().join("inner"), folder.0.path().join("aside"));
        std::fs::create_dir(&inner).unwrap();
        let file = inner.join("audit.jsonl");
        let mut app = TestApp::spawn_with(|settings| {
            settings.telemetry.audit.file = Some(file.clone());
            settings.telemetry.audit.required = true;
        })
        .await;
        app.call(Era::Modern, "list_users", json!({})).await.structured();
        until(async || std::fs::read_to_string(&file).unwrap().contains("tool_call")).await;
        // Nothing happens here but that the folder leaves.
        std::fs::rename(&inner, &aside).unwrap();
        until(async || app.metric("mcp_server_audit_writable").await == 0.0).await;
        app.stand_ins.backend.forget_requests();
        let refused = app.call(Era::Modern, "list_users", json!({})).await;
        assert_eq!(refused.error()["error"], "INTERNAL_ERROR");
        assert_eq!(app.backend_requests().len(), 0);

        if comes_back {
            std::fs::rename(&aside, &inner).unwrap();
        } else {
            std::fs::create_dir(&inner).unwrap();
        }
        until(async || app.metric("mcp_server_audit_writable").await == 1.0).await;
        app.call(Era::Modern, "list_users", json!({})).await.structured();
        assert_eq!(app.metric("mcp_server_audit_events_lost_total").await, 0.0);
        app.begin_shutdown();
        app.stopped().await.unwrap();
        let whole = audit::verify(&file).unwrap();
        // `started`, the call, then `reopened`, the refused call, the call, `stopped`. A file that is back at once need not be reopened.
        let incidents = whole.incidents.len() as u64;
        let (records, least) = if comes_back { (5 + incidents, 0) } else { (4, 1) };
        assert!(whole.records == records && (least..=1).contains(&incidents), "{whole:?}");
    }
}

#[tokio::test]
async fn a_call_begins_only_with_room_for_its_event_where_the_audit_is_required() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let folder = Folder::new();
    let port = ReservedPort::new();
    // Room for no more than two dozen events.
    let server = Program::serve(&stand_ins)
        .env("METRICS_PORT", &port.number().to_string())
        .env("AUDIT_LOG_FILE", folder.text())
        .env("AUDIT_REQUIRED", "true")
        .file_size_limit(64 << 10)
        .start();
    let client = server.client().await;
    client.until_ready().await;
    let ticket = json!({ "title": TITLE, "description": DESCRIPTION });
    let tickets = || stand_ins.backend.requests().iter().filter(|request| request.target == "/tickets").count();
    let sends = (0..60).map(|_| client.call("create_ticket", ticket.clone()).send());
    for answer in futures_util::future::join_all(sends).await {
        let result = result_of(answer.unwrap()).await;
        assert!(result.0["isError"] != true || result.error()["error"] == "INTERNAL_ERROR", "{:?}", result.0);
    }
    let mut calls = 60;
    while calls < 300 && !server.stdout.so_far().iter().any(|line| line.contains("NO ROOM IS LEFT")) {
        result_of(client.call("create_ticket", ticket.clone()).send().await.unwrap()).await;
        calls += 1;
    }
    let created = tickets();
    let in_file = || {
        let text = std::fs::read_to_string(folder.file()).unwrap();
        text.lines().filter(|line| line.contains(r#""event.outcome":"ok""#) && line.ends_with('}')).count()
    };
    until(async || in_file() == created).await;
    assert!((20..60).contains(&created), "{created}");
    let error = parsed(&server.stdout.line("NO ROOM IS LEFT").await);
    assert_eq!((&error["level"], server.metric("mcp_server_audit_writable").await), (&json!("ERROR"), 0.0));
    let refused = result_of(client.call("create_ticket", ticket.clone()).send().await.unwrap()).await;
    assert_eq!((&refused.error()["error"], tickets()), (&json!("INTERNAL_ERROR"), created));

    server.lift_file_size_limit();
    until(async || server.metric("mcp_server_audit_writable").await == 1.0).await;
    result_of(client.call("create_ticket", ticket).send().await.unwrap()).await.structured();
    assert!(allocated(&folder.file()) > 1 << 20);
    server.signal("TERM");
    let finished = server.ended().await;
    assert_eq!(finished.code, Some(0), "{finished:#?}");
    assert_eq!(finished.stdout.iter().filter(|line| line.contains("NO ROOM IS LEFT")).count(), 1);
    // Refused calls stand there, too, and what was allocated ahead is free again.
    assert_eq!((in_file(), folder.calls().len()), (created + 1, calls + 2));
    assert!(allocated(&folder.file()) < std::fs::metadata(folder.file()).unwrap().len() + 64 * 1024);
    let whole = verify(&folder.file()).await;
    assert!(whole.stdout[0].contains(" 0 events lost"), "{whole:#?}");
}

/// How much of the disk a file takes, in bytes.
fn allocated(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(file).unwrap().blocks() * 512
}

#[tokio::test]
async fn events_that_a_full_disk_has_lost_are_counted_in_the_file_at_the_next_start() {
    const CALLS: u64 = 30;
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    for signal in ["TERM", "KILL"] {
        let folder = Folder::new();
        let head = folder.0.path().join("audit.jsonl.head");
        let limited = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", folder.text()).file_size_limit(8 << 10);
        let server = limited.start();
        let client = server.client().await;
        client.until_ready().await;
        for _ in 0..CALLS {
            result_of(client.call("list_users", json!({})).send().await.unwrap()).await.structured();
        }
        let lost = || {
            let text = std::fs::read_to_string(&head).unwrap_or_default();
            serde_json::from_str::<Value>(&text).ok().and_then(|head| head["lost"].as_u64()).unwrap_or_default()
        };
        let in_file = || {
            let text = std::fs::read_to_string(folder.file()).unwrap();
            text.split_inclusive('\n').filter(|line| line.ends_with('\n') && line.contains("tool_call")).count() as u64
        };
        until(async || lost() + in_file() == CALLS).await;
        assert!(lost() > 0);
        server.signal(signal);
        server.ended().await;
        let (lost, in_file) = (lost(), in_file());
        assert_eq!(lost + in_file, CALLS, "{signal}");

        let server = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", folder.text()).start();
        server.client().await.until_ready().await;
        server.signal("TERM");
        assert_eq!(server.ended().await.code, Some(0));
        let whole = verify(&folder.file()).await;
        assert_eq!(whole.code, Some(0), "{signal}: {whole:#?}");
        assert!(whole.stdout[0].contains(&format!(" {lost} events lost")), "{signal}: {lost}: {whole:#?}");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_used_ends_the_start_and_half_a_configuration_is_a_mistake() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let folder = Folder::new();
    std::fs::write(folder.file(), "somebody else's\n").unwrap();
    for (file, told) in
        [(folder.text(), "does not end like an audit file"), ("/nowhere/audit", "cannot open `/nowhere/audit`")]
    {
        let finished = Program::serve(&stand_ins).env("AUDIT_LOG_FILE", file).run().await;
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        assert!(finished.stdout.iter().any(|line| line.contains(told)), "{finished:#?}");
    }
    let finished = Program::serve(&stand_ins).env("AUDIT_REQUIRED", "true").run().await;
    assert_eq!((finished.code, finished.stdout.len()), (Some(78), 0), "{finished:#?}");
    assert!(finished.stderr.iter().any(|line| line.contains("AUDIT_LOG_FILE is not set")), "{finished:#?}");
}
