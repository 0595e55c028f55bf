//! The error table of contract §5: what a caller is told about each way to fail. The one place that decides it.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use http::StatusCode;

use crate::backend::{BackendError, Failure, IdentityError, Segment};
use crate::problem::{Details, ErrorCode, Problem};

/// Turns a backend's failure into advice. The argument names, for a 404, what the backend was asked for.
pub(super) trait ProblemExt<T> {
    fn or_problem(self, subject: impl FnOnce() -> String) -> Result<T, Problem>;
}

impl<T> ProblemExt<T> for Result<T, BackendError> {
    fn or_problem(self, subject: impl FnOnce() -> String) -> Result<T, Problem> {
        self.map_err(|error| advice(&error, subject))
    }
}

/// An argument that goes into a path, as the type that proves it harmless.
pub(super) fn segment(field: &str, text: String) -> Result<Segment, Problem> {
    Segment::try_from(text).map_err(|wrong| Problem::fields([(field.to_owned(), wrong.to_string())].into()))
}

/// So many calls of one tool are running that another has to wait outside.
pub(super) fn tool_busy() -> Problem {
    let mut problem = Problem::new(
        ErrorCode::ServiceError,
        "As many calls of this tool are running as may run at the same time; nothing was sent to the backend. Call again in a second.",
    );
    problem.details.retryable = true;
    problem.details.retry_after_seconds = Some(Duration::from_secs(1));
    problem
}

/// Without its audit log the server may not run anything (`AUDIT_REQUIRED`).
pub(super) fn unaudited() -> Problem {
    let mut problem = Problem::new(
        ErrorCode::InternalError,
        "The MCP server cannot write its audit log, and runs no tool without; nothing was sent to the backend. \
         Its operators have to mend that; call again in a minute.",
    );
    problem.details.retryable = true;
    problem.details.retry_after_seconds = Some(Duration::from_secs(60));
    problem
}

/// What is left of a call when the server has to stop before it ends.
pub(super) fn out_of_time(write: bool) -> Problem {
    let mut problem = Problem::new(
        ErrorCode::TimeoutError,
        "The MCP server is being stopped and could not finish this call. Another replica can: call again.",
    );
    problem.details.retryable = !write;
    if write {
        problem.message =
            "The MCP server is being stopped and could not wait for the backend's answer. The ticket may have been \
            created: look for it with `list_tickets` before you call again."
                .to_owned();
        problem.details.outcome = Some("unknown");
    }
    problem
}

