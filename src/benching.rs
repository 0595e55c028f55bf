//! What the micro-benchmarks in `benches/` call: what is ours on the way of a call, each piece by itself. No release holds this.
#![allow(clippy::panic, clippy::expect_used, missing_docs, reason = "a benchmark whose setting is wrong ends")]

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use serde_json::{Map, Value};
use tracing::{Dispatch, info};
use url::Url;

use crate::backend::{self, BackendClient, Route, User};
use crate::identity::{TokenSource, benching::token_source};
use crate::settings::BackendSettings;
use crate::telemetry::logs::{self, LogGuard};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::RequestTrace;
use crate::tools::{self, TOOL_NAMES};

/// A server's inside without a server.
pub struct Inside {
    identity: Arc<TokenSource>,
    backend: BackendClient,
}

impl Default for Inside {
    fn default() -> Self {
        let url = Url::parse("http://backend.internal:8080/api").expect("an address");
        let identity = token_source().expect("a token");
        let metrics = Arc::new(Metrics::new(&TOOL_NAMES, &Route::TEMPLATES));
        let backend = BackendClient::new(&BackendSettings::new(url), Arc::clone(&identity), metrics);
        Self { identity, backend: backend.expect("TLS") }
    }
}

impl Inside {
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

/// The process's subscriber, and what keeps its writer alive.
pub fn logs() -> (Dispatch, LogGuard) {
    logs::benching::dispatch().expect("a thread, and the filter that is the default")
}

/// The line that ends a call.
pub fn log_call(trace: &RequestTrace) {
    let _inside = trace.span().enter();
    info!(
        gen_ai.tool.name = "get_user_profile",
        outcome = "ok",
        duration_ms = 0.123,
        backend.attempts = 1,
        backend.status_code = 200,
        client.address = %"127.0.0.1:40000",
        "tool `get_user_profile` succeeded after 0.123 ms"
    );
}
