//! One caller, or one fault, against all others: slow uploads, abandoned writes, one resource that fails, idle connections.
//!
//! In each case the others must not notice: their calls all succeed, on new connections too. The limits are the defaults, except where
//! a row names another.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use mcp_server::demo::entra::{API_APP_ID, DemoCaller};
use mcp_server::demo::fault::FaultRule;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::Scale;
use crate::client::{self, Client, Era, Meaning};
use crate::connections::connect;
use crate::load::{Load, Tally};
use crate::report::{Report, ms, seconds};
use crate::server::{Server, Stage};

/// As many as `MAX_IN_FLIGHT` allows requests by default.
const UPLOADS: usize = 768;
/// `MAX_IN_FLIGHT_PER_CALLER` of the abandoned writes, and how many writes are abandoned.
const PER_CALLER: usize = 16;
const ABANDONED: usize = 600;
/// As many as `MAX_CONNECTIONS` allows by default.
const IDLE: usize = 1_024;
const NEW_CALLERS: usize = 50;

const UPLOAD_HEAD: &[u8] = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
    Accept: application/json, text/event-stream\r\nContent-Length: 4000\r\n\r\n{";

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    slow_uploads(scale, report).await;
    abandoned_writes(scale, report).await;
    one_failing_resource(scale, report).await;
    idle_connections(scale, report).await;
}

async fn slow_uploads(scale: &Scale, report: &mut Report) {
    let scenario = format!("fairness, {UPLOADS} uploads at a byte a second");
    let stage = Stage::set(&scale.server).await;
    let server = stage.server(&[]).await;
    let (stop, begun) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
    let mut uploads = JoinSet::new();
    for number in 0..UPLOADS {
        uploads.spawn(upload_again_and_again(server.address, number, Arc::clone(&begun), stop.clone()));
    }
    let begin = Instant::now();
    while begun.load(Relaxed) < UPLOADS && begin.elapsed() < Duration::from_secs(20) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let others = others(&server, client::all_tools()).last(time(scale, 5)).await;
    stop.cancel();
    while uploads.join_next().await.is_some() {}
    unaffected(report, &scenario, &others);
}

