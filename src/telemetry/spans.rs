//! Spans for an OpenTelemetry collector: one for each MCP request, one for each attempt at the backend.
//!
//! Names and attributes are those of the OpenTelemetry semantic conventions for MCP (status: development, as of November 2026) and
//! for HTTP clients. Arguments and results are in none of them, and neither are paths with ids in them. Nothing of this exists
//! unless an endpoint is set; then a span that is sampled costs its attributes and a place in a bounded queue, and no call ever
//! waits for the collector.

mod export;

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceState};
use opentelemetry::{Context, InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, ShouldSample as _, SpanData};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::trace::{RequestTrace, Trace, TraceContext};
use crate::settings::{RootSampler, TraceSettings};
use export::{Exporter, Message};

/// The names of the conventions, in one place because they still move.
mod names {
    pub(super) const METHOD: &str = "mcp.method.name";
    pub(super) const PROTOCOL: &str = "mcp.protocol.version";
    pub(super) const REQUEST_ID: &str = "jsonrpc.request.id";
    pub(super) const TOOL: &str = "gen_ai.tool.name";
    pub(super) const OPERATION: &str = "gen_ai.operation.name";
    pub(super) const RPC_STATUS: &str = "rpc.response.status_code";
    pub(super) const ERROR: &str = "error.type";
    pub(super) const CLIENT_ADDRESS: &str = "client.address";
    pub(super) const TRANSPORT: &str = "network.transport";
    pub(super) const NETWORK_PROTOCOL: &str = "network.protocol.name";
    pub(super) const NETWORK_PROTOCOL_VERSION: &str = "network.protocol.version";
    pub(super) const HTTP_METHOD: &str = "http.request.method";
    pub(super) const URL_TEMPLATE: &str = "url.template";
    pub(super) const SERVER_ADDRESS: &str = "server.address";
    pub(super) const SERVER_PORT: &str = "server.port";
    pub(super) const HTTP_STATUS: &str = "http.response.status_code";
    pub(super) const RESENDS: &str = "http.request.resend_count";
}

/// What a span says whose work nobody waited for.
const CANCELLED: &str = "cancelled";
/// Whoever sends longer request ids gets them back, but no span holds more of them.
const LONGEST_REQUEST_ID: usize = 64;

/// Where spans are made, and handed over to the task that sends them. Cheap to clone.
#[derive(Clone)]
pub struct Spans(Arc<Shared>);

struct Shared {
    sampler: Sampler,
    scope: InstrumentationScope,
    queue: mpsc::Sender<Message>,
    counts: Arc<Counts>,
}

/// What became of spans, since the start.
#[derive(Debug, Default)]
struct Counts {
    ended: AtomicU64,
    exported: AtomicU64,
    /// No room in the queue, or refused by the collector for good.
    dropped: AtomicU64,
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Spans")
    }
}

