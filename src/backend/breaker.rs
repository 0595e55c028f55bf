//! Circuit breakers, one for each route of the backend: while a route fails, calls to it fail at once instead of queueing up.
//!
//! A breaker opens after failures in a row, or when most of the recent attempts failed. After a pause it lets one attempt through, the
//! trial, and closes when that succeeds. Failures are refused and broken connections, timeouts, 502, 503 and 504. A 500 is the answer
//! of a working backend to one request, a 4xx is the caller's mistake, and a 429 asks for patience; none of them opens a breaker.
//!
//! One caller, or one resource, must not take a tool away from all others. So a breaker opens only when the attempts fail for most of
//! the recent callers and most of the recent resources, and when there is a second witness: another caller, another resource, or
//! another route that fails as well. Connections that cannot be had need none: they depend neither on a caller nor on a resource. After
//! a trial that failed, others go first.

mod recent;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::Route;
use recent::Recent;
pub(super) use recent::{CallerBit, Source};

const ROUTES: usize = Route::TEMPLATES.len();

/// The first pause; it doubles with each trial that fails for another caller.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After the pause, who has not had a trial yet goes first for so long.
const RESERVED_FOR_OTHERS: Duration = Duration::from_secs(1);

/// What one attempt says about the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It works.
    Works,
    /// It is in trouble, at least for this caller and this resource.
    Fails,
    /// It cannot be reached, whoever calls.
    Unreachable,
    /// Nothing: the attempt was given up, or refused for reasons of its own.
    Unknown,
}

/// What a breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Lets them through.
    Closed,
    /// Refuses them.
    Open,
    /// Lets one through, to see.
    HalfOpen,
}

/// The breakers of all routes.
pub(super) struct Breakers {
    start: Instant,
    routes: [Breaker; ROUTES],
}

#[derive(Default)]
struct Breaker {
    /// Set while there is an outage: calls of a route that works read this alone.
    open: AtomicBool,
    outage: Mutex<Option<Outage>>,
    recent: Recent,
}

#[derive(Debug)]
struct Outage {
    until: Instant,
    pause: Duration,
    trial: bool,
    /// Whose trials failed.
    failed: Source,
}

impl Breakers {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), routes: std::array::from_fn(|_| Breaker::default()) }
    }

    /// Lets an attempt through, or says how long to wait. The admission must be settled; dropped, it says nothing.
    pub(super) fn admit(&self, route: Route, source: Source) -> Result<Admission<'_>, Duration> {
        let admission = |trial| Admission { breakers: self, route, source, trial, settled: false };
        let Some(breaker) = self.of(route).filter(|breaker| breaker.open.load(Ordering::Acquire)) else {
            return Ok(admission(false));
        };
        let now = Instant::now();
        match &mut *breaker.outage() {
            None => Ok(admission(false)),
            Some(outage) if outage.trial => Err(FIRST_PAUSE),
            Some(outage) => {
                let reserved = if outage.failed.has(source) { RESERVED_FOR_OTHERS } else { Duration::ZERO };
                let from = outage.until + reserved;
                if now < from {
                    return Err(from - now);
                }
                outage.trial = true;
                Ok(admission(true))
            }
        }
    }

    /// For metrics.
    pub(super) fn state(&self, route: Route) -> BreakerState {
        match self.of(route).and_then(|breaker| breaker.outage().as_ref().map(|outage| outage.trial)) {
            None => BreakerState::Closed,
            Some(false) => BreakerState::Open,
            Some(true) => BreakerState::HalfOpen,
        }
    }

    fn settle(&self, attempt: &Admission<'_>, verdict: Verdict) {
        let Some(breaker) = self.of(attempt.route) else { return };
        if attempt.trial {
            return breaker.end_trial(attempt, verdict);
        }
        // An attempt from before it opened comes home late; only the trial decides.
        if verdict == Verdict::Unknown || breaker.open.load(Ordering::Acquire) {
            return;
        }
        let now = Instant::now();
        breaker.recent.record(attempt.source, verdict == Verdict::Works, recent::second(self.start, now));
        if verdict != Verdict::Works && self.is_down(breaker, verdict, now) {
            breaker.open(attempt.route, now);
        }
    }

    fn is_down(&self, breaker: &Breaker, verdict: Verdict, now: Instant) -> bool {
        let second = recent::second(self.start, now);
        let summary = breaker.recent.summary(second);
        let fails_too = |other: &Breaker| {
            !std::ptr::eq(other, breaker)
                && (other.open.load(Ordering::Acquire) || other.recent.summary(second).is_failing())
        };
        summary.is_failing()
            && (verdict == Verdict::Unreachable || summary.is_shared() || self.routes.iter().any(fails_too))
    }

    fn of(&self, route: Route) -> Option<&Breaker> {
        self.routes.get(route as usize)
    }
}

