//! What the micro-benchmarks in `benches/` call: what is ours on the way of a call, each piece by itself. No release holds this.
#![allow(clippy::panic, clippy::expect_used, missing_docs, reason = "a benchmark whose setting is wrong ends")]

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tracing::{Dispatch, info};
use url::Url;

use crate::auth::Caller;
use crate::backend::{self, BackendClient, Route, User};
use crate::identity::{TokenSource, benching::token_source};
use crate::settings::BackendSettings;
use crate::telemetry::logs::{self, LogGuard};
use crate::telemetry::metrics::Metrics;
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
        let backend = Arc::new(backend.expect("TLS"));
        let wiring = Wiring {
            backend: Arc::clone(&backend),
            metrics,
            audit: Arc::default(),
            spans: None,
            max_in_flight_per_tool: 512,
            tell_causes: false,
            out_of_time: CancellationToken::new(),
        };
        let mut extensions = http::Extensions::new();
        extensions.insert(Caller::unauthenticated([127, 0, 0, 1].into()));
        extensions.insert(RequestTrace::new(&http::HeaderMap::new()));
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
    tools::benching::write_response(&Ok(result.to_owned()))
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