impl Spans {
    /// Starts the task that sends spans. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the platform's TLS cannot be set up.
    pub fn start(settings: &TraceSettings) -> Result<Self, reqwest::Error> {
        let (queue, messages) = mpsc::channel(settings.max_queue);
        let counts = Arc::new(Counts::default());
        let exporter = Exporter::new(settings, Arc::clone(&counts))?;
        tokio::spawn(exporter.run(messages));
        info!("traces are exported to {}", settings.endpoint);
        let root = match settings.sampling.root {
            RootSampler::All => Sampler::AlwaysOn,
            RootSampler::None => Sampler::AlwaysOff,
            RootSampler::Share(share) => Sampler::TraceIdRatioBased(share),
        };
        let sampler = if settings.sampling.parent_based { Sampler::ParentBased(Box::new(root)) } else { root };
        let scope = InstrumentationScope::builder("mcp-server").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self(Arc::new(Shared { sampler, scope, queue, counts })))
    }

    /// Begins the span of an MCP request. Gives the trace that goes on to the backend, which names this span as the parent; and
    /// the span, if it is sampled.
    pub fn operation(&self, request: &RequestTrace, operation: &Operation<'_>) -> (Trace, Option<Span>) {
        let Trace { context, state, .. } = request.trace().clone();
        let parent = request.parent();
        let name = match operation.tool {
            Some(tool) => Cow::Owned(format!("{} {tool}", operation.method)),
            None => Cow::Borrowed(operation.method),
        };
        let remote = parent.map(|parent| Context::new().with_remote_span_context(parent.span_context(true)));
        let trace_id = context.otel_trace_id();
        let decision =
            self.0.sampler.should_sample(remote.as_ref(), trace_id, &name, &SpanKind::Server, &[], &[]).decision;
        let sampled = decision == SamplingDecision::RecordAndSample;
        let ours = Trace { context: context.child().sampled_as(sampled), state, spans: sampled.then(|| self.clone()) };
        if !sampled {
            return (ours, None);
        }
        let mut span = self.begin(&ours, ours.context, parent.map(|parent| parent.context), SpanKind::Server, name);
        if let Some(data) = &mut span.data {
            data.parent_span_is_remote = parent.is_some();
            data.links.links.extend(request.link().map(|link| Link::with_context(link.span_context(true))));
        }
        operation.describe(&mut span);
        (ours, Some(span))
    }

    /// Begins the span of one attempt at the backend.
    fn attempt(&self, parent: &Trace, context: TraceContext, attempt: &Attempt<'_>) -> Span {
        let name = Cow::Owned(format!("{} {}", attempt.method, attempt.template));
        let mut span = self.begin(parent, context, Some(parent.context), SpanKind::Client, name);
        span.set(names::HTTP_METHOD, attempt.method);
        span.set(names::URL_TEMPLATE, attempt.template);
        span.set(names::SERVER_ADDRESS, attempt.address.to_owned());
        span.set(names::SERVER_PORT, i64::from(attempt.port));
        if attempt.resends > 0 {
            span.set(names::RESENDS, i64::from(attempt.resends));
        }
        span
    }

    fn begin(
        &self,
        trace: &Trace,
        context: TraceContext,
        parent: Option<TraceContext>,
        span_kind: SpanKind,
        name: Cow<'static, str>,
    ) -> Span {
        let now = SystemTime::now();
        let data = SpanData {
            span_context: Trace { context, ..trace.clone() }.span_context(false),
            parent_span_id: parent.map_or(SpanId::INVALID, TraceContext::otel_span_id),
            parent_span_is_remote: false,
            span_kind,
            name,
            start_time: now,
            end_time: now,
            attributes: Vec::with_capacity(12),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: self.0.scope.clone(),
        };
        Span { spans: self.clone(), data: Some(Box::new(data)), started: Instant::now(), ended: false }
    }

    /// Spans that were not sent because the collector was too slow, or not there.
    pub fn dropped(&self) -> u64 {
        self.0.counts.dropped.load(Relaxed)
    }

    /// Spans that the collector has taken.
    pub fn exported(&self) -> u64 {
        self.0.counts.exported.load(Relaxed)
    }

    /// Sends what is left, if that is done in time.
    pub async fn flush(&self, patience: Duration) {
        let (done, flushed) = oneshot::channel();
        let flushing = async {
            self.0.queue.send(Message::Flush(done)).await.ok()?;
            flushed.await.ok()
        };
        let in_time = tokio::time::timeout(patience, flushing).await.is_ok();
        let missing = self.0.counts.ended.load(Relaxed).saturating_sub(self.exported());
        if !in_time || missing > 0 {
            warn!("{missing} spans did not reach the collector");
        }
    }
}

/// What is known of an MCP request when it begins.
#[derive(Debug)]
pub struct Operation<'a> {
    /// `tools/call` and its like: of the methods that this server knows, and no other.
    pub method: &'static str,
    /// The tool that is called, if there is one of that name.
    pub tool: Option<&'static str>,
    /// The revision of MCP that the client speaks.
    pub protocol: Option<&'a str>,
    /// The id of the JSON-RPC request.
    pub request_id: String,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
}

