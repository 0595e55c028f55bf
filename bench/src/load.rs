//! The load generator: one thread, one epoll loop, about the cost of its system calls.
//!
//! Closed loop: each connection sends as soon as it has its answer. Open loop: calls are due at a constant rate, and the time of
//! a call runs from the moment it was due, so that a stall is charged to every call that it delayed (no coordinated omission).

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use rustix::event::epoll::EventFlags;
use serde::{Deserialize, Serialize};

use crate::calls::{Call, Era, Kind, Maker};
use crate::check::Checker;
use crate::poller::Poller;

/// Set when the run is to end: whoever waits looks at it now and then.
pub static STOP: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Calls that are not answered so long after the end never are.
const GRACE: Duration = Duration::from_secs(10);
/// A candidate that answers nothing for so long never will: longer than any deadline of its own.
const STUCK: Duration = Duration::from_secs(60);

/// What is sent, and how fast.
pub struct Load<'a> {
    pub address: SocketAddr,
    pub bearer: Option<&'a str>,
    pub connections: usize,
    pub mix: &'a [Kind],
    pub era: Era,
    /// Calls a second; without it, as fast as they are answered.
    pub rate: Option<f64>,
    pub span: Span,
    /// Whether the candidate hands the backend's answer through as it is.
    pub passed_through: bool,
}

/// How long it lasts.
#[derive(Clone, Copy)]
pub enum Span {
    /// Only what happens in this time counts.
    Window { from: Instant, until: Instant },
    /// All of so many calls count.
    Calls(u64),
}

/// What came of it.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct Tally {
    /// Right answers.
    pub right: u64,
    /// Answers that were compared as a whole.
    pub compared: u64,
    /// Wrong answers, and connections that broke.
    pub wrong: u64,
    /// Calls that were due and have no answer.
    pub unanswered: u64,
    /// What was wrong first.
    pub first_mistake: Option<String>,
    /// Milliseconds.
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub longest: f64,
    /// By how much the generator itself was late at most.
    pub late: f64,
}

struct Connection {
    stream: TcpStream,
    out: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    /// Of the answer that is being read: status, and where head and body end.
    head: Option<(u16, usize, usize)>,
    /// The call that is under way, and when it was sent or due.
    call: Option<(Call, Instant)>,
}

struct Generator<'a> {
    load: &'a Load<'a>,
    poller: Poller,
    maker: Maker,
    checker: Checker,
    connections: Vec<Connection>,
    /// Where every connection reads to.
    buffer: Vec<u8>,
    times: Histogram<u64>,
    tally: Tally,
}

/// Runs a load to its end; `done` counts the answers meanwhile.
pub fn run(load: &Load, done: &AtomicU64) -> anyhow::Result<Tally> {
    // As punctual as the system allows: wake-ups to the microsecond, and before the backend that shares the core. Never spinning.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let _ = rustix::process::setpriority_process(None, -10);
    let mut generator = Generator::new(load)?;
    generator.run(done)?;
    Ok(generator.tally())
}

impl<'a> Generator<'a> {
    fn new(load: &'a Load<'a>) -> anyhow::Result<Self> {
        let poller = Poller::new()?;
        let mut connections = Vec::with_capacity(load.connections);
        for number in 0..load.connections {
            connections.push(Connection::open(load.address, &poller, number)?);
        }
        Ok(Self {
            load,
            poller,
            maker: Maker::new(load.mix, load.era, &load.address.to_string(), load.bearer),
            checker: Checker::new(load.passed_through),
            connections,
            buffer: vec![0; 256 * 1024],
            times: Histogram::new_with_bounds(1_000, 600_000_000_000, 3).context("a histogram")?,
            tally: Tally::default(),
        })
    }

    fn run(&mut self, done: &AtomicU64) -> anyhow::Result<()> {
        let (start, count) = (Instant::now(), self.connections.len());
        let (until, calls) = match self.load.span {
            Span::Window { until, .. } => (until, u64::MAX),
            Span::Calls(calls) => (start + Duration::from_secs(24 * 3_600), calls),
        };
        let due = |number: u64| match self.load.rate {
            Some(rate) => start + Duration::from_secs_f64(number as f64 / rate),
            None => start,
        };
        let mut idle: VecDeque<usize> = (0..count).collect();
        let mut events = Vec::with_capacity(512);
        let (mut issued, mut finished, mut last_answer) = (0, 0, start);
        loop {
            let now = Instant::now();
            let is_open = self.load.rate.is_some();
            let more = |issued| issued < calls && if is_open { due(issued) < until } else { now < until };
            while more(issued) && due(issued) <= now && !idle.is_empty() {
                let Some(number) = idle.pop_front() else { break };
                let since = if is_open { due(issued) } else { Instant::now() };
                self.tally.late = self.tally.late.max(milliseconds(Instant::now() - since));
                issued += 1;
                self.send(number, since)?;
            }
            let over = !more(issued);
            if over && idle.len() == count || now > until + GRACE {
                break;
            }
            anyhow::ensure!(!STOP.load(Relaxed), "interrupted");
            anyhow::ensure!(idle.len() == count || now < last_answer + STUCK, "nothing was answered for {STUCK:?}");
            let next = if over || idle.is_empty() { now + Duration::from_millis(100) } else { due(issued) };
            self.poller.wait(&mut events, Some(next.saturating_duration_since(now).min(Duration::from_millis(100))))?;
            for event in events.drain(..) {
                let number = event.data.u64() as usize;
                if self.advance(number)? {
                    finished += 1;
                    last_answer = now;
                    done.store(finished, Relaxed);
                    idle.push_back(number);
                }
            }
        }
        let end = Instant::now();
        // Closed loop: what is under way when the window ends counts neither way. Else it never came, or was never even sent.
        if self.load.rate.is_some() || calls != u64::MAX {
            let under_way = self.connections.iter().filter_map(|connection| connection.call.map(|(_, since)| since));
            let unsent = (issued..calls).map(due).take_while(|due| self.load.rate.is_some() && *due < until);
            for since in under_way.chain(unsent) {
                self.tally.unanswered += 1;
                self.times.saturating_record((end - since).as_nanos() as u64);
            }
        }
        Ok(())
    }

