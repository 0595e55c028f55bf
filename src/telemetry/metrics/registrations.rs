//! How the figures are registered: under which names, with which labels, and all of their values from the start.

use std::fmt;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::series::{Figure, Grid, Kind, Labels, Observed, unlabelled};
use super::{
    Capacity, ENDS, Exchange, Fault, Metrics, OTHER, Operation, Outcome, PROTOCOL_VERSIONS, RETRY_REASONS, RPC_ERRORS,
    Shed, WEB_METHODS, WEB_ROUTES, WEB_STATUSES,
};

/// Seconds; the conventions' bounds, and finer ones below 10 ms.
const DURATION_BOUNDS: &[f64] =
    &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];

/// Seconds; the conventions' bounds for HTTP servers, without those that only finer questions than ours need.
const HTTP_BOUNDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

impl Metrics {
    /// Registers every figure, for these closed sets of tools and of the backend's routes (method and template).
    pub fn new(tools: &[&'static str], routes: &[(&'static str, &'static str)]) -> Self {
        let mut registry = Registry::default();
        let operations = operations(&mut registry, tools);
        let calls = calls(&mut registry, tools);
        let overhead = Histogram::new(DURATION_BOUNDS.iter().copied());
        let help = "What calls that read and succeed take beyond the backend's own time";
        registry.register_with_unit("mcp_server_operation_overhead", help, Unit::Seconds, overhead.clone());

        let family = Family::<LabelSet<1>, Gauge>::default();
        let active_calls =
            tools.iter().map(|tool| family.get_or_create(&LabelSet([("gen_ai_tool_name", *tool)])).clone()).collect();
        registry.register("mcp_server_active_calls", "Calls of a tool in flight", family);

        let backend_calls = Grid::register(
            &mut registry,
            Figure::seconds(
                "http_client_request_duration",
                "Duration of single attempts at the backend, to the last byte of the answer",
            ),
            DURATION_BOUNDS,
            vec![
                routes
                    .iter()
                    .map(|(method, template)| vec![("http_request_method", *method), ("url_template", *template)])
                    .collect(),
                axis("outcome", Exchange::ALL.iter().map(|(_, kind)| *kind)),
            ],
        );
        let web_requests = Grid::register(
            &mut registry,
            Figure::seconds(
                "http_server_request_duration",
                "Duration of HTTP requests on the main listener, from the request's head to the answer's",
            ),
            HTTP_BOUNDS,
            vec![
                axis("http_request_method", WEB_METHODS.into_iter().chain([OTHER])),
                axis("http_route", WEB_ROUTES.into_iter().chain([OTHER])),
                axis("http_response_status_code", WEB_STATUSES.iter().map(|(_, word)| *word).chain([OTHER])),
            ],
        );

        let retries = RETRY_REASONS.into_iter().zip(counters(
            &mut registry,
            &Figure::new("mcp_server_backend_retries", "Repeated attempts at the backend, by what made them so"),
            "reason",
            &RETRY_REASONS,
        ));
        let retries = retries.collect();
        let shed = counters(
            &mut registry,
            &Figure::new("mcp_server_shed", "Calls and requests turned away at once, by the limit that did it"),
            "limit",
            &Shed::ALL.map(|(_, limit)| limit),
        );

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
        let mut metrics = Self {
            registry,
            operations,
            calls,
            overhead,
            active_calls,
            backend_calls,
            web_requests,
            retries,
            refusals: Vec::new(),
            budget_exhausted,
            shed,
            task_restarts,
            panics,
            in_flight,
            backend_in_flight,
            backend_permits: Gauge::default(),
            connections,
        };
        let build = vec![("version", env!("CARGO_PKG_VERSION"))];
        let figure = Figure::new("mcp_server_build_info", "Always 1; the label tells the version");
        metrics.observe_each(Kind::Gauge, figure, move || vec![(build.clone(), 1.0)]);
        metrics.observe_process();
        metrics
    }

    /// Adds the refusals of callers, by these reasons.
    pub fn count_refusals(&mut self, reasons: &[&'static str]) {
        let figure = Figure::new("mcp_server_callers_refused", "Requests refused for their token or its permissions");
        let counters = counters(&mut self.registry, &figure, "reason", reasons);
        self.refusals = reasons.iter().copied().zip(counters).collect();
    }

    /// Adds the limits, and how much of each is taken; of the memory, as it is told.
    pub fn observe_capacity(&mut self, capacity: Capacity, memory: impl Fn() -> usize + Send + Sync + 'static) {
        let limits = [
            ("connections", capacity.connections),
            ("server", capacity.server),
            ("tool", capacity.tool),
            ("backend", capacity.backend),
            ("memory", capacity.memory),
        ];
        let help = "What may be in flight at the same time, by the limit's name; of `memory`, bytes";
        let figure = Figure::new("mcp_server_limit", help);
        self.observe_each(Kind::Gauge, figure, move || {
            limits.map(|(name, limit)| (vec![("limit", name)], limit as f64)).to_vec()
        });
        let (connections, server) = (self.connections.clone(), self.in_flight.clone());
        let (tools, backend) = (self.active_calls.clone(), self.backend_permits.clone());
        let figure = Figure::new(
            "mcp_server_limit_in_use",
            "What is in flight of a limit; of the limit `tool`, which every tool has for itself, the fullest one",
        );
        self.observe_each(Kind::Gauge, figure, move || {
            let fullest = tools.iter().map(Gauge::get).max().unwrap_or_default();
            [
                ("connections", connections.get()),
                ("server", server.get()),
                ("tool", fullest),
                ("backend", backend.get()),
                ("memory", memory() as i64),
            ]
            .map(|(name, taken)| (vec![("limit", name)], taken as f64))
            .to_vec()
        });
    }

    /// Adds a figure that is read when somebody asks, such as the age of a token.
    pub fn observe(&mut self, kind: Kind, figure: Figure, read: impl Fn() -> f64 + Send + Sync + 'static) {
        self.observe_each(kind, figure, move || vec![unlabelled(read())]);
    }

    /// Adds a figure with labels, all of them from a closed set, that is read when somebody asks.
    pub fn observe_each(
        &mut self,
        kind: Kind,
        figure: Figure,
        read: impl Fn() -> Vec<(Labels, f64)> + Send + Sync + 'static,
    ) {
        let observed = Observed { kind, figure, read: Box::new(read) };
        self.registry.register_collector(Box::new(observed));
    }
}

/// The conventions' histogram of MCP requests.
fn operations(registry: &mut Registry, tools: &[&'static str]) -> Grid {
    let labels =
        |(method, tool)| vec![("mcp_method_name", method), ("gen_ai_tool_name", tool), ("network_transport", "tcp")];
    let operations = Operation::WORDS.into_iter().chain(tools.iter().map(|tool| ("tools/call", *tool)));
    let errors = Outcome::ALL.iter().map(|outcome| outcome.error_type());
    let errors = errors.chain(RPC_ERRORS.iter().map(|(_, word)| *word)).chain([OTHER]);
    let figure = Figure::seconds(
        "mcp_server_operation_duration",
        "Duration of MCP requests, from the decoded message to the result",
    );
    let axes = vec![
        operations.map(labels).collect(),
        axis("error_type", errors),
        axis("mcp_protocol_version", PROTOCOL_VERSIONS.into_iter().chain([OTHER])),
    ];
    Grid::register(registry, figure, DURATION_BOUNDS, axes)
}

/// What service levels are reckoned from: there from the start for every end, so that the first failure counts as an increase.
fn calls(registry: &mut Registry, tools: &[&'static str]) -> Vec<Vec<Counter>> {
    let family = Family::<LabelSet<3>, Counter>::default();
    let ends = |tool: &&'static str| {
        let labels = |(outcome, fault): &(Outcome, Fault)| {
            LabelSet([("gen_ai_tool_name", *tool), ("outcome", outcome.as_str()), ("fault", fault.as_str())])
        };
        ENDS.iter().map(|end| family.get_or_create(&labels(end)).clone()).collect()
    };
    let calls = tools.iter().map(ends).collect();
    registry.register("mcp_server_calls", "Calls of tools, by how they ended and whose fault that was", family);
    calls
}

/// A counter for each value of a label, all of them there from the start.
fn counters(registry: &mut Registry, figure: &Figure, label: &'static str, values: &[&'static str]) -> Vec<Counter> {
    let family = Family::<LabelSet<1>, Counter>::default();
    let counters = values.iter().map(|value| family.get_or_create(&LabelSet([(label, *value)])).clone()).collect();
    registry.register(figure.name, figure.help, family);
    counters
}

fn axis(label: &'static str, values: impl IntoIterator<Item = &'static str>) -> Vec<Labels> {
    values.into_iter().map(|value| vec![(label, value)]).collect()
}

/// A fixed number of labels, all of them known when the program was built.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct LabelSet<const N: usize>([(&'static str, &'static str); N]);

impl<const N: usize> EncodeLabelSet for LabelSet<N> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.as_slice().encode(encoder)
    }
}