impl Operation<'_> {
    fn describe(&self, span: &mut Span) {
        span.set(names::METHOD, self.method);
        if let Some(tool) = self.tool {
            span.set(names::TOOL, tool);
            span.set(names::OPERATION, "execute_tool");
        }
        span.set(names::REQUEST_ID, self.request_id.chars().take(LONGEST_REQUEST_ID).collect::<String>());
        if let Some(protocol) = self.protocol {
            span.set(names::PROTOCOL, protocol.to_owned());
        }
        span.set(names::TRANSPORT, "tcp");
        span.set(names::NETWORK_PROTOCOL, "http");
        span.set(names::NETWORK_PROTOCOL_VERSION, "1.1");
        if let Some(address) = self.client_address {
            span.set(names::CLIENT_ADDRESS, address.to_string());
        }
    }
}

/// What is known of an attempt at the backend when it begins.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// `GET` or `POST`.
    pub method: &'static str,
    /// The path, without what was put into it.
    pub template: &'static str,
    /// The backend's host.
    pub address: &'a str,
    /// Its port.
    pub port: u16,
    /// How many attempts of the same call there were before.
    pub resends: u32,
}

impl Trace {
    /// Begins the span of an attempt that has this context, if the call is sampled.
    pub fn attempt<'a>(&self, context: TraceContext, attempt: impl FnOnce() -> Attempt<'a>) -> Option<Span> {
        self.spans.as_ref().map(|spans| spans.attempt(self, context, &attempt()))
    }

    fn span_context(&self, is_remote: bool) -> SpanContext {
        let state = self.state.as_ref().and_then(|state| state.to_str().ok());
        let state = state.and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default();
        let flags = if self.context.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        SpanContext::new(self.context.otel_trace_id(), self.context.otel_span_id(), flags, is_remote, state)
    }
}

/// A span that has begun. It is handed over when it is dropped, whatever becomes of its work.
#[derive(Debug)]
pub struct Span {
    spans: Spans,
    /// Taken when it is handed over.
    data: Option<Box<SpanData>>,
    started: Instant,
    ended: bool,
}

impl Span {
    fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        if let Some(data) = &mut self.data {
            data.attributes.push(KeyValue::new(name, value));
        }
    }

    fn fail(&mut self, why: &'static str) {
        if let Some(data) = &mut self.data {
            data.status = Status::error(why);
        }
    }

    /// Ends the span of a tool call: with an error if its result is one, of which the conventions say no more than that.
    pub fn end_tool_call(mut self, error: Option<&'static str>) {
        self.ended = true;
        if let Some(error) = error {
            self.set(names::ERROR, if error == CANCELLED { CANCELLED } else { "tool_error" });
            self.fail(error);
        }
    }

    /// Ends the span of any MCP request, with the code of the JSON-RPC error that answers it.
    pub fn end_request(mut self, error: Option<i32>) {
        self.ended = true;
        if let Some(code) = error {
            self.set(names::ERROR, code.to_string());
            self.set(names::RPC_STATUS, code.to_string());
            self.fail("");
        }
    }

    /// Ends the span of an attempt: with the status of the answer if there was one, and the kind of failure if it was one.
    pub fn end_attempt(mut self, status: Option<u16>, error: Option<&'static str>) {
        self.ended = true;
        if let Some(status) = status {
            self.set(names::HTTP_STATUS, i64::from(status));
        }
        if let Some(error) = error {
            match status.filter(|status| *status >= 300) {
                Some(status) => self.set(names::ERROR, status.to_string()),
                None => self.set(names::ERROR, error),
            }
            self.fail(error);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.ended {
            self.set(names::ERROR, CANCELLED);
            self.fail(CANCELLED);
        }
        let Some(mut data) = self.data.take() else { return };
        data.end_time = data.start_time + self.started.elapsed();
        let counts = &self.spans.0.counts;
        counts.ended.fetch_add(1, Relaxed);
        if self.spans.0.queue.try_send(Message::Span(data)).is_err() {
            counts.dropped.fetch_add(1, Relaxed);
        }
    }
}
