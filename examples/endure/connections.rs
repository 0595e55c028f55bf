//! F12: connections that say nothing, half a head, half a body, or `initialize` again and again.
//!
//! First with room for all of them, then with far more than there is room for. Probes come on connections of their own all the
//! while, as the orchestrator's do; good callers keep the connections that they had before.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::Scale;
use crate::client::{self, Client};
use crate::load::{Load, Times};
use crate::report::{Report, ms, seconds};
use crate::server::Stage;

const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
const BODY_TIMEOUT: Duration = Duration::from_secs(2);
const RSS_BOUND_MIB: f64 = 160.0;
const PROBE_EVERY: Duration = Duration::from_millis(100);
const GOOD_CALLERS: usize = 8;

const HALF_A_HEAD: &[u8] = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Ty";
const HALF_A_BODY: &[u8] = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
    Accept: application/json, text/event-stream\r\nContent-Length: 500\r\n\r\n{\"jsonrpc\":\"2.0\",";

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    with_room(scale, report).await;
    without_room(scale, report).await;
    initialize_flood(scale, report).await;
}

fn environment(max_connections: &str) -> [(&str, &str); 3] {
    assert_eq!((HEAD_TIMEOUT, BODY_TIMEOUT), (Duration::from_secs(2), Duration::from_secs(2)));
    [("MAX_CONNECTIONS", max_connections), ("REQUEST_HEADER_TIMEOUT", "2"), ("REQUEST_BODY_TIMEOUT", "2")]
}

async fn with_room(scale: &Scale, report: &mut Report) {
    let [silent, partial, stalled] = if scale.long { [2_000, 2_000, 500] } else { [1_000, 1_000, 200] };
    let scenario = "F12 connections, with room for all";
    let stage = Stage::set(&scale.server).await;
    let server = stage.server(&environment("8192")).await;
    let good = Load::new(server.address, GOOD_CALLERS, client::all_tools()).at(40.0).start();
    let probes = Probes::begin(server.address);

    let mut crowd = JoinSet::new();
    for (kind, count, says) in [(0, silent, &b""[..]), (1, partial, HALF_A_HEAD), (2, stalled, HALF_A_BODY)] {
        for number in 0..count {
            let address = server.address;
            crowd.spawn(async move {
                // They come over a second: of more than the kernel holds for a server at one instant it drops some, probes too.
                tokio::time::sleep(Duration::from_secs(1).mul_f64(fastrand::f64())).await;
                (kind, until_closed(address, number, says).await)
            });
        }
    }
    let (mut longest, mut ended) = ([Duration::ZERO; 3], 0);
    for (kind, took) in crowd.join_all().await {
        if let (Some(longest), Some(took)) = (longest.get_mut(kind), took) {
            *longest = took.max(*longest);
            ended += 1;
        }
    }
    let bounds = [HEAD_TIMEOUT, HEAD_TIMEOUT, BODY_TIMEOUT].map(|bound| bound + Duration::from_secs(1));
    report.hold(
        scenario,
        format!(
            "{silent} silent, {partial} with half a head, {stalled} with half a body: {ended} closed, the last after {}, {}, {}",
            seconds(longest[0]),
            seconds(longest[1]),
            seconds(longest[2])
        ),
        "timeout + 1 s: 3 s, 3 s, 8 s",
        ended == silent + partial + stalled && longest.iter().zip(bounds).all(|(longest, bound)| *longest <= bound),
    );
    probes.end(scenario, report).await;
    let good = good.stop().await;
    report.hold(
        scenario,
        format!("{} good calls meanwhile, p99 {}; {}", good.calls(), ms(good.done.share(0.99)), good.failures()),
        "0 failed",
        good.failed.is_empty() && good.shed.count() == 0 && good.calls() > 0,
    );
    let vitals = server.vitals();
    report.hold(
        scenario,
        format!("peak {:.0} MiB; {} descriptors are left open", vitals.peak_mib, vitals.fds),
        format!("≤ {RSS_BOUND_MIB} MiB; < 100"),
        vitals.peak_mib <= RSS_BOUND_MIB && vitals.fds < 100,
    );
}

