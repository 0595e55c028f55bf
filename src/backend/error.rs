//! What can go wrong with the backend, in the backend's own words; what a caller is told stands in `tools::error`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use super::Route;
use super::breaker::Verdict;
use super::retry::Setback;
use crate::identity::IdentityError;
use crate::json::Malformed;
use crate::telemetry::metrics::Exchange;

/// A failed exchange with the backend.
#[derive(Debug)]
pub struct BackendError {
    /// What went wrong.
    pub failure: Failure,
    /// The route that was asked.
    pub route: Route,
    /// The path that was asked, below the backend's base URL and without its query. It holds arguments, and so is for the caller only.
    pub path: String,
    /// The status of the backend's answer, also where the rest of it did not arrive or cannot be read.
    pub status: Option<u16>,
    /// Whether the request was a write.
    pub write: bool,
    /// The backend answered, to this or an earlier attempt, that it did apply the write.
    pub applied: bool,
    /// The `Idempotency-Key` of a write that may have been applied although it failed.
    pub unknown_write: Option<String>,
    /// The backend had answered 401 to the token before, and there was no other: the failure says why.
    pub token_rejected: bool,
    /// The backend had answered 401 to the token before, and this is what came of the attempt with a new one.
    pub token_replaced: bool,
    /// What the backend says about the error, short and on one line: for the log. It is the backend's text, and no caller gets it.
    pub detail: Option<Box<str>>,
}