    fn send(&mut self, number: usize, since: Instant) -> anyhow::Result<()> {
        let connection = &mut self.connections[number];
        let call = self.maker.write(&mut connection.out);
        connection.call = Some((call, since));
        connection.sent = 0;
        if !connection.push()? {
            self.poller.wants(&connection.stream, number as u64, EventFlags::IN | EventFlags::OUT)?;
        }
        Ok(())
    }

    /// Takes what has come on a connection; whether its call is over.
    fn advance(&mut self, number: usize) -> anyhow::Result<bool> {
        let connection = &mut self.connections[number];
        if connection.sent < connection.out.len() {
            if connection.push()? {
                self.poller.wants(&connection.stream, number as u64, EventFlags::IN)?;
            }
            return Ok(false);
        }
        let answer = match connection.pull(&mut self.buffer) {
            Ok(None) => return Ok(false),
            Ok(Some(answer)) => answer,
            Err(error) => {
                // A candidate may close a connection, but not while it owes an answer.
                let was_idle = connection.call.take().is_none();
                *connection = Connection::open(self.load.address, &self.poller, number)?;
                if was_idle {
                    return Ok(false);
                }
                self.tally.mistake(format!("a connection broke: {error}"));
                return Ok(true);
            }
        };
        let Some((call, since)) = connection.call.take() else { anyhow::bail!("an answer that nobody asked for") };
        let now = Instant::now();
        let counts = match (self.load.span, self.load.rate) {
            (Span::Calls(_), _) => true,
            (Span::Window { from, until }, Some(_)) => from <= since && since < until,
            (Span::Window { from, until }, None) => from <= now && now < until,
        };
        let (status, head, end) = answer;
        let verdict = self.checker.check(&call, status, &connection.input[head..end]);
        connection.input.clear();
        connection.head = None;
        match verdict {
            Ok(()) if counts => {
                self.tally.right += 1;
                self.times.saturating_record((now - since).as_nanos() as u64);
            }
            Ok(()) => {}
            // Wrong at any time.
            Err(mistake) => self.tally.mistake(format!("{:?}: {mistake}", call.kind)),
        }
        Ok(true)
    }

    fn tally(self) -> Tally {
        let quantile = |quantile| self.times.value_at_quantile(quantile) as f64 / 1e6;
        Tally {
            compared: self.checker.compared,
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
            longest: self.times.max() as f64 / 1e6,
            ..self.tally
        }
    }
}

impl Tally {
    fn mistake(&mut self, mistake: String) {
        self.wrong += 1;
        self.first_mistake.get_or_insert(mistake);
    }
}

impl Connection {
    fn open(address: SocketAddr, poller: &Poller, number: usize) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).context("no connection")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        poller.add(&stream, number as u64)?;
        Ok(Self { stream, out: Vec::new(), sent: 0, input: Vec::new(), head: None, call: None })
    }

    /// Sends what can be sent; whether that is all.
    fn push(&mut self) -> io::Result<bool> {
        while self.sent < self.out.len() {
            match self.stream.write(&self.out[self.sent..]) {
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // Reading tells what has happened.
                Err(_) => self.sent = self.out.len(),
            }
        }
        Ok(true)
    }

    /// Reads what has come: status, and where head and body end, once the answer is whole.
    fn pull(&mut self, buffer: &mut [u8]) -> anyhow::Result<Option<(u16, usize, usize)>> {
        match self.stream.read(buffer) {
            Ok(0) => anyhow::bail!("closed"),
            Ok(read) => self.input.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if self.head.is_none() {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut response = httparse::Response::new(&mut headers);
            let httparse::Status::Complete(head) = response.parse(&self.input)? else { return Ok(None) };
            let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
            let length: usize = str::from_utf8(length.context("an answer without Content-Length")?.value)?.parse()?;
            self.head = Some((response.code.unwrap_or_default(), head, head + length));
        }
        anyhow::ensure!(self.head.is_none_or(|(_, _, end)| self.input.len() <= end), "more than one answer");
        Ok(self.head.filter(|(_, _, end)| self.input.len() == *end))
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
