//! F11: a backend that answers 503 to everything. The server must not make it worse.
//!
//! Two bounds work together, and are shown apart: the retry budget (with the breaker off), then the breaker. The budget is
//! tower's `TpsBudget` over ten seconds: in any ten seconds it grants a fifth of their calls and 10 × 10 more, and it starts
//! with those 100 at hand. So over S seconds the backend may see 1.2 × calls + 10/s × (S + 10 s).

use std::time::{Duration, Instant};

use mcp_server::demo::fault::FaultRule;

use crate::Scale;
use crate::client::{self, Client, Meaning};
use crate::load::Load;
use crate::report::{Report, ms, seconds};
use crate::server::Stage;

const RATE: f64 = 200.0;
const DEADLINE: Duration = Duration::from_secs(2);
/// The breaker's longest pause, and a second to notice.
const CLOSES_WITHIN: Duration = Duration::from_secs(31);

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    let time = scale.load.unwrap_or(if scale.long { 60 } else { 15 });
    let time = Duration::from_secs(time);
    budget(scale, report, time).await;
    breaker(scale, report, time.min(Duration::from_secs(30)) / 2).await;
}

async fn budget(scale: &Scale, report: &mut Report, time: Duration) {
    let scenario = "F11 storm, breaker off";
    let stage = Stage::set(&scale.server).await;
    let deadline = DEADLINE.as_secs().to_string();
    let environment = [
        ("BACKEND_API_TIMEOUT", deadline.as_str()),
        ("BACKEND_CIRCUIT_BREAKER", "false"),
        ("READINESS_CHECK_BACKEND", "false"),
    ];
    let server = stage.server(&environment).await;
    stage.stand_ins.backend.set_fault([FaultRule::status(503)]);
    let before = stage.stand_ins.backend.request_count().get();
    let tally = Load::new(server.address, 64, client::all_reads()).at(RATE).last(time).await;
    let attempts = stage.stand_ins.backend.request_count().get() - before;
    let calls = tally.calls() as f64;
    let bound = 1.2 * calls + 10.0 * (time.as_secs_f64() + 10.0);
    report.hold(
        scenario,
        format!(
            "{calls} calls at {:.0}/s over {} s became {attempts} attempts (× {:.2}); {} repetitions, {} refused by the budget",
            tally.rate(),
            time.as_secs(),
            attempts as f64 / calls,
            server.metric("mcp_server_backend_retries_total").await,
            server.metric("mcp_server_backend_retry_budget_exhausted_total").await,
        ),
        format!("≤ 1.2 × calls + 10/s × (S + 10 s) = {bound:.0}"),
        attempts as f64 <= bound && calls > 0.0 && attempts as f64 >= calls,
    );
    let mut times = tally.done.clone();
    tally.failed.iter().for_each(|(_, took, _)| times.add(*took));
    report.hold(
        scenario,
        format!("p50 {}, p99 {}; {}", ms(times.share(0.5)), ms(times.share(0.99)), tally.failures()),
        format!("p99 ≤ the deadline of {} s; SERVICE_ERROR only", DEADLINE.as_secs()),
        times.share(0.99) <= DEADLINE && tally.failed.iter().all(|(_, _, why)| why == "SERVICE_ERROR"),
    );
}

async fn breaker(scale: &Scale, report: &mut Report, time: Duration) {
    let scenario = "F11 storm, breaker on";
    let stage = Stage::set(&scale.server).await;
    let deadline = DEADLINE.as_secs().to_string();
    let server =
        stage.server(&[("BACKEND_API_TIMEOUT", deadline.as_str()), ("READINESS_CHECK_BACKEND", "false")]).await;
    stage.stand_ins.backend.set_fault([FaultRule::status(503)]);
    let before = stage.stand_ins.backend.request_count().get();
    let tally = Load::new(server.address, 64, client::all_reads()).at(RATE).last(time).await;
    let attempts = stage.stand_ins.backend.request_count().get() - before;
    let refused = server.metric("mcp_server_shed_total{limit=\"breaker\"}").await;
    report.hold(
        scenario,
        format!(
            "{} calls over {:.0} s became {attempts} attempts; `/metrics` counts {refused} refused by the breaker, p99 {}",
            tally.calls(),
            time.as_secs_f64(),
            ms(tally.shed.share(0.99))
        ),
        "attempts ≤ a tenth of the calls; refusals in /metrics; none past the deadline",
        attempts * 10 <= tally.calls() as u64 && refused > 0.0 && tally.longest() <= DEADLINE + Duration::from_secs(1),
    );

    stage.stand_ins.backend.set_fault([]);
    let healed = Instant::now();
    let call = client::all_reads().swap_remove(0);
    let mut caller = Client::new(server.address);
    let mut works = false;
    while !works && healed.elapsed() < 2 * CLOSES_WITHIN {
        tokio::time::sleep(Duration::from_millis(100)).await;
        works = caller.ask(&call).await.is_ok_and(|answer| answer.meaning() == Meaning::Done);
    }
    let took = healed.elapsed();
    report.hold(
        scenario,
        format!("calls succeed {} after the backend works again", seconds(took)),
        "≤ 31 s: the longest pause, and one",
        works && took <= CLOSES_WITHIN,
    );
}
