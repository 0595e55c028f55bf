//! How many tokens of one client address may be refused: each costs a check of its signature, a log line and an audit event. When
//! there were too many, the next ones from there wait, and are not looked at before.
//!
//! All callers behind a gateway have its address, and one of them must not keep the others out: whose token was good before is not
//! asked to wait, whatever the others send. Only who comes with a new token, while others use up what may be refused, has to
//! try again.

use std::net::IpAddr;
use std::time::Duration;

use super::rate::{Buckets, household};
use crate::auth::{Refusal, Verdict};
use crate::settings::RateLimitSettings;

/// Addresses that are remembered at the same time. One that is forgotten begins anew.
const REMEMBERED: usize = 16_384;

/// The limit of one replica.
pub(super) struct RefusalLimit(Buckets);

impl RefusalLimit {
    /// `None` when there is no limit.
    pub(super) fn new(settings: &RateLimitSettings) -> Option<Self> {
        let buckets = || Buckets::new(settings.refused_tokens, settings.burst, 0, REMEMBERED);
        (settings.refused_tokens > 0.0).then(|| Self(buckets()))
    }

    /// Whether a token from there that was never good may be checked, or how long it has to wait.
    pub(super) fn admit(&self, address: IpAddr) -> Result<(), Duration> {
        self.0.wait(household(address)).map_or(Ok(()), Err)
    }

    /// Counts a check that ended with a refusal.
    pub(super) fn checked<T>(&self, address: IpAddr, checked: &Result<T, Refusal>) {
        // That there are no keys says nothing about the token.
        if checked.as_ref().is_err_and(|refusal| refusal.verdict() != Verdict::Unavailable) {
            // As many at the same time as there are threads may be more than the bucket had: it stays empty.
            let _ = self.0.take(household(address));
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
    async fn only_what_was_refused_counts() {
        let (limit, here, there) = (limit(10.0, 3), address("192.0.2.1"), address("192.0.2.2"));
        for _ in 0..1_000 {
            limit.checked(here, &Ok(()));
            limit.checked(here, &Err::<(), _>(Refusal::KeysUnavailable));
        }
        for number in 0..3 {
            assert_eq!(limit.admit(here), Ok(()), "{number}");
            limit.checked(here, &BAD);
        }
        assert_eq!(limit.admit(here), Err(Duration::from_millis(100)));
        assert_eq!(limit.admit(here), Err(Duration::from_millis(100)), "asking costs nothing");
        assert_eq!(limit.admit(there), Ok(()));
        tokio::time::advance(Duration::from_millis(100)).await;
        assert_eq!(limit.admit(here), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attack_from_a_network_of_ipv6_is_one() {
        let limit = limit(0.001, 2);
        limit.checked(address("2001:db8:1:1::1"), &BAD);
        limit.checked(address("2001:db8:1:1::2"), &BAD);
        assert!(limit.admit(address("2001:db8:1:1:ffff::3")).is_err());
        assert!(limit.admit(address("2001:db8:1:2::1")).is_ok());
        assert!(
            RefusalLimit::new(&RateLimitSettings { refused_tokens: 0.0, ..RateLimitSettings::default() }).is_none()
        );
    }
}
