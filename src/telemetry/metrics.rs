//! Which figures are counted, under the names of the OpenTelemetry semantic conventions, in Prometheus' text format.
//!
//! Everything that a call touches is looked up beforehand: no label is built and no map is searched on the way of a call, and a
//! label can only have values that stand here. A new figure is a field of [`Metrics`], a line in [`Metrics::new`] (`registrations`)
//! that registers it with all its label values, and a method that says what happened; `docs/operations.md` lists it, and a test compares.

mod process;
mod registrations;
mod series;
mod text_format;

use std::fmt;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::problem::ErrorCode;
use series::Grid;
pub use series::{Figure, Kind, Labels};

/// What stands for every value that is none of ours, in the conventions' word.
const OTHER: &str = "_OTHER";

/// The revisions of the protocol that requests may speak.
pub const PROTOCOL_VERSIONS: [&str; 4] = ["2025-03-26", "2025-06-18", "2025-11-25", "2026-07-28"];

/// The codes of JSON-RPC errors that requests may end with.
const RPC_ERRORS: [(i32, &str); 7] = [
    (-32600, "-32600"),
    (-32601, "-32601"),
    (-32602, "-32602"),
    (-32603, "-32603"),
    (-32020, "-32020"),
    (-32021, "-32021"),
    (-32022, "-32022"),
];

/// The routes of the main listener.
const WEB_ROUTES: [&str; 5] = ["/mcp", "/health/live", "/health/ready", "/", RESOURCE_METADATA];
/// RFC 9728; whatever follows it is the resource's path.
const RESOURCE_METADATA: &str = "/.well-known/oauth-protected-resource";
const WEB_METHODS: [&str; 5] = ["POST", "GET", "HEAD", "DELETE", "OPTIONS"];
/// The statuses that we answer with, and nginx's word for a client that did not wait.
const WEB_STATUSES: [(u16, &str); 21] = [
    (200, "200"),
    (202, "202"),
    (204, "204"),
    (400, "400"),
    (401, "401"),
    (403, "403"),
    (404, "404"),
    (405, "405"),
    (406, "406"),
    (408, "408"),
    (409, "409"),
    (413, "413"),
    (415, "415"),
    (421, "421"),
    (429, "429"),
    (431, "431"),
    (CLIENT_LEFT, "499"),
    (500, "500"),
    (501, "501"),
    (503, "503"),
    (504, "504"),
];
const CLIENT_LEFT: u16 = 499;

/// Why an attempt at the backend was repeated.
pub const RETRY_REASONS: [&str; 5] = ["not_sent", "interrupted", "status", "throttled", "unauthorized"];

/// A request of MCP that is not a call of one of our tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "`WORDS` says what each is")]
pub enum Operation {
    Initialize,
    Discover,
    Ping,
    ListTools,
    CallUnknownTool,
    Other,
}

impl Operation {
    /// Method and tool of each, in order.
    const WORDS: [(&'static str, &'static str); 6] = [
        ("initialize", ""),
        ("server/discover", ""),
        ("ping", ""),
        ("tools/list", ""),
        ("tools/call", OTHER),
        (OTHER, ""),
    ];

    /// The method's name on the wire; `_OTHER` for those that are not served.
    pub fn method(self) -> &'static str {
        Self::WORDS.get(self as usize).map_or(OTHER, |(method, _)| method)
    }
}

/// How a tool call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With a result.
    Ok,
    /// Nobody was left to read the end.
    Cancelled,
    /// The server gave up a write that it had sent: whether the backend applied it is not known.
    Unknown,
    /// With an error object.
    Failed(ErrorCode),
}

impl Outcome {
    const ALL: [Self; 8] = [
        Self::Ok,
        Self::Cancelled,
        Self::Unknown,
        Self::Failed(ErrorCode::ValidationError),
        Self::Failed(ErrorCode::ServiceError),
        Self::Failed(ErrorCode::AuthenticationError),
        Self::Failed(ErrorCode::TimeoutError),
        Self::Failed(ErrorCode::InternalError),
    ];

    /// The word for logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Cancelled => "cancelled",
            Self::Unknown => "unknown",
            Self::Failed(code) => code.as_str(),
        }
    }

    /// The conventions' `error.type`: empty for a success.
    fn error_type(self) -> &'static str {
        if self == Self::Ok { "" } else { self.as_str() }
    }
}

/// How one exchange with the backend ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// 2xx, read to its end.
    Success,
    /// 3xx, which is not followed.
    Redirection,
    /// 4xx.
    ClientError,
    /// 5xx.
    ServerError,
    /// No connection.
    Unreachable,
    /// The connection broke.
    Interrupted,
    /// The deadline passed.
    Timeout,
    /// An answer that cannot be read, or is too large.
    Unreadable,
    /// An answer that there was no memory for.
    Discarded,
    /// Nothing was sent.
    NotMade,
    /// Nobody was left to read the answer.
    Cancelled,
}

