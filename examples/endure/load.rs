//! Callers: so many connections that call again and again, as fast as they are answered or at a rate, and what they saw.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, Meaning};

/// What shall be called, and how hard.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) address: SocketAddr,
    pub(crate) connections: usize,
    /// Calls a second over all connections; `None` is as fast as they are answered.
    pub(crate) rate: Option<f64>,
    /// Whether a connection serves more than one call.
    pub(crate) keep_alive: bool,
    pub(crate) calls: Arc<[Bytes]>,
}

impl Load {
    pub(crate) fn new(address: SocketAddr, connections: usize, calls: Vec<Bytes>) -> Self {
        Self { address, connections, rate: None, keep_alive: true, calls: calls.into() }
    }

    pub(crate) fn at(self, rate: f64) -> Self {
        Self { rate: Some(rate), ..self }
    }

    pub(crate) fn start(self) -> Callers {
        let stop = CancellationToken::new();
        let mut callers = JoinSet::new();
        for number in 0..self.connections {
            callers.spawn(self.clone().caller(number, stop.clone()));
        }
        Callers { callers, stop, begin: Instant::now() }
    }

    /// Calls for this long.
    pub(crate) async fn last(self, time: Duration) -> Tally {
        let callers = self.start();
        tokio::time::sleep(time).await;
        callers.stop().await
    }

    async fn caller(self, number: usize, stop: CancellationToken) -> Tally {
        let mut tally = Tally::default();
        let mut client = Client::new(self.address);
        let period = self.rate.map(|rate| Duration::from_secs_f64(self.connections as f64 / rate));
        let mut next = Instant::now() + period.unwrap_or_default().mul_f64(fastrand::f64());
        let calls = self.calls.iter().cycle().skip(number);
        for call in calls {
            if let Some(period) = period {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break,
                    () = tokio::time::sleep_until(next.into()) => {}
                }
                // Who is late calls at once, and catches up no more than that.
                next = Instant::now().max(next + period.mul_f64(0.5 + fastrand::f64()));
            }
            if stop.is_cancelled() {
                break;
            }
            let begin = Instant::now();
            let answer = client.ask(call).await;
            let meaning = match answer {
                Ok(answer) => answer.meaning(),
                Err(error) => {
                    client.hang_up();
                    Meaning::Failed(format!("broken: {error}"))
                }
            };
            if !self.keep_alive {
                client.hang_up();
            }
            let refused = matches!(&meaning, Meaning::Failed(why) if why.starts_with("broken"));
            tally.count(begin, meaning);
            if refused {
                // Nobody hammers at a door that was just slammed.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        tally
    }
}

/// Callers at work.
pub(crate) struct Callers {
    callers: JoinSet<Tally>,
    stop: CancellationToken,
    begin: Instant,
}

impl Callers {
    /// Lets every caller finish its call, and adds up what they saw.
    pub(crate) async fn stop(mut self) -> Tally {
        self.stop.cancel();
        let took = self.begin.elapsed();
        let mut sum = Tally::default();
        while let Some(tally) = self.callers.join_next().await {
            sum.add(tally.unwrap());
        }
        sum.took = took;
        sum
    }
}

/// What callers saw.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) done: Times,
    pub(crate) shed: Times,
    /// When each of these was turned away.
    pub(crate) shed_at: Vec<Instant>,
    /// When each failed call began, how long it took, and what became of it.
    pub(crate) failed: Vec<(Instant, Duration, String)>,
    /// When the last call that was not done ended.
    pub(crate) last_bad: Option<Instant>,
    pub(crate) took: Duration,
}

impl Tally {
    fn count(&mut self, begin: Instant, meaning: Meaning) {
        let took = begin.elapsed();
        if meaning != Meaning::Done {
            self.last_bad = Some(begin + took);
        }
        match meaning {
            Meaning::Done => self.done.add(took),
            Meaning::Shed => {
                self.shed.add(took);
                self.shed_at.push(begin + took);
            }
            Meaning::Failed(why) => self.failed.push((begin, took, why)),
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.done.0.extend(other.done.0);
        self.shed.0.extend(other.shed.0);
        self.shed_at.extend(other.shed_at);
        self.failed.extend(other.failed);
        self.last_bad = self.last_bad.max(other.last_bad);
        self.took = self.took.max(other.took);
    }

    pub(crate) fn calls(&self) -> usize {
        self.done.count() + self.shed.count() + self.failed.len()
    }

    pub(crate) fn rate(&self) -> f64 {
        self.calls() as f64 / self.took.as_secs_f64()
    }

    /// Calls a second that were done.
    pub(crate) fn goodput(&self) -> f64 {
        self.done.count() as f64 / self.took.as_secs_f64()
    }

    /// The longest call of all.
    pub(crate) fn longest(&self) -> Duration {
        let failed = self.failed.iter().map(|(_, took, _)| *took).max().unwrap_or_default();
        failed.max(self.done.share(1.0)).max(self.shed.share(1.0))
    }

    /// What became of the calls that failed, and how often.
    pub(crate) fn failures(&self) -> String {
        let mut counts = BTreeMap::new();
        for (_, _, why) in &self.failed {
            *counts.entry(why.as_str()).or_insert(0) += 1;
        }
        let list: Vec<_> = counts.iter().map(|(why, count)| format!("{count} × {why}")).collect();
        if list.is_empty() { "0 failed".to_owned() } else { list.join(", ") }
    }
}

/// Durations, in microseconds.
#[derive(Default, Clone)]
pub(crate) struct Times(Vec<u32>);

impl Times {
    pub(crate) fn add(&mut self, time: Duration) {
        self.0.push(u32::try_from(time.as_micros()).unwrap_or(u32::MAX));
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The time that this share of them stayed within; zero of none.
    pub(crate) fn share(&self, share: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = (sorted.len() as f64 * share).ceil() as usize;
        Duration::from_micros(sorted.get(at.saturating_sub(1)).copied().unwrap_or_default().into())
    }
}

/// How late this process itself is: what it would find between two instants that are 5 ms apart.
pub(crate) struct Lag {
    stop: CancellationToken,
    watching: tokio::task::JoinHandle<Times>,
}

impl Lag {
    pub(crate) fn watch() -> Self {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let watching = tokio::spawn(async move {
            let mut late = Times::default();
            while !stopped.is_cancelled() {
                let begin = Instant::now();
                tokio::time::sleep(Duration::from_millis(5)).await;
                late.add(begin.elapsed().saturating_sub(Duration::from_millis(5)));
            }
            late
        });
        Self { stop, watching }
    }

    pub(crate) async fn end(self) -> Times {
        self.stop.cancel();
        self.watching.await.unwrap()
    }
}