/// The ways to fail.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Entra gave no token; nothing was sent, unless `token_rejected` says so.
    #[error("could not get a token")]
    Identity(#[source] Arc<IdentityError>),
    /// The same on behalf of the user who calls.
    #[error("could not get a token on behalf of the user")]
    OnBehalfOf(#[source] Arc<IdentityError>),
    /// Calls are made on behalf of users, and this caller is none; nothing was sent.
    #[error("is called on behalf of users only")]
    NoUser,
    /// The backend answered 401; `token_replaced` says whether to a second token as well.
    #[error("refused the token")]
    Unauthorized,
    /// The backend answered with an error.
    #[error("answered {status}")]
    Status {
        /// Its status.
        status: StatusCode,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// No connection could be had; nothing was sent.
    #[error("could not be reached")]
    Unreachable(#[source] reqwest::Error),
    /// The connection broke before the answer was complete.
    #[error("broke the connection off")]
    Interrupted(#[source] reqwest::Error),
    /// The answer is no JSON of the agreed shape.
    #[error("sent an answer that cannot be read")]
    Unreadable(#[source] FormError),
    /// The answer has a content coding, and none was asked for.
    #[error("sent an answer with the content coding `{0}`, which this server did not ask for")]
    Encoded(Box<str>),
    /// The answer is larger than this many bytes.
    #[error("sent more than {0} bytes")]
    TooLarge(usize),
    /// There is no memory for the answer now.
    #[error("sent more than there is memory for now")]
    NoMemory {
        /// Whether the request was sent.
        sent: bool,
    },
    /// The deadline of the call passed.
    #[error("gave no answer within {0:?}")]
    Timeout(Duration),
    /// So many requests are with the backend already that another would only wait; nothing was sent.
    #[error("has all the requests that it may have at the same time")]
    Busy,
    /// The circuit breaker of the route is open, for so long; nothing was sent.
    #[error("keeps failing and is not asked for {0:?}")]
    CircuitOpen(Duration),
    /// `GET /health` was answered with this word instead of `healthy`.
    #[error("says `{0}` about its health, where `{{\"status\":\"healthy\"}}` is expected")]
    Unhealthy(Box<str>),
}

/// Where an answer leaves the agreed form, and what stands there in the agreed one. serde also quotes what it found, which is
/// the backend's data and belongs in no log and no error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct FormError(String);

impl From<serde_json::Error> for FormError {
    fn from(error: serde_json::Error) -> Self {
        let text = error.to_string();
        // The quotation comes first and may hold anything; what was expected is a text of ours.
        Self(match text.rsplit_once(", expected ") {
            Some((_found, expected)) => format!("expected {expected}"),
            None => text.strip_prefix('.').map(str::to_owned).unwrap_or(text),
        })
    }
}

impl From<Malformed> for FormError {
    fn from(malformed: Malformed) -> Self {
        Self(malformed.to_string())
    }
}

impl Failure {
    /// Whether a request that failed like this, once sent, may have taken effect.
    pub(crate) fn may_have_been_applied(&self) -> bool {
        match self {
            Self::Interrupted(_) | Self::Unreadable(_) | Self::Encoded(_) | Self::TooLarge(_) | Self::Timeout(_) => {
                true
            }
            Self::NoMemory { sent } => *sent,
            Self::Status { status, .. } => {
                // RFC 9110 section 15: a status that is none counts as one of the server's errors.
                !status.is_client_error() || *status == StatusCode::REQUEST_TIMEOUT
            }
            Self::Identity(_)
            | Self::OnBehalfOf(_)
            | Self::NoUser
            | Self::Unauthorized
            | Self::Unreachable(_)
            | Self::Busy
            | Self::CircuitOpen(_)
            | Self::Unhealthy(_) => false,
        }
    }

    /// The word for metrics about one exchange.
    pub(super) fn exchange(&self) -> Exchange {
        match self {
            Self::Status { status, .. } if status.is_server_error() => Exchange::ServerError,
            Self::Status { status, .. } if status.is_redirection() => Exchange::Redirection,
            Self::Status { .. } | Self::Unauthorized => Exchange::ClientError,
            Self::Unreachable(_) => Exchange::Unreachable,
            Self::Interrupted(_) => Exchange::Interrupted,
            Self::Unreadable(_) | Self::Encoded(_) | Self::TooLarge(_) | Self::Unhealthy(_) => Exchange::Unreadable,
            Self::Timeout(_) => Exchange::Timeout,
            Self::NoMemory { sent: true } => Exchange::Discarded,
            Self::NoMemory { sent: false }
            | Self::Identity(_)
            | Self::OnBehalfOf(_)
            | Self::NoUser
            | Self::Busy
            | Self::CircuitOpen(_) => Exchange::NotMade,
        }
    }
}

impl BackendError {
    /// As the retry table sees it; `None` for what is decided elsewhere.
    pub(super) fn setback(&self) -> Option<Setback> {
        match &self.failure {
            Failure::Unreachable(_) => Some(Setback::NotSent),
            Failure::Interrupted(_) => Some(Setback::Interrupted),
            Failure::Status { status, .. } => Some(Setback::Status(*status)),
            Failure::Unreadable(_) | Failure::Encoded(_) | Failure::TooLarge(_) => Some(Setback::Unreadable),
            // Memory is not there sooner when it is asked for again at once.
            // A token is the token source's to retry, and past the deadline there is no time.
            // A full house and an open breaker exist to keep calls away: repeating would defeat them.
            Failure::NoMemory { .. }
            | Failure::Identity(_)
            | Failure::OnBehalfOf(_)
            | Failure::NoUser
            | Failure::Unauthorized
            | Failure::Timeout(_)
            | Failure::Busy
            | Failure::CircuitOpen(_)
            | Failure::Unhealthy(_) => None,
        }
    }

    /// What it tells the circuit breaker.
    pub(super) fn verdict(&self) -> Verdict {
        match &self.failure {
            // A 500 is what a working backend says when it cannot cope with one request.
            Failure::Status {
                status: StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT,
                ..
            } => Verdict::Fails,
            Failure::Status { status: StatusCode::TOO_MANY_REQUESTS, .. } => Verdict::Unknown,
            Failure::Unreachable(_) => Verdict::Unreachable,
            Failure::Interrupted(_) | Failure::Timeout(_) => Verdict::Fails,
            Failure::Status { .. }
            | Failure::Unauthorized
            | Failure::Unreadable(_)
            | Failure::Encoded(_)
            | Failure::TooLarge(_) => Verdict::Works,
            Failure::NoMemory { .. }
            | Failure::Identity(_)
            | Failure::OnBehalfOf(_)
            | Failure::NoUser
            | Failure::Busy
            | Failure::CircuitOpen(_)
            | Failure::Unhealthy(_) => Verdict::Unknown,
        }
    }

    /// Whether we kept the request from the backend ourselves.
    pub(super) fn was_turned_away(&self) -> bool {
        matches!(self.failure, Failure::Busy | Failure::CircuitOpen(_))
    }

    /// When the backend wants to be asked again.
    pub fn retry_after(&self) -> Option<Duration> {
        match &self.failure {
            Failure::Status { retry_after, .. } => *retry_after,
            Failure::CircuitOpen(wait) => Some(*wait),
            Failure::Busy | Failure::NoMemory { .. } => Some(Duration::from_secs(1)),
            _ => None,
        }
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the backend {} (`{}`)", self.failure, self.route.name())
    }
}

impl std::error::Error for BackendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.failure.source()
    }
}
