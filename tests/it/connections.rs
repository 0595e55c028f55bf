//! Connections that misbehave: the silent, the slow, the long-winded, and too many of them.

use std::time::{Duration, Instant};

use mcp_server::demo::fault::FaultRule;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::WebSettings;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::process::{Program, parsed};
use crate::support::{Era, TestApp, error_object, message, until};

const LIVE: &str = "GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A request that is no probe.
const LISTING: &str = "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
    Content-Length: 46\r\n\r\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"tools/list\"}";

/// What takes longer does not end at all: no machine is so busy.
const HANGS: Duration = Duration::from_secs(60);

async fn app_with(change: impl FnOnce(&mut WebSettings)) -> TestApp {
    TestApp::spawn_with(|settings| change(&mut settings.web)).await
}

/// A connection without a client library in between.
pub struct Wire(pub TcpStream);

impl Wire {
    pub async fn to(app: &TestApp) -> Self {
        Self(TcpStream::connect(app.address).await.unwrap())
    }

    pub async fn say(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads one answer, which must have a `Content-Length`: its status, head and body.
    pub async fn answer(&mut self) -> (u16, String, String) {
        let mut text = String::new();
        loop {
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let head = head.to_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
                if body.len() == length.parse::<usize>().unwrap() {
                    return (head[9..12].parse().unwrap(), head, body.to_owned());
                }
            }
            let mut chunk = [0; 4_096];
            let read = tokio::time::timeout(HANGS, self.0.read(&mut chunk)).await;
            let read = read.expect("no answer").unwrap();
            assert!(read > 0, "the connection ended after `{text}`");
            text += std::str::from_utf8(&chunk[..read]).unwrap();
        }
    }

    /// Reads the answer to this request, which has no body if it is one to HEAD: its status and head.
    async fn answer_to(&mut self, request: &str) -> (u16, String) {
        if !request.starts_with("HEAD") {
            let (status, head, _) = self.answer().await;
            return (status, head);
        }
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let byte = tokio::time::timeout(HANGS, self.0.read_u8()).await.expect("no answer").unwrap();
            head.push(byte.into());
        }
        (head[9..12].parse().unwrap(), head.to_lowercase())
    }

    /// Reads one interim answer: its status.
    pub async fn informed(&mut self) -> u16 {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = tokio::time::timeout(HANGS, self.0.read_u8()).await.expect("no answer").unwrap();
            head.push(byte);
        }
        String::from_utf8_lossy(&head)[9..12].parse().unwrap()
    }

    /// Waits until the other side ends the connection; anything it still says fails the test.
    pub async fn closed(&mut self) {
        let mut rest = Vec::new();
        let reading = self.0.read_to_end(&mut rest);
        // A reset is an end as well.
        let _ = tokio::time::timeout(HANGS, reading).await.expect("the connection stays open");
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }
}

