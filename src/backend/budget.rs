//! How many repetitions there may be: a share of the calls of the last ten seconds, and so many a second whatever happens.
//!
//! Ours, because tower's `TpsBudget` grants twice its floor under a steady load: its window leaves out every second cell, and so
//! forgets after five seconds what it should remember for ten.

use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use super::window::{WINDOW_SECONDS, Window};

pub(super) struct RetryBudget {
    /// Repetitions for each call.
    share: f64,
    /// Repetitions in a window that need no calls.
    reserve: f64,
    /// Calls are the good ones, repetitions the others.
    recent: Mutex<Window>,
}

impl RetryBudget {
    pub(super) fn new(floor_per_second: u32, percent: u32) -> Self {
        Self {
            share: f64::from(percent) / 100.0,
            reserve: f64::from(floor_per_second) * WINDOW_SECONDS as f64,
            recent: Mutex::new(Window::new()),
        }
    }

    /// A call begins, and pays its share.
    pub(super) fn deposit(&self) {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).count(true, Instant::now());
    }

    /// Whether one more repetition may be made; it then counts as made.
    pub(super) fn withdraw(&self) -> bool {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let (calls, repetitions) = recent.sums();
        let granted = f64::from(repetitions) + 1.0 <= f64::from(calls) * self.share + self.reserve;
        if granted {
            recent.count(false, Instant::now());
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Calls evenly for this long, each of which would like to be repeated twice; how many repetitions it got.
    async fn storm(budget: &RetryBudget, seconds: u64, calls_per_second: u64) -> f64 {
        let mut granted = 0;
        for _ in 0..seconds * calls_per_second {
            budget.deposit();
            granted += u32::from(budget.withdraw()) + u32::from(budget.withdraw());
            tokio::time::advance(Duration::from_secs(1) / calls_per_second as u32).await;
        }
        granted.into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_steady_storm_gets_the_share_of_its_calls_and_the_floor() {
        for (rate, floor, percent) in [(200, 10, 20), (37, 10, 20), (500, 0, 20), (50, 3, 0), (100, 1, 100)] {
            let budget = RetryBudget::new(floor, percent);
            let granted = storm(&budget, 60, rate).await;
            let share = (60 * rate) as f64 * f64::from(percent) / 100.0;
            let (least, most) = (share + f64::from(floor) * 60.0, share + f64::from(floor) * 70.0);
            assert!(granted <= most, "{granted} of {most} at {rate}/s");
            assert!(granted >= least * 0.9, "{granted} of {least} at {rate}/s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_granted_what_was_not_paid_for() {
        let budget = RetryBudget::new(0, 20);
        assert!(!budget.withdraw());
        for call in 1..=10 {
            budget.deposit();
            assert_eq!(budget.withdraw(), call % 5 == 0, "{call}");
        }
        assert!(!RetryBudget::new(0, 0).withdraw());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reserve_that_was_spent_is_there_again_after_the_window() {
        let budget = RetryBudget::new(10, 0);
        let spend = || (0..1_000).filter(|_| budget.withdraw()).count();
        assert_eq!((spend(), spend()), (100, 0));
        for (pass, there) in [(9, 0), (1, 100)] {
            tokio::time::advance(Duration::from_secs(pass)).await;
            budget.deposit();
            assert_eq!(spend(), there);
        }
    }
}