async fn without_room(scale: &Scale, report: &mut Report) {
    let (crowd, limit) = if scale.long { (10_000, "1024") } else { (2_000, "256") };
    let scenario = &format!("F12 connections, {crowd} of them on `MAX_CONNECTIONS={limit}`");
    let stage = Stage::set(&scale.server).await;
    let server = stage.server(&environment(limit)).await;
    let good = Load::new(server.address, GOOD_CALLERS, client::all_tools()).at(40.0).start();
    // The good callers have their connections before the crowd comes.
    tokio::time::sleep(Duration::from_secs(1)).await;

    let stop = CancellationToken::new();
    let mut junk = JoinSet::new();
    for number in 0..crowd {
        let (address, stop) = (server.address, stop.clone());
        junk.spawn(async move {
            let mut opened = 0_u64;
            // They come over the first two seconds, and come again a while after they were closed.
            let mut pause = Duration::from_secs(2).mul_f64(fastrand::f64());
            loop {
                tokio::select! {
                    () = stop.cancelled() => return opened,
                    () = tokio::time::sleep(pause) => {}
                }
                opened += 1;
                tokio::select! {
                    () = stop.cancelled() => return opened,
                    _ = until_closed(address, number, if number % 2 == 0 { b"" } else { HALF_A_HEAD }) => {}
                }
                pause = Duration::from_secs(1).mul_f64(0.5 + fastrand::f64());
            }
        });
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let probes = Probes::begin(server.address);
    let mut least = f64::MAX;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(if scale.long { 60 } else { 8 }) {
        least = least.min(server.metric("http_server_open_connections").await);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    probes.end(scenario, report).await;
    let good = good.stop().await;
    stop.cancel();
    let mut opened = 0;
    while let Some(ended) = junk.join_next().await {
        opened += ended.unwrap();
    }
    report.figure(
        scenario,
        format!("{opened} connections opened; never fewer than {least} of {limit} open"),
        "the limit stays reached",
    );
    report.hold(
        scenario,
        format!(
            "{} calls meanwhile on connections from before, p99 {}; {}",
            good.calls(),
            ms(good.done.share(0.99)),
            good.failures()
        ),
        "0 failed",
        good.failed.is_empty() && good.shed.count() == 0 && good.calls() > 0,
    );
    let begin = Instant::now();
    let call = client::all_tools().swap_remove(0);
    let again = loop {
        let answer = Client::new(server.address).ask(&call).await;
        if answer.is_ok_and(|answer| answer.meaning() == client::Meaning::Done) {
            break begin.elapsed();
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "no new caller gets in any more");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let peak = server.vitals().peak_mib;
    report.hold(
        scenario,
        format!("a new caller is served {} after the crowd left; peak {peak:.0} MiB", seconds(again)),
        format!("≤ 5 s; ≤ {RSS_BOUND_MIB} MiB"),
        again <= Duration::from_secs(5) && peak <= RSS_BOUND_MIB,
    );
}

async fn initialize_flood(scale: &Scale, report: &mut Report) {
    let count = if scale.long { 10_000 } else { 2_000 };
    let scenario = "F12 connections, `initialize` flood";
    let stage = Stage::set(&scale.server).await;
    let server = stage.server(&environment("1024")).await;
    let probes = Probes::begin(server.address);
    let before = server.vitals();
    let begin = Instant::now();
    let mut flood = JoinSet::new();
    for _ in 0..100 {
        let address = server.address;
        flood.spawn(async move {
            let request = client::initialize();
            let mut answered = 0;
            for _ in 0..count / 100 {
                // Each is a client of its own, who never comes back.
                let answer = Client::new(address).ask(&request).await;
                answered += usize::from(answer.is_ok_and(|answer| answer.status == 200));
            }
            answered
        });
    }
    let answered: usize = flood.join_all().await.into_iter().sum();
    let took = begin.elapsed();
    let after = server.vitals();
    report.hold(scenario, format!("{answered} of {count} answered in {}", seconds(took)), "all", answered == count);
    probes.end(scenario, report).await;
    report.hold(
        scenario,
        format!("{:.1} MiB before, {:.1} MiB after, peak {:.0} MiB", before.rss_mib, after.rss_mib, after.peak_mib),
        format!("no session is kept: + 16 MiB at most; ≤ {RSS_BOUND_MIB} MiB"),
        after.rss_mib - before.rss_mib <= 16.0 && after.peak_mib <= RSS_BOUND_MIB,
    );
}

/// Opens a connection, says this and no more, and waits for its end. `None` when there was no connection to be had.
async fn until_closed(address: SocketAddr, number: usize, says: &[u8]) -> Option<Duration> {
    // One source address has too few ports for a crowd that keeps coming back.
    let source = [127, 0, 0, 2 + (number % 16) as u8];
    let mut stream = connect(source, address).await.ok()?;
    let begin = Instant::now();
    let _ = stream.write_all(says).await;
    let mut rest = [0; 1_024];
    // A reset is an end as well.
    while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
    Some(begin.elapsed())
}

pub(crate) async fn connect(source: [u8; 4], address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(address).await
}

/// A probe as the orchestrator's: each on a connection of its own, with a second to be answered.
struct Probes {
    stop: CancellationToken,
    probing: tokio::task::JoinHandle<(Times, u32, u32)>,
}

impl Probes {
    fn begin(address: SocketAddr) -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let probing = tokio::spawn(async move {
            let (mut times, mut failed, mut in_a_row, mut most_in_a_row) = (Times::default(), 0, 0_u32, 0);
            while !stopped.is_cancelled() {
                tokio::time::sleep(PROBE_EVERY).await;
                let begin = Instant::now();
                let mut client = Client::new(address);
                let probe = client.ask(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n");
                let answer = tokio::time::timeout(Duration::from_secs(1), probe).await;
                let why = match answer {
                    Ok(Ok(answer)) if answer.status == 200 => {
                        times.add(begin.elapsed());
                        in_a_row = 0;
                        continue;
                    }
                    Ok(Ok(answer)) => format!("status {}", answer.status),
                    Ok(Err(error)) => error.to_string(),
                    Err(elapsed) => elapsed.to_string(),
                };
                eprintln!("endure: a probe failed after {}: {why}", ms(begin.elapsed()));
                failed += 1;
                in_a_row += 1;
                most_in_a_row = in_a_row.max(most_in_a_row);
            }
            (times, failed, most_in_a_row)
        });
        Self { stop, probing }
    }

    async fn end(self, scenario: &str, report: &mut Report) {
        self.stop.cancel();
        let (times, failed, in_a_row) = self.probing.await.unwrap();
        report.hold(
            scenario,
            format!(
                "{} probes of `/health/live`, p50 {}, longest {}; {failed} failed, {in_a_row} in a row",
                times.count() as u32 + failed,
                ms(times.share(0.5)),
                ms(times.share(1.0))
            ),
            "each < 1 s",
            failed == 0 && times.count() > 0,
        );
    }
}
