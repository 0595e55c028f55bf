//! Large answers and costly requests, as many as callers ask for: memory stays within its bound, and is given back.
//!
//! The limits of memory are the defaults. Answers have the 4 MiB that `BACKEND_MAX_RESPONSE_BYTES` allows, and `MAX_RESULT_BYTES=0` lets them
//! through whole. Every case has a server of its own, so that its peak is its own.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mcp_server::demo::fault::FaultRule;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use crate::Scale;
use crate::client::{self, Client, Era, Meaning};
use crate::connections::connect;
use crate::report::{Report, seconds};
use crate::server::{Server, Stage};

/// What the process may take at most, below the chart's limit of 1 GiB.
const PEAK_MIB: f64 = 768.0;
/// What it may still hold some time after everything is over, beyond what it held before.
const KEPT_MIB: f64 = 96.0;
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(60);
/// `BACKEND_MAX_RESPONSE_BYTES`, less what frames the rows.
const ANSWER: usize = (4 << 20) - 64;
/// How long readers that are slow, or none, stay: longer than it takes until all answers wait for them.
const READS_FOR: Duration = Duration::from_secs(8);
/// The largest request that is read, and how many of them come together.
const REQUEST: usize = 98_304;

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    let answers = if scale.long { 600 } else { 300 };
    let plain = rows(r#"{"name":"Ada Lovelace","city":"London","since":1843},"#);
    let quotes = rows(&format!(r#"{{"text":"{}"}},"#, r#"\""#.repeat(500)));
    let mut cases = Vec::new();
    for (name, body, reader) in [
        ("quick readers", &plain, Reader::Quick),
        ("rows full of quotes, quick readers", &quotes, Reader::Quick),
        ("readers of 64 KiB a second", &plain, Reader::Slow),
        ("rows full of quotes, no readers", &quotes, Reader::Not),
    ] {
        if name == "quick readers" && !scale.long {
            // The quotes are the harder case, and take long enough.
            continue;
        }
        // A debug build takes long for so many bytes.
        let answers = if reader == Reader::Quick && !scale.long { answers / 2 } else { answers };
        let scenario = format!("memory, {answers} answers of 4 MiB, {name}");
        let stage = Stage::set(&scale.server).await;
        let fault = FaultRule::status(200).body(body.clone()).on("GET /query");
        stage.stand_ins.backend.set_fault([fault]);
        let call = client::call(Era::Legacy, "query_data", &json!({ "dataset": "sales", "limit": 1000 }));
        cases.push(crowd(report, scenario, stage, answers, &call, reader).await);
    }

    let requests = if scale.long { 2_000 } else { 400 };
    let scenario = format!("memory, {requests} requests of 96 KiB that parsing makes 100 times as large");
    let stage = Stage::set(&scale.server).await;
    let objects = |bytes: usize| format!("[{}0]", r#"{"":0},"#.repeat(bytes / 7));
    let call = client::post_text(
        "2025-11-25",
        "",
        &format!(
            r#"{{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{{"_meta":{{"a":{}}}}}}}"#,
            objects(REQUEST - 200)
        ),
    );
    cases.push(crowd(report, scenario, stage, requests, &call, Reader::Quick).await);
    for case in cases {
        case.gives_back(report).await;
    }
}

/// A server after its crowd.
struct Case {
    scenario: String,
    stage: Stage,
    server: Server,
    before_mib: f64,
    ended: Instant,
}

/// How a caller takes its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    Quick,
    Slow,
    Not,
}

/// Rows of this kind, as many as an answer may hold.
fn rows(row: &str) -> Bytes {
    let rows = row.repeat(ANSWER / row.len());
    Bytes::from(format!(r#"{{"data":[{}]}}"#, rows.trim_end_matches(',')))
}

/// So many callers at the same time, on connections of their own.
async fn crowd(
    report: &mut Report,
    scenario: String,
    stage: Stage,
    count: usize,
    call: &Bytes,
    reader: Reader,
) -> Case {
    // Without health checks nothing happens afterwards; and a debug build on a busy machine takes its time.
    let environment = [("MAX_RESULT_BYTES", "0"), ("READINESS_CHECK_BACKEND", "false"), ("BACKEND_API_TIMEOUT", "60")];
    let server = stage.server(&environment).await;
    let before = server.vitals();
    let mut callers = JoinSet::new();
    for number in 0..count {
        callers.spawn(one(server.address, number, call.clone(), reader));
    }
    let (mut whole, mut refused, mut others) = (0, 0, 0);
    let stop = Instant::now() + Duration::from_secs(60);
    while !callers.is_empty() && Instant::now() < stop {
        match tokio::time::timeout(Duration::from_millis(200), callers.join_next()).await {
            Ok(Some(Ok(Some(Meaning::Done)))) => whole += 1,
            Ok(Some(Ok(Some(Meaning::Shed)))) => refused += 1,
            Ok(_) => others += 1,
            Err(_elapsed) => {}
        }
    }
    callers.shutdown().await;
    // The system keeps the peak.
    let peak = server.vitals().peak_mib;
    let wanted = match reader {
        Reader::Quick => whole > 0 && others == 0,
        Reader::Slow | Reader::Not => true,
    };
    report.hold(
        &scenario,
        format!("{whole} answered, {refused} refused as retryable, {others} cut; peak {peak:.0} MiB"),
        format!("≤ {PEAK_MIB} MiB, none lost where all read"),
        peak > 0.0 && peak <= PEAK_MIB && wanted,
    );
    Case { scenario, stage, server, before_mib: before.rss_mib, ended: Instant::now() }
}

impl Case {
    /// Waits until its memory is given back; meanwhile the other cases run.
    async fn gives_back(self, report: &mut Report) {
        let Self { scenario, stage, server, before_mib, ended } = self;
        stage.stand_ins.backend.set_fault([]);
        let mut kept = server.vitals().rss_mib - before_mib;
        while kept > KEPT_MIB && ended.elapsed() < GIVEN_BACK_WITHIN {
            tokio::time::sleep(Duration::from_millis(500)).await;
            kept = server.vitals().rss_mib - before_mib;
        }
        let answer = Client::new(server.address).ask(&client::call(Era::Modern, "list_users", &json!({}))).await;
        let in_use = server.metric("mcp_server_limit_in_use{limit=\"memory\"}").await;
        report.hold(
            &scenario,
            format!(
                "{kept:.0} MiB more than before {} later; {in_use:.0} bytes leased; the next call is answered",
                seconds(ended.elapsed())
            ),
            format!("≤ {KEPT_MIB} MiB within {} s; 0 leased", GIVEN_BACK_WITHIN.as_secs()),
            kept <= KEPT_MIB && in_use == 0.0 && answer.is_ok_and(|answer| answer.meaning() == Meaning::Done),
        );
    }
}

/// One call; `None` where its answer did not come as a whole. Of the answer, only the beginning is kept.
async fn one(address: SocketAddr, number: usize, call: Bytes, reader: Reader) -> Option<Meaning> {
    let mut stream = connect([127, 0, 0, 2 + (number % 16) as u8], address).await.ok()?;
    stream.write_all(&call).await.ok()?;
    if reader == Reader::Not {
        tokio::time::sleep(READS_FOR).await;
        return None;
    }
    let (mut piece, mut beginning, mut read) = (vec![0; 64 << 10], Vec::new(), 0);
    let stop = Instant::now() + READS_FOR;
    loop {
        let bytes = match reader {
            Reader::Slow => tokio::time::timeout_at(stop.into(), stream.read(&mut piece)).await.ok()?,
            Reader::Quick | Reader::Not => stream.read(&mut piece).await,
        };
        let bytes = bytes.ok().filter(|bytes| *bytes > 0)?;
        read += bytes;
        beginning.extend_from_slice(piece.get(..bytes.min(2_048usize.saturating_sub(beginning.len())))?);
        let text = String::from_utf8_lossy(&beginning);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.to_ascii_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        if length.is_some_and(|length: usize| read >= head.len() + 4 + length) {
            return match (body.contains("_ERROR"), body.contains("retry_after_seconds")) {
                (false, _) => Some(Meaning::Done),
                (true, true) => Some(Meaning::Shed),
                (true, false) => None,
            };
        }
        if reader == Reader::Slow {
            if Instant::now() > stop {
                return None;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