impl Breaker {
    fn open(&self, route: Route, now: Instant) {
        let mut outage = self.outage();
        if outage.is_none() {
            let until = now + FIRST_PAUSE;
            *outage = Some(Outage { until, pause: FIRST_PAUSE, trial: false, failed: Source::default() });
            self.open.store(true, Ordering::Release);
            drop(outage);
            let route = route.name();
            warn!(
                "the backend keeps failing: calls of `{route}` fail at once for {FIRST_PAUSE:?}, then one tries again"
            );
        }
    }

    fn end_trial(&self, attempt: &Admission<'_>, verdict: Verdict) {
        let mut guard = self.outage();
        let Some(outage) = &mut *guard else { return };
        outage.trial = false;
        match verdict {
            // It has said nothing: the next call is the next trial.
            Verdict::Unknown => {}
            Verdict::Works => {
                self.recent.clear();
                *guard = None;
                self.open.store(false, Ordering::Release);
                drop(guard);
                let route = attempt.route.name();
                info!("the backend answers again: calls of `{route}` go through");
            }
            Verdict::Fails | Verdict::Unreachable => {
                // What fails again for one caller must not keep it open for longer and longer for the others.
                if !outage.failed.has_caller(attempt.source) {
                    outage.pause = (outage.pause * 2).min(LONGEST_PAUSE);
                }
                outage.failed = outage.failed.with(attempt.source);
                outage.until = Instant::now() + outage.pause;
            }
        }
    }

    fn outage(&self) -> MutexGuard<'_, Option<Outage>> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permission for one attempt.
pub(super) struct Admission<'a> {
    breakers: &'a Breakers,
    route: Route,
    source: Source,
    trial: bool,
    settled: bool,
}

