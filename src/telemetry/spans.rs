//! Spans for an OpenTelemetry collector: one for each MCP request, one for each attempt at the backend.
//!
//! Names and attributes are those of the OpenTelemetry semantic conventions for MCP (status: development, as of November 2026) and
//! for HTTP clients. No span holds arguments, results or paths with ids. Without an endpoint there are no spans. A call hands its
//! sampled spans to the SDK's bounded queue and never waits for the collector.

mod export;

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use http::HeaderValue;
use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::trace::{TraceContextExt as _, TraceId as OtelTraceId};
use opentelemetry::{Context, InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SamplingDecision, ShouldSample as _, SpanData, SpanEvents,
    SpanLinks, SpanProcessor as _,
};
use tracing::{info, warn};

use super::trace::{RequestTrace, Trace, TraceContext};
use crate::settings::{RootSampler, Sampling, TraceSettings};
pub use export::ExportError;
use export::Exporter;

/// The attribute names of the conventions, in one place because they still change.
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

/// `error.type` of a call whose client left.
const CANCELLED: &str = "cancelled";
/// Characters of a request id that a span keeps: what waits for the collector is bounded in bytes.
const LONGEST_REQUEST_ID: usize = 64;

/// Makes spans and hands them to the SDK's batch processor. Cheap to clone.
#[derive(Clone)]
pub struct Spans(Arc<Shared>);

struct Shared {
    sampler: Sampler,
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
    max_queue: u64,
    counts: Arc<Counts>,
}

/// What became of spans, since the start.
#[derive(Debug, Default)]
struct Counts {
    /// Handed to the processor.
    queued: AtomicU64,
    /// Taken from its queue.
    sent: AtomicU64,
    exported: AtomicU64,
    /// No room in the queue, or not taken by the collector.
    dropped: AtomicU64,
}

impl fmt::Debug for Spans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Spans")
    }
}

impl Spans {
    /// Starts the SDK's batch processor and its thread. Needs a tokio runtime, which carries the requests to the collector.
    ///
    /// # Errors
    ///
    /// When TLS, the exporter or the endpoint cannot be set up.
    pub fn start(settings: &TraceSettings) -> Result<Self, ExportError> {
        let counts = Arc::new(Counts::default());
        let exporter = Exporter::new(settings, Arc::clone(&counts))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(settings.max_queue)
            .with_max_export_batch_size(settings.max_batch.min(settings.max_queue))
            .with_scheduled_delay(settings.schedule_delay)
            .build();
        let mut processor = BatchSpanProcessor::new(exporter, batches);
        processor.set_resource(&resource(settings));
        info!("traces are exported to {}", settings.endpoint);
        let scope = InstrumentationScope::builder("mcp-server").with_version(env!("CARGO_PKG_VERSION")).build();
        let max_queue = settings.max_queue as u64;
        Ok(Self(Arc::new(Shared { sampler: sampler(settings.sampling), processor, scope, max_queue, counts })))
    }

    /// Begins the span of an MCP request at this moment. Returns the trace for the backend, which names this span as the parent, and
    /// the recording, if the request is sampled.
    pub fn begin(&self, request: &RequestTrace, started: Instant) -> (Trace, Option<Recording>) {
        let Trace { context, state } = request.trace().clone();
        let sampled = self.samples(request.parent(), context);
        let context = context.child().sampled_as(sampled);
        let recording = sampled.then(|| Recording {
            spans: self.clone(),
            context,
            state: state.as_ref().map(trace_state).unwrap_or_default(),
            started,
            started_at: SystemTime::now() - started.elapsed(),
        });
        (Trace { context, state }, recording)
    }

    /// Spans that were not sent because the collector was too slow or not there.
    pub fn dropped(&self) -> u64 {
        self.0.counts.dropped.load(Relaxed)
    }

    /// Spans that the collector has taken.
    pub fn exported(&self) -> u64 {
        self.0.counts.exported.load(Relaxed)
    }

    /// Sends what is left and ends the export; waits for `timeout` at most.
    pub async fn shutdown(&self, timeout: Duration) {
        let spans = self.clone();
        let shutdown = tokio::task::spawn_blocking(move || spans.0.processor.shutdown_with_timeout(timeout));
        let _ = tokio::time::timeout(timeout, shutdown).await;
        let missing = self.0.counts.queued.load(Relaxed).saturating_sub(self.exported());
        if missing > 0 {
            warn!("{missing} spans did not reach the collector");
        }
    }

    /// OpenTelemetry Trace SDK, "Sampling": the parent's decision, or the ratio by trace id.
    fn samples(&self, parent: Option<&Trace>, context: TraceContext) -> bool {
        let parent = parent.map(|parent| Context::new().with_remote_span_context(remote(parent)));
        let trace_id = OtelTraceId::from_bytes(context.trace_id().bytes());
        let result = self.0.sampler.should_sample(parent.as_ref(), trace_id, "", &SpanKind::Server, &[], &[]);
        result.decision == SamplingDecision::RecordAndSample
    }