pub(super) fn advice(error: &BackendError, subject: impl FnOnce() -> String) -> Problem {
    let (code, message, retryable) = match &error.failure {
        Failure::Identity(identity) => return with_doubt(no_token(error, identity, &own_token(identity, error.token_rejected)), error),
        Failure::OnBehalfOf(identity) => {
            let mut problem = no_token(error, identity, &users_token(identity, error.token_rejected));
            if identity.needs_user() {
                // Without claims from Entra a new sign-in is what can be asked for.
                problem.details.claims = Some(identity.claims().unwrap_or("{}").to_owned());
                problem.details.retryable = false;
                problem.details.retry_after_seconds = None;
            }
            return with_doubt(problem, error);
        }
        Failure::NoUser => (
            ErrorCode::AuthenticationError,
            "This server calls the backend on behalf of users, and this caller is an app without a user; nothing was sent to the \
             backend. Call with a user's token. The operators can let apps act with the server's own rights (OBO_APP_FALLBACK)."
                .to_owned(),
            false,
        ),
        Failure::Unauthorized if !error.token_replaced => (
            ErrorCode::AuthenticationError,
            "The backend does not accept the MCP server's token (401). No other token was tried: a token is replaced at most once in 30 \
             seconds, and only while Entra ID gives new ones and the call has time left. Its operators have to check the token's audience \
             (AZURE_SCOPES) and the rights of the server's identity in the backend. Calling again at once will not help."
                .to_owned(),
            false,
        ),
        Failure::Unauthorized => (
            ErrorCode::AuthenticationError,
            "The backend does not accept the MCP server's token, not even a new one. Its operators have to mend that: the token's \
             audience (AZURE_SCOPES) and the rights of the server's identity in the backend. Calling again will not help."
                .to_owned(),
            false,
        ),
        Failure::Status { status, .. } => status_advice(*status, subject),
        Failure::Unreachable(_) => (
            ErrorCode::ServiceError,
            "The backend could not be reached; nothing was sent to it. It may be restarting: call again in a few seconds, and if that \
             goes on, tell the operators."
                .to_owned(),
            true,
        ),
        Failure::Interrupted(_) => (
            ErrorCode::ServiceError,
            "The backend broke the connection off before its answer was complete. It may be restarting: call again in a few seconds."
                .to_owned(),
            true,
        ),
        Failure::Unreadable(_) => (
            ErrorCode::ServiceError,
            "The backend sent an answer that does not have the agreed form. Its developers have to mend that; calling again will not \
             help."
                .to_owned(),
            false,
        ),
        Failure::Encoded(coding) => (
            ErrorCode::ServiceError,
            format!(
                "The backend's answer has the content coding `{coding}`, which this server did not ask for (`Accept-Encoding: identity`). \
                 The operators of the backend, or of a gateway before it, have to switch that off; calling again will not help."
            ),
            false,
        ),
        Failure::TooLarge(limit) => (
            ErrorCode::ServiceError,
            format!("The backend's answer is larger than the {limit} bytes that this server reads. Ask for less: a lower `limit`, or more `filters`."),
            false,
        ),
        Failure::Timeout(timeout) if let Some(status) = error.status => (
            ErrorCode::TimeoutError,
            format!(
                "The backend answered {status}, but its whole answer did not arrive within {} seconds. Call again, or ask for less.",
                timeout.as_secs_f64()
            ),
            true,
        ),
        Failure::Timeout(timeout) => (
            ErrorCode::TimeoutError,
            format!("The backend gave no answer within {} seconds. Call again, or ask for less.", timeout.as_secs_f64()),
            true,
        ),
        Failure::Busy => (
            ErrorCode::ServiceError,
            "The backend has as many requests as it may have at the same time; nothing was sent to it. Call again in a second.".to_owned(),
            true,
        ),
        Failure::NoMemory { sent: false } => (
            ErrorCode::ServiceError,
            "The MCP server has no memory left for the answer to this call; nothing was sent to the backend. Call again in a second."
                .to_owned(),
            true,
        ),
        Failure::NoMemory { sent: true } => (
            ErrorCode::ServiceError,
            "The MCP server has no memory left for the backend's answer, because it holds many large ones at the same time. Call again in \
             a second, or ask for less: a lower `limit`, or more `filters`."
                .to_owned(),
            true,
        ),
        Failure::CircuitOpen(_) => (
            ErrorCode::ServiceError,
            "The backend is failing, so calls are being rejected without contacting it (circuit breaker open). Call again after \
             `retry_after_seconds`, and if that goes on, tell the operators."
                .to_owned(),
            true,
        ),
        Failure::Unhealthy(_) => (ErrorCode::ServiceError, "The backend says that it is not healthy. Call again later.".to_owned(), true),
    };
    let problem = Problem {
        error: code,
        message,
        details: Box::new(Details {
            status_code: error.status,
            path: Some(error.path.clone()),
            timeout_seconds: match &error.failure {
                Failure::Timeout(timeout) => Some(timeout.as_secs_f64()),
                _ => None,
            },
            retryable,
            retry_after_seconds: error.retry_after(),
            cause: Some(chain(error)),
            backend_detail: error.detail.clone(),
            ..Details::default()
        }),
    };
    with_doubt(problem, error)
}

/// Of a write that may have happened, that is what the caller has to know before all else.
fn with_doubt(mut problem: Problem, error: &BackendError) -> Problem {
    let Some(key) = &error.unknown_write else { return problem };
    problem.details.idempotency_key = Some(key.clone());
    problem.details.retryable = false;
    // A challenge would take the place of this answer, and clients send the call again after the sign-in.
    problem.details.claims = None;
    if error.applied {
        problem.message = format!(
            "The backend created the ticket, but {}. Do not create it again: find it with `list_tickets`. The backend's operators can \
             find the attempt under its Idempotency-Key {key}.",
            lost_answer(&error.failure)
        );
        problem.details.outcome = Some("created");
        return problem;
    }
    let what = match &error.failure {
        Failure::Timeout(_) => "gave no answer in time".to_owned(),
        failure if failure.may_have_been_applied() => failure.to_string(),
        // The last attempt surely did nothing; it was an earlier one that may have.
        _ => "gave no clear answer".to_owned(),
    };
    problem.message = format!(
        "The backend {what} after the ticket was sent to it, so the ticket may have been created. Look for it with `list_tickets` before \
         you call again, or it may be there twice. The backend's operators can find the attempt under its Idempotency-Key {key}.",
    );
    problem.details.outcome = Some("unknown");
    problem
}

