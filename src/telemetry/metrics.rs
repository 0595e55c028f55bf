//! Which figures are counted, under the names of the OpenTelemetry semantic conventions, in Prometheus' text format.
//!
//! Everything that a call touches is looked up beforehand: no label is built and no map is searched on the way of a call, and a
//! label can only have values that stand here.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::problem::ErrorCode;

/// Seconds; the conventions' bounds, and finer ones below 10 ms.
const DURATION_BOUNDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Why an attempt at the backend was repeated.
pub const RETRY_REASONS: [&str; 5] = ["not_sent", "interrupted", "status", "throttled", "unauthorized"];

/// How a tool call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With a result.
    Ok,
    /// Nobody was left to read the end.
    Cancelled,
    /// With an error object.
    Failed(ErrorCode),
}

impl Outcome {
    const ALL: [Self; 7] = [
        Self::Ok,
        Self::Cancelled,
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
    /// Nothing was sent.
    NotMade,
}

impl Exchange {
    const ALL: [(Self, &'static str); 9] = [
        (Self::Success, "2xx"),
        (Self::Redirection, "3xx"),
        (Self::ClientError, "4xx"),
        (Self::ServerError, "5xx"),
        (Self::Unreachable, "unreachable"),
        (Self::Interrupted, "interrupted"),
        (Self::Timeout, "timeout"),
        (Self::Unreadable, "unreadable"),
        (Self::NotMade, "not_made"),
    ];

    /// The word for it, in metrics and spans.
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(other, _)| *other == self).map_or("", |(_, word)| *word)
    }
}

/// What turned a call away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
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
}

impl Shed {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Server, "server"),
        (Self::Tool, "tool"),
        (Self::Backend, "backend"),
        (Self::Breaker, "breaker"),
        (Self::Caller, "caller"),
    ];
}

/// The figures, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    /// By tool, then by outcome.
    tool_calls: Table<Histogram>,
    /// By route, then by the kind of the answer.
    backend_calls: Table<Histogram>,
    retries: Vec<(&'static str, Counter)>,
    budget_exhausted: Counter,
    shed: Vec<Counter>,
    task_restarts: Counter,
    panics: Counter,
    in_flight: Gauge,
    backend_in_flight: Gauge,
    connections: Gauge,
}

type Table<M> = Vec<Vec<M>>;
type Labels<const N: usize> = [(&'static str, &'static str); N];