#[tokio::test]
async fn who_says_nothing_or_half_a_head_is_cut_off() {
    let app = app_with(|web| web.request_header_timeout = Duration::from_millis(300)).await;
    for (before, half) in [("", ""), ("", "GET /health/live HT"), ("", &LIVE[..LIVE.len() - 2]), (LIVE, "GET /hea")] {
        let begin = Instant::now();
        let mut wire = Wire::to(&app).await;
        if !before.is_empty() {
            wire.say(before).await;
            assert_eq!(wire.answer().await.0, 200);
        }
        wire.say(half).await;
        wire.closed().await;
        assert!(begin.elapsed() >= Duration::from_millis(300), "`{half}` had {:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn a_head_that_drips_is_cut_off_all_the_same() {
    let app = app_with(|web| web.request_header_timeout = Duration::from_millis(300)).await;
    let mut wire = Wire::to(&app).await;
    let begin = Instant::now();
    let mut dripping = LIVE.bytes().cycle();
    while wire.0.write_all(&[dripping.next().unwrap().max(b'a')]).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(begin.elapsed() < HANGS, "the connection stays open");
    }
}

#[tokio::test]
async fn an_idle_connection_is_kept_for_its_time_and_then_closed() {
    let keep_alive = Duration::from_secs(5);
    let app = app_with(|web| web.keep_alive_timeout = keep_alive).await;
    let mut wire = Wire::to(&app).await;
    for _ in 0..3 {
        wire.say(LIVE).await;
        assert_eq!(wire.answer().await.0, 200);
        tokio::time::sleep(keep_alive / 10).await;
    }
    let begin = Instant::now();
    wire.say(LIVE).await;
    assert_eq!(wire.answer().await.0, 200);
    wire.closed().await;
    assert!(begin.elapsed() >= keep_alive, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn requests_that_come_in_one_piece_are_answered_in_turn() {
    let app = TestApp::spawn().await;
    let mut wire = Wire::to(&app).await;
    let last = LIVE.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    wire.say(&[LIVE, LIVE, &last].concat()).await;
    let mut answers = String::new();
    wire.0.read_to_string(&mut answers).await.unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
}

/// A connection on which an answer of several megabytes is under way, which does not fit into the buffers in between.
async fn waiting_for_much(app: &TestApp) -> Wire {
    app.stand_ins.backend.set_fault([FaultRule::huge_body(3_500_000)]);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 * 1_024).unwrap();
    let mut wire = Wire(socket.connect(app.address).await.unwrap());
    let params = json!({ "name": "query_data", "arguments": { "dataset": "sales" } });
    let call = message(Era::Legacy, "tools/call", params).to_string();
    wire.say(&format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\nContent-Length: {}\r\n\r\n{call}",
        call.len()
    ))
    .await;
    wire
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_off_and_a_slow_one_is_served() {
    let write_timeout = Duration::from_secs(4);
    let app = app_with(|web| web.response_write_timeout = write_timeout).await;
    let open = async |count| app.metric("http_server_open_connections").await == count;
    let mut slow = waiting_for_much(&app).await;
    let mut chunk = vec![0; 500_000];
    for part in 1..=14 {
        slow.0.read_exact(&mut chunk).await.unwrap_or_else(|error| panic!("{error} in part {part}"));
        tokio::time::sleep(write_timeout / 50).await;
    }
    drop(slow);
    until(async || open(0.0).await).await;

    let begin = Instant::now();
    let _stuck = waiting_for_much(&app).await;
    until(async || open(1.0).await).await;
    until(async || open(0.0).await).await;
    assert!(begin.elapsed() >= write_timeout, "{:?}", begin.elapsed());
}

#[tokio::test]
async fn a_body_that_never_arrives_ends_as_a_timeout() {
    let app = app_with(|web| web.request_body_timeout = Duration::from_millis(200)).await;
    let mut wire = Wire::to(&app).await;
    wire.say(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\nContent-Length: 1000\r\n\r\n{\"jsonrpc\":",
    )
    .await;
    let (status, _, body) = wire.answer().await;
    let error: Value = serde_json::from_str(&body).unwrap();
    let error = error_object(&error);
    assert_eq!((status, &error["error"]), (408, &json!("TIMEOUT_ERROR")), "{error}");
    assert_eq!(error["details"]["trace_id"].as_str().map(str::len), Some(32), "{error}");
    wire.closed().await;
}

#[tokio::test]
async fn too_many_and_too_long_header_fields_are_refused_with_431() {
    let app = TestApp::spawn().await;
    let with_fields = |count| {
        let fields: String = (1..count).map(|n| format!("X-{n}: x\r\n")).collect();
        format!("GET /health/live HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n")
    };
    let with_bytes =
        |count| format!("GET /health/live HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n", "x".repeat(count));
    for (request, expected) in
        [(with_fields(64), 200), (with_fields(65), 431), (with_bytes(8_000), 200), (with_bytes(17_000), 431)]
    {
        let mut wire = Wire::to(&app).await;
        wire.say(&request).await;
        assert_eq!(wire.answer().await.0, expected, "{} bytes", request.len());
    }
}

#[tokio::test]
async fn a_crowd_cannot_hide_our_health_and_is_told_when_to_come_again() {
    let app = app_with(|web| web.max_connections = 4).await;
    let mut crowd = Vec::new();
    for _ in 0..4 {
        let mut wire = Wire::to(&app).await;
        wire.say(LIVE).await;
        assert_eq!(wire.answer().await.0, 200);
        crowd.push(wire);
    }
    // Probes close no connection, though all are idle.
    until(async || app.metric("http_server_open_connections").await == 4.0).await;
    for wire in &mut crowd {
        wire.say(LIVE).await;
        assert_eq!(wire.answer().await.0, 200);
        wire.say(&LIVE[..10]).await;
    }

    for probe in ["/health/live", "/health/ready"] {
        let mut wire = Wire::to(&app).await;
        wire.say(&format!("GET {probe} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        let (status, head, _) = wire.answer().await;
        assert!(status == 200 || probe == "/health/ready", "{head}");
        assert!(head.contains("connection: close"), "{head}");
        wire.closed().await;
    }
    let call = message(Era::Legacy, "tools/list", json!({})).to_string();
    let mut wire = Wire::to(&app).await;
    wire.say(&format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{call}",
        call.len()
    ))
    .await;
    let (status, head, body) = wire.answer().await;
    assert_eq!(status, 503, "{head}");
    assert!(head.contains("retry-after: 1") && head.contains("connection: close"), "{head}");
    let error: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("no JSON: {head} {body}"));
    let error = error_object(&error);
    assert_eq!(error["error"], "SERVICE_ERROR", "{error}");
    assert_eq!(error["details"]["status_code"], 503, "{error}");
    assert_eq!(error["details"]["retryable"], true, "{error}");

    drop(crowd);
    app.until_ready().await;
    until(async || app.send(Era::Legacy, "tools/list", json!({})).await.status() == 200).await;
}

#[tokio::test]
async fn when_all_places_are_taken_the_longest_idle_connection_makes_room() {
    let app = app_with(|web| web.max_connections = 4).await;
    let mut crowd = Vec::new();
    for _ in 0..4 {
        crowd.push(Wire::to(&app).await);
    }
    until(async || app.metric("http_server_open_connections").await == 4.0).await;
    // The first never sends anything; of the others, the third has been idle for longest.
    for index in [2, 1, 3] {
        crowd[index].say(LIVE).await;
        assert_eq!(crowd[index].answer().await.0, 200);
    }
    let mut newcomers = Vec::new();
    for closed in [0, 2] {
        let mut wire = Wire::to(&app).await;
        wire.say(LISTING).await;
        let (status, head, _) = wire.answer().await;
        assert_eq!((status, head.contains("connection: close")), (200, false), "{head}");
        crowd[closed].closed().await;
        newcomers.push(wire);
    }
    // Everybody else keeps their connection, the newcomers too.
    newcomers.extend([crowd.remove(3), crowd.remove(1)]);
    for wire in &mut newcomers {
        wire.say(LIVE).await;
        assert_eq!(wire.answer().await.0, 200);
    }
    assert_eq!(app.metric("http_server_open_connections").await, 4.0);
    assert_eq!(app.metric("mcp_server_shed_total{limit=\"connections\"}").await, 0.0);
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised_as_far_as_it_may_be() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let server = Program::serve(&stand_ins).max_open_files(64, 4_096).start();
    let client = server.client().await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.id())).unwrap();
    let open_files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    assert_eq!(open_files.split_whitespace().next(), Some("4096"), "{limits}");
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(TcpStream::connect(client.address).await.unwrap());
    }
    client.until_ready().await;
    assert!(!server.stdout.so_far().iter().any(|line| line.contains("process.needed_fds")));
}