/// An upload at a byte a second; where it is refused or cut, the next.
async fn upload_again_and_again(address: SocketAddr, number: usize, begun: Arc<AtomicUsize>, stop: CancellationToken) {
    let upload = async {
        loop {
            if let Ok(mut stream) = connect([127, 0, 0, 2 + (number % 16) as u8], address).await
                && stream.write_all(UPLOAD_HEAD).await.is_ok()
            {
                begun.fetch_add(1, Relaxed);
                let mut answer = [0; 1_024];
                // Any answer, and any end, comes before the body is complete.
                while tokio::time::timeout(Duration::from_secs(1), stream.read(&mut answer)).await.is_err() {
                    if stream.write_all(b" ").await.is_err() {
                        break;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = upload => {}
    }
}

async fn abandoned_writes(scale: &Scale, report: &mut Report) {
    let scenario = format!("fairness, {ABANDONED} writes abandoned, `MAX_IN_FLIGHT_PER_CALLER={PER_CALLER}`");
    let stage = Stage::set(&scale.server).await;
    stage.stand_ins.backend.set_fault([FaultRule::hang().on("POST /tickets")]);
    let per_caller = PER_CALLER.to_string();
    let environment = [
        ("INBOUND_AUTH", "entra"),
        ("INBOUND_AUDIENCE", API_APP_ID),
        ("PUBLIC_URL", "https://mcp.contoso.example/mcp"),
        ("MAX_IN_FLIGHT_PER_CALLER", per_caller.as_str()),
        ("RATE_LIMIT_PER_CALLER", "0"),
        // The backend holds each write for longer than this takes.
        ("BACKEND_API_TIMEOUT", "60"),
    ];
    let server = stage.server(&environment).await;
    let token = |caller| stage.stand_ins.entra.caller_token(caller, &json!({}));
    let ticket = json!({ "title": "Printer", "description": "It prints nothing but zeros." });
    let write = client::with_token(&client::call(Era::Legacy, "create_ticket", &ticket), &token(DemoCaller::Writer));
    let mut crowd = JoinSet::new();
    for _ in 0..PER_CALLER {
        let (address, write) = (server.address, write.clone());
        crowd.spawn(async move {
            for _ in 0..ABANDONED / PER_CALLER {
                if let Ok(mut stream) = connect([127, 0, 0, 2], address).await {
                    let _ = stream.write_all(&write).await;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        });
    }
    while crowd.join_next().await.is_some() {}
    let reader = token(DemoCaller::Reader);
    let reads = client::all_reads().iter().map(|call| client::with_token(call, &reader)).collect();
    let others = others(&server, reads).last(time(scale, 3)).await;
    let requests = stage.stand_ins.backend.requests();
    let writes = requests.iter().filter(|request| request.method == Method::POST).count();
    report.hold(
        &scenario,
        format!("the backend holds {writes} of them"),
        format!("1 to {PER_CALLER}: the limit holds for as long as the work"),
        (1..=PER_CALLER).contains(&writes),
    );
    unaffected(report, &scenario, &others);
}

async fn one_failing_resource(scale: &Scale, report: &mut Report) {
    let user = |id: &str| client::call(Era::Legacy, "get_user_profile", &json!({ "user_id": id }));
    let dataset = |name: &str| client::call(Era::Legacy, "query_data", &json!({ "dataset": name, "limit": 5 }));
    let cases = [
        ("one user answers 500", FaultRule::status(500).on("GET /users/broken"), user("broken"), user("42")),
        ("one user answers 503", FaultRule::status(503).on("GET /users/broken"), user("broken"), user("42")),
        ("one dataset hangs", FaultRule::hang().on("GET /query/broken"), dataset("broken"), dataset("sales")),
    ];
    for (name, fault, broken, sound) in cases {
        let scenario = format!("fairness, {name}, asked for 50 times a second");
        let stage = Stage::set(&scale.server).await;
        stage.stand_ins.backend.set_fault([fault]);
        let server = stage.server(&[("BACKEND_API_TIMEOUT", "1")]).await;
        let caller = Load::new(server.address, 64, vec![broken]).at(50.0).start();
        let same_tool = Load::new(server.address, 4, vec![sound]).at(10.0).start();
        let tool = if name.contains("user") { &b"get_user_profile"[..] } else { &b"query_data"[..] };
        let is_other = |call: &Bytes| !call.windows(tool.len()).any(|part| part == tool);
        let calls = client::all_tools().into_iter().filter(is_other).collect();
        // Fewer than the broken ones, so that those are most of what the server sees of its backend.
        let others = others(&server, calls).at(20.0).last(time(scale, 4)).await;
        let (same_tool, caller) = (same_tool.stop().await, caller.stop().await);
        unaffected(report, &format!("{scenario}; other tools"), &others);
        let refused = same_tool.calls() - same_tool.done.count();
        report.hold(
            &format!("{scenario}; the same tool for others"),
            format!("{refused} of {} calls failed, beside {} of the broken one", same_tool.calls(), caller.calls()),
            "≤ 10 %",
            refused * 10 <= same_tool.calls() && same_tool.done.count() > 0 && caller.calls() > 0,
        );
    }
}

async fn idle_connections(scale: &Scale, report: &mut Report) {
    let scenario = format!("fairness, {IDLE} idle keep-alive connections");
    let stage = Stage::set(&scale.server).await;
    let server = stage.server(&[]).await;
    let mut crowd = JoinSet::new();
    for part in 0..16 {
        let address = server.address;
        crowd.spawn(async move {
            let mut idle = Vec::new();
            for _ in part * IDLE / 16..(part + 1) * IDLE / 16 {
                let mut client = Client::new(address);
                let answer = client.ask(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
                if answer.is_ok_and(|answer| answer.status == 200) {
                    idle.push(client);
                }
            }
            idle
        });
    }
    let idle: Vec<_> = crowd.join_all().await.into_iter().flatten().collect();
    let call = client::all_tools().swap_remove(0);
    let (mut served, mut longest) = (0, Duration::ZERO);
    for _ in 0..NEW_CALLERS {
        let begin = Instant::now();
        let answer = Client::new(server.address).ask(&call).await;
        served += usize::from(answer.is_ok_and(|answer| answer.meaning() == Meaning::Done));
        longest = longest.max(begin.elapsed());
    }
    report.hold(
        &scenario,
        format!(
            "beside {} of them {served} of {NEW_CALLERS} new callers are served, the slowest in {}",
            idle.len(),
            seconds(longest)
        ),
        "all",
        served == NEW_CALLERS && idle.len() > IDLE / 2,
    );
}

/// Callers who do nothing wrong, each call on a connection of its own.
fn others(server: &Server, calls: Vec<Bytes>) -> Load {
    Load { keep_alive: false, ..Load::new(server.address, 8, calls) }.at(40.0)
}

fn time(scale: &Scale, short: u64) -> Duration {
    Duration::from_secs(if scale.long { 10 * short } else { short })
}

fn unaffected(report: &mut Report, scenario: &str, others: &Tally) {
    report.hold(
        scenario,
        format!(
            "{} calls of others, p99 {}: {}, {} shed",
            others.calls(),
            ms(others.done.share(0.99)),
            others.failures(),
            others.shed.count()
        ),
        "0 failed, 0 shed",
        others.failed.is_empty() && others.shed.count() == 0 && others.done.count() > 0,
    );
}
