//! How much one caller may ask, so that one noisy caller does not slow another: a token bucket for each identity, or for each
//! client address of callers who have none.
//!
//! The buckets are bounded in number and nobody waits for a lock while there is one: each is a single atomic number, the time at
//! which it will be full again. What is over the limit is refused at once, never queued.

use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
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
        let buckets = |per_second: u32| (per_second > 0).then(|| Buckets::new(per_second, settings.burst));
        Self { callers: buckets(settings.per_caller), addresses: buckets(settings.per_address) }
    }

    /// Takes one request out of the caller's bucket, or tells how long it takes until there is one in it.
    pub(super) fn admit(&self, caller: &Caller) -> Result<(), Duration> {
        match caller.identity() {
            Some(identity) => {
                self.callers.as_ref().map_or(Ok(()), |buckets| buckets.take((identity.tenant(), identity.object())))
            }
            None => self.addresses.as_ref().map_or(Ok(()), |buckets| buckets.take(household(caller.address()))),
        }
    }
}

/// A client has one IPv4 address, and of IPv6 a whole network of 64 bits to choose from.
fn household(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

/// Buckets of one size. A bucket holds the nanosecond, counted from `since`, at which it will be full again.
struct Buckets {
    per_request: u64,
    size: u64,
    since: Instant,
    secret: RandomState,
    full_at: Cache<u64, Arc<AtomicU64>>,
}

impl Buckets {
    fn new(per_second: u32, burst: u32) -> Self {
        let per_request = 1_000_000_000 / u64::from(per_second.max(1));
        Self {
            per_request,
            size: per_request * u64::from(burst.max(1)),
            since: Instant::now(),
            secret: RandomState::new(),
            full_at: Cache::new(REMEMBERED),
        }
    }

    fn take(&self, who: impl std::hash::Hash) -> Result<(), Duration> {
        let now = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        // Two callers whose keyed hashes are the same would share a bucket: nobody can bring that about.
        let Ok(bucket) = self
            .full_at
            .get_or_insert_with(&self.secret.hash_one(who), || Ok::<_, std::convert::Infallible>(Arc::default()));
        let mut full_at = bucket.load(Relaxed);
        loop {
            let next = full_at.max(now).saturating_add(self.per_request);
            let missing = next.saturating_sub(now);
            if missing > self.size {
                return Err(Duration::from_nanos(missing - self.size));
            }
            match bucket.compare_exchange_weak(full_at, next, Relaxed, Relaxed) {
                Ok(_) => return Ok(()),
                Err(current) => full_at = current,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> Caller {
        Caller::unauthenticated(address.parse().unwrap())
    }

    fn limit(per_address: u32, burst: u32) -> RateLimit {
        RateLimit::new(&RateLimitSettings { per_caller: 0, per_address, burst })
    }

    #[tokio::test(start_paused = true)]
    async fn a_bucket_gives_its_burst_at_once_and_then_the_rate_and_says_how_long_to_wait() {
        let limit = limit(10, 5);
        let caller = from("192.0.2.1");
        for _ in 0..5 {
            assert_eq!(limit.admit(&caller), Ok(()));
        }
        assert_eq!(limit.admit(&caller), Err(Duration::from_millis(100)));
        tokio::time::advance(Duration::from_millis(60)).await;
        assert_eq!(limit.admit(&caller), Err(Duration::from_millis(40)), "a refusal costs nothing");
        tokio::time::advance(Duration::from_millis(40)).await;
        assert_eq!(limit.admit(&caller), Ok(()));
        assert!(limit.admit(&caller).is_err());
        tokio::time::advance(Duration::from_secs(3_600)).await;
        let admitted = (0..100).filter(|_| limit.admit(&caller).is_ok()).count();
        assert_eq!(admitted, 5, "an hour of rest fills the bucket and no more");
    }

    #[tokio::test(start_paused = true)]
    async fn ten_times_its_rate_gets_a_caller_its_rate_and_another_caller_everything() {
        let limit = limit(100, 10);
        let (noisy, quiet) = (from("192.0.2.1"), from("192.0.2.2"));
        let (mut noisy_admitted, mut quiet_refused) = (0, 0);
        for millisecond in 0..10_000 {
            noisy_admitted += usize::from(limit.admit(&noisy).is_ok());
            if millisecond % 20 == 0 {
                quiet_refused += usize::from(limit.admit(&quiet).is_err());
            }
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!((1_000..=1_010).contains(&noisy_admitted), "{noisy_admitted}");
        assert_eq!(quiet_refused, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_thousand_callers_are_not_all_remembered_and_the_noisy_one_is_not_forgotten() {
        let limit = limit(1, 1);
        let noisy = from("192.0.2.1");
        assert_eq!(limit.admit(&noisy), Ok(()));
        for number in 0..100_000u32 {
            let other = IpAddr::from((0x0a00_0000 + number).to_be_bytes());
            assert_eq!(limit.admit(&Caller::unauthenticated(other)), Ok(()), "{other}");
            if number % 100 == 0 {
                assert!(limit.admit(&noisy).is_err(), "forgotten after {number} others");
            }
        }
        let remembered = limit.addresses.as_ref().unwrap().full_at.len();
        assert!(remembered <= REMEMBERED, "{remembered}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_is_one_caller_and_zero_means_no_limit() {
        let limited = limit(1, 1);
        assert_eq!(limited.admit(&from("2001:db8:1:1::1")), Ok(()));
        assert!(limited.admit(&from("2001:db8:1:1:ffff::2")).is_err());
        assert_eq!(limited.admit(&from("2001:db8:1:2::1")), Ok(()));
        let unlimited = limit(0, 1);
        assert!((0..1_000).all(|_| unlimited.admit(&from("192.0.2.1")).is_ok()));
    }

    #[tokio::test]
    async fn many_at_once_get_exactly_the_burst() {
        let limit = Arc::new(limit(1, 500));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let limit = Arc::clone(&limit);
                std::thread::spawn(move || (0..1_000).filter(|_| limit.admit(&from("192.0.2.1")).is_ok()).count())
            })
            .collect();
        let admitted: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        assert!((500..=501).contains(&admitted), "{admitted}");
    }
}