impl Exchange {
    const ALL: [(Self, &'static str); 11] = [
        (Self::Success, "2xx"),
        (Self::Redirection, "3xx"),
        (Self::ClientError, "4xx"),
        (Self::ServerError, "5xx"),
        (Self::Unreachable, "unreachable"),
        (Self::Interrupted, "interrupted"),
        (Self::Timeout, "timeout"),
        (Self::Unreadable, "unreadable"),
        (Self::Discarded, "discarded"),
        (Self::NotMade, "not_made"),
        (Self::Cancelled, "cancelled"),
    ];

    /// The word for it, in metrics and spans.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(other, _)| *other == self).map_or("", |(_, word)| *word)
    }
}

/// Whose fault it is that a call did not succeed: what a service level is reckoned by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nobody's: it did succeed.
    None,
    /// The caller's: wrong arguments, or they left.
    Caller,
    /// The backend's own answer was an error.
    Backend,
    /// Ours, and that of everything else between the caller and the backend's answer.
    Server,
}

impl Fault {
    const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Caller => "caller",
            Self::Backend => "backend",
            Self::Server => "server",
        }
    }
}

/// The ends that a call can come to, each with whose fault it is.
const ENDS: [(Outcome, Fault); 9] = [
    (Outcome::Ok, Fault::None),
    (Outcome::Cancelled, Fault::Caller),
    (Outcome::Unknown, Fault::Server),
    (Outcome::Failed(ErrorCode::ValidationError), Fault::Caller),
    (Outcome::Failed(ErrorCode::ServiceError), Fault::Backend),
    (Outcome::Failed(ErrorCode::ServiceError), Fault::Server),
    (Outcome::Failed(ErrorCode::AuthenticationError), Fault::Server),
    (Outcome::Failed(ErrorCode::TimeoutError), Fault::Server),
    (Outcome::Failed(ErrorCode::InternalError), Fault::Server),
];

/// One call of a tool, after its end.
#[derive(Debug, Clone, Copy)]
pub struct EndedCall<'a> {
    /// Its place among the tools.
    pub tool: usize,
    /// The revision of the protocol that it came by.
    pub protocol: &'a str,
    /// How it ended.
    pub outcome: Outcome,
    /// Whether the failure was the backend's own answer.
    pub backend_declared: bool,
    /// How long it took.
    pub took: Duration,
    /// How much of that the backend had.
    pub at_backend: Duration,
    /// Whether it only reads.
    pub reads: bool,
}

/// What turned a call away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// `MAX_CONNECTIONS`.
    Connections,
    /// `MAX_IN_FLIGHT`.
    Server,
    /// `MAX_IN_FLIGHT_PER_TOOL`.
    Tool,
    /// `BACKEND_MAX_CONCURRENCY`.
    Backend,
    /// The circuit breaker.
    Breaker,
    /// `RATE_LIMIT_PER_CALLER` or `RATE_LIMIT_PER_ADDRESS`.
    Caller,
    /// `RATE_LIMIT_REFUSED_TOKENS`.
    RefusedTokens,
    /// `MAX_BUFFERED_BYTES`.
    Memory,
}

impl Shed {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Connections, "connections"),
        (Self::Server, "server"),
        (Self::Tool, "tool"),
        (Self::Backend, "backend"),
        (Self::Breaker, "breaker"),
        (Self::Caller, "caller"),
        (Self::RefusedTokens, "refused_tokens"),
        (Self::Memory, "memory"),
    ];
}

/// How much may be in flight at the same time; the names are those of [`Shed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "`Shed` says which setting each is")]
pub struct Capacity {
    pub connections: usize,
    pub server: usize,
    pub tool: usize,
    pub backend: usize,
    /// In bytes.
    pub memory: usize,
}

