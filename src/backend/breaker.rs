//! A circuit breaker: while the backend is down, calls fail at once instead of queueing up behind it.
//!
//! It opens after failures in a row, or when most of the recent attempts failed; after a pause it lets one attempt through and
//! closes when that succeeds. Failures are what says that the backend is in trouble: broken or refused connections, timeouts and
//! 5xx. A 4xx is the caller's trouble, a 429 a working backend's wish; neither opens it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::window::Window;

/// So many failures in a row open the breaker.
const FAILURES_IN_A_ROW: u32 = 8;
/// With at least so many attempts in the window, fewer successes than failures open it, too.
const LEAST_ATTEMPTS: u32 = 20;
/// The first pause; it doubles with each probe that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What one attempt says about the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It works.
    Works,
    /// It is in trouble.
    Fails,
    /// Nothing: the attempt was given up, or refused for reasons of its own.
    Unknown,
}

/// What the breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Lets them through.
    Closed,
    /// Refuses them.
    Open,
    /// Lets one through, to see.
    HalfOpen,
}

pub(super) struct Breaker {
    inner: Mutex<Inner>,
}

struct Inner {
    position: Position,
    in_a_row: u32,
    window: Window,
    pause: Duration,
}

#[derive(Debug, Clone, Copy)]
enum Position {
    Closed,
    Open { until: Instant },
    Probing,
}

impl Breaker {
    pub(super) fn new() -> Self {
        let inner = Inner { position: Position::Closed, in_a_row: 0, window: Window::new(), pause: FIRST_PAUSE };
        Self { inner: Mutex::new(inner) }
    }

    /// Lets an attempt through, or says how long to wait. The admission must be settled; dropped, it says nothing.
    pub(super) fn admit(&self) -> Result<Admission<'_>, Duration> {
        let now = Instant::now();
        let mut inner = self.lock();
        match inner.position {
            Position::Closed => Ok(Admission { breaker: self, probe: false, settled: false }),
            Position::Open { until } if now >= until => {
                inner.position = Position::Probing;
                Ok(Admission { breaker: self, probe: true, settled: false })
            }
            Position::Open { until } => Err(until - now),
            Position::Probing => Err(FIRST_PAUSE),
        }
    }

    /// For metrics.
    pub(super) fn state(&self) -> BreakerState {
        match self.lock().position {
            Position::Closed => BreakerState::Closed,
            Position::Open { .. } => BreakerState::Open,
            Position::Probing => BreakerState::HalfOpen,
        }
    }

    fn settle(&self, probe: bool, verdict: Verdict) {
        let now = Instant::now();
        let mut inner = self.lock();
        match (inner.position, probe, verdict) {
            // A probe that was given up has said nothing: the next call is the next probe.
            (Position::Probing, true, Verdict::Unknown) => inner.position = Position::Open { until: now },
            (Position::Probing, true, Verdict::Works) => {
                *inner = Inner { position: Position::Closed, in_a_row: 0, window: Window::new(), pause: FIRST_PAUSE };
                info!("the backend answers again: calls go through");
            }
            (Position::Probing, true, Verdict::Fails) => {
                inner.pause = (inner.pause * 2).min(LONGEST_PAUSE);
                inner.position = Position::Open { until: now + inner.pause };
            }
            (Position::Closed, _, Verdict::Works | Verdict::Fails) => {
                inner.count(verdict, now);
                if inner.is_too_much() {
                    inner.position = Position::Open { until: now + inner.pause };
                    let pause = inner.pause;
                    drop(inner);
                    warn!("the backend keeps failing: calls to it fail at once for {pause:?}, then one tries again");
                }
            }
            // Attempts from before it opened come home late; only the probe decides.
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn count(&mut self, verdict: Verdict, now: Instant) {
        let works = verdict == Verdict::Works;
        self.in_a_row = if works { 0 } else { self.in_a_row.saturating_add(1) };
        self.window.count(works, now);
    }

    fn is_too_much(&self) -> bool {
        let (good, bad) = self.window.sums();
        self.in_a_row >= FAILURES_IN_A_ROW || (good + bad >= LEAST_ATTEMPTS && good < bad)
    }
}

/// The permission for one attempt.
pub(super) struct Admission<'a> {
    breaker: &'a Breaker,
    probe: bool,
    settled: bool,
}

impl Admission<'_> {
    pub(super) fn settle(mut self, verdict: Verdict) {
        self.settled = true;
        self.breaker.settle(self.probe, verdict);
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.breaker.settle(self.probe, Verdict::Unknown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::window::WINDOW_SECONDS;
    use super::*;

    fn attempt(breaker: &Breaker, verdict: Verdict) -> bool {
        match breaker.admit() {
            Ok(admission) => {
                admission.settle(verdict);
                true
            }
            Err(_) => false,
        }
    }

    async fn pass(seconds: f64) {
        tokio::time::advance(Duration::from_secs_f64(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it_and_one_good_probe_closes_it() {
        let breaker = Breaker::new();
        for _ in 0..FAILURES_IN_A_ROW {
            assert!(attempt(&breaker, Verdict::Fails));
        }
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!attempt(&breaker, Verdict::Works));
        pass(1.0).await;
        let probe = breaker.admit().ok().unwrap();
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert!(breaker.admit().is_err(), "one probe at a time");
        probe.settle(Verdict::Works);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert!(attempt(&breaker, Verdict::Fails), "the past is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn each_failed_probe_doubles_the_pause_up_to_half_a_minute() {
        let breaker = Breaker::new();
        for _ in 0..FAILURES_IN_A_ROW {
            attempt(&breaker, Verdict::Fails);
        }
        for pause in [1, 2, 4, 8, 16, 30, 30] {
            pass(pause as f64 - 0.1).await;
            assert!(!attempt(&breaker, Verdict::Fails), "before {pause} s");
            pass(0.1).await;
            assert!(attempt(&breaker, Verdict::Fails), "after {pause} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_was_given_up_makes_room_for_the_next() {
        let breaker = Breaker::new();
        for _ in 0..FAILURES_IN_A_ROW {
            attempt(&breaker, Verdict::Fails);
        }
        pass(1.0).await;
        drop(breaker.admit());
        assert!(attempt(&breaker, Verdict::Works));
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn more_failures_than_successes_in_the_window_open_it() {
        let breaker = Breaker::new();
        for round in 0..9 {
            assert!(attempt(&breaker, Verdict::Fails), "{round}");
            assert!(attempt(&breaker, Verdict::Works), "{round}");
        }
        attempt(&breaker, Verdict::Fails);
        assert_eq!(breaker.state(), BreakerState::Closed, "19 attempts are too few to judge");
        attempt(&breaker, Verdict::Fails);
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_older_than_the_window_counts_no_more() {
        let breaker = Breaker::new();
        for _ in 0..7 {
            attempt(&breaker, Verdict::Fails);
        }
        attempt(&breaker, Verdict::Works);
        for _ in 0..7 {
            attempt(&breaker, Verdict::Fails);
        }
        attempt(&breaker, Verdict::Works);
        pass(WINDOW_SECONDS as f64).await;
        for _ in 0..7 {
            attempt(&breaker, Verdict::Fails);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_say_nothing_change_nothing() {
        let breaker = Breaker::new();
        for _ in 0..100 {
            attempt(&breaker, Verdict::Unknown);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
