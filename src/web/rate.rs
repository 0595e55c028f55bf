//! How much one caller may ask, so that one noisy caller does not slow another: a token bucket for each identity, or for each
//! client address of callers who have none; and for each identity a share of the requests at the same time, because a few slow ones
//! can take as much room as many quick ones.
//!
//! A request is charged to its caller's bucket before its body is read, and gets a seat of theirs once the body is there: a body may
//! come slowly.
//!
//! The buckets are bounded in number, and each is two atomic numbers: the time at which it will be full again, and the requests
//! that are being answered. What is over a limit is refused at once, never queued.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::auth::Caller;
use crate::settings::RateLimitSettings;

/// Callers that are remembered at the same time, of each kind. One who is forgotten begins with a full bucket; who keeps calling is
/// not forgotten for those who come once.
const REMEMBERED: usize = 65_536;

/// The limits of one replica.
pub(super) struct RateLimit {
    callers: Option<Buckets>,
    addresses: Option<Buckets>,
}

impl RateLimit {
    pub(super) fn new(settings: &RateLimitSettings) -> Self {
        let buckets = |per_second: f64, at_once: u32| {
            (per_second > 0.0 || at_once > 0).then(|| Buckets::new(per_second, settings.burst, at_once, REMEMBERED))
        };
        Self { callers: buckets(settings.per_caller, settings.in_flight), addresses: buckets(settings.per_address, 0) }
    }

    /// Takes one request out of the caller's bucket, or tells how long it takes until there is one in it.
    pub(super) fn charge(&self, caller: &Caller) -> Result<Option<Charged>, Duration> {
        let buckets = if caller.identity().is_some() { &self.callers } else { &self.addresses };
        let Some(buckets) = buckets else { return Ok(None) };
        match caller.identity() {
            Some(identity) => buckets.take((identity.tenant(), identity.object())).map(Some),
            None => buckets.take(household(caller.address())).map(Some),
        }
    }
}

/// A request that has been taken out of its caller's bucket.
#[derive(Debug)]
pub(super) struct Charged {
    bucket: Arc<Bucket>,
    at_once: u32,
}

