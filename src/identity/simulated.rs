//! A token source whose authority is made up, for the tests and fuzz targets of rooms that need one.
#![cfg_attr(not(test), allow(dead_code, reason = "fuzz targets need less of it than tests"))]

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

use super::fault::{FaultClass, IdentityError};
use super::source::{BearerToken, TokenSource};
use super::transport;

const CREDENTIAL: &str = "client secret";

/// How one exchange ends.
#[derive(Debug)]
pub(crate) enum Answer {
    /// With a token that lives so long.
    Token { secret: String, life: Duration },
    /// With an error, and perhaps a wish for a pause.
    Refused { status: u16, pause: Option<Duration> },
    /// Without an answer.
    Silence,
}

/// A source that asks `authority` for each exchange. Needs a tokio runtime.
pub(crate) fn token_source<E>(authority: impl Fn() -> E + Send + Sync + 'static) -> Arc<TokenSource>
where
    E: Future<Output = Answer> + Send + 'static,
{
    TokenSource::with_exchange(CREDENTIAL, move || {
        let (sent, answer) = (Instant::now(), authority());
        async move {
            match answer.await {
                Answer::Token { secret, life } => {
                    BearerToken::new(&secret, sent, life).ok_or_else(|| Box::new(fault(FaultClass::Parse)))
                }
                Answer::Refused { status, pause } => {
                    let status = StatusCode::from_u16(status).ok();
                    Err(Box::new(IdentityError { status, pause, ..fault(FaultClass::Http) }))
                }
                Answer::Silence => Err(Box::new(fault(FaultClass::Timeout))),
            }
        }
    })
}

/// A source that never gets a token.
pub(crate) fn no_token() -> Arc<TokenSource> {
    token_source(|| async { Answer::Refused { status: 400, pause: None } })
}

/// Why there is no token when Entra answers like this.
#[cfg(test)]
pub(crate) fn refusal(status: u16, codes: Vec<u32>, pause: Option<Duration>) -> IdentityError {
    let status = StatusCode::from_u16(status).ok();
    let retry_at = pause.map(|pause| Instant::now() + pause.min(Duration::from_secs(300)));
    IdentityError { status, codes, pause, retry_at, ..fault(FaultClass::Http) }
}

/// What an HTTP answer in Entra's place comes to.
pub(crate) fn read_answer(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Result<Vec<u8>, Box<IdentityError>> {
    if !status.is_success() {
        return Err(Box::new(transport::error_answer(CREDENTIAL, status, headers, body)));
    }
    transport::checked_token(body).map_err(|reason| Box::new(fault(FaultClass::Parse).with_detail(reason)))
}

fn fault(class: FaultClass) -> IdentityError {
    IdentityError::new(class, CREDENTIAL)
}