#[tokio::test]
async fn where_files_run_out_there_is_a_warning_and_the_longest_idle_connections_make_room() {
    let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
    let program = Program::serve(&stand_ins).env("REQUEST_HEADER_TIMEOUT", "600").max_open_files(64, 100);
    let server = program.env("BACKEND_MAX_CONCURRENCY", "100").start();
    let client = server.client().await;
    let warning = parsed(&server.stdout.line("process.needed_fds").await);
    assert_eq!((&warning["level"], &warning["process.max_fds"]), (&json!("WARNING"), &json!(100)), "{warning}");
    assert_eq!(warning["process.needed_fds"], 1_024 + 1_024 + 2 * 64 + 100 + 128, "{warning}");
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(TcpStream::connect(client.address).await.unwrap());
    }
    server.stdout.line("could not accept a connection").await;
    let answer = client.get("/health/live").send();
    assert_eq!(tokio::time::timeout(HANGS, answer).await.expect("no answer").unwrap().status(), 200);
}

#[tokio::test]
async fn connections_that_receive_or_answer_a_request_are_never_closed_for_others() {
    let app = app_with(|web| web.max_connections = 4).await;
    let mut receiving = Wire::to(&app).await;
    receiving.say(&LIVE[..10]).await;
    let mut again = Wire::to(&app).await;
    again.say(LIVE).await;
    assert_eq!(again.answer().await.0, 200);
    again.say(&LIVE[..10]).await;
    let writing = waiting_for_much(&app).await;
    until(async || app.backend_requests().len() == 1).await;
    app.stand_ins.backend.set_fault([FaultRule::hang().on("GET /users/42")]);
    let mut answering = Wire::to(&app).await;
    let (head, body) = in_two_pieces("");
    answering.say(&[&head, body].concat()).await;
    until(async || app.backend_requests().len() == 2).await;

    for _ in 0..3 {
        let mut wire = Wire::to(&app).await;
        wire.say(LISTING).await;
        let (status, head, _) = wire.answer().await;
        assert_eq!((status, head.contains("connection: close")), (503, true), "{head}");
        wire.closed().await;
    }
    for wire in [&mut receiving, &mut again] {
        wire.say(&LIVE[10..]).await;
        assert_eq!(wire.answer().await.0, 200);
    }
    let mut wire = Wire::to(&app).await;
    wire.say(LISTING).await;
    assert_eq!(wire.answer().await.0, 200);
    receiving.closed().await;
    drop((writing, answering));
}