impl Charged {
    /// One of the caller's requests at the same time, if there is one left, or how long to wait before the next try. The seat is to be
    /// kept until the work for the request has ended.
    pub(super) fn seat(self) -> Result<Seat, Duration> {
        let in_flight = self.bucket.in_flight.fetch_add(1, Relaxed);
        let seat = Seat(self.bucket);
        if self.at_once > 0 && in_flight >= self.at_once { Err(Duration::from_secs(1)) } else { Ok(seat) }
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Seat(Arc<Bucket>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

/// A client has one IPv4 address, and of IPv6 a whole network of 64 bits to choose from.
pub(super) fn household(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Buckets of one size.
pub(super) struct Buckets {
    /// Nanoseconds in which one request comes in; 0 fills a bucket at once.
    per_request: u64,
    size: u64,
    /// Requests at the same time; 0 means no limit.
    at_once: u32,
    since: Instant,
    secret: RandomState,
    of: Cache<u64, Arc<Bucket>>,
}

/// What one caller has left.
#[derive(Debug, Default)]
struct Bucket {
    /// The nanosecond, counted from `Buckets::since`, at which it will be full again.
    full_at: AtomicU64,
    in_flight: AtomicU32,
}

impl Buckets {
    pub(super) fn new(per_second: f64, burst: u32, at_once: u32, remembered: usize) -> Self {
        // The cast keeps to what fits.
        let per_request = if per_second > 0.0 { (1e9 / per_second) as u64 } else { 0 };
        Self {
            per_request,
            size: per_request.saturating_mul(burst.max(1).into()),
            at_once,
            since: Instant::now(),
            secret: RandomState::new(),
            of: Cache::new(remembered),
        }
    }

    pub(super) fn take(&self, who: impl std::hash::Hash) -> Result<Charged, Duration> {
        // Two callers whose keyed hashes are the same would share a bucket: nobody can bring that about.
        let key = self.secret.hash_one(who);
        let Ok(bucket) = self.of.get_or_insert_with(&key, || Ok::<_, std::convert::Infallible>(Arc::default()));
        self.fill(&bucket.full_at)?;
        Ok(Charged { bucket, at_once: self.at_once })
    }

    /// How long it takes until there is something in the bucket, if it is empty. Takes nothing.
    pub(super) fn wait(&self, who: impl std::hash::Hash) -> Option<Duration> {
        let bucket = self.of.get(&self.secret.hash_one(who))?;
        self.with_one_less(bucket.full_at.load(Relaxed)).err()
    }

    fn fill(&self, full_at: &AtomicU64) -> Result<(), Duration> {
        let mut seen = full_at.load(Relaxed);
        loop {
            let next = self.with_one_less(seen)?;
            match full_at.compare_exchange_weak(seen, next, Relaxed, Relaxed) {
                Ok(_) => return Ok(()),
                Err(current) => seen = current,
            }
        }
    }

    /// When a bucket will be full again once one more is taken out of it, or how long it takes until there is one.
    fn with_one_less(&self, full_at: u64) -> Result<u64, Duration> {
        let now = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let next = full_at.max(now).saturating_add(self.per_request);
        let missing = next.saturating_sub(now);
        if missing > self.size { Err(Duration::from_nanos(missing - self.size)) } else { Ok(next) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> Caller {
        Caller::unauthenticated(address.parse().unwrap())
    }

    fn limit(per_address: f64, burst: u32) -> RateLimit {
        RateLimit::new(&RateLimitSettings { per_address, burst, ..RateLimitSettings::default() })
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_its_burst_at_once_and_then_the_rate_and_says_how_long_to_wait() {
        let limit = limit(10.0, 5);
        let caller = from("192.0.2.1");
        for _ in 0..5 {
            assert!(limit.charge(&caller).is_ok());
        }
        assert_eq!(limit.charge(&caller).unwrap_err(), Duration::from_millis(100));
        tokio::time::advance(Duration::from_millis(60)).await;
        assert_eq!(limit.charge(&caller).unwrap_err(), Duration::from_millis(40), "a refusal costs nothing");
        tokio::time::advance(Duration::from_millis(40)).await;
        assert!(limit.charge(&caller).is_ok());
        assert!(limit.charge(&caller).is_err());
        tokio::time::advance(Duration::from_secs(3_600)).await;
        let admitted = (0..100).filter(|_| limit.charge(&caller).is_ok()).count();
        assert_eq!(admitted, 5, "an hour of rest fills the bucket and no more");
    }

    #[tokio::test(start_paused = true)]
    async fn ten_times_its_rate_gets_a_caller_its_rate_and_another_caller_everything() {
        let limit = limit(100.0, 10);
        let (noisy, quiet) = (from("192.0.2.1"), from("192.0.2.2"));
        let (mut noisy_admitted, mut quiet_refused) = (0, 0);
        for millisecond in 0..10_000 {
            noisy_admitted += usize::from(limit.charge(&noisy).is_ok());
            if millisecond % 20 == 0 {
                quiet_refused += usize::from(limit.charge(&quiet).is_err());
            }
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!((1_000..=1_010).contains(&noisy_admitted), "{noisy_admitted}");
        assert_eq!(quiet_refused, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_thousand_callers_are_not_all_remembered_and_the_noisy_one_is_not_forgotten() {
        let limit = limit(1.0, 1);
        let noisy = from("192.0.2.1");
        assert!(limit.charge(&noisy).is_ok());
        for number in 0..100_000u32 {
            let other = IpAddr::from((0x0a00_0000 + number).to_be_bytes());
            assert!(limit.charge(&Caller::unauthenticated(other)).is_ok(), "{other}");
            if number % 100 == 0 {
                assert!(limit.charge(&noisy).is_err(), "forgotten after {number} others");
            }
        }
        let remembered = limit.addresses.as_ref().unwrap().of.len();
        assert!(remembered <= REMEMBERED, "{remembered}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_is_one_caller_and_zero_means_no_limit() {
        let limited = limit(1.0, 1);
        assert!(limited.charge(&from("2001:db8:1:1::1")).is_ok());
        assert!(limited.charge(&from("2001:db8:1:1:ffff::2")).is_err());
        assert!(limited.charge(&from("2001:db8:1:2::1")).is_ok());
        let unlimited = limit(0.0, 1);
        assert!((0..1_000).all(|_| unlimited.charge(&from("192.0.2.1")).is_ok()));
    }

    #[tokio::test]
    async fn many_at_once_get_exactly_the_burst() {
        let limit = Arc::new(limit(0.001, 500));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let limit = Arc::clone(&limit);
                std::thread::spawn(move || (0..1_000).filter(|_| limit.charge(&from("192.0.2.1")).is_ok()).count())
            })
            .collect();
        let admitted: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert_eq!(admitted, 500);
    }

    #[tokio::test(start_paused = true)]
    async fn who_keeps_all_their_seats_gets_no_other_until_one_is_free_and_a_refusal_takes_none() {
        for per_second in [0.0, 1_000.0] {
            let buckets = Buckets::new(per_second, 1_000, 3, REMEMBERED);
            let seat = |of| buckets.take(of).unwrap().seat();
            let mut seats: Vec<_> = (0..3).map(|_| seat("a").unwrap()).collect();
            for _ in 0..10 {
                assert_eq!(seat("a").unwrap_err(), Duration::from_secs(1));
            }
            assert!(seat("b").is_ok(), "another has seats of their own");
            seats.pop();
            assert!(seat("a").is_ok());
            drop(seats);
            assert_eq!(buckets.of.get(&buckets.secret.hash_one("a")).unwrap().in_flight.load(Relaxed), 0);
        }
    }
}
