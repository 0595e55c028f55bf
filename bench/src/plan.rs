//! The scenarios, and how one window of one of them is measured.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::calls::{Era, Kind};
use crate::candidates::Candidate;
use crate::load::{self, Load, Span, Tally};
use crate::machine::{Memory, Usage, Used, forget_peak, pause, wait_until_quiet};

/// A way to ask.
pub struct Scenario {
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    pub connections: usize,
    pub pace: Pace,
    pub era: Era,
    pub mix: &'static [Kind],
}

/// How fast calls are made.
#[derive(Clone, Copy, PartialEq)]
pub enum Pace {
    /// The next when the last is answered.
    Closed,
    /// So many a second, answered or not.
    Rate(f64),
    /// Half of what the candidate itself did with 64 connections.
    HalfLoad,
}

const USER: &[Kind] = &[Kind::User];
/// Six profiles to one each of the others, spread.
const ALL_TOOLS: &[Kind] = &[
    Kind::User,
    Kind::Users,
    Kind::User,
    Kind::NewTicket,
    Kind::User,
    Kind::User,
    Kind::Tickets,
    Kind::User,
    Kind::Rows(10),
    Kind::User,
];

const fn closed(name: &'static str, what: &'static str, connections: usize, mix: &'static [Kind]) -> Scenario {
    Scenario { name, what, connections, pace: Pace::Closed, era: Era::Legacy, mix }
}

const fn modern(name: &'static str, what: &'static str, connections: usize, mix: &'static [Kind]) -> Scenario {
    Scenario { era: Era::Modern, ..closed(name, what, connections, mix) }
}

const fn open(name: &'static str, what: &'static str, pace: Pace) -> Scenario {
    Scenario { pace, ..closed(name, what, 256, USER) }
}

/// The scenario whose rate half load is half of.
pub const FULL_LOAD: &str = "c64";

/// In the order in which a process goes through them: failures at last, for they use up the budget for repetitions.
pub const SCENARIOS: [Scenario; 17] = [
    closed("c1", "1 connection", 1, USER),
    closed("c8", "8 connections", 8, USER),
    closed("c64", "64 connections", 64, USER),
    closed("c512", "512 connections", 512, USER),
    modern("new64", "64 connections, 2026-07-28", 64, USER),
    modern("new512", "512 connections, 2026-07-28", 512, USER),
    closed("mix64", "64 connections, all tools", 64, ALL_TOOLS),
    modern("newmix64", "64 connections, all tools, 2026-07-28", 64, ALL_TOOLS),
    open("r200", "200 calls/s", Pace::Rate(200.0)),
    open("r2000", "2,000 calls/s", Pace::Rate(2_000.0)),
    open("half", "half of its own calls/s at 64 connections", Pace::HalfLoad),
    closed("q1", "`query_data`, 1 row (1 KiB)", 8, &[Kind::Rows(1)]),
    closed("q10", "`query_data`, 10 rows", 8, &[Kind::Rows(10)]),
    closed("q100", "`query_data`, 100 rows (100 KiB)", 8, &[Kind::Rows(100)]),
    closed("q1000", "`query_data`, 1,000 rows (1 MiB)", 8, &[Kind::Rows(1_000)]),
    closed("e404", "the backend answers 404", 8, &[Kind::Failure(404)]),
    closed("e503", "the backend answers 503", 8, &[Kind::Failure(503)]),
];

/// How long and how carefully windows are measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Care {
    pub warm_up: f64,
    pub seconds: f64,
    /// Instead of a window of time, so many calls on each connection: then nothing depends on how fast the machine is.
    pub calls_per_connection: Option<u64>,
    /// How long a quiet machine is waited for.
    pub patience: f64,
    /// How often a window is repeated that was too noisy.
    pub repetitions: u32,
}

/// A window above this is repeated.
const NOISY: f64 = 0.10;
/// Where calls are counted, at least so many.
const LEAST_CALLS: u64 = 192;

/// One measured window.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Window {
    pub tally: Tally,
    /// How long it lasted.
    pub seconds: f64,
    pub used: Used,
    pub memory: Memory,
}

impl Window {
    pub fn calls_per_second(&self) -> f64 {
        self.tally.right as f64 / self.seconds
    }

    /// CPU time of the candidate per call, in microseconds. Of too few calls it would say nothing.
    pub fn cpu_per_call(&self) -> Option<f64> {
        (self.tally.right >= 50).then(|| self.used.candidate * 1e6 / self.tally.right as f64)
    }
}