impl Metrics {
    /// Registers every figure, for these closed sets of tools and of the backend's routes (method and template).
    pub fn new(tools: &[&'static str], routes: &[(&'static str, &'static str)]) -> Self {
        let mut registry = Registry::default();
        let seconds = || Family::new_with_constructor((|| Histogram::new(DURATION_BOUNDS)) as fn() -> Histogram);

        let family: Family<LabelSet<3>, Histogram, _> = seconds();
        let tool_calls = tools
            .iter()
            .map(|tool| {
                let labels = Outcome::ALL.map(|outcome| {
                    [
                        ("mcp_method_name", "tools/call"),
                        ("gen_ai_tool_name", *tool),
                        ("error_type", outcome.error_type()),
                    ]
                });
                labels.map(|labels| family.get_or_create(&LabelSet(labels)).clone()).to_vec()
            })
            .collect();
        let help = "Duration of MCP requests, from the decoded message to the result";
        registry.register_with_unit("mcp_server_operation_duration", help, Unit::Seconds, family);

        let family: Family<LabelSet<3>, Histogram, _> = seconds();
        let backend_calls = routes
            .iter()
            .map(|(method, template)| {
                let labels = Exchange::ALL.map(|(_, kind)| {
                    [("http_request_method", *method), ("url_template", *template), ("outcome", kind)]
                });
                labels.map(|labels| family.get_or_create(&LabelSet(labels)).clone()).to_vec()
            })
            .collect();
        let help = "Duration of single attempts at the backend, to the last byte of the answer";
        registry.register_with_unit("http_client_request_duration", help, Unit::Seconds, family);

        let family = Family::<LabelSet<1>, Counter>::default();
        let retries = RETRY_REASONS
            .map(|reason| (reason, family.get_or_create(&LabelSet([("reason", reason)])).clone()))
            .to_vec();
        registry.register(
            "mcp_server_backend_retries",
            "Repeated attempts at the backend, by what made them so",
            family,
        );

        let family = Family::<LabelSet<1>, Counter>::default();
        let shed = Shed::ALL.map(|(_, limit)| family.get_or_create(&LabelSet([("limit", limit)])).clone()).to_vec();
        registry.register("mcp_server_shed", "Calls turned away at once, by the limit that did it", family);

        let build = Family::<LabelSet<1>, Gauge>::default();
        build.get_or_create(&LabelSet([("version", env!("CARGO_PKG_VERSION"))])).set(1);
        registry.register("mcp_server_build_info", "Always 1; the label tells the version", build);

        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let budget_exhausted =
            counter("mcp_server_backend_retry_budget_exhausted", "Repetitions not made because too many calls repeat");
        let task_restarts = counter("mcp_server_task_restarts", "Background tasks that ended and were started again");
        let panics = counter("mcp_server_panics", "Panics caught: bugs in the server");
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let in_flight = gauge("http_server_active_requests", "MCP requests in flight");
        let backend_in_flight = gauge("http_client_active_requests", "Requests that the backend is at");
        let connections = gauge("http_server_open_connections", "Open connections on the main listener");
        Self {
            registry,
            tool_calls,
            backend_calls,
            retries,
            budget_exhausted,
            shed,
            task_restarts,
            panics,
            in_flight,
            backend_in_flight,
            connections,
        }
    }

    /// Adds gauges that are read when somebody asks, such as the age of a token: name, help and a way to read it.
    pub fn observe(&mut self, name: &str, help: &str, read: impl Fn() -> f64 + Send + Sync + 'static) {
        let observed = Observed { name: name.to_owned(), help: help.to_owned(), read: Box::new(read) };
        self.registry.register_collector(Box::new(observed));
    }

    /// One tool call has ended.
    pub fn tool_called(&self, tool: usize, outcome: Outcome, took: Duration) {
        let column = Outcome::ALL.iter().position(|other| *other == outcome);
        if let Some(histogram) = cell(&self.tool_calls, tool, column) {
            histogram.observe(took.as_secs_f64());
        }
    }

    /// One attempt at the backend has ended.
    pub fn backend_asked(&self, route: usize, exchange: Exchange, took: Duration) {
        let column = Exchange::ALL.iter().position(|(other, _)| *other == exchange);
        if let Some(histogram) = cell(&self.backend_calls, route, column) {
            histogram.observe(took.as_secs_f64());
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
        let column = Shed::ALL.iter().position(|(other, _)| *other == limit);
        if let Some(counter) = column.and_then(|column| self.shed.get(column)) {
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

    /// Counts a request as being with the backend until the guard is dropped.
    pub fn backend_in_flight(&self) -> GaugeGuard {
        GaugeGuard::of(&self.backend_in_flight)
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
}

fn cell<M>(table: &Table<M>, row: usize, column: Option<usize>) -> Option<&M> {
    table.get(row)?.get(column?)
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

/// A fixed number of labels, all of them known when the program was built.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct LabelSet<const N: usize>(Labels<N>);

impl<const N: usize> EncodeLabelSet for LabelSet<N> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.as_slice().encode(encoder)
    }
}

/// A gauge that is read when it is printed.
struct Observed {
    name: String,
    help: String,
    read: Box<dyn Fn() -> f64 + Send + Sync>,
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl prometheus_client::collector::Collector for Observed {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        use prometheus_client::encoding::EncodeMetric as _;
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set((self.read)());
        let metric = encoder.encode_descriptor(&self.name, &self.help, None, gauge.metric_type())?;
        gauge.encode(metric)
    }
}
