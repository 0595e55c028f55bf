//! Tokens that were good, and what they said: whoever calls again with one is known at once.
//!
//! The signature is nearly all that a check costs, and it says the same every time: the same bytes are signed by the same key, or
//! are not. So a token that passed every check is remembered by its SHA-256, never as it came, together with what may end it: its own
//! times, which are asked at each request with the same leeway, and the key that signed it. A fetch of keys, which comes each
//! hour, brings every key anew, and then every token is checked in full once more; a key that its tenant publishes no longer ends its
//! tokens with that fetch, and keys that are too old to be used end all. Only good tokens get in here, so that nobody can fill it
//! with what they made up.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use quick_cache::sync::Cache;
use sha2::{Digest as _, Sha256};

use super::Said;
use super::keys::Key;

/// Tokens that are remembered at the same time. One that is forgotten is checked as if it were new.
const REMEMBERED: usize = 8_192;

/// The SHA-256 of a token.
type Name = [u8; 32];

/// What the checks of one token have proved.
pub(super) struct Proof {
    pub(super) said: Arc<Said>,
    /// The place of its tenant among those that are trusted.
    pub(super) tenant: usize,
    /// What it was signed with.
    pub(super) key: Arc<Key>,
    /// When it is good, in seconds since 1970, with the leeway.
    pub(super) good: RangeInclusive<u64>,
}

impl Proof {
    /// Whether its time has come and is not over.
    pub(super) fn is_timely(&self, now: SystemTime) -> bool {
        // A clock before 1970 is no time for any token.
        let now = now.duration_since(UNIX_EPOCH);
        now.is_ok_and(|now| self.good.contains(&now.as_secs()))
    }
}

/// The tokens that one replica remembers.
pub(super) struct ProvenTokens(Cache<Name, Arc<Proof>>);

impl ProvenTokens {
    pub(super) fn new() -> Self {
        Self(Cache::new(REMEMBERED))
    }

    /// What was proved of a token.
    pub(super) fn get(&self, token: &str) -> Option<Arc<Proof>> {
        self.0.get(&name(token))
    }

    /// Remembers it.
    pub(super) fn insert(&self, token: &str, proof: Proof) {
        self.0.insert(name(token), Arc::new(proof));
    }

    /// Forgets it, for it is good no longer.
    pub(super) fn remove(&self, token: &str) {
        self.0.remove(&name(token));
    }
}

fn name(token: &str) -> Name {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Permissions;
    use crate::telemetry::audit::Subject;

    #[test]
    fn what_is_remembered_is_bounded_and_a_token_is_good_within_its_times_only() {
        let said = || {
            let [tenant, object, app] = ["t", "o", "a"].map(Box::from);
            let subject = Arc::new(Subject { tenant, object, app });
            Arc::new(Said { subject, delegated: false, permissions: Permissions::default() })
        };
        let proof = |good| Proof { said: said(), tenant: 0, key: Key::any(), good };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        for (good, is_timely) in [
            (now - 60..=now + 60, true),
            (0..=u64::MAX, true),
            (now + 60..=now + 120, false),
            (now - 120..=now - 60, false),
            (now + 60..=now - 60, false),
        ] {
            assert_eq!(proof(good.clone()).is_timely(SystemTime::now()), is_timely, "{good:?}");
        }
        let tokens = ProvenTokens::new();
        for number in 0..2 * REMEMBERED {
            tokens.insert(&number.to_string(), proof(0..=u64::MAX));
        }
        assert!((REMEMBERED / 2..=REMEMBERED).contains(&tokens.0.len()), "{}", tokens.0.len());
    }
}
