//! What the micro-benchmarks in `benches/` call: what is ours on the way of a call, each piece by itself. No release holds this.
#![allow(
    clippy::panic,
    clippy::expect_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark whose setting is wrong ends"
)]

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::HeaderMap;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Dispatch, Level};
use url::Url;

use crate::auth::Caller;
use crate::backend::{self, BackendClient, Route, User};
use crate::identity::{TokenSource, benching::token_source};
use crate::settings::{AuditSettings, BackendSettings, TraceSettings};
use crate::telemetry::audit::{self, Audit};
use crate::telemetry::logs::{self, LogGuard, Told};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::spans::{Attempt, Description, Operation, RequestId, Spans};
use crate::telemetry::trace::RequestTrace;
use crate::tools::{self, TOOL_NAMES, ToolServer, Wiring};

/// A server's inside without a server.
pub struct Inside {
    identity: Arc<TokenSource>,
    backend: Arc<BackendClient>,
    tools: ToolServer,
    /// Of a request whose caller is known.
    extensions: http::Extensions,
}

impl Default for Inside {
    fn default() -> Self {
        let url = Url::parse("http://backend.internal:8080/api").expect("an address");
        let identity = token_source().expect("a token");
        let metrics = Arc::new(Metrics::new(&TOOL_NAMES, &Route::TEMPLATES));
        let backend = BackendClient::new(&BackendSettings::new(url), Arc::clone(&identity), Arc::clone(&metrics));
        let backend = Arc::new(backend.expect("an exporter"));
        let wiring = Wiring {
            backend: Arc::clone(&backend),
            metrics,
            audit: Arc::default(),
            spans: None,
            max_in_flight_per_tool: 512,
            tell_causes: false,
            out_of_time: CancellationToken::new(),
            tracker: TaskTracker::new(),
        };
        let mut extensions = http::Extensions::new();
        extensions.insert(Caller::unauthenticated([127, 0, 0, 1].into()));
        extensions.insert(RequestTrace::new(&HeaderMap::new()));
        Self { identity, backend, tools: ToolServer::new(wiring, |_, _| true), extensions }
    }
}

impl Inside {
    /// Reads the message of a plain call; whether it is one.
    pub fn read_call(&self, body: &[u8]) -> bool {
        tools::benching::read_call(&self.tools, body, &self.extensions)
    }

    /// Checks and decodes arguments; whether they are legal.
    pub fn decode_arguments(&self, tool: &str, arguments: Map<String, Value>) -> bool {
        tools::benching::decode(tool, arguments).is_ok()
    }

    /// Refuses arguments, and renders what is wrong with them.
    pub fn refuse_arguments(&self, tool: &str, arguments: Map<String, Value>) -> String {
        tools::benching::decode(tool, arguments).expect_err("legal arguments").to_json()
    }

    /// Renders a 404 of the backend for the caller.
    pub fn render_failure(&self, trace: &RequestTrace) -> String {
        let error = backend::benching::not_found(&self.backend);
        tools::benching::advice(&error).traced(trace.context().trace_id()).to_json()
    }

    /// Reads the token that is held.
    pub fn read_token(&self) -> usize {
        let token = self.identity.token().now_or_never().expect("a token at once").expect("a token");
        token.authorization().len()
    }

    /// Builds the address of a user.
    pub fn build_path(&self, id: &str) -> Url {
        backend::benching::user_url(&self.backend, id)
    }

    /// Decodes a user.
    pub fn decode_user(&self, body: &[u8]) -> User {
        backend::benching::user(&self.backend, body).expect("a user")
    }

    /// Checks rows and writes them anew.
    pub fn decode_rows(&self, body: &Bytes) -> String {
        backend::benching::rows(&self.backend, body).expect("rows").json
    }

    /// Renders a user as the text of a result.
    pub fn render_user(&self, user: &User) -> String {
        tools::benching::render(user).expect("JSON")
    }
}

/// The response of a plain call with this result.
pub fn write_response(result: &str) -> Vec<u8> {
    tools::benching::write_response(result.to_owned())
}

/// The process's subscriber, and what keeps its writer alive.
pub fn logs() -> (Dispatch, LogGuard) {
    logs::benching::dispatch().expect("a thread, and the filter that is the default")
}

/// A request that begins, is worked at three times, and ends.
pub fn follow_request() {
    let trace = RequestTrace::new(&HeaderMap::new());
    for _ in 0..3 {
        let _inside = trace.span().clone().entered();
    }
}

/// An audit that goes to the log, and to this file if there is one.
pub fn audit(file: Option<PathBuf>) -> Audit {
    Audit::start(&AuditSettings { file, required: false }).expect("a file")
}

/// The audit event and the line that end a call.
pub fn end_call(audit: &Audit, trace: &RequestTrace, tool: &'static audit::Tool) {
    let _inside = trace.span().enter();
    let (trace_id, address) = (trace.context().trace_id(), IpAddr::from([127, 0, 0, 1]));
    let event = audit::Event {
        name: audit::Name::ToolCall,
        tool: Some(tool),
        arguments: Some(audit::digest_of_json(&"u000000042")),
        decision: audit::Decision::Allowed,
        backend_status: Some(200),
        attempts: 1,
        took: Duration::from_micros(123),
        ..audit::Event::refused_caller(trace_id, Some(address), "ok")
    };
    audit.record_call(audit::Slot::default(), event, Told { level: Level::INFO, verb: "succeeded", cause: None });
}

/// Spans that go to a collector at this address. Needs a runtime.
pub fn spans(collector: Url) -> Spans {
    Spans::start(&TraceSettings::new(collector)).expect("an exporter")
}

/// What the two spans of a call have in common with others.
pub fn descriptions() -> (Description, Description) {
    let (method, template) = Route::TEMPLATES[0];
    let attempt = Description::of_attempts(method, template, "backend.internal", 8080);
    (Description::of_operation("tools/call", Some("get_user_profile")), attempt)
}

/// The two spans of a call.
pub fn trace_call(spans: &Spans, trace: &RequestTrace, described: &(Description, Description)) {
    let (started, took) = (Instant::now(), Duration::from_micros(123));
    let (onward, recording) = spans.begin(trace, started);
    let Some(recording) = recording else { return };
    recording.attempt(&Attempt {
        context: onward.context.child(),
        description: &described.1,
        resends: 0,
        started,
        took,
        status: Some(200),
        error: None,
    });
    let operation = Operation {
        request: trace,
        description: &described.0,
        protocol: Some("2025-11-25"),
        request_id: RequestId::Number(4711),
        client_address: Some(IpAddr::from([127, 0, 0, 1])),
        took,
    };
    recording.end_tool_call(operation, None);
}
