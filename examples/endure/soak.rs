//! F15: mixed calls of all five tools for a long time, with a fault every now and then, and what the process holds meanwhile.
//!
//! Slopes are fitted to the samples after the warm-up. Over minutes they are mostly noise, so a short run is judged by what the
//! last third holds beyond the first; only a run of an hour or more is judged by its slope.

use std::time::{Duration, Instant};

use mcp_server::demo::DemoOptions;
use mcp_server::demo::entra::EntraOptions;
use mcp_server::demo::fault::FaultRule;

use crate::Scale;
use crate::client;
use crate::load::Load;
use crate::report::{Report, ms};
use crate::server::{Stage, Vitals};

const RATE: f64 = 100.0;
const FAULT_LASTS: Duration = Duration::from_millis(1_500);
/// After a fault the breaker may stay open for so long, with room for a slow machine.
const FAULT_ECHOES: Duration = Duration::from_secs(6);
/// Tokens live so short that they are renewed during the run, also while Entra is down.
const TOKEN_LIFETIME: Duration = Duration::from_secs(120);

const FAULTS: [&str; 5] = ["503", "slow", "close", "Entra down", "garbage"];

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    let total = scale.soak;
    let warm_up = (total / 3).clamp(Duration::from_secs(10), Duration::from_secs(600));
    let fault_every = Duration::from_secs(if total.as_secs() >= 3_600 { 60 } else { 10 });
    let sample_every = (total / 600).max(Duration::from_millis(500));
    let scenario = &format!("F15 soak, {} s after {} s of warm-up", (total - warm_up).as_secs(), warm_up.as_secs());

    let mut options = DemoOptions::default();
    options.entra = EntraOptions { token_lifetime: TOKEN_LIFETIME, ..options.entra };
    let stage = Stage::set_with(&scale.server, options).await;
    let server = stage.server(&[("BACKEND_API_TIMEOUT", "5")]).await;
    let idle = server.vitals();
    let begin = Instant::now();
    let callers = Load::new(server.address, 32, client::all_tools()).at(RATE).start();
    let mut faults = Vec::new();
    let mut samples = Vec::new();
    let mut next_fault = begin + fault_every / 2;
    let mut fault_ends: Option<Instant> = None;
    while begin.elapsed() < total {
        tokio::time::sleep(sample_every.min(Duration::from_millis(500))).await;
        let now = Instant::now();
        if samples.last().is_none_or(|(at, _): &(Duration, Vitals)| begin.elapsed() >= *at + sample_every) {
            samples.push((begin.elapsed(), server.vitals()));
        }
        if fault_ends.is_some_and(|end| now >= end) {
            fault_ends = None;
            stage.stand_ins.backend.set_fault([]);
            stage.stand_ins.entra.set_down(false).await.unwrap();
            if let Some((_, end)) = faults.last_mut() {
                *end = Instant::now();
            }
        }
        if now >= next_fault {
            // None in the last moments: the end has to be clean.
            if begin.elapsed() + FAULT_LASTS + FAULT_ECHOES < total {
                inflict(&stage, faults.len()).await;
                faults.push((now, now + FAULT_LASTS));
                fault_ends = Some(now + FAULT_LASTS);
            }
            next_fault += fault_every;
        }
    }
    let tally = callers.stop().await;

    let expected = |at: Instant| faults.iter().any(|(begin, end)| at >= *begin && at <= *end + FAULT_ECHOES);
    let all = &tally.failed;
    let unexpected = all.iter().filter(|(begin, took, why)| {
        let honest = why == "SERVICE_ERROR" || why == "TIMEOUT_ERROR";
        !honest || !(expected(*begin) || expected(*begin + *took))
    });
    let shed = tally.shed_at.iter().filter(|at| !expected(**at)).map(|_| "shed");
    let unexpected: Vec<_> = unexpected.map(|(_, _, why)| why.as_str()).chain(shed).collect();
    for why in unexpected.iter().take(10) {
        eprintln!("endure: an error that no fault explains: {why}");
    }
    report.hold(
        scenario,
        format!(
            "{} calls of all tools at {:.0}/s, p50 {}, p99 {}; {} faults ({}): {}, {} shed",
            tally.calls(),
            tally.rate(),
            ms(tally.done.share(0.5)),
            ms(tally.done.share(0.99)),
            faults.len(),
            FAULTS.join(", "),
            tally.failures(),
            tally.shed.count()
        ),
        "0 that no fault explains; 0 ERROR lines in the log",
        unexpected.is_empty() && server.errors() == 0 && tally.done.count() > 0,
    );
    hold_flat(scenario, report, &samples, warm_up, total);

    let at_rest = server.at_rest(Duration::from_secs(10)).await;
    let after = server.vitals();
    report.hold(
        scenario,
        format!(
            "after the last call: nothing in flight; {} descriptors, {} before the first; {} and {} threads; \
             {:.1} and {:.1} MiB, peak {:.1}",
            after.fds, idle.fds, after.threads, idle.threads, after.rss_mib, idle.rss_mib, after.peak_mib
        ),
        "in flight 0; idle connections to the backend are all that may be left",
        at_rest.is_some() && after.fds <= idle.fds + 64 && after.threads <= idle.threads + 4,
    );
}

