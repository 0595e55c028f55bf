//! Measures the server beside a plain rmcp server and a bare pass-through, and prints one table. `docs/performance.md` says what
//! is measured, and how to read it.
//!
//! Generator and backend are threads of this process, the candidates processes of their own. Nothing here is a test of time:
//! only a wrong answer makes it fail.

mod answers;
mod backend;
mod calls;
mod candidates;
mod check;
mod load;
mod machine;
mod plan;
mod poller;
mod report;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::candidates::{Name, Stage};
use crate::load::STOP;
use crate::machine::{Memory, Placement, pause, wait_until_quiet};
use crate::plan::{Care, FULL_LOAD, Pace, SCENARIOS, Scenario, Window, grow, measure};
use crate::report::{Measured, Results};

/// Measure mcp-server beside a plain rmcp server and a bare pass-through
#[derive(Parser)]
struct Arguments {
    /// Only see to it that every answer is right: some calls for each scenario, and no times
    #[arg(long, conflicts_with_all = ["seconds", "write"])]
    short: bool,
    /// Which scenarios, separated by commas; `--list` names them
    #[arg(long, value_delimiter = ',')]
    scenarios: Vec<String>,
    /// Which candidates, separated by commas
    #[arg(long, value_delimiter = ',')]
    candidates: Vec<Name>,
    /// How often each window is measured; the candidates take turns
    #[arg(long)]
    rounds: Option<u32>,
    /// How long a window lasts, in seconds
    #[arg(long)]
    seconds: Option<f64>,
    /// Start the candidates side by side, now and then anew, and measure them turn about in many short windows: shows small differences on a
    /// machine whose speed changes
    #[arg(long, conflicts_with = "short")]
    together: bool,
    /// Over how many calls the growth of the server's memory is watched; 0 leaves it out
    #[arg(long)]
    calls: Option<u64>,
    /// An executable to measure instead of building the server
    #[arg(long)]
    server: Option<PathBuf>,
    /// Write the raw results here, after every round
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measure nothing, and show the results of an earlier `--json`
    #[arg(long, conflicts_with_all = ["short", "json"])]
    from: Option<PathBuf>,
    /// Write the table between the marks of this document, too
    #[arg(long)]
    write: Option<PathBuf>,
    /// List the scenarios
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match show(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.list {
        for scenario in &SCENARIOS {
            println!("{:10} {}", scenario.name, scenario.what);
        }
        return Ok(());
    }
    let results = match &arguments.from {
        Some(file) => serde_json::from_slice(&std::fs::read(file)?)?,
        None => run(arguments)?,
    };
    if !arguments.short {
        let table = results.markdown();
        println!("{table}");
        if let Some(document) = &arguments.write {
            std::fs::write(document, report::write_between_marks(&std::fs::read_to_string(document)?, &table)?)?;
        }
    }
    verify(&results)
}

/// Every answer has to be right, and there have to be answers.
fn verify(results: &Results) -> anyhow::Result<()> {
    for (name, measured) in &results.candidates {
        if let Some(mistake) = measured.first_mistake() {
            anyhow::bail!("{name}: {mistake}");
        }
        for (scenario, right) in measured.right() {
            anyhow::ensure!(right > 0, "{name}, {scenario}: no answer at all");
        }
        let right: u64 = measured.right().map(|(_, right)| right).sum();
        println!("{name}: {right} right answers in {} scenarios, no wrong one", measured.windows.len());
    }
    Ok(())
}

/// How long candidates live that are measured side by side: a process has luck or bad luck with where its memory lies.
const ROUNDS_OF_A_LIFE: u32 = 2;

fn run(arguments: &Arguments) -> anyhow::Result<Results> {
    let care = match arguments.short {
        true => Care { warm_up: 0.0, seconds: 0.0, calls_per_connection: Some(2), patience: 0.0, repetitions: 0 },
        false if arguments.together => {
            let seconds = arguments.seconds.unwrap_or(0.25);
            Care { warm_up: 0.1, seconds, calls_per_connection: None, patience: 0.0, repetitions: 0 }
        }
        false => {
            let seconds = arguments.seconds.unwrap_or(4.0);
            Care { warm_up: 1.5, seconds, calls_per_connection: None, patience: 10.0, repetitions: 2 }
        }
    };
    let rounds = arguments.rounds.unwrap_or(match arguments {
        Arguments { short: true, .. } => 1,
        Arguments { together: true, .. } => 200,
        _ => 3,
    });
    let calls = arguments.calls.unwrap_or(if arguments.short { 5_000 } else { 1_000_000 });
    let scenarios = chosen(&arguments.scenarios)?;
    let names = if arguments.candidates.is_empty() { Name::ALL.to_vec() } else { arguments.candidates.clone() };

    let mut candidates = Vec::new();
    for name in names {
        let executable = match (name, &arguments.server) {
            (name, Some(server)) if name.is_ours() => server.canonicalize()?,
            _ => name.build()?,
        };
        candidates.push((name, executable));
    }
    let placement = Placement::split()?;
    let load_cores = placement.load.count() as usize;
    let stage = Stage::set(placement)?;
    end_when_told()?;
    let mut results =
        Results { machine: machine::describe(), load_cores, rounds, care, candidates: Default::default() };
    for (name, executable) in &candidates {
        let binary_bytes = executable.metadata()?.len();
        results.candidates.insert(name.as_str().to_owned(), Measured { binary_bytes, ..Measured::default() });
    }
    let mut side_by_side = Vec::new();
    for round in 0..rounds {
        if arguments.together && round % ROUNDS_OF_A_LIFE == 0 {
            side_by_side.clear();
            for (name, executable) in &candidates {
                side_by_side.push(stage.warm(*name, executable)?);
            }
        }
        // Turn about, so that a machine that becomes slower favours nobody.
        if round > 0 {
            candidates.reverse();
        }
        for (name, executable) in &candidates {
            let started;
            let candidate = match side_by_side.iter().find(|candidate| candidate.name == *name) {
                Some(candidate) => candidate,
                None => {
                    wait_until_quiet(Duration::from_secs_f64(care.patience));
                    started = stage.warm(*name, executable)?;
                    pause(Duration::from_secs_f64(if arguments.short { 0.1 } else { 1.0 }));
                    &started
                }
            };
            let measured = results.candidates.get_mut(name.as_str()).context("a candidate")?;
            measured.starts.push(candidate.started_in.as_secs_f64() * 1e3);
            measured.idle.push(Memory::of(candidate.process())?.now);
            let mut full_load = None;
            for scenario in &scenarios {
                let rate = match scenario.pace {
                    Pace::Closed => None,
                    Pace::Rate(rate) => Some(rate),
                    Pace::HalfLoad => full_load.map(|rate: f64| rate / 2.0),
                };
                let window = measure(candidate, scenario, rate, &care)
                    .with_context(|| format!("{}, {}", name.as_str(), scenario.name))?;
                if scenario.name == FULL_LOAD {
                    full_load = Some(window.calls_per_second().max(1.0));
                }
                tell(round, *name, scenario, &window, arguments.short);
                measured.windows.entry(scenario.name.to_owned()).or_default().push(window);
            }
        }
        save(arguments, &results)?;
    }
    drop(side_by_side);
    if let (Some((name, executable)), 1..) = (candidates.iter().find(|(name, _)| *name == Name::Server), calls) {
        eprintln!("memory of the {} over {calls} calls", name.as_str());
        let candidate = stage.warm(*name, executable)?;
        let growth = Some(grow(&candidate, calls)?);
        results.candidates.get_mut(name.as_str()).context("a candidate")?.growth = growth;
        save(arguments, &results)?;
    }
    Ok(results)
}

/// One line for a window, while one waits for the table.
fn tell(round: u32, name: Name, scenario: &Scenario, window: &Window, short: bool) {
    let (name, scenario, tally) = (name.as_str(), scenario.name, &window.tally);
    if short {
        return eprintln!("{name:9} {scenario:9} {:6} right, {} wrong", tally.right, tally.wrong);
    }
    eprintln!(
        "round {} {name:9} {scenario:9} {:7.0} calls/s {:8.1} µs CPU, p99 {:7.2} ms, {} wrong, noise {:.0} %",
        round + 1,
        window.calls_per_second(),
        window.cpu_per_call().unwrap_or(f64::NAN),
        tally.p99,
        tally.wrong,
        window.used.noise * 100.0
    );
}

/// The scenarios of these names, in the order in which they are run; half load needs full load before it.
fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Scenario>> {
    for name in names {
        anyhow::ensure!(SCENARIOS.iter().any(|scenario| scenario.name == name), "there is no scenario `{name}`");
    }
    let half = names.iter().any(|name| name == "half");
    let is_chosen = |scenario: &&Scenario| {
        names.is_empty() || names.iter().any(|name| name == scenario.name) || half && scenario.name == FULL_LOAD
    };
    Ok(SCENARIOS.iter().filter(is_chosen).collect())
}

fn save(arguments: &Arguments, results: &Results) -> anyhow::Result<()> {
    match &arguments.json {
        Some(file) => Ok(std::fs::write(file, serde_json::to_vec(results)?)?),
        None => Ok(()),
    }
}

/// Lets the run end in good order, so that no candidate is left behind.
fn end_when_told() -> anyhow::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // A second one ends it at once.
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&STOP))?;
        flag::register(signal, Arc::clone(&STOP))?;
    }
    Ok(())
}