/// The figures, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    /// By operation, error and protocol version. The tools come after the other operations.
    operations: Grid,
    /// By tool, then by place in [`ENDS`].
    calls: Vec<Vec<Counter>>,
    overhead: Histogram,
    /// By tool.
    active_calls: Vec<Gauge>,
    /// By route and kind of the answer.
    backend_calls: Grid,
    /// By method, route and status.
    web_requests: Grid,
    retries: Vec<(&'static str, Counter)>,
    refusals: Vec<(&'static str, Counter)>,
    budget_exhausted: Counter,
    shed: Vec<Counter>,
    task_restarts: Counter,
    panics: Counter,
    in_flight: Gauge,
    backend_in_flight: Gauge,
    backend_permits: Gauge,
    connections: Gauge,
}

impl Metrics {
    /// A caller was refused, for one of the reasons that are counted.
    pub fn caller_refused(&self, reason: &'static str) {
        if let Some((_, counter)) = self.refusals.iter().find(|(other, _)| *other == reason) {
            counter.inc();
        }
    }

    /// A request of MCP that is no call of a tool of ours has ended, with this error's code if with one.
    pub fn operation_ended(&self, operation: Operation, protocol: &str, error: Option<i32>, took: Duration) {
        let error = match error {
            None => 0,
            Some(code) => Outcome::ALL.len() + place(&RPC_ERRORS, |(other, _)| *other == code),
        };
        self.operations.observe(&[operation as usize, error, version(protocol)], took.as_secs_f64());
    }

    /// One tool call has ended.
    pub fn tool_called(&self, call: &EndedCall<'_>) {
        let outcome = place(&Outcome::ALL, |other| *other == call.outcome);
        let operation = Operation::WORDS.len() + call.tool;
        self.operations.observe(&[operation, outcome, version(call.protocol)], call.took.as_secs_f64());
        let fits = |(outcome, fault): &(Outcome, Fault)| {
            *outcome == call.outcome && (call.backend_declared || *fault != Fault::Backend)
        };
        if let Some(counter) = self.calls.get(call.tool).and_then(|ends| ends.get(place(&ENDS, fits))) {
            counter.inc();
        }
        if call.reads && call.outcome == Outcome::Ok {
            self.overhead.observe(call.took.saturating_sub(call.at_backend).as_secs_f64());
        }
    }

    /// One attempt at the backend has ended.
    pub fn backend_asked(&self, route: usize, exchange: Exchange, took: Duration) {
        let exchange = place(&Exchange::ALL, |(other, _)| *other == exchange);
        self.backend_calls.observe(&[route, exchange], took.as_secs_f64());
    }

    /// A request on the main listener has arrived. Dropping what this returns counts it.
    pub fn request_arrived(&self, method: &str, path: &str) -> ArrivedRequest<'_> {
        let path = match path {
            "/mcp/" => "/mcp",
            path if path.starts_with(RESOURCE_METADATA) => RESOURCE_METADATA,
            path => path,
        };
        ArrivedRequest {
            requests: &self.web_requests,
            started: Instant::now(),
            method: place(&WEB_METHODS, |other| *other == method),
            route: place(&WEB_ROUTES, |other| *other == path),
            status: CLIENT_LEFT,
        }
    }

    /// An attempt is about to be repeated, for one of [`RETRY_REASONS`].
    pub fn retried(&self, reason: &'static str) {
        if let Some((_, counter)) = self.retries.iter().find(|(other, _)| *other == reason) {
            counter.inc();
        }
    }

    /// A repetition was not made because too many calls repeat.
    pub fn retry_budget_exhausted(&self) {
        self.budget_exhausted.inc();
    }

    /// A call was turned away at once.
    pub fn shed(&self, limit: Shed) {
        if let Some(counter) = self.shed.get(place(&Shed::ALL, |(other, _)| *other == limit)) {
            counter.inc();
        }
    }

    /// A background task ended and is being started again.
    pub fn task_restarted(&self) {
        self.task_restarts.inc();
    }

    /// A panic was caught.
    pub fn panicked(&self) {
        self.panics.inc();
    }

    /// Counts a request as in flight until the guard is dropped.
    pub fn request_in_flight(&self) -> GaugeGuard {
        GaugeGuard::of(&self.in_flight)
    }

    /// Counts a call of this tool as in flight until the guard is dropped.
    pub fn call_in_flight(&self, tool: usize) -> Option<GaugeGuard> {
        self.active_calls.get(tool).map(GaugeGuard::of)
    }

    /// Counts a request as being with the backend until the guard is dropped.
    pub fn backend_in_flight(&self) -> GaugeGuard {
        GaugeGuard::of(&self.backend_in_flight)
    }

    /// Counts one of the backend's permits as taken until the guard is dropped.
    pub fn backend_permit(&self) -> GaugeGuard {
        GaugeGuard::of(&self.backend_permits)
    }

    /// Counts a connection as open until the guard is dropped.
    pub fn open_connection(&self) -> GaugeGuard {
        GaugeGuard::of(&self.connections)
    }

    /// The figures as OpenMetrics text.
    ///
    /// # Errors
    ///
    /// Never in practice: writing to a string does not fail.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// The figures in Prometheus' text format 0.0.4.
    ///
    /// # Errors
    ///
    /// As those of [`Metrics::encode`].
    pub fn encode_text(&self) -> Result<String, fmt::Error> {
        Ok(text_format::prometheus_text(&self.encode()?))
    }
}

