//! How many tokens of one client address may be refused: each costs a check of its signature, a log line and an audit event. When
//! there were too many, the next ones from there wait, and are not looked at before.
//!
//! All callers behind a gateway have its address, and one of them must not keep the others out: whose token was good before is let
//! through to its next check, whatever the others send. So tokens that were good are remembered, as keyed hashes, and that decides
//! whether a token is checked, never what it is worth. Only who comes with a new token, while others use up what may be refused, has to
//! try again.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::Duration;

use quick_cache::sync::Cache;

use super::rate::{Buckets, household};
use crate::auth::{Refusal, Verdict};
use crate::settings::RateLimitSettings;

/// Addresses, and tokens that were good, that are remembered at the same time. An address that is forgotten begins anew, and a token waits
/// like a new one.
const REMEMBERED: usize = 16_384;

/// The limit of one replica.
pub(super) struct RefusalLimit {
    addresses: Buckets,
    /// Two tokens with the same hash would only both be checked.
    good: Cache<u64, ()>,
    secret: RandomState,
}

impl RefusalLimit {
    /// `None` when there is no limit.
    pub(super) fn new(settings: &RateLimitSettings) -> Option<Self> {
        (settings.refused_tokens > 0.0).then(|| Self {
            addresses: Buckets::new(settings.refused_tokens, settings.burst, 0, REMEMBERED),
            good: Cache::new(REMEMBERED),
            secret: RandomState::new(),
        })
    }

    /// Whether the token may be checked, or how long it has to wait.
    pub(super) fn admit(&self, address: IpAddr, token: &str) -> Result<(), Duration> {
        match self.addresses.wait(household(address)) {
            Some(wait) if self.good.get(&self.secret.hash_one(token)).is_none() => Err(wait),
            _ => Ok(()),
        }
    }

    /// Remembers how the check ended.
    pub(super) fn checked<T>(&self, address: IpAddr, token: &str, checked: &Result<T, Refusal>) {
        let token = self.secret.hash_one(token);
        match checked {
            Ok(_) if self.good.get(&token).is_none() => self.good.insert(token, ()),
            Ok(_) => {}
            // It says nothing about the token.
            Err(refusal) if refusal.verdict() == Verdict::Unavailable => {}
            Err(_) => {
                self.good.remove(&token);
                // As many at the same time as there are threads may be more than the bucket had: it stays empty.
                let _ = self.addresses.take(household(address));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Result<(), Refusal> = Err(Refusal::Signature);

    fn limit(per_second: f64, burst: u32) -> RefusalLimit {
        let settings = RateLimitSettings { refused_tokens: per_second, burst, ..RateLimitSettings::default() };
        RefusalLimit::new(&settings).unwrap()
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_was_refused_counts_and_who_was_good_before_is_always_let_through() {
        let (limit, here, there) = (limit(10.0, 3), address("192.0.2.1"), address("192.0.2.2"));
        for _ in 0..1_000 {
            limit.checked(here, "good", &Ok(()));
            limit.checked(here, "any", &Err::<(), _>(Refusal::KeysUnavailable));
        }
        for number in 0..3 {
            assert_eq!(limit.admit(here, "bad"), Ok(()), "{number}");
            limit.checked(here, "bad", &BAD);
        }
        assert_eq!(limit.admit(here, "bad"), Err(Duration::from_millis(100)));
        assert_eq!(limit.admit(here, "new"), Err(Duration::from_millis(100)), "asking costs nothing");
        assert_eq!((limit.admit(here, "good"), limit.admit(there, "bad")), (Ok(()), Ok(())));
        // Refused once, it is a token like any other.
        limit.checked(here, "good", &BAD);
        assert!(limit.admit(here, "good").is_err());
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(limit.admit(here, "new"), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attack_from_a_network_of_ipv6_is_one_and_what_is_remembered_is_bounded() {
        let limit = limit(0.001, 2);
        limit.checked(address("2001:db8:1:1::1"), "a", &BAD);
        limit.checked(address("2001:db8:1:1::2"), "b", &BAD);
        assert!(limit.admit(address("2001:db8:1:1:ffff::3"), "c").is_err());
        assert!(limit.admit(address("2001:db8:1:2::1"), "c").is_ok());
        for number in 0..2 * REMEMBERED {
            limit.checked(address("192.0.2.1"), &format!("good {number}"), &Ok(()));
        }
        assert!(limit.good.len() <= REMEMBERED);
        assert!(
            RefusalLimit::new(&RateLimitSettings { refused_tokens: 0.0, ..RateLimitSettings::default() }).is_none()
        );
    }
}