/// A call in two pieces, as clients send it that write head and body one after the other.
fn in_two_pieces(headers: &str) -> (String, &'static str) {
    let body = r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"get_user_profile","arguments":{"user_id":"42"}}}"#;
    let head = format!(
        "POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Accept: application/json, text/event-stream\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    (head, body)
}

#[tokio::test]
async fn who_is_told_to_come_later_can_do_so_on_the_same_connection() {
    for status in [429, 503] {
        let app = app_with(|web| match status {
            429 => (web.rate_limit.per_address, web.rate_limit.burst) = (0.001, 1),
            _ => (web.max_in_flight, web.request_body_timeout) = (1, Duration::from_secs(2)),
        })
        .await;
        app.until_ready().await;
        app.stand_ins.backend.set_fault([FaultRule::hang().on("GET /users/42")]);
        let (head, body) = in_two_pieces("");
        let mut first = Wire::to(&app).await;
        first.say(&[&head, body].concat()).await;
        until(async || app.backend_requests().len() == 1).await;
        let mut wire = Wire::to(&app).await;
        for _ in 0..3 {
            wire.say(&head).await;
            // An answer before the body is there would end the connection when the body comes, under the client's next request.
            let early = tokio::time::timeout(Duration::from_millis(50), wire.0.readable()).await;
            assert!(early.is_err(), "{status} before the body");
            wire.say(body).await;
            let (seen, head, _) = wire.answer().await;
            assert_eq!(seen, status, "{head}");
            assert!(!head.contains("connection: close"), "{head}");
        }
        wire.say(LIVE).await;
        assert_eq!(wire.answer().await.0, 200, "after a {status}");
        // A body that never comes is not waited for long, and the client is told that the connection ends.
        wire.say(&head).await;
        let (seen, head, _) = wire.answer().await;
        let expected = if status == 503 { 408 } else { status };
        assert!(seen == expected && head.contains("connection: close"), "{head}");
        wire.closed().await;
    }
}

#[tokio::test]
async fn what_is_too_large_or_ambiguous_ends_its_connection_and_the_client_is_told() {
    let app = app_with(|web| web.max_request_bytes = 1_024).await;
    let much = format!("POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", 1_025);
    let chunks = "400\r\n".to_owned() + &" ".repeat(1_024) + "\r\n";
    let (head, body) = in_two_pieces("Transfer-Encoding: chunked\r\n");
    let in_chunks = head.replace(&format!("Content-Length: {}\r\n", body.len()), "") + &chunks + &chunks;
    for (name, request, status) in [
        ("large by its own account", much, 413),
        ("large as it came", in_chunks, 413),
        ("ambiguous", [&*in_two_pieces("Origin: a\r\nOrigin: b\r\n").0, body].concat(), 400),
    ] {
        let mut wire = Wire::to(&app).await;
        wire.say(&request).await;
        let (seen, head, _) = wire.answer().await;
        assert!(seen == status && head.contains("connection: close"), "{name}: {head}");
        wire.closed().await;
    }
    // Who writes the body later is not cut off under it.
    let (head, body) = in_two_pieces("Origin: a\r\nOrigin: b\r\n");
    let mut wire = Wire::to(&app).await;
    wire.say(&head).await;
    assert!(tokio::time::timeout(Duration::from_millis(50), wire.0.readable()).await.is_err());
    wire.say(body).await;
    assert_eq!(wire.answer().await.0, 400);
    wire.closed().await;
}