/// Where something stands; behind the last place, which is [`OTHER`]'s where there is one, if it does not.
fn place<T>(all: &[T], is: impl FnMut(&T) -> bool) -> usize {
    all.iter().position(is).unwrap_or(all.len())
}

fn version(protocol: &str) -> usize {
    place(&PROTOCOL_VERSIONS, |other| *other == protocol)
}

/// A request whose answer is awaited.
pub struct ArrivedRequest<'m> {
    requests: &'m Grid,
    started: Instant,
    method: usize,
    route: usize,
    status: u16,
}

impl ArrivedRequest<'_> {
    /// There is an answer, with this status.
    pub fn answered(mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for ArrivedRequest<'_> {
    fn drop(&mut self) {
        let status = place(&WEB_STATUSES, |(other, _)| *other == self.status);
        self.requests.observe(&[self.method, self.route, status], self.started.elapsed().as_secs_f64());
    }
}

/// Lowers a gauge again when it is dropped.
pub struct GaugeGuard(Gauge);

impl GaugeGuard {
    fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOLS: [&str; 5] = ["create_ticket", "get_user_profile", "list_tickets", "list_users", "query_data"];
    const ROUTES: [(&str, &str); 2] = [("GET", "/users/{user_id}"), ("POST", "/tickets")];

    #[test]
    fn a_call_is_somebodys_fault_exactly_once() {
        let metrics = Metrics::new(&TOOLS, &ROUTES);
        for (outcome, backend_declared, fault) in [
            (Outcome::Ok, false, "none"),
            (Outcome::Cancelled, false, "caller"),
            (Outcome::Unknown, false, "server"),
            (Outcome::Failed(ErrorCode::ValidationError), false, "caller"),
            (Outcome::Failed(ErrorCode::ServiceError), true, "backend"),
            (Outcome::Failed(ErrorCode::ServiceError), false, "server"),
            (Outcome::Failed(ErrorCode::AuthenticationError), false, "server"),
            (Outcome::Failed(ErrorCode::TimeoutError), false, "server"),
            (Outcome::Failed(ErrorCode::InternalError), false, "server"),
        ] {
            let (took, at_backend) = (Duration::from_millis(9), Duration::from_millis(5));
            let call = EndedCall { tool: 1, protocol: "", outcome, backend_declared, took, at_backend, reads: true };
            metrics.tool_called(&call);
            let (text, outcome) = (metrics.encode().unwrap(), outcome.as_str());
            let counted = format!(
                r#"mcp_server_calls_total{{gen_ai_tool_name="get_user_profile",outcome="{outcome}",fault="{fault}"}} 1"#
            );
            assert!(text.contains(&counted), "{counted}: {text}");
        }
        let text = metrics.encode().unwrap();
        assert!(text.contains("mcp_server_operation_overhead_seconds_sum 0.004\n"), "{text}");
    }

    #[test]
    fn what_is_unknown_is_counted_as_other_and_places_that_do_not_exist_are_not_counted() {
        let metrics = Metrics::new(&TOOLS, &ROUTES);
        metrics.operation_ended(Operation::Other, "1999-01-01", Some(-1), Duration::ZERO);
        metrics.request_arrived("BREW", "/pot").answered(418);
        drop(metrics.request_arrived("POST", "/mcp/"));
        metrics.backend_asked(99, Exchange::Success, Duration::ZERO);
        let text = metrics.encode().unwrap();
        for series in [
            r#"mcp_method_name="_OTHER",network_transport="tcp",error_type="_OTHER",mcp_protocol_version="_OTHER""#,
            r#"http_request_method="_OTHER",http_route="_OTHER",http_response_status_code="_OTHER""#,
            r#"http_request_method="POST",http_route="/mcp",http_response_status_code="499""#,
        ] {
            assert!(text.contains(&format!("_count{{{series}}} 1\n")), "{series}: {text}");
        }
        assert!(!text.contains("http_client_request_duration_seconds_count"), "{text}");
    }

    /// However inventive the callers: this is all that there can ever be.
    #[test]
    fn every_combination_together_stays_a_scrape_that_prometheus_takes() {
        let metrics = Metrics::new(&TOOLS, &ROUTES);
        for grid in [&metrics.operations, &metrics.backend_calls, &metrics.web_requests] {
            grid.observe_everywhere();
        }
        let lines = metrics.encode().unwrap().lines().count();
        assert!(lines < 30_000, "{lines} lines");
    }
}
