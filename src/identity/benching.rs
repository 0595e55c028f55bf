//! Ways in for micro-benchmarks: a token source that needs no Entra.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{BearerToken, TokenSource};

/// A source that holds a token as long as Entra's, for an hour.
pub(crate) fn token_source() -> Option<Arc<TokenSource>> {
    let token = BearerToken::new(&"x".repeat(1_500), Instant::now(), Duration::from_secs(3_600))?;
    Some(TokenSource::holding(token, "client secret"))
}