/// Requests whose body nobody needs, with the status of the answer: on the main listener, and on the management listener.
fn without_use_for_a_body() -> [Vec<(String, u16)>; 2] {
    let request = |line: &str, more: &str| format!("{line} HTTP/1.1\r\nHost: localhost\r\n{more}");
    let preflight = "Origin: https://app.example\r\nAccess-Control-Request-Method: POST\r\n";
    let many_fields: String = (0..64).map(|n| format!("X-{n}: x\r\n")).collect();
    let main = [
        ("GET /", "", 200),
        ("GET /health/live", "", 200),
        ("GET /health/ready", "", 200),
        ("HEAD /health/live", "", 200),
        ("POST /health/live", "", 405),
        ("POST /", "", 405),
        ("GET /mcp", "", 405),
        ("DELETE /mcp/", "", 405),
        ("OPTIONS /mcp", preflight, 200),
        ("GET /metrics", "", 404),
        ("POST /messages", "", 404),
        ("GET /.well-known/oauth-protected-resource/mcp", "", 200),
        ("POST /mcp", "", 401),
        ("POST /mcp", &many_fields, 431),
        ("GET /health/live", &many_fields, 431),
    ];
    let management = [("GET /metrics", "", 200), ("POST /metrics", "", 405), ("POST /mcp", "", 404)];
    let rows =
        |rows: &[(&str, &str, u16)]| rows.iter().map(|(line, more, status)| (request(line, more), *status)).collect();
    [rows(&main), rows(&management)]
}

#[tokio::test]
async fn a_body_that_nobody_needs_costs_the_next_request_on_its_connection_nothing() {
    const FRAMES: [(&str, &str); 2] = [
        ("Content-Length: 12\r\n\r\n", "GET / HTTP/1"),
        ("Transfer-Encoding: chunked\r\n\r\n", "5\r\nGET /\r\n0\r\nTrailer: x\r\n\r\n"),
    ];
    let app =
        TestApp::guarded_with(|_| {}, |settings| settings.web.allowed_origins = vec!["https://app.example".to_owned()])
            .await;
    let ([main, management], next) = (without_use_for_a_body(), ["GET /health/live", "GET /metrics"]);
    let addresses = [(app.address, main, next[0]), (app.metrics_address, management, next[1])];
    for (address, requests, next) in addresses {
        for (request, status) in &requests {
            let connect = async || Wire(TcpStream::connect(address).await.unwrap());
            for (framing, body) in FRAMES {
                let mut wire = connect().await;
                for _ in 0..2 {
                    wire.say(&[request, framing].concat()).await;
                    let early = tokio::time::timeout(Duration::from_millis(20), wire.0.peek(&mut [0])).await;
                    assert!(early.is_err(), "before the body of {request}");
                    wire.say(body).await;
                    let (seen, head) = wire.answer_to(request).await;
                    assert!(seen == *status && !head.contains("connection: close"), "{request}: {head}");
                }
                wire.say(&format!("{next} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
                assert_eq!(wire.answer().await.0, 200, "after {request}");
            }
            // Large by its own account, or waiting for leave to come: it is not waited for.
            for framing in ["Content-Length: 98305\r\n\r\n", "Content-Length: 12\r\nExpect: 100-continue\r\n\r\n"] {
                let mut wire = connect().await;
                wire.say(&[request, framing].concat()).await;
                let (seen, head) = wire.answer_to(request).await;
                assert!(seen == *status && head.contains("connection: close"), "{request}: {head}");
                wire.closed().await;
            }
        }
        // It is waited for, but not for long.
        let never = async |request: &str, status: u16| {
            let mut wire = Wire(TcpStream::connect(address).await.unwrap());
            wire.say(&[request, FRAMES[0].0].concat()).await;
            let (seen, head) = wire.answer_to(request).await;
            assert!(seen == status && head.contains("connection: close"), "{request}: {head}");
            wire.closed().await;
        };
        futures_util::future::join_all(requests.iter().map(|(request, status)| never(request, *status))).await;
    }
}