/// Makes the next kind of trouble.
async fn inflict(stage: &Stage, number: usize) {
    let backend = &stage.stand_ins.backend;
    match FAULTS.get(number % FAULTS.len()).copied().unwrap_or_default() {
        "503" => backend.set_fault([FaultRule::status(503).probability(0.7)]),
        "slow" => backend.set_fault([FaultRule::delay(Duration::from_millis(800))]),
        "close" => backend.set_fault([FaultRule::close_before_head().probability(0.5)]),
        "garbage" => backend.set_fault([FaultRule::broken_json().probability(0.5)]),
        _ => stage.stand_ins.entra.set_down(true).await.unwrap(),
    }
}

fn hold_flat(scenario: &str, report: &mut Report, samples: &[(Duration, Vitals)], warm_up: Duration, total: Duration) {
    let warm: Vec<_> = samples.iter().filter(|(at, _)| *at >= warm_up).collect();
    let series = |value: fn(&Vitals) -> f64| -> Vec<(f64, f64)> {
        warm.iter().map(|(at, vitals)| (at.as_secs_f64() / 3_600.0, value(vitals))).collect()
    };
    let rss = series(|vitals| vitals.rss_mib);
    let fds = series(|vitals| vitals.fds as f64);
    let threads = series(|vitals| vitals.threads as f64);
    let [rss_growth, fd_growth, thread_growth] = [&rss, &fds, &threads].map(|series| growth(series));
    let slope_of_rss = slope(&rss);
    let measured = format!(
        "per hour: RSS {slope_of_rss:+.2} MiB, descriptors {:+.1}, threads {:+.2}; last third against first: {rss_growth:+.2} MiB, \
         {fd_growth:+.0}, {thread_growth:+.0}; at the end {:.1} MiB",
        slope(&fds),
        slope(&threads),
        rss.last().map_or(0.0, |(_, rss)| *rss)
    );
    let flat = fd_growth <= 16.0 && thread_growth <= 2.0;
    if total >= Duration::from_secs(3_600) {
        report.hold(scenario, measured, "RSS < 1 MiB/h; descriptors + 16, threads + 2", slope_of_rss < 1.0 && flat);
    } else {
        report.hold(
            scenario,
            measured,
            "last third: RSS + 4 MiB, descriptors + 16, threads + 2",
            rss_growth <= 4.0 && flat,
        );
    }
}

/// The slope of the straight line through the points.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), point| (x + point.0 / count, y + point.1 / count));
    let (above, below) = points.iter().fold((0.0, 0.0), |(above, below), point| {
        (above + (point.0 - x) * (point.1 - y), below + (point.0 - x).powi(2))
    });
    if below == 0.0 { 0.0 } else { above / below }
}

/// How much higher the median of the last third is than that of the first.
fn growth(points: &[(f64, f64)]) -> f64 {
    let third = points.len() / 3;
    let median = |points: &[(f64, f64)]| {
        let mut values: Vec<_> = points.iter().map(|point| point.1).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    median(points.get(points.len() - third..).unwrap_or_default()) - median(points.get(..third).unwrap_or_default())
}
