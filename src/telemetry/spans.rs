//! Spans for an OpenTelemetry collector: one for each MCP request, one for each attempt at the backend.
//!
//! Names and attributes are those of the OpenTelemetry semantic conventions for MCP (status: development, as of November 2026) and
//! for HTTP clients. Arguments and results are in none of them, and neither are paths with ids in them. Nothing of this exists
//! unless an endpoint is set; then a call hands over what its sampled spans will say to a bounded queue, and never waits for the
//! collector. The task that sends them lays them out, many in a row, as it is done with log lines.

mod export;
mod queue;
mod wire;

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fmt, mem};

use http::HeaderValue;
use smallvec::SmallVec;
use tracing::{info, warn};

use super::text::Digits;
use super::trace::{RequestTrace, Trace, TraceContext};
use crate::settings::{RootSampler, Sampling, TraceSettings};
use export::Exporter;
use queue::Queue;
use wire::{Kind, Message, Parent};

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
    sampling: Sampling,
    queue: Arc<Queue<Record>>,
    counts: Arc<Counts>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue.close();
    }
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
        let counts = Arc::new(Counts::default());
        let max_batch = settings.max_batch.min(settings.max_queue);
        let exporter = Exporter::new(settings, max_batch, Arc::clone(&counts))?;
        let queue = Arc::new(Queue::new(settings.max_queue, max_batch, settings.schedule_delay));
        tokio::spawn(exporter.run(Arc::clone(&queue)));
        info!("traces are exported to {}", settings.endpoint);
        Ok(Self(Arc::new(Shared { sampling: settings.sampling, queue, counts })))
    }

    /// Begins the span of an MCP request at this moment. Gives the trace that goes on to the backend, which names this span as the parent;
    /// and where the rest is recorded, if the request is sampled.
    pub fn begin(&self, request: &RequestTrace, started: Instant) -> (Trace, Option<Recording>) {
        let Trace { context, state } = request.trace().clone();
        let sampled = samples(self.0.sampling, request.parent().map(|parent| parent.context), context);
        let context = context.child().sampled_as(sampled);
        let recording =
            sampled.then(|| Recording { spans: self.clone(), context, started, attempts: Mutex::default() });
        (Trace { context, state }, recording)
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
        let in_time = tokio::time::timeout(patience, self.0.queue.flush()).await.is_ok();
        let missing = self.0.counts.ended.load(Relaxed).saturating_sub(self.exported());
        if !in_time || missing > 0 {
            warn!("{missing} spans did not reach the collector");
        }
    }
}

/// What all spans of a kind have in common, written once: their name, and most of their attributes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Description(Arc<Message>);

impl Description {
    /// Of MCP requests with this method: `tools/call` and its like, of those that this server knows, and no other; and of calls of
    /// this tool, if it is one.
    pub fn of_operation(method: &'static str, tool: Option<&'static str>) -> Self {
        let mut common = Message::default();
        match tool {
            Some(tool) => common.name(&[method, " ", tool]),
            None => common.name(&[method]),
        }
        common.text(names::METHOD, method);
        if let Some(tool) = tool {
            common.text(names::TOOL, tool);
            common.text(names::OPERATION, "execute_tool");
        }
        common.text(names::TRANSPORT, "tcp");
        common.text(names::NETWORK_PROTOCOL, "http");
        common.text(names::NETWORK_PROTOCOL_VERSION, "1.1");
        Self(Arc::new(common))
    }

    /// Of attempts at one of the backend's routes: its method, its path without what is put into it, and the backend's host and port.
    pub fn of_attempts(method: &'static str, template: &'static str, address: &str, port: u16) -> Self {
        let mut common = Message::default();
        common.name(&[method, " ", template]);
        common.text(names::HTTP_METHOD, method);
        common.text(names::URL_TEMPLATE, template);
        common.text(names::SERVER_ADDRESS, address);
        common.integer(names::SERVER_PORT, port.into());
        Self(Arc::new(common))
    }
}

/// That an MCP request is recorded, and its attempts at the backend so far. They are handed over together when the request ends.
#[derive(Debug)]
pub struct Recording {
    spans: Spans,
    /// The request's own span.
    context: TraceContext,
    started: Instant,
    attempts: Mutex<Attempts>,
}

/// Most requests have one.
type Attempts = SmallVec<[EndedAttempt; 1]>;