/// Measures a scenario once, or a few times while others are at work, and keeps the quietest window.
pub fn measure(candidate: &Candidate, scenario: &Scenario, rate: Option<f64>, care: &Care) -> anyhow::Result<Window> {
    let mut best: Option<Window> = None;
    for _ in 0..=care.repetitions {
        wait_until_quiet(Duration::from_secs_f64(care.patience));
        let window = window(candidate, scenario, rate, care)?;
        if best.as_ref().is_none_or(|best| window.used.noise < best.used.noise) {
            best = Some(window);
        }
        if best.as_ref().is_some_and(|best| best.used.noise <= NOISY) {
            break;
        }
    }
    best.ok_or_else(|| anyhow::anyhow!("nothing was measured"))
}

fn window(candidate: &Candidate, scenario: &Scenario, rate: Option<f64>, care: &Care) -> anyhow::Result<Window> {
    candidate.trim_files();
    forget_peak(candidate.process());
    let from = Instant::now() + Duration::from_secs_f64(care.warm_up);
    let until = from + Duration::from_secs_f64(care.seconds);
    let span = match care.calls_per_connection {
        Some(calls) => Span::Calls((calls * scenario.connections as u64).max(LEAST_CALLS)),
        None => Span::Window { from, until },
    };
    let load = Load {
        address: candidate.address,
        bearer: candidate.bearer.as_deref(),
        connections: scenario.connections,
        mix: scenario.mix,
        era: scenario.era,
        rate,
        span,
        passed_through: candidate.name.passes_through(),
    };
    std::thread::scope(|scope| {
        let generator = scope.spawn(|| load::run(&load, &AtomicU64::new(0)));
        // What was used is read at the two ends of the window, while the load goes on; or at the end of so many calls.
        let until_told = |moment: Instant| {
            while Instant::now() < moment && !generator.is_finished() {
                pause(moment.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)));
            }
        };
        if let Span::Window { from, .. } = span {
            until_told(from);
        }
        let before = Usage::now(candidate.process())?;
        until_told(if let Span::Window { until, .. } = span {
            until
        } else {
            Instant::now() + Duration::from_secs(3_600)
        });
        let used = Usage::now(candidate.process())?.since(&before);
        let memory = Memory::of(candidate.process())?;
        let tally = generator.join().map_err(|_| anyhow::anyhow!("the generator panicked"))??;
        let seconds = if let Span::Window { .. } = span { care.seconds } else { used.seconds };
        Ok(Window { tally, seconds, used, memory })
    })
}

/// Resident memory over many calls.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Growth {
    pub tally: Tally,
    /// Calls done and KiB, fifty times.
    pub points: Vec<(u64, u64)>,
}

impl Growth {
    /// KiB between the second fifth of the calls, when the process has warmed up, and the last: medians, which a busy moment of
    /// the allocator does not move.
    pub fn kib(&self) -> Option<f64> {
        let calls = self.points.last()?.0 as f64;
        let median = |from: f64, to: f64| {
            let part = self.points.iter().filter(|(done, _)| (from..=to).contains(&(*done as f64 / calls)));
            median(part.map(|(_, kib)| *kib as f64))
        };
        Some(median(0.8, 1.0)? - median(0.2, 0.4)?)
    }
}

/// Makes so many calls of all tools, and watches memory.
pub fn grow(candidate: &Candidate, calls: u64) -> anyhow::Result<Growth> {
    const POINTS: u64 = 50;
    let load = Load {
        address: candidate.address,
        bearer: candidate.bearer.as_deref(),
        connections: 32,
        mix: ALL_TOOLS,
        era: Era::Modern,
        rate: None,
        span: Span::Calls(calls),
        passed_through: candidate.name.passes_through(),
    };
    let done = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let tally = scope.spawn(|| load::run(&load, &done));
        let mut points = Vec::new();
        while !tally.is_finished() {
            pause(Duration::from_millis(5));
            let done = done.load(Relaxed);
            if done >= (points.len() as u64 + 1) * (calls / POINTS).max(1) {
                points.push((done, Memory::of(candidate.process())?.now));
                candidate.trim_files();
            }
        }
        let tally = tally.join().map_err(|_| anyhow::anyhow!("the generator panicked"))??;
        Ok(Growth { tally, points })
    })
}

/// The median, if there is anything.
pub fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() {
        0 => None,
        count if count % 2 == 1 => Some(figures[middle]),
        _ => Some((figures[middle - 1] + figures[middle]) / 2.0),
    }
}