    fn end(&self, span: SpanData) {
        let Shared { processor, max_queue, counts, .. } = &*self.0;
        let waiting = counts.queued.load(Relaxed).saturating_sub(counts.sent.load(Relaxed));
        // The SDK drops what finds no room too, but does not let anyone read how much.
        if waiting >= *max_queue {
            counts.dropped.fetch_add(1, Relaxed);
            return;
        }
        counts.queued.fetch_add(1, Relaxed);
        processor.on_end(span);
    }
}

fn resource(settings: &TraceSettings) -> Resource {
    let attributes = settings.resource.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    Resource::builder_empty()
        .with_attributes(attributes)
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_detector(Box::new(opentelemetry_sdk::resource::TelemetryResourceDetector))
        .build()
}

fn sampler(sampling: Sampling) -> Sampler {
    let root = match sampling.root {
        RootSampler::All => Sampler::AlwaysOn,
        RootSampler::None => Sampler::AlwaysOff,
        RootSampler::Share(share) => Sampler::TraceIdRatioBased(share),
    };
    if sampling.parent_based { Sampler::ParentBased(Box::new(root)) } else { root }
}

/// The state of tracing systems; what the SDK cannot read is dropped, as the specification asks.
fn trace_state(header: &HeaderValue) -> TraceState {
    header.to_str().ok().and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default()
}

fn remote(trace: &Trace) -> SpanContext {
    span_context(trace.context, true, trace.state.as_ref().map(trace_state).unwrap_or_default())
}

fn span_context(context: TraceContext, is_remote: bool, state: TraceState) -> SpanContext {
    let flags = TraceFlags::default().with_sampled(context.is_sampled());
    let trace_id = OtelTraceId::from_bytes(context.trace_id().bytes());
    SpanContext::new(trace_id, SpanId::from_bytes(context.span_id_bytes()), flags, is_remote, state)
}

/// What all spans of a kind have in common: their name, and most of their attributes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Description(Arc<Common>);

#[derive(Debug)]
struct Common {
    name: Cow<'static, str>,
    attributes: Vec<KeyValue>,
}

impl Description {
    /// Of MCP requests with this method, one that this server knows; and of calls of this tool, if it is one.
    pub fn of_operation(method: &'static str, tool: Option<&'static str>) -> Self {
        let mut attributes = vec![
            KeyValue::new(names::METHOD, method),
            KeyValue::new(names::TRANSPORT, "tcp"),
            KeyValue::new(names::NETWORK_PROTOCOL, "http"),
            KeyValue::new(names::NETWORK_PROTOCOL_VERSION, "1.1"),
        ];
        let Some(tool) = tool else { return Self(Arc::new(Common { name: method.into(), attributes })) };
        attributes.push(KeyValue::new(names::TOOL, tool));
        attributes.push(KeyValue::new(names::OPERATION, "execute_tool"));
        Self(Arc::new(Common { name: format!("{method} {tool}").into(), attributes }))
    }

    /// Of attempts at one of the backend's routes: its method, its path template, and the backend's host and port.
    pub fn of_attempts(method: &'static str, template: &'static str, address: &str, port: u16) -> Self {
        let attributes = vec![
            KeyValue::new(names::HTTP_METHOD, method),
            KeyValue::new(names::URL_TEMPLATE, template),
            KeyValue::new(names::SERVER_ADDRESS, Arc::<str>::from(address)),
            KeyValue::new(names::SERVER_PORT, i64::from(port)),
        ];
        Self(Arc::new(Common { name: format!("{method} {template}").into(), attributes }))
    }

    /// The attributes, with room for more.
    fn attributes(&self, more: usize) -> Vec<KeyValue> {
        let mut attributes = Vec::with_capacity(self.0.attributes.len() + more);
        attributes.extend_from_slice(&self.0.attributes);
        attributes
    }
}

/// An MCP request that is traced.
#[derive(Debug)]
pub struct Recording {
    spans: Spans,
    /// The request's own span.
    context: TraceContext,
    state: TraceState,
    started: Instant,
    /// The one reading of the clock: all times of the request's spans are offsets from it, so a clock that is set meanwhile does not
    /// tear them apart.
    started_at: SystemTime,
}

/// One attempt at the backend that has ended.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// The context that the backend got.
    pub context: TraceContext,
    /// Name and common attributes.
    pub description: &'a Description,
    /// How many attempts of the same request there were before.
    pub resends: u32,
    /// When it began.
    pub started: Instant,
    /// How long it took.
    pub took: Duration,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// The kind of failure, if it was one.
    pub error: Option<&'static str>,
}

/// An MCP request that has ended.
#[derive(Debug)]
pub struct Operation<'a> {
    /// The request's trace.
    pub request: &'a RequestTrace,
    /// Name and common attributes.
    pub description: &'a Description,
    /// The revision of MCP that the client speaks, if it is a known one.
    pub protocol: Option<&'static str>,
    /// The id of the JSON-RPC request.
    pub request_id: RequestId,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
    /// How long it took.
    pub took: Duration,
}

