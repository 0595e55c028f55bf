//! F10: more calls than there is room for. What there is room for goes on as before; the rest is turned away at once.
//!
//! Room is made small by settings, and the backend slow, so that the limit is reached long before this machine's own. It is
//! reached in two ways: by `BACKEND_MAX_CONCURRENCY` (a SERVICE_ERROR) and by `MAX_IN_FLIGHT` (an HTTP 503).

use std::time::{Duration, Instant};

use mcp_server::demo::fault::FaultRule;
use serde_json::json;

use crate::Scale;
use crate::client::{self, Era};
use crate::load::{Lag, Load};
use crate::report::{Report, ms, seconds};
use crate::server::Stage;

const RSS_BOUND_MIB: f64 = 160.0;

/// How much there is room for.
#[derive(Clone, Copy)]
struct Room {
    /// Calls at the same time.
    calls: usize,
    /// How long the backend takes for each.
    backend_takes: Duration,
    /// How long each load lasts.
    time: Duration,
    /// Whether the slowest of the calls that are turned away count, too.
    strict: bool,
}

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    // 40 calls a second are within the means of a debug build on a busy machine, and so are 400 that are turned away.
    let (calls, takes, time) = if scale.long { (64, 160, 60) } else { (16, 400, 5) };
    let room = Room {
        calls,
        backend_takes: Duration::from_millis(takes),
        time: Duration::from_secs(scale.load.unwrap_or(time)),
        strict: scale.long,
    };
    for limit in ["BACKEND_MAX_CONCURRENCY", "MAX_IN_FLIGHT"] {
        overload(scale, report, limit, room).await;
    }
}

async fn overload(scale: &Scale, report: &mut Report, limit: &str, room: Room) {
    let time = room.time;
    let scenario = |what: &str| format!("F10 overload, `{limit}={}`, {what}", room.calls);
    let stage = Stage::set(&scale.server).await;
    stage.stand_ins.backend.set_fault([FaultRule::delay(room.backend_takes).on("GET /users")]);
    let server = stage.server(&[(limit, &room.calls.to_string()), ("READINESS_CHECK_BACKEND", "false")]).await;
    let calls = [Era::Legacy, Era::Modern].map(|era| client::call(era, "list_users", &json!({ "limit": 1 })));
    let load = |connections| Load::new(server.address, connections, calls.to_vec());

    load(room.calls).last(Duration::from_secs(1)).await;
    let capacity = load(room.calls).last(time).await;
    report.figure(
        &scenario("capacity"),
        format!(
            "{:.0} calls/s over {} connections, p50 {}",
            capacity.goodput(),
            room.calls,
            ms(capacity.done.share(0.5))
        ),
        format!("at most {:.0}/s", room.calls as f64 / room.backend_takes.as_secs_f64()),
    );

    for times in [3, 10] {
        let lag = Lag::watch();
        // Who is being served does not call: the crowd has to be larger than the rate alone would need.
        let tally = load(10 * room.calls).at(capacity.goodput() * f64::from(times)).last(time).await;
        let lag = lag.end().await;
        let share = tally.goodput() / capacity.goodput();
        report.hold(
            &scenario(&format!("{times} ×")),
            format!("{:.0} calls/s offered, goodput {:.0} % of capacity", tally.rate(), share * 100.0),
            "≥ 90 %",
            share >= 0.9,
        );
        let (median, p99) = (tally.shed.share(0.5), tally.shed.share(0.99));
        let bound = Duration::from_millis(50);
        report.hold(
            &scenario(&format!("{times} ×")),
            format!(
                "{} shed in p50 {}, p99 {}, longest {}; this client itself is late by p99 {}",
                tally.shed.count(),
                ms(median),
                ms(p99),
                ms(tally.shed.share(1.0)),
                ms(lag.share(0.99))
            ),
            if room.strict { "p50 and p99 < 50 ms" } else { "p50 < 50 ms (p99 is a figure)" },
            tally.shed.count() > 0 && median < bound && (p99 < bound || !room.strict),
        );
        report.hold(&scenario(&format!("{times} ×")), tally.failures(), "0 other failures", tally.failed.is_empty());
    }

    let begin = Instant::now();
    let quiet = load(room.calls).at(capacity.goodput() / 2.0).last(Duration::from_secs(4)).await;
    let normal = quiet.last_bad.map_or(Duration::ZERO, |last| last.saturating_duration_since(begin));
    let at_rest = server.at_rest(Duration::from_secs(5)).await;
    report.hold(
        &scenario("afterwards"),
        format!("the last call turned away {} after the overload, in flight 0", seconds(normal)),
        "≤ 5 s; here ≤ 2 s, and calls since",
        normal <= Duration::from_secs(2) && quiet.done.count() > 0 && at_rest.is_some(),
    );
    let peak = server.vitals().peak_mib;
    report.hold(
        &scenario("memory"),
        format!("peak {peak:.0} MiB"),
        format!("≤ {RSS_BOUND_MIB} MiB"),
        peak <= RSS_BOUND_MIB,
    );
}
