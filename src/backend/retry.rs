//! When an attempt may be repeated, and after how long.
//!
//! The only place that knows the `backoff` crate: it is no longer maintained and serves as the source of intervals alone.

use std::time::{Duration, SystemTime};

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};
use http::{HeaderMap, StatusCode, header};

/// An attempt that would have less than this before the deadline is not made.
pub(super) const LEAST_ATTEMPT: Duration = Duration::from_millis(100);

/// What may go wrong with one attempt, as far as repeating it is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setback {
    /// Provably not a byte of the request was sent.
    NotSent,
    /// The connection broke after the request may have been seen.
    Interrupted,
    /// A whole answer that is an error.
    Status(StatusCode),
    /// A success that cannot be read, or is too large.
    Unreadable,
}

/// Why a call was replayed with a new token.
pub(super) const REASON_UNAUTHORIZED: &str = "unauthorized";

impl Setback {
    /// The word for metrics: one of [`RETRY_REASONS`](crate::telemetry::metrics::RETRY_REASONS).
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::NotSent => "not_sent",
            Self::Interrupted => "interrupted",
            Self::Status(StatusCode::TOO_MANY_REQUESTS) => "throttled",
            Self::Status(_) | Self::Unreadable => "status",
        }
    }
}

/// The decision table for reads and writes. A 401 is not decided here: it is worth a new token, once.
pub(super) fn may_repeat(write: bool, setback: Setback) -> bool {
    match setback {
        // Never sent, or refused before processing: harmless for both.
        Setback::NotSent | Setback::Status(StatusCode::TOO_MANY_REQUESTS) => true,
        // RFC 9110 section 9.2.2: what may have been applied is not repeated unless it is idempotent.
        Setback::Interrupted
        | Setback::Status(
            StatusCode::REQUEST_TIMEOUT
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT,
        ) => !write,
        Setback::Status(_) | Setback::Unreadable => false,
    }
}

/// The waits between the attempts of one call.
pub(super) struct Attempts {
    left: u32,
    windows: ExponentialBackoff,
}

impl Attempts {
    /// Windows of 50 ms, doubling up to 1 s, with full jitter. `backoff` gives the windows, and we draw from them, so that one seed
    /// decides all that is random here. Its own limit of 15 minutes is off; the call's deadline rules.
    pub(super) fn new(max_attempts: u32) -> Self {
        let windows = ExponentialBackoffBuilder::new()
            .with_initial_interval(Duration::from_millis(50))
            .with_multiplier(2.0)
            .with_max_interval(Duration::from_secs(1))
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build();
        Self { left: max_attempts.saturating_sub(1), windows }
    }

    /// How long to wait before the next attempt, or `None` when there should be none. The backend's own wish is a lower bound.
    pub(super) fn next_wait(&mut self, retry_after: Option<Duration>, left: Duration) -> Option<Duration> {
        if self.left == 0 {
            return None;
        }
        let jittered = self.windows.next_backoff()?.mul_f64(fastrand::f64());
        let wait = jittered.max(retry_after.unwrap_or_default());
        if wait.saturating_add(LEAST_ATTEMPT) > left {
            return None;
        }
        self.left -= 1;
        Some(wait)
    }
}

/// `Retry-After` as seconds or as an HTTP date (RFC 9110 section 10.2.3). A date that has passed means now.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit are still a legal, very long wait; callers get it as a number that every JSON reader keeps.
        return Some(Duration::from_secs(u64::from(value.parse().unwrap_or(u32::MAX))));
    }
    let at = httpdate::parse_http_date(value).ok()?;
    Some(at.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_write_is_repeated_only_when_it_cannot_have_happened() {
        let status = |code| Setback::Status(StatusCode::from_u16(code).unwrap());
        for (setback, read, write) in [
            (Setback::NotSent, true, true),
            (Setback::Interrupted, true, false),
            (Setback::Unreadable, false, false),
            (status(429), true, true),
            (status(408), true, false),
            (status(502), true, false),
            (status(503), true, false),
            (status(504), true, false),
            (status(500), false, false),
            (status(400), false, false),
            (status(403), false, false),
            (status(404), false, false),
            (status(409), false, false),
            (status(422), false, false),
        ] {
            assert_eq!((may_repeat(false, setback), may_repeat(true, setback)), (read, write), "{setback:?}");
        }
    }

    #[test]
    fn there_are_three_attempts_with_waits_inside_their_windows() {
        for _ in 0..1_000 {
            let mut attempts = Attempts::new(3);
            let left = Duration::from_secs(10);
            assert!(attempts.next_wait(None, left).unwrap() <= Duration::from_millis(50));
            assert!(attempts.next_wait(None, left).unwrap() <= Duration::from_millis(100));
            assert_eq!(attempts.next_wait(None, left), None);
        }
    }

    #[test]
    fn no_wait_reaches_past_the_deadline() {
        let mut attempts = Attempts::new(3);
        assert_eq!(attempts.next_wait(Some(Duration::from_secs(5)), Duration::from_secs(5)), None);
        assert!(
            attempts.next_wait(Some(Duration::from_secs(1)), Duration::from_secs(5)).unwrap() >= Duration::from_secs(1)
        );
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_date() {
        let now = httpdate::parse_http_date("Sun, 22 Nov 2026 15:00:00 GMT").unwrap();
        for (value, expected) in [
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("0", Some(0)),
            ("Sun, 22 Nov 2026 15:00:30 GMT", Some(30)),
            ("Sun, 22 Nov 2026 14:00:00 GMT", Some(0)),
            ("99999999999999999999999", Some(u64::from(u32::MAX))),
            ("9007199254740993", Some(u64::from(u32::MAX))),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(header::RETRY_AFTER, HeaderValue::from_str(value).unwrap())]);
            assert_eq!(retry_after(&headers, now), expected.map(Duration::from_secs), "{value:?}");
        }
    }
}
