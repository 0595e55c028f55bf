//! F13 and the rollout without loss: instances behind a balancer that notices late, told to stop one after the other, under
//! calls of both eras. Then the same with an instance that is killed.
//!
//! The server runs with the drain that it ships with: 5 s of lame duck, 25 s of grace.

use std::time::{Duration, Instant};

use mcp_server::demo::fault::FaultRule;

use crate::Scale;
use crate::balancer::Balancer;
use crate::client;
use crate::load::{Callers, Load, Tally};
use crate::report::{Report, seconds};
use crate::server::{Server, Stage};

/// `SHUTDOWN_GRACE` less five seconds: the pod is gone before the kubelet loses its patience.
const STOPS_WITHIN: Duration = Duration::from_secs(20);
const CALLS_A_SECOND: f64 = 200.0;

pub(crate) async fn run(scale: &Scale, report: &mut Report) {
    let rounds_of_three = if scale.long { 10 } else { 1 };
    let kills = if scale.long { 10 } else { 2 };
    if scale.long {
        rolled(scale, 2, scale.rolls, CALLS_A_SECOND).await.tell(report);
        rolled(scale, 3, 3 * rounds_of_three, CALLS_A_SECOND).await.tell(report);
        killed(scale, kills, CALLS_A_SECOND).await.tell(report);
        return;
    }
    // Mostly waiting: the three share the time and the rate.
    let three_then_kills = async {
        let rolled = rolled(scale, 3, 3 * rounds_of_three, CALLS_A_SECOND / 2.0).await;
        (rolled, killed(scale, kills, CALLS_A_SECOND / 2.0).await)
    };
    let (two, (three, killed)) = tokio::join!(rolled(scale, 2, scale.rolls, CALLS_A_SECOND / 2.0), three_then_kills);
    two.tell(report);
    three.tell(report);
    killed.tell(report);
}

/// Instances behind a balancer, under calls.
struct Fleet {
    stage: Stage,
    servers: Vec<Server>,
    balancer: Balancer,
    callers: Vec<Callers>,
}

impl Fleet {
    async fn start(scale: &Scale, size: usize, tries: usize, rate: f64) -> Self {
        let stage = Stage::set(&scale.server).await;
        // Most calls are short; some are under way for as long as people notice.
        stage.stand_ins.backend.set_fault([
            FaultRule::delay(Duration::from_millis(20)),
            FaultRule::delay(Duration::from_secs(2)).on("GET /query").probability(0.05),
        ]);
        let mut balancer = Balancer::start(tries).await;
        let mut servers = Vec::new();
        for _ in 0..size {
            let server = stage.server(&[]).await;
            balancer.follow(server.address);
            servers.push(server);
        }
        balancer.has(size).await;
        let load = |connections| Load::new(balancer.address, connections, client::all_tools());
        let callers = vec![
            // Busy connections, connections that idle for longer than the lame duck lives, and connections for one call only.
            load(40).at(rate * 0.8).start(),
            load(14).at(2.0).start(),
            Load { keep_alive: false, ..load(8) }.at(rate * 0.2).start(),
        ];
        Self { stage, servers, balancer, callers }
    }

    /// Starts another in the place of one that has ended.
    async fn replace(&mut self, number: usize) {
        let server = self.stage.server(&[]).await;
        self.balancer.follow(server.address);
        if let Some(place) = self.servers.get_mut(number) {
            *place = server;
        }
        self.balancer.has(self.servers.len()).await;
    }

    async fn quiet(self) -> (Tally, u64) {
        let mut sum = Tally::default();
        for callers in self.callers {
            sum.add(callers.stop().await);
        }
        (sum, self.balancer.refused())
    }
}

/// Instances told to stop.
struct Rolled {
    size: usize,
    stops: usize,
    good_ends: usize,
    other_ends: Vec<String>,
    slowest: Duration,
    refused: u64,
    tally: Tally,
}

