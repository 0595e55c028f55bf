//! F14, the outer half: kill -9 under load. The other instance notices nothing, and a restart on the same port is ready soon.
//! (Panics inside of tools are covered by the tests.)

use std::time::Duration;

use crate::Scale;
use crate::client;
use crate::load::{Load, Times};
use crate::report::{Report, ms, seconds};
use crate::server::Stage;

const READY_WITHIN: Duration = Duration::from_secs(5);

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    let scenario = &format!("F14 crash, {} × kill -9", scale.kills);
    let stage = Stage::set(&scale.server).await;
    let other = stage.server(&[]).await;
    let mut victim = stage.server(&[]).await;
    let other_callers = Load::new(other.address, 16, client::all_tools()).at(100.0).start();
    let victim_callers = Load::new(victim.address, 16, client::all_tools()).at(100.0).start();
    let mut restarts = Times::default();
    for _ in 0..scale.kills {
        tokio::time::sleep(Duration::from_secs(1)).await;
        victim.signal("KILL");
        let _ = victim.ended(Duration::from_secs(5)).await;
        // On the same port, while connections of the old process are still being cleared away.
        victim = stage.server_on(victim.ports(), &[]);
        restarts.add(victim.ready().await);
    }
    let hurt = victim_callers.stop().await;
    let unhurt = other_callers.stop().await;
    report.hold(
        scenario,
        format!("{} calls to the other instance: {}, {} shed", unhurt.calls(), unhurt.failures(), unhurt.shed.count()),
        "0 failed",
        unhurt.calls() > 0 && unhurt.failed.is_empty() && unhurt.shed.count() == 0,
    );
    report.hold(
        scenario,
        format!("ready after p50 {}, longest {}", ms(restarts.share(0.5)), ms(restarts.share(1.0))),
        format!("≤ {}", seconds(READY_WITHIN)),
        restarts.share(1.0) <= READY_WITHIN,
    );
    report.figure(
        scenario,
        format!("{} of {} calls to the killed one failed", hurt.failed.len(), hurt.calls()),
        "those in flight, and those that came before it was back",
    );
    let after = Load::new(victim.address, 16, client::all_tools()).at(100.0).last(Duration::from_secs(1)).await;
    report.hold(
        scenario,
        format!("{} calls after the last restart: {}", after.calls(), after.failures()),
        "0 failed",
        after.calls() > 0 && after.failed.is_empty() && after.shed.count() == 0,
    );
}
