//! Spans for an OpenTelemetry collector: one for each MCP request, one for each attempt at the backend.
//!
//! Names and attributes are those of the OpenTelemetry semantic conventions for MCP (status: development, as of November 2026) and
//! for HTTP clients. Arguments and results are in none of them, and neither are paths with ids in them. Nothing of this exists
//! unless an endpoint is set; then a call hands over what its sampled spans will say to a bounded queue, and never waits for the
//! collector. The task that sends them lays them out, many in a row, as it is done with log lines.

mod export;
mod queue;
mod wire;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::HeaderValue;
use tracing::{info, warn};

use super::logs::line::Digits;
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
    queue: Arc<Queue<Ended>>,
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
        let exporter = Exporter::new(settings, Arc::clone(&counts))?;
        let queue = Arc::new(Queue::new(settings.max_queue, settings.max_batch, settings.schedule_delay));
        tokio::spawn(exporter.run(Arc::clone(&queue)));
        info!("traces are exported to {}", settings.endpoint);
        Ok(Self(Arc::new(Shared { sampling: settings.sampling, queue, counts })))
    }

    /// Begins the span of an MCP request, which is now. Gives the trace that goes on to the backend, which names this span as the parent; and
    /// the span, if it is sampled.
    pub fn operation(&self, request: &RequestTrace, operation: &Operation<'_>) -> (Trace, Option<Span>) {
        let Trace { context, state, .. } = request.trace().clone();
        let parent = request.parent();
        let sampled = samples(self.0.sampling, parent.map(|parent| parent.context), context);
        let recording = sampled.then(|| Recording { spans: self.clone(), clock: Clock::set(operation.started) });
        let ours = Trace { context: context.child().sampled_as(sampled), state, recording };
        let parent = parent.map(|parent| Parent { span_id: parent.context.span_id_bytes(), is_remote: true });
        let link = request.link().map(|link| Box::new((link.context, link.state.clone())));
        let span = ours.recording.as_ref().map(|recording| {
            let about = About::Operation {
                request_id: operation.request_id.bounded(),
                protocol: operation.protocol,
                client_address: operation.client_address,
                link,
            };
            recording.begin(&ours, ours.context, parent, operation.description, about, operation.started)
        });
        (ours, span)
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

/// The time of day during one request, which is asked for once: like this the spans of a request fit together, whatever is done
/// to the clock meanwhile.
#[derive(Debug, Clone, Copy)]
struct Clock {
    set: Instant,
    /// Nanoseconds since 1970.
    then: u64,
}

impl Clock {
    /// A clock for a request that has begun at this moment, just now.
    fn set(now: Instant) -> Self {
        let then = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        Self { set: now, then }
    }

    /// Nanoseconds since 1970.
    fn tell(&self, moment: Instant) -> u64 {
        self.then.saturating_add(moment.saturating_duration_since(self.set).as_nanos() as u64)
    }
}

/// That a request is recorded, and where. It goes along with the request's [`Trace`].
#[derive(Debug, Clone)]
pub struct Recording {
    spans: Spans,
    clock: Clock,
}

impl Recording {
    fn begin(
        &self,
        trace: &Trace,
        context: TraceContext,
        parent: Option<Parent>,
        description: &Description,
        about: About,
        started: Instant,
    ) -> Span {
        let start = self.clock.tell(started);
        let (state, description) = (trace.state.clone().map(Box::new), description.clone());
        let record =
            Record { context, state, parent, start, end: start, description, about, status: None, failure: None };
        Span { spans: self.spans.clone(), record: Some(Box::new(record)), started }
    }
}

/// What is known of an MCP request when it begins.
#[derive(Debug)]
pub struct Operation<'a> {
    /// When that is.
    pub started: Instant,
    /// What it has in common with others.
    pub description: &'a Description,
    /// The revision of MCP that the client speaks, if it is one that is known.
    pub protocol: Option<&'static str>,
    /// The id of the JSON-RPC request.
    pub request_id: RequestId,
    /// The other end of the connection.
    pub client_address: Option<IpAddr>,
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

/// What a span will say. Small, for each call leaves two of them in the processor's cache: what few spans have is elsewhere.
#[derive(Debug)]
struct Record {
    context: TraceContext,
    state: Option<Box<HeaderValue>>,
    parent: Option<Parent>,
    /// Nanoseconds since 1970.
    start: u64,
    end: u64,
    description: Description,
    about: About,
    /// Of the backend's answer.
    status: Option<u16>,
    failure: Option<Box<Failure>>,
}

/// A span's record on its way to the collector: no more than a pointer is moved.
type Ended = Box<Record>;

/// What is known of one span when it begins, and not the same for all of its kind.
#[derive(Debug)]
enum About {
    Operation {
        request_id: RequestId,
        protocol: Option<&'static str>,
        client_address: Option<IpAddr>,
        /// Another trace that the request belongs to as well.
        link: Option<Box<(TraceContext, Option<HeaderValue>)>>,
    },
    Attempt {
        resends: u32,
    },
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
    const CANCELLED: Self = Self { error: ErrorType::Word(CANCELLED), why: CANCELLED };
}

impl Record {
    /// As one of the spans of a batch.
    fn write(&self, batch: &mut Message, client: &mut Client) {
        batch.span(|span| self.write_fields(span, client));
    }

    fn write_fields(&self, span: &mut Message, client: &mut Client) {
        let kind = match self.about {
            About::Operation { .. } => Kind::Server,
            About::Attempt { .. } => Kind::Client,
        };
        span.begin_span(kind, self.context, self.state.as_deref(), self.parent, self.start, &self.description.0);
        match &self.about {
            About::Operation { request_id, protocol, client_address, link } => {
                if let Some(link) = link {
                    span.link(link.0, link.1.as_ref());
                }
                match request_id {
                    RequestId::Number(id) => match u64::try_from(*id) {
                        Ok(id) => span.text(names::REQUEST_ID, Digits::of(id).as_str()),
                        Err(_) => span.text(names::REQUEST_ID, &id.to_string()),
                    },
                    RequestId::Text(id) => span.text(names::REQUEST_ID, id),
                }
                span.append(client.attributes(*protocol, *client_address));
            }
            About::Attempt { resends: 0 } => {}
            About::Attempt { resends } => span.integer(names::RESENDS, *resends),
        }
        if let Some(status) = self.status {
            span.integer(names::HTTP_STATUS, status.into());
        }
        if let Some(Failure { error, why }) = self.failure.as_deref() {
            match error {
                ErrorType::Word(word) => span.text(names::ERROR, word),
                ErrorType::HttpStatus(status) => span.text(names::ERROR, &status.to_string()),
                ErrorType::RpcCode(code) => {
                    let code = code.to_string();
                    span.text(names::ERROR, &code);
                    span.text(names::RPC_STATUS, &code);
                }
            }
            span.failure(why);
        }
        span.end(self.end);
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

impl Trace {
    /// Begins the span of an attempt at the backend that has this context, if the request is recorded; there were so many attempts
    /// of the same call before.
    pub fn attempt(
        &self,
        context: TraceContext,
        description: &Description,
        resends: u32,
        started: Instant,
    ) -> Option<Span> {
        let above = Parent { span_id: self.context.span_id_bytes(), is_remote: false };
        let about = About::Attempt { resends };
        Some(self.recording.as_ref()?.begin(self, context, Some(above), description, about, started))
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

/// A span that has begun. It is handed over when it ends or is dropped, whatever becomes of its work.
#[derive(Debug)]
pub struct Span {
    spans: Spans,
    /// Until it is handed over.
    record: Option<Box<Record>>,
    started: Instant,
}

impl Span {
    /// Ends the span of a tool call: with an error if its result is one, of which the conventions say no more than that.
    pub fn end_tool_call(mut self, error: Option<&'static str>, took: Duration) {
        let word = |error| if error == CANCELLED { CANCELLED } else { "tool_error" };
        self.end(took, None, error.map(|why| Failure { error: ErrorType::Word(word(why)), why }));
    }

    /// Ends the span of any MCP request, with the code of the JSON-RPC error that answers it.
    pub fn end_request(mut self, error: Option<i32>, took: Duration) {
        self.end(took, None, error.map(|code| Failure { error: ErrorType::RpcCode(code), why: "" }));
    }

    /// Ends the span of an attempt: with the status of the answer if there was one, and the kind of failure if it was one.
    pub fn end_attempt(mut self, status: Option<u16>, error: Option<&'static str>, took: Duration) {
        let failure = error.map(|why| {
            let told = status.filter(|status| *status >= 300);
            Failure { error: told.map_or(ErrorType::Word(why), ErrorType::HttpStatus), why }
        });
        self.end(took, status, failure);
    }

    fn end(&mut self, took: Duration, status: Option<u16>, failure: Option<Failure>) {
        let Some(mut record) = self.record.take() else { return };
        record.end = record.start.saturating_add(took.as_nanos() as u64);
        (record.status, record.failure) = (status, failure.map(Box::new));
        let Shared { queue, counts, .. } = &*self.spans.0;
        counts.ended.fetch_add(1, Relaxed);
        if !queue.add(record) {
            counts.dropped.fetch_add(1, Relaxed);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if self.record.is_some() {
            self.end(self.started.elapsed(), None, Some(Failure::CANCELLED));
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
            let RequestId::Text(bounded) = RequestId::Text(id.into()).bounded() else { panic!("another kind") };
            assert!(bounded.len() == kept && id.starts_with(&*bounded), "{bounded}");
        }
    }
}