async fn rolled(scale: &Scale, size: usize, stops: usize, rate: f64) -> Rolled {
    let mut fleet = Fleet::start(scale, size, 1, rate).await;
    let (mut good_ends, mut other_ends, mut slowest) = (0, Vec::new(), Duration::ZERO);
    for stop in 0..stops {
        let number = stop % size;
        let Some(server) = fleet.servers.get_mut(number) else { break };
        let begin = Instant::now();
        server.signal("TERM");
        match server.ended(Duration::from_secs(30)).await {
            Some(status) if status.success() && server.errors() == 0 => good_ends += 1,
            Some(status) => other_ends.push(format!("{status}: {}", server.last_lines())),
            None => other_ends.push("no end within 30 s".to_owned()),
        }
        slowest = slowest.max(begin.elapsed());
        fleet.replace(number).await;
    }
    let (tally, refused) = fleet.quiet().await;
    Rolled { size, stops, good_ends, other_ends, slowest, refused, tally }
}

impl Rolled {
    fn tell(self, report: &mut Report) {
        let scenario = format!("F13 drain, {} instances, {} × SIGTERM", self.size, self.stops);
        for end in &self.other_ends {
            eprintln!("endure: an instance ended badly: {end}");
        }
        let tally = &self.tally;
        report.hold(
            &scenario,
            format!(
                "{} calls of both eras at {:.0}/s: {}, {} shed; {} connections refused",
                tally.calls(),
                tally.rate(),
                tally.failures(),
                tally.shed.count(),
                self.refused
            ),
            "0 failed",
            tally.calls() > 0 && tally.failed.is_empty() && tally.shed.count() == 0 && self.refused == 0,
        );
        report.hold(
            &scenario,
            format!("{} × exit 0, the slowest {} after SIGTERM", self.good_ends, seconds(self.slowest)),
            "all exit 0, within grace − 5 s = 20 s",
            self.good_ends == self.stops && self.slowest <= STOPS_WITHIN,
        );
    }
}

/// Instances killed.
struct Killed {
    kills: usize,
    /// Connections that were open to them.
    cut: usize,
    /// Failed calls that no kill explains.
    unexplained: usize,
    refused: u64,
    tally: Tally,
}

async fn killed(scale: &Scale, kills: usize, rate: f64) -> Killed {
    let mut fleet = Fleet::start(scale, 3, 3, rate).await;
    let (mut cut, mut at) = (0, Vec::new());
    for kill in 0..kills {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let number = kill % 3;
        let Some(server) = fleet.servers.get_mut(number) else { break };
        let address = server.address;
        cut += fleet.balancer.open(address);
        at.push(Instant::now());
        server.signal("KILL");
        let _ = server.ended(Duration::from_secs(5)).await;
        fleet.balancer.left(address).await;
        fleet.replace(number).await;
    }
    let (tally, refused) = fleet.quiet().await;
    // A call that was under way had begun before; one that was just being written may have begun a moment after.
    let moment = Duration::from_millis(500);
    let explained = |begin: Instant, took: Duration| {
        at.iter()
            .any(|kill| begin <= *kill + moment && begin + took + moment >= *kill && begin + took <= *kill + 4 * moment)
    };
    let unexplained = tally.failed.iter().filter(|(begin, took, _)| !explained(*begin, *took)).count();
    Killed { kills, cut, unexplained, refused, tally }
}

impl Killed {
    fn tell(self, report: &mut Report) {
        let tally = &self.tally;
        report.hold(
            &format!("F13 drain, 3 instances, {} × SIGKILL", self.kills),
            format!(
                "{} calls at {:.0}/s: {}; {} connections were cut, {} went elsewhere",
                tally.calls(),
                tally.rate(),
                tally.failures(),
                self.cut,
                self.refused
            ),
            "only calls in flight on it: at most one for each connection cut, none that begins later",
            tally.calls() > 0 && tally.failed.len() <= self.cut && self.unexplained == 0 && tally.shed.count() == 0,
        );
    }
}