/// One attempt at the backend that has ended.
#[derive(Debug)]
pub struct Attempt<'a> {
    /// What the backend was told.
    pub context: TraceContext,
    /// What it has in common with others.
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
    /// Whose request it was.
    pub request: &'a RequestTrace,
    /// What it has in common with others.
    pub description: &'a Description,
    /// The revision of MCP that the client speaks, if it is one that is known.
    pub protocol: Option<&'static str>,
    /// The id of the JSON-RPC request.
    pub request_id: RequestId,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
    /// When it ended. The one time of day that a request's spans are told by: like this they fit together, whatever is done to the clock
    /// meanwhile.
    pub ended: SystemTime,
    /// How long it took.
    pub took: Duration,
}

impl Recording {
    /// Takes down an attempt.
    pub fn attempt(&self, attempt: &Attempt<'_>) {
        let failure = attempt.error.map(|why| {
            let told = attempt.status.filter(|status| *status >= 300);
            Failure { error: told.map_or(ErrorType::Word(why), ErrorType::HttpStatus), why }
        });
        self.lock().push(EndedAttempt {
            span_id: attempt.context.span_id_bytes(),
            started_after: nanos(attempt.started.saturating_duration_since(self.started)),
            took: nanos(attempt.took),
            description: attempt.description.clone(),
            failure: failure.map(Box::new),
            status: attempt.status,
            resends: attempt.resends,
        });
    }

    /// Hands over the spans of a tool call: with an error if its result is one, of which the conventions say no more than that.
    pub fn end_tool_call(&self, operation: Operation<'_>, error: Option<&'static str>) {
        let word = |error| if error == CANCELLED { CANCELLED } else { "tool_error" };
        self.end(operation, error.map(|why| Failure { error: ErrorType::Word(word(why)), why }));
    }

    /// Hands over the spans of any MCP request, with the code of the JSON-RPC error that answers it.
    pub fn end_request(&self, operation: Operation<'_>, error: Option<i32>) {
        self.end(operation, error.map(|code| Failure { error: ErrorType::RpcCode(code), why: "" }));
    }