impl Admission<'_> {
    pub(super) fn settle(mut self, verdict: Verdict) {
        self.settled = true;
        self.breakers.settle(&self, verdict);
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if !self.settled {
            self.breakers.settle(self, Verdict::Unknown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::recent::{FAILURES_IN_A_ROW, LEAST_ATTEMPTS, WINDOW_SECONDS};
    use super::*;

    /// Callers and resources with bits of their own.
    fn source(caller: usize, resource: usize) -> Source {
        fn distinct<T: PartialEq>(number: usize, bit: impl Fn(String) -> T) -> T {
            let mut bits = Vec::new();
            for name in (0..).map(|name: u32| bit(name.to_string())) {
                if !bits.contains(&name) {
                    bits.push(name);
                }
                if bits.len() > number {
                    return bits.swap_remove(number);
                }
            }
            unreachable!("there are 64")
        }
        let caller = distinct(caller, |name| CallerBit::of_identity("tenant", &name));
        distinct(resource, |name| Source::new(caller, &name))
    }

    fn attempt(breakers: &Breakers, route: Route, source: Source, verdict: Verdict) -> bool {
        breakers.admit(route, source).map(|admission| admission.settle(verdict)).is_ok()
    }

    /// Failures in a row of two callers.
    fn opened() -> Breakers {
        let breakers = Breakers::new();
        for number in 0..FAILURES_IN_A_ROW as usize {
            assert!(attempt(&breakers, Route::User, source(number % 2, 0), Verdict::Fails));
        }
        assert_eq!(breakers.state(Route::User), BreakerState::Open);
        breakers
    }

    async fn pass(seconds: f64) {
        tokio::time::advance(Duration::from_secs_f64(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_open_it_and_one_good_trial_closes_it() {
        let breakers = opened();
        assert!(!attempt(&breakers, Route::User, source(0, 0), Verdict::Works));
        pass(1.0).await;
        let trial = breakers.admit(Route::User, source(0, 0)).ok().unwrap();
        assert_eq!(breakers.state(Route::User), BreakerState::HalfOpen);
        assert!(breakers.admit(Route::User, source(1, 0)).is_err(), "one trial at a time");
        trial.settle(Verdict::Works);
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
        assert!(attempt(&breakers, Route::User, source(0, 0), Verdict::Fails), "the past is forgotten");
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn the_other_routes_stay_closed() {
        let breakers = opened();
        for route in [Route::Users, Route::CreateTicket, Route::Tickets, Route::Query] {
            assert!(attempt(&breakers, route, source(0, 0), Verdict::Works));
            assert_eq!(breakers.state(route), BreakerState::Closed);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_trial_that_fails_for_another_caller_doubles_the_pause_up_to_half_a_minute() {
        let breakers = opened();
        for (caller, pause) in [1, 2, 4, 8, 16, 30, 30].into_iter().enumerate() {
            pass(f64::from(pause) - 0.1).await;
            assert!(!attempt(&breakers, Route::User, source(caller, 0), Verdict::Fails), "before {pause} s");
            pass(0.1).await;
            assert!(attempt(&breakers, Route::User, source(caller, 0), Verdict::Fails), "after {pause} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_that_fails_for_one_resource_leaves_the_next_to_the_others() {
        let breakers = opened();
        pass(1.0).await;
        let (broken, sound) = (source(0, 0), source(0, 1));
        assert!(attempt(&breakers, Route::User, broken, Verdict::Fails));
        for _ in 0..20 {
            // Whoever had a trial waits a second longer, but the pause does not grow.
            pass(2.9).await;
            assert!(!attempt(&breakers, Route::User, broken, Verdict::Fails));
            pass(0.1).await;
            assert!(attempt(&breakers, Route::User, broken, Verdict::Fails));
        }
        pass(2.0).await;
        assert!(!attempt(&breakers, Route::User, broken, Verdict::Fails));
        assert!(attempt(&breakers, Route::User, sound, Verdict::Works));
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn a_trial_that_was_given_up_makes_room_for_the_next() {
        let breakers = opened();
        pass(1.0).await;
        drop(breakers.admit(Route::User, source(0, 0)));
        assert!(attempt(&breakers, Route::User, source(0, 0), Verdict::Works));
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn more_failures_than_successes_in_the_window_open_it() {
        let breakers = Breakers::new();
        for round in 0..LEAST_ATTEMPTS as usize / 2 - 1 {
            assert!(attempt(&breakers, Route::User, source(round % 2, 0), Verdict::Works), "{round}");
            assert!(attempt(&breakers, Route::User, source(round % 2, 0), Verdict::Fails), "{round}");
        }
        attempt(&breakers, Route::User, source(0, 0), Verdict::Fails);
        assert_eq!(breakers.state(Route::User), BreakerState::Closed, "19 attempts are too few to judge");
        attempt(&breakers, Route::User, source(0, 0), Verdict::Fails);
        assert_eq!(breakers.state(Route::User), BreakerState::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_older_than_the_window_counts_no_more() {
        let breakers = Breakers::new();
        let mix = |failures: usize| {
            for number in 0..failures {
                attempt(&breakers, Route::User, source(number % 2, 0), Verdict::Fails);
            }
            attempt(&breakers, Route::User, source(0, 0), Verdict::Works);
        };
        mix(7);
        mix(7);
        pass(WINDOW_SECONDS as f64).await;
        mix(7);
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_say_nothing_change_nothing() {
        let breakers = Breakers::new();
        for number in 0..100 {
            attempt(&breakers, Route::User, source(number % 9, number % 5), Verdict::Unknown);
        }
        assert_eq!(breakers.state(Route::User), BreakerState::Closed);
    }

    /// A thousand attempts that fail, a hundred a second, and beside them one a second of each of these others.
    async fn one_sided(breakers: &Breakers, broken: impl Fn(usize) -> Source, others: &[Source]) -> usize {
        let mut refused = 0;
        for number in 0..1_000 {
            if number % 100 == 0 {
                let turned_away = |other: &&Source| !attempt(breakers, Route::Query, **other, Verdict::Works);
                refused += others.iter().filter(turned_away).count();
            }
            attempt(breakers, Route::Query, broken(number), Verdict::Fails);
            pass(0.01).await;
        }
        refused
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_with_one_resource_never_opens_it() {
        for others in [&[][..], &[source(1, 1)], &[source(0, 1)], &[source(1, 0)]] {
            let breakers = Breakers::new();
            assert_eq!(one_sided(&breakers, |_| source(0, 0), others).await, 0);
            assert_eq!(breakers.state(Route::Query), BreakerState::Closed, "{others:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_with_many_bad_resources_does_not_open_it_for_others_who_succeed() {
        let breakers = Breakers::new();
        let others = [source(1, 8), source(2, 9)];
        assert_eq!(one_sided(&breakers, |number| source(0, number % 8), &others).await, 0);
        assert_eq!(breakers.state(Route::Query), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn many_callers_of_one_bad_resource_do_not_open_it_for_the_others() {
        let breakers = Breakers::new();
        let others = [source(9, 1), source(10, 2)];
        assert_eq!(one_sided(&breakers, |number| source(number % 8, 0), &others).await, 0);
        assert_eq!(breakers.state(Route::Query), BreakerState::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_whose_calls_fail_on_two_routes_is_enough() {
        let breakers = Breakers::new();
        for _ in 0..FAILURES_IN_A_ROW {
            attempt(&breakers, Route::Users, source(0, 0), Verdict::Fails);
        }
        assert_eq!(breakers.state(Route::Users), BreakerState::Closed);
        for _ in 0..FAILURES_IN_A_ROW {
            attempt(&breakers, Route::Tickets, source(0, 1), Verdict::Fails);
        }
        assert_eq!(breakers.state(Route::Tickets), BreakerState::Open);
        attempt(&breakers, Route::Users, source(0, 0), Verdict::Fails);
        assert_eq!(breakers.state(Route::Users), BreakerState::Open);
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_cannot_be_had_need_no_second_witness() {
        let breakers = Breakers::new();
        for _ in 0..FAILURES_IN_A_ROW {
            attempt(&breakers, Route::Users, source(0, 0), Verdict::Unreachable);
        }
        assert_eq!(breakers.state(Route::Users), BreakerState::Open);
    }
}
