//! What a failure looks like from outside: the error object of contract §5.
//!
//! It is the text of a failed tool call and the body of our own HTTP errors. `message` is written for the model that reads it:
//! what happened, in whose hands the remedy is, what to do next. Nothing here may hold a token, a secret or a backend's body.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod check;
#[cfg(test)]
mod properties;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::telemetry::trace::TraceId;
use crate::visible;

/// The five kinds of failure that a caller can tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The arguments break the schema or a rule; nothing was sent to the backend.
    ValidationError,
    /// The backend, or this server as a whole, could not serve the call.
    ServiceError,
    /// Entra gave no token, or the backend refused it.
    AuthenticationError,
    /// The call ran past its deadline.
    TimeoutError,
    /// Our fault.
    InternalError,
}

impl ErrorCode {
    /// The code as it stands on the wire, in logs and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ValidationError => "VALIDATION_ERROR",
            Self::ServiceError => "SERVICE_ERROR",
            Self::AuthenticationError => "AUTHENTICATION_ERROR",
            Self::TimeoutError => "TIMEOUT_ERROR",
            Self::InternalError => "INTERNAL_ERROR",
        }
    }
}

/// The error object. Its fields serialise in this order.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    /// The kind of failure.
    pub error: ErrorCode,
    /// What happened, in whose hands the remedy is, and what to do next.
    pub message: String,
    /// The same for programs.
    pub details: Box<Details>,
}

/// The machine-readable part; what does not apply is left out.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Details {
    /// The backend's HTTP status, or ours when the problem is the body of an HTTP error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status_code: Option<u16>,
    /// The backend's path, or the one asked of us.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// For each argument that is wrong: what is wrong and what would be accepted.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
    /// The deadline that passed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<f64>,
    /// Of a write that failed: `unknown` when it may have happened, `created` when it did, and only its answer was lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<&'static str>,
    /// The `Idempotency-Key` of a write with an `outcome`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// Entra's error number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aadsts: Option<u32>,
    /// Which credential of the chain was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credential: Option<&'static str>,
    /// Entra's correlation id, for its support and sign-in logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// What the user's next token has to satisfy, as a claims request: for the challenge in the HTTP answer, not for its body.
    #[serde(skip)]
    pub claims: Option<String>,
    /// Whether the same call may succeed later, without anybody changing anything.
    pub retryable: bool,
    /// How long to wait before that, rounded up to whole seconds.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "whole_seconds")]
    pub retry_after_seconds: Option<Duration>,
    /// The technical cause; with `DEBUG=true` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What the backend says about its error: for the log, not for the caller.
    #[serde(skip)]
    pub backend_detail: Option<Box<str>>,
    /// Finds the log lines of this request.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "trace_id")]
    pub trace_id: Option<TraceId>,
}

impl Problem {
    /// A problem with nothing but its message; not retryable.
    pub fn new(error: ErrorCode, message: impl Into<String>) -> Self {
        Self { error, message: message.into(), details: Box::default() }
    }

    /// Our fault: the log has the story under the same trace id.
    pub fn internal() -> Self {
        Self::new(
            ErrorCode::InternalError,
            "The MCP server failed on this call through a fault of its own. Tell its operators the `trace_id`; trying again rarely helps.",
        )
    }

    /// Arguments that cannot be accepted, all of them at once.
    pub fn fields(fields: BTreeMap<String, String>) -> Self {
        let list: Vec<_> = fields.iter().map(|(field, wrong)| format!("`{field}` {wrong}")).collect();
        let mut problem = Self::new(
            ErrorCode::ValidationError,
            format!(
                "The arguments were not accepted: {}. Correct them and call again; nothing was sent to the backend.",
                list.join("; ")
            ),
        );
        problem.details.fields = fields;
        problem
    }

    /// The same problem under a trace id.
    #[must_use]
    pub fn traced(mut self, trace_id: TraceId) -> Self {
        self.details.trace_id = Some(trace_id);
        self
    }

    /// The object as compact JSON that holds only what a person can see: messages quote what was sent.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).map(visible::json).unwrap_or_else(|_| {
            r#"{"error":"INTERNAL_ERROR","message":"The MCP server could not describe an error.","details":{"retryable":false}}"#.to_owned()
        })
    }
}

fn whole_seconds<S: Serializer>(wait: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    let seconds = wait.map(|wait| wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0)));
    seconds.serialize(serializer)
}

fn trace_id<S: Serializer>(id: &Option<TraceId>, serializer: S) -> Result<S::Ok, S::Error> {
    match id {
        Some(id) => serializer.collect_str(id),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_in_the_contract_order_and_absent_ones_are_left_out() {
        let mut problem = Problem::new(ErrorCode::ServiceError, "The backend has no user `42`.");
        problem.details.status_code = Some(404);
        problem.details.path = Some("/users/42".to_owned());
        assert_eq!(
            problem.to_json(),
            r#"{"error":"SERVICE_ERROR","message":"The backend has no user `42`.","details":{"status_code":404,"path":"/users/42","retryable":false}}"#
        );
    }

    #[test]
    fn waits_are_rounded_up_so_that_nobody_comes_too_early() {
        let mut problem = Problem::new(ErrorCode::ServiceError, "later");
        problem.details.retry_after_seconds = Some(Duration::from_millis(1_200));
        assert!(problem.to_json().contains(r#""retry_after_seconds":2"#));
    }
}
