//! Liveness and readiness. A probe reads memory: it never waits for Entra or the backend, and costs them nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};

use axum::extract::State;
use axum::response::{IntoResponse as _, Json, Response};
use http::StatusCode;
use serde::Serialize;
use time::OffsetDateTime;

use crate::telemetry::logs::Rfc3339;

/// This many failed checks in a row make the backend count as unhealthy; one good check makes it healthy.
const TOLERATED_FAILURES: u8 = 3;
/// The value of `failures` before the first check has ended.
const NEVER_CHECKED: u8 = u8::MAX;

/// What the probes are told.
pub struct Health {
    has_token: Box<dyn Fn() -> bool + Send + Sync>,
    /// Failed checks of the backend in a row; `None` when it does not count (`READINESS_CHECK_BACKEND=false`).
    backend_failures: Option<AtomicU8>,
    draining: AtomicBool,
}

impl Health {
    /// Starts not ready: nothing has been checked yet. `has_token` must answer from memory.
    pub fn new(has_token: impl Fn() -> bool + Send + Sync + 'static, backend_counts: bool) -> Self {
        Self {
            has_token: Box::new(has_token),
            backend_failures: backend_counts.then(|| AtomicU8::new(NEVER_CHECKED)),
            draining: AtomicBool::new(false),
        }
    }

    /// Whether the backend has to be checked at all.
    pub fn checks_backend(&self) -> bool {
        self.backend_failures.is_some()
    }

    /// Takes the result of one check, and tells whether it changed what the probes are told.
    pub fn backend_checked(&self, healthy: bool) -> bool {
        let before = self.backend();
        if let Some(failures) = &self.backend_failures {
            let count = match (healthy, failures.load(Relaxed)) {
                (true, _) => 0,
                (false, NEVER_CHECKED) => NEVER_CHECKED,
                (false, count) => count.saturating_add(1).min(TOLERATED_FAILURES),
            };
            failures.store(count, Relaxed);
        }
        before != self.backend()
    }

    /// From now on new work should go elsewhere.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Whether the server is about to stop.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// What `/health/ready` says: whether calls should come here.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && (self.has_token)() && self.backend() != Condition::Unhealthy
    }

    fn backend(&self) -> Condition {
        match self.backend_failures.as_ref().map(|failures| failures.load(Relaxed)) {
            None => Condition::Skipped,
            Some(count) if count < TOLERATED_FAILURES => Condition::Healthy,
            Some(_) => Condition::Unhealthy,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Condition {
    Healthy,
    Unhealthy,
    Skipped,
}

#[derive(Serialize)]
struct Report {
    status: &'static str,
    timestamp: String,
    service_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dependencies: Option<Dependencies>,
}

#[derive(Serialize)]
struct Dependencies {
    mcp_server: Condition,
    azure_auth: Condition,
    backend_service: Condition,
}

fn report(status: &'static str, dependencies: Option<Dependencies>) -> Json<Report> {
    let timestamp = Rfc3339(OffsetDateTime::now_utc()).to_string();
    Json(Report { status, timestamp, service_version: env!("CARGO_PKG_VERSION"), dependencies })
}

/// `GET /health/live`: the process answers. It depends on nothing.
pub(super) async fn live() -> Response {
    report("alive", None).into_response()
}

/// `GET /health/ready`: whether calls should come here.
pub(super) async fn ready(State(health): State<Arc<Health>>) -> Response {
    let backend_service = health.backend();
    let azure_auth = if (health.has_token)() { Condition::Healthy } else { Condition::Unhealthy };
    let (code, status) = if health.is_draining() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else if azure_auth == Condition::Unhealthy || backend_service == Condition::Unhealthy {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    } else {
        (StatusCode::OK, "ready")
    };
    (code, report(status, Some(Dependencies { mcp_server: Condition::Healthy, azure_auth, backend_service })))
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_bad_checks_make_the_backend_unhealthy_and_one_good_check_heals_it() {
        let health = Health::new(|| true, true);
        assert_eq!(health.backend(), Condition::Unhealthy, "before the first check");
        health.backend_checked(false);
        assert_eq!(health.backend(), Condition::Unhealthy);
        assert!(health.backend_checked(true));
        for (good, state) in [
            (false, Condition::Healthy),
            (false, Condition::Healthy),
            (true, Condition::Healthy),
            (false, Condition::Healthy),
            (false, Condition::Healthy),
            (false, Condition::Unhealthy),
            (false, Condition::Unhealthy),
            (true, Condition::Healthy),
        ] {
            health.backend_checked(good);
            assert_eq!(health.backend(), state);
        }
    }

    #[test]
    fn a_backend_that_does_not_count_is_skipped() {
        let health = Health::new(|| true, false);
        assert!(!health.backend_checked(false));
        assert_eq!(health.backend(), Condition::Skipped);
    }
}
