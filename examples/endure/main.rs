//! Load, overload, abuse, drain, crash and soak: the real binary as child processes against stand-ins in this process, on
//! loopback, bounded in number and time.
//!
//! Each scenario prints rows of one Markdown table. A bound that a busy machine with two cores cannot break by itself decides
//! the exit code; what depends on the machine is printed as a figure. `scripts/endure` builds and runs this.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what cannot be set up here ends the run, and the place tells why"
)]
#![allow(clippy::indexing_slicing, reason = "an index into JSON that is missing gives null")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the table goes to stdout, the story to stderr")]

mod balancer;
mod client;
mod connections;
mod crash;
mod drain;
mod fairness;
mod load;
mod memory;
mod overload;
mod report;
mod server;
mod soak;
mod storm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};

use report::Report;

/// Load, overload, abuse, drain, crash and soak against the real binary.
#[derive(Debug, Parser)]
#[command(name = "endure")]
struct Options {
    /// What to run; everything by default
    #[arg(value_enum)]
    scenarios: Vec<Scenario>,
    /// The binary to run
    #[arg(long, value_name = "PATH")]
    server: PathBuf,
    /// The long forms, as a release wants them; they also hold latencies to their bounds
    #[arg(long)]
    long: bool,
    /// How long the soak lasts (90 in a run of everything, 600 by itself, 7200 in the long form)
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u64>,
    /// How long each load of overload and storm lasts (5 and 15; 60 in the long form)
    #[arg(long, value_name = "SECONDS")]
    load: Option<u64>,
    /// How often an instance is told to stop (10, long 50)
    #[arg(long, value_name = "COUNT")]
    rolls: Option<usize>,
    /// How often an instance is killed (5, long 20)
    #[arg(long, value_name = "COUNT")]
    kills: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// Three and ten times more calls than there is room for
    Overload,
    /// A backend that answers 503 to everything
    Storm,
    /// Connections that say nothing, too little, or the same again and again
    Connections,
    /// One caller or one fault against all others
    Fairness,
    /// Large answers and costly requests, as many as callers ask for
    Memory,
    /// SIGTERM and SIGKILL behind a balancer, under load
    Drain,
    /// kill -9 and restart, under load
    Crash,
    /// Mixed traffic with faults, and what the process holds over time
    Soak,
}

/// How much of everything.
struct Scale {
    server: PathBuf,
    long: bool,
    soak: Duration,
    load: Option<u64>,
    rolls: usize,
    kills: usize,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let all = options.scenarios.is_empty();
    let soak = options.soak.unwrap_or(match (options.long, all) {
        (true, _) => 7_200,
        (false, true) => 90,
        (false, false) => 600,
    });
    let scale = Scale {
        server: options.server.canonicalize().unwrap_or(options.server),
        long: options.long,
        soak: Duration::from_secs(soak),
        load: options.load,
        rolls: options.rolls.unwrap_or(if options.long { 50 } else { 10 }),
        kills: options.kills.unwrap_or(if options.long { 20 } else { 5 }),
    };
    let scenarios = if all { Scenario::value_variants().to_vec() } else { options.scenarios };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut report = Report::begin();
    let begin = Instant::now();
    for scenario in scenarios {
        let started = Instant::now();
        eprintln!("endure: {scenario:?} …");
        runtime.block_on(async {
            match scenario {
                Scenario::Overload => overload::run(&scale, &mut report).await,
                Scenario::Storm => storm::run(&scale, &mut report).await,
                Scenario::Connections => connections::run(&scale, &mut report).await,
                Scenario::Fairness => fairness::run(&scale, &mut report).await,
                Scenario::Memory => memory::run(&scale, &mut report).await,
                Scenario::Drain => drain::run(&scale, &mut report).await,
                Scenario::Crash => crash::run(&scale, &mut report).await,
                Scenario::Soak => soak::run(&scale, &mut report).await,
            }
        });
        eprintln!("endure: {scenario:?} took {:.0} s", started.elapsed().as_secs_f64());
    }
    report.end(begin.elapsed())
}
