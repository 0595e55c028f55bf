//! The machine: who may run where, who has used how much of it, and what kind of machine it is. All of it from /proc.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use crate::load::STOP;

/// Which cores are whose: the candidate has one half of them, generator and backend the other.
#[derive(Clone)]
pub struct Placement {
    pub candidate: CpuSet,
    pub load: CpuSet,
}

impl Placement {
    /// Of the cores that this process may use. On one core all have to share.
    pub fn split() -> anyhow::Result<Self> {
        let all = sched_getaffinity(None)?;
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| all.is_set(*core)).collect();
        if cores.len() < 2 {
            return Ok(Self { candidate: all, load: all });
        }
        let mut placement = Self { candidate: CpuSet::new(), load: CpuSet::new() };
        for (number, core) in cores.iter().enumerate() {
            let half = if number < cores.len() / 2 { &mut placement.candidate } else { &mut placement.load };
            half.set(*core);
        }
        Ok(placement)
    }
}

/// Moves this thread, and what it starts from now on.
pub fn stay_on(cores: &CpuSet) -> anyhow::Result<()> {
    Ok(sched_setaffinity(None, cores)?)
}

/// What has been used up to a moment, in seconds of CPU time.
#[derive(Clone, Copy)]
pub struct Usage {
    at: Instant,
    candidate: f64,
    own: f64,
    busy: f64,
    steal: f64,
}

/// What was used in a window.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Used {
    pub seconds: f64,
    /// The candidate and its children: user and system time.
    pub candidate: f64,
    /// Generator and backend.
    pub load: f64,
    /// The share of the machine that others had.
    pub noise: f64,
}

impl Usage {
    pub fn now(candidate: u32) -> anyhow::Result<Self> {
        let second = rustix::param::clock_ticks_per_second() as f64;
        let processes = processes()?;
        let total = fields(&fs::read_to_string("/proc/stat")?, 1);
        // user nice system idle iowait irq softirq steal
        let spent = |columns: &[usize]| columns.iter().filter_map(|at| total.get(*at)).sum::<f64>() / second;
        Ok(Self {
            at: Instant::now(),
            candidate: tree(&processes, candidate) / second,
            own: processes.get(&std::process::id()).map_or(0.0, |(_, ticks)| *ticks) / second,
            busy: spent(&[0, 1, 2, 5, 6]),
            steal: spent(&[7]),
        })
    }

    pub fn since(&self, before: &Self) -> Used {
        let seconds = (self.at - before.at).as_secs_f64();
        let (candidate, load) = (self.candidate - before.candidate, self.own - before.own);
        let others = (self.busy - before.busy - candidate - load).max(0.0) + self.steal - before.steal;
        Used { seconds, candidate, load, noise: others / (seconds * cores() as f64) }
    }
}

/// Parent and CPU time, in ticks, of every process.
fn processes() -> anyhow::Result<HashMap<u32, (u32, f64)>> {
    let mut processes = HashMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name, in parentheses, may hold anything.
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        let fields = fields(rest, 1);
        if let [parent, .., user, system] = fields.get(..12).unwrap_or_default() {
            processes.insert(id, (*parent as u32, user + system));
        }
    }
    Ok(processes)
}

/// The CPU time of a process and all below it.
fn tree(processes: &HashMap<u32, (u32, f64)>, root: u32) -> f64 {
    let below = processes.iter().filter(|(_, (parent, _))| *parent == root);
    let own = processes.get(&root).map_or(0.0, |(_, ticks)| *ticks);
    below.fold(own, |sum, (child, _)| sum + tree(processes, *child))
}

/// The numbers of a first line, past so many words.
fn fields(text: &str, skipped: usize) -> Vec<f64> {
    let words = text.lines().next().unwrap_or_default().split_whitespace().skip(skipped);
    words.map(|word| word.parse().unwrap_or_default()).collect()
}

/// Resident memory now and at its highest since [`forget_peak`], in KiB.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Memory {
    pub now: u64,
    pub peak: u64,
}

impl Memory {
    pub fn of(process: u32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{process}/status"))?;
        let figure = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|line| line.split_whitespace().next()?.parse().ok()).context("no figure in /proc")
        };
        Ok(Self { now: figure("VmRSS:")?, peak: figure("VmHWM:")? })
    }
}

/// Lets the highest resident memory begin anew. Where that is not allowed, it is that of all windows so far.
pub fn forget_peak(process: u32) {
    let _ = fs::write(format!("/proc/{process}/clear_refs"), "5");
}

/// Waits until the machine is idle, at most so long.
pub fn wait_until_quiet(limit: Duration) {
    const BUSY: f64 = 0.1;
    let end = Instant::now() + limit;
    while Instant::now() < end && !STOP.load(Relaxed) {
        let before = Usage::now(NOBODY);
        pause(Duration::from_millis(400));
        if let (Ok(before), Ok(after)) = (before, Usage::now(NOBODY))
            && after.since(&before).noise < BUSY
        {
            return;
        }
    }
}

/// No process has this number.
const NOBODY: u32 = u32::MAX;

/// Sleeps on a thread that has nothing else to do.
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}

fn cores() -> usize {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    stat.lines().filter(|line| line.starts_with("cpu")).count().saturating_sub(1).max(1)
}

/// What kind of machine this is, in one line.
pub fn describe() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = model.trim_start_matches([' ', '\t', ':']);
    format!("{model}, {} cores, Linux {}", cores(), kernel.trim())
}