impl Recording {
    /// Ends the span of an attempt.
    pub fn attempt(&self, attempt: &Attempt<'_>) {
        let &Attempt { context, description, resends, started, took, status, error } = attempt;
        let mut attributes = description.attributes(3);
        if resends > 0 {
            attributes.push(KeyValue::new(names::RESENDS, i64::from(resends)));
        }
        if let Some(status) = status {
            attributes.push(KeyValue::new(names::HTTP_STATUS, i64::from(status)));
        }
        let failure = error.map(|why| match status.filter(|status| *status >= 300) {
            Some(status) => (Value::from(status.to_string()), why),
            None => (why.into(), why),
        });
        let start = self.started_at + started.saturating_duration_since(self.started);
        self.end(
            SpanKind::Client,
            context,
            self.context.span_id_bytes(),
            description,
            attributes,
            failure,
            start,
            took,
            None,
        );
    }

    /// Ends the span of a tool call. The conventions say of every failed one `tool_error`.
    pub fn end_tool_call(&self, operation: Operation<'_>, error: Option<&'static str>) {
        let word = |error| if error == CANCELLED { CANCELLED } else { "tool_error" };
        self.end_operation(operation, Vec::new(), error.map(|why| (word(why).into(), why)));
    }

    /// Ends the span of any other MCP request, with the code of the JSON-RPC error that answers it.
    pub fn end_request(&self, operation: Operation<'_>, error: Option<i32>) {
        let code = error.map(|code| Value::from(code.to_string()));
        let attributes = code.iter().map(|code| KeyValue::new(names::RPC_STATUS, code.clone())).collect();
        self.end_operation(operation, attributes, code.map(|code| (code, "")));
    }

    fn end_operation(&self, operation: Operation<'_>, more: Vec<KeyValue>, failure: Option<(Value, &'static str)>) {
        let Operation { request, description, protocol, request_id, client_address, took } = operation;
        let mut attributes = description.attributes(5);
        attributes.push(KeyValue::new(names::REQUEST_ID, request_id.bounded()));
        attributes.extend(protocol.map(|protocol| KeyValue::new(names::PROTOCOL, protocol)));
        attributes.extend(client_address.map(|address| KeyValue::new(names::CLIENT_ADDRESS, address.to_string())));
        attributes.extend(more);
        let parent = request.parent().map(|parent| parent.context.span_id_bytes());
        let link = request.link().map(|link| Link::with_context(remote(link)));
        let (context, start) = (self.context, self.started_at);
        self.end(
            SpanKind::Server,
            context,
            parent.unwrap_or_default(),
            description,
            attributes,
            failure,
            start,
            took,
            link,
        );
    }

    #[expect(clippy::too_many_arguments, reason = "they are what a span has")]
    fn end(
        &self,
        span_kind: SpanKind,
        context: TraceContext,
        parent: [u8; 8],
        description: &Description,
        mut attributes: Vec<KeyValue>,
        failure: Option<(Value, &'static str)>,
        start_time: SystemTime,
        took: Duration,
        link: Option<Link>,
    ) {
        let status = match failure {
            None => Status::Unset,
            Some((error, why)) => {
                attributes.push(KeyValue::new(names::ERROR, error));
                Status::error(why)
            }
        };
        let mut links = SpanLinks::default();
        links.links.extend(link);
        self.spans.end(SpanData {
            span_context: span_context(context, false, self.state.clone()),
            parent_span_id: SpanId::from_bytes(parent),
            // The only parents of ours are of attempts.
            parent_span_is_remote: span_kind == SpanKind::Server,
            span_kind,
            name: description.0.name.clone(),
            start_time,
            end_time: start_time + took,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status,
            instrumentation_scope: self.spans.0.scope.clone(),
        });
    }
}

/// The id of a JSON-RPC request.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "JSON-RPC has these two")]
pub enum RequestId {
    Number(i64),
    Text(Arc<str>),
}

impl RequestId {
    /// The same, or the beginning of a long one.
    fn bounded(self) -> Value {
        match self {
            Self::Number(id) => id.to_string().into(),
            Self::Text(id) => match id.char_indices().nth(LONGEST_REQUEST_ID).and_then(|(end, _)| id.get(..end)) {
                Some(beginning) => beginning.to_owned().into(),
                None => id.into(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_beginning_of_a_request_id_waits_for_the_collector() {
        for (id, kept) in [("", 0), ("a", 1), (&"a".repeat(64), 64), (&"a".repeat(1 << 20), 64), (&"ü".repeat(65), 128)]
        {
            let bounded = RequestId::Text(id.into()).bounded().to_string();
            assert!(bounded.len() == kept && id.starts_with(&*bounded), "{bounded}");
        }
    }
}