    fn end(&self, operation: Operation<'_>, failure: Option<Failure>) {
        let Operation { request, description, protocol, request_id, client_address, ended, took } = operation;
        let end = nanos(ended.duration_since(UNIX_EPOCH).unwrap_or_default());
        let record = Record {
            context: self.context,
            state: request.trace().state.clone().map(Box::new),
            parent: request.parent().map(|parent| parent.context.span_id_bytes()),
            link: request.link().map(|link| Box::new(link.clone())),
            description: description.clone(),
            request_id: request_id.bounded(),
            protocol,
            client_address,
            start: end.saturating_sub(nanos(took)),
            end,
            failure: failure.map(Box::new),
            attempts: mem::take(&mut *self.lock()),
        };
        let Shared { queue, counts, .. } = &*self.spans.0;
        let spans = record.count();
        counts.ended.fetch_add(spans as u64, Relaxed);
        if !queue.add(record, spans) {
            counts.dropped.fetch_add(spans as u64, Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanos(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

/// The id of a JSON-RPC request.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "JSON-RPC has these two")]
pub enum RequestId {
    Number(i64),
    Text(Arc<str>),
}

impl RequestId {
    /// The same, or the beginning of a long one: what waits for the collector is bounded in bytes, not only in number.
    fn bounded(&self) -> Self {
        match self {
            Self::Text(id) => match id.char_indices().nth(LONGEST_REQUEST_ID).and_then(|(end, _)| id.get(..end)) {
                Some(beginning) => Self::Text(beginning.into()),
                None => self.clone(),
            },
            Self::Number(_) => self.clone(),
        }
    }
}

/// What the spans of a request will say. Small, for each call leaves one in the processor's cache: what few have is elsewhere.
#[derive(Debug)]
struct Record {
    context: TraceContext,
    state: Option<Box<HeaderValue>>,
    /// Somebody else's span.
    parent: Option<[u8; 8]>,
    /// Another trace that the request belongs to as well.
    link: Option<Box<Trace>>,
    description: Description,
    request_id: RequestId,
    protocol: Option<&'static str>,
    client_address: Option<IpAddr>,
    /// Nanoseconds since 1970.
    start: u64,
    end: u64,
    failure: Option<Box<Failure>>,
    attempts: Attempts,
}

/// An attempt as it is kept until it is laid out.
#[derive(Debug)]
struct EndedAttempt {
    span_id: [u8; 8],
    /// Nanoseconds since the request's start.
    started_after: u64,
    /// Nanoseconds.
    took: u64,
    description: Description,
    failure: Option<Box<Failure>>,
    status: Option<u16>,
    resends: u32,
}

/// How it went wrong.
#[derive(Debug)]
struct Failure {
    error: ErrorType,
    why: &'static str,
}

/// What `error.type` says of it.
#[derive(Debug)]
enum ErrorType {
    Word(&'static str),
    HttpStatus(u16),
    RpcCode(i32),
}

impl Failure {
    fn write(&self, span: &mut Message) {
        match self.error {
            ErrorType::Word(word) => span.text(names::ERROR, word),
            ErrorType::HttpStatus(status) => span.text(names::ERROR, status.to_string()),
            ErrorType::RpcCode(code) => {
                let code = code.to_string();
                span.text(names::ERROR, &code);
                span.text(names::RPC_STATUS, &code);
            }
        }
        span.failure(self.why);
    }
}

impl Record {
    /// How many spans it has.
    fn count(&self) -> usize {
        1 + self.attempts.len()
    }

    /// Each of its spans, in the order in which they ended.
    fn spans(&self) -> impl Iterator<Item = Ended<'_>> {
        self.attempts.iter().map(|attempt| Ended::Attempt(self, attempt)).chain([Ended::Request(self)])
    }

    fn write(&self, span: &mut Message, client: &mut Client) {
        let parent = self.parent.map(|span_id| Parent { span_id, is_remote: true });
        span.begin_span(Kind::Server, self.context, self.state.as_deref(), parent, self.start, &self.description.0);
        if let Some(link) = &self.link {
            span.link(link.context, link.state.as_ref());
        }
        match &self.request_id {
            RequestId::Number(id) => match u64::try_from(*id) {
                Ok(id) => span.text(names::REQUEST_ID, Digits::of(id).as_bytes()),
                Err(_) => span.text(names::REQUEST_ID, id.to_string()),
            },
            RequestId::Text(id) => span.text(names::REQUEST_ID, &**id),
        }
        span.append(client.attributes(self.protocol, self.client_address));
        if let Some(failure) = &self.failure {
            failure.write(span);
        }
        span.end(self.end);
    }
}

impl EndedAttempt {
    fn write(&self, request: &Record, span: &mut Message) {
        let context = request.context.with_span_id(self.span_id);
        let above = Some(Parent { span_id: request.context.span_id_bytes(), is_remote: false });
        let start = request.start.saturating_add(self.started_after);
        span.begin_span(Kind::Client, context, request.state.as_deref(), above, start, &self.description.0);
        if self.resends > 0 {
            span.integer(names::RESENDS, self.resends);
        }
        if let Some(status) = self.status {
            span.integer(names::HTTP_STATUS, status.into());
        }
        if let Some(failure) = &self.failure {
            failure.write(span);
        }
        span.end(start.saturating_add(self.took));
    }
}

/// One span of a record.
enum Ended<'a> {
    Request(&'a Record),
    Attempt(&'a Record, &'a EndedAttempt),
}

impl Ended<'_> {
    /// As one of the spans of a batch.
    fn write(&self, batch: &mut Message, client: &mut Client) {
        batch.span(|span| match self {
            Self::Request(record) => record.write(span, client),
            Self::Attempt(record, attempt) => attempt.write(record, span),
        });
    }
}

/// What a request says of its client, written once for all in a row that say the same.
#[derive(Debug, Default)]
struct Client {
    protocol: Option<&'static str>,
    address: Option<IpAddr>,
    attributes: Message,
}

impl Client {
    fn attributes(&mut self, protocol: Option<&'static str>, address: Option<IpAddr>) -> &Message {
        if (self.protocol, self.address) != (protocol, address) {
            let mut attributes = Message::default();
            if let Some(protocol) = protocol {
                attributes.text(names::PROTOCOL, protocol);
            }
            if let Some(address) = address {
                attributes.address(names::CLIENT_ADDRESS, address);
            }
            *self = Self { protocol, address, attributes };
        }
        &self.attributes
    }
}

/// Whether a trace is recorded: as its parent says, where that is asked; else as the root's rule says.
fn samples(sampling: Sampling, parent: Option<TraceContext>, context: TraceContext) -> bool {
    if let Some(parent) = parent.filter(|_| sampling.parent_based) {
        return parent.is_sampled();
    }
    match sampling.root {
        RootSampler::All => true,
        RootSampler::None => false,
        RootSampler::Share(share) => context.is_of_share(share),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_beginning_of_a_request_id_waits_for_the_collector() {
        for (id, kept) in [("", 0), ("a", 1), (&"a".repeat(64), 64), (&"a".repeat(1 << 20), 64), (&"ü".repeat(65), 128)]
        {
            let RequestId::Text(bounded) = RequestId::Text(id.into()).bounded() else { panic!("another kind") };
            assert!(bounded.len() == kept && id.starts_with(&*bounded), "{bounded}");
        }
    }
}
