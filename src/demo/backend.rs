//! A stand-in for the backend: the routes of `api/backend.openapi.yaml` over seeded data, guarded by bearer tokens,
//! with tickets that stay and faults on demand.
//!
//! Data and log live in memory and are bounded; nothing outlasts the process.

mod data;
mod routes;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::body::Incoming;
use url::Url;

use self::routes::Service;
use super::entra::{ROLE, Verifier};
use super::fault::{FaultRule, Faults};
use super::wire::{Answer, Counter, InFlight, Log, Port, Server, read_body, without_credentials};

/// How the stand-in is set up.
#[derive(Debug, Clone)]
pub struct BackendOptions {
    /// Whose tokens it accepts.
    pub verifier: Verifier,
    /// Where its routes begin: empty, or a path such as `/api/v1`.
    pub path_prefix: String,
    /// The app role that a caller must hold; 403 without it.
    pub required_role: Option<String>,
    /// How many requests are kept in the log.
    pub log_capacity: usize,
}

impl BackendOptions {
    /// No prefix, and the role that the stand-in Entra grants.
    #[must_use]
    pub fn new(verifier: Verifier) -> Self {
        Self { verifier, path_prefix: String::new(), required_role: Some(ROLE.to_owned()), log_capacity: 2048 }
    }
}

/// One request, as it came.
#[derive(Debug, Clone)]
pub struct RecordedRequest {
    /// The method.
    pub method: Method,
    /// Path and query exactly as on the wire: neither decoded nor without the prefix.
    pub target: String,
    /// The headers; `authorization` holds a digest.
    pub headers: HeaderMap,
    /// What `authorization` really held.
    pub authorization_raw: Option<String>,
    /// The body; empty when it was too large to read.
    pub body: Bytes,
    /// When it came.
    pub at: SystemTime,
    /// The status of the answer; `None` while, or because, there is none.
    pub status: Option<StatusCode>,
}

impl RecordedRequest {
    /// A header as text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// The running stand-in; dropping it stops it.
pub struct StandInBackend {
    state: Arc<State>,
    server: Server,
    base_url: Url,
}

struct State {
    service: Service,
    path_prefix: String,
    faults: Faults,
    log: Log<RecordedRequest>,
    requests: Counter,
    cancelled: Arc<Counter>,
}

impl StandInBackend {
    /// Starts it on a free port of loopback.
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn start(options: BackendOptions) -> io::Result<Self> {
        let port = Port::bind().await?;
        let path_prefix = match options.path_prefix.trim_matches('/') {
            "" => String::new(),
            prefix => format!("/{prefix}"),
        };
        let base_url = format!("http://127.0.0.1:{}{path_prefix}", port.addr.port());
        let base_url = Url::parse(&base_url).map_err(io::Error::other)?;
        let state = Arc::new(State {
            service: Service::new(options.verifier, options.required_role),
            path_prefix,
            faults: Faults::default(),
            log: Log::new(options.log_capacity),
            requests: Counter::default(),
            cancelled: Arc::default(),
        });
        let serving = Arc::clone(&state);
        let server = port.serve(None, move |request| answer(Arc::clone(&serving), request));
        Ok(Self { state, server, base_url })
    }

    /// What to set as the backend's URL: `http://127.0.0.1:PORT/prefix`.
    #[must_use]
    pub fn base_url(&self) -> Url {
        self.base_url.clone()
    }

    /// Whether `GET /health` says so.
    pub fn set_healthy(&self, healthy: bool) {
        self.state.service.healthy.store(healthy, Ordering::Relaxed);
    }

    /// Replaces all fault rules; `None` or an empty list makes it honest again.
    pub fn set_fault(&self, rules: impl IntoIterator<Item = FaultRule>) {
        self.state.faults.set(rules);
    }

    /// Adds a fault rule.
    pub fn add_fault(&self, rule: FaultRule) {
        self.state.faults.add(rule);
    }

    /// Cuts all connections and refuses new ones, or listens again.
    ///
    /// # Errors
    /// When the port cannot be kept or taken again.
    pub async fn set_down(&self, down: bool) -> io::Result<()> {
        self.server.set_down(down).await
    }

    /// The newest requests, oldest first.
    #[must_use]
    pub fn requests(&self) -> Vec<RecordedRequest> {
        self.state.log.all()
    }

    /// Forgets the requests of [`StandInBackend::requests`]; the counters go on.
    pub fn forget_requests(&self) {
        self.state.log.clear();
    }

    /// How many requests came.
    #[must_use]
    pub fn request_count(&self) -> &Counter {
        &self.state.requests
    }

    /// How many requests lost their client before they were answered in full.
    #[must_use]
    pub fn cancelled_count(&self) -> &Counter {
        &self.state.cancelled
    }

    /// How many connections were accepted.
    #[must_use]
    pub fn connection_count(&self) -> &Counter {
        &self.server.connections
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Answer {
    let in_flight = InFlight::new(&state.cancelled);
    let (head, body) = request.into_parts();
    let body = read_body(body).await;
    let entry = state.log.push(RecordedRequest {
        method: head.method.clone(),
        target: head.uri.to_string(),
        authorization_raw: head.headers.get(AUTHORIZATION).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()),
        headers: without_credentials(&head.headers),
        body: body.clone().unwrap_or_default(),
        at: SystemTime::now(),
        status: None,
    });
    state.requests.add();
    let path = head.uri.path().strip_prefix(&state.path_prefix);
    let answer = state
        .faults
        .answer(
            &format!("{} {}", head.method, path.unwrap_or_default()),
            in_flight,
            |status| routes::refuse(status, head.uri.path()),
            || state.service.answer(&head.method, &head.uri, path, &head.headers, body.as_ref()),
        )
        .await;
    if let Ok(answer) = &answer {
        state.log.amend(entry, |request| request.status = Some(answer.status()));
    }
    answer
}

#[cfg(test)]
mod tests;