/// What became of the answer to a write that was applied.
fn lost_answer(failure: &Failure) -> String {
    match failure {
        Failure::Timeout(timeout) => {
            format!("its whole answer did not arrive within {} seconds", timeout.as_secs_f64())
        }
        Failure::Interrupted(_) => "the connection broke before its answer was complete".to_owned(),
        Failure::Unreadable(_) => "its answer does not have the agreed form".to_owned(),
        Failure::Encoded(coding) => {
            format!("its answer has the content coding `{coding}`, which this server did not ask for")
        }
        Failure::TooLarge(limit) => format!("its answer is larger than the {limit} bytes that this server reads"),
        Failure::NoMemory { .. } => "this server had no memory for its answer".to_owned(),
        // An earlier attempt created it, and the last one failed in another way.
        _ => "its answer was lost".to_owned(),
    }
}

fn status_advice(status: StatusCode, subject: impl FnOnce() -> String) -> (ErrorCode, String, bool) {
    let (message, retryable) = match status {
        StatusCode::NOT_FOUND => (format!("The backend has no {}.", subject()), false),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => (
            format!("The backend did not accept the arguments ({}). Check that the values exist and fit together.", status.as_u16()),
            false,
        ),
        StatusCode::FORBIDDEN => (
            "The backend does not allow this. Its operators have to grant the right to it to the MCP server's identity, or to the user where \
             the server acts on a user's behalf; calling again will not help."
                .to_owned(),
            false,
        ),
        StatusCode::CONFLICT => {
            ("The backend refused this because it conflicts with what is there already. Read the current state first.".to_owned(), false)
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            ("The backend is being asked too much or too slowly. Wait before you call again, and ask for less.".to_owned(), true)
        }
        status if status.is_redirection() => (
            format!(
                "The backend answered with a redirection ({}), which this server does not follow. Its operators have to correct BACKEND_API_URL.",
                status.as_u16()
            ),
            false,
        ),
        status if status.is_server_error() => (
            format!(
                "The backend failed ({}). The fault is on its side: call again a little later, and if that goes on, tell the operators.",
                status.as_u16()
            ),
            true,
        ),
        status => (format!("The backend refused the call ({}). Calling again without a change will not help.", status.as_u16()), false),
    };
    (ErrorCode::ServiceError, message, retryable)
}

fn own_token(identity: &IdentityError, rejected: bool) -> String {
    let hint = identity.hint();
    match rejected {
        true => format!("The backend rejected the MCP server's token (401), and Entra ID gave no other. {hint}"),
        false => {
            format!("The MCP server could not get its own token from Entra ID; nothing was sent to the backend. {hint}")
        }
    }
}

fn users_token(identity: &IdentityError, rejected: bool) -> String {
    if identity.needs_user() {
        return "Entra ID wants the user to sign in once more before the backend may be called for them; nothing was sent to it. The \
                client has to get a new token with the claims in this answer's `WWW-Authenticate` header: calling again with the same \
                token does not help."
            .to_owned();
    }
    if rejected {
        return format!(
            "The backend rejected the token of the user who calls (401), and Entra ID gave no other. {}",
            identity.hint()
        );
    }
    format!(
        "The MCP server could not get a token for the backend on behalf of the user who calls; nothing was sent to the backend. {}",
        identity.hint()
    )
}

fn no_token(error: &BackendError, identity: &IdentityError, message: &str) -> Problem {
    Problem {
        error: ErrorCode::AuthenticationError,
        message: message.to_owned(),
        details: Box::new(Details {
            status_code: error.token_rejected.then_some(401),
            path: error.token_rejected.then(|| error.path.clone()),
            aadsts: identity.aadsts(),
            credential: Some(identity.credential()),
            correlation_id: identity.correlation_id().map(str::to_owned),
            retryable: identity.retryable(),
            retry_after_seconds: identity.retry_after(),
            cause: Some(chain(error)),
            ..Details::default()
        }),
    }
}

/// The error with all its causes, for the log.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
