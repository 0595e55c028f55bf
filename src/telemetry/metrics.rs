//! Which figures are counted, under the names of the OpenTelemetry semantic conventions, in Prometheus' text format.
//!
//! Everything that a call touches is looked up beforehand: no label is built and no map is searched on the way of a call, and a
//! label can only have values that stand here.

use std::fmt;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::problem::ErrorCode;

/// Seconds; the conventions' bounds, and finer ones below 10 ms.
const DURATION_BOUNDS: [f64; 16] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0];

/// How a tool call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With a result.
    Ok,
    /// With an error object.
    Failed(ErrorCode),
    /// Nobody was left to read the end.
    Cancelled,
}

impl Outcome {
    const COUNT: usize = ErrorCode::ALL.len() + 2;

    /// The word for logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed(code) => code.as_str(),
            Self::Cancelled => "cancelled",
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        [Self::Ok, Self::Cancelled].into_iter().chain(ErrorCode::ALL.map(Self::Failed))
    }

    fn index(self) -> usize {
        match self {
            Self::Ok => 0,
            Self::Cancelled => 1,
            Self::Failed(code) => 2 + code as usize,
        }
    }
}

/// The figures, and the registry that prints them.
pub struct Metrics {
    registry: Registry,
    /// By tool, then by outcome.
    tool_calls: Vec<Vec<Histogram>>,
    in_flight: Gauge,
    connections: Gauge,
}

impl Metrics {
    /// Registers every figure, for this closed set of tools.
    pub fn new(tools: &[&'static str]) -> Self {
        let mut registry = Registry::default();
        let durations = Family::<OperationLabels, Histogram, _>::new_with_constructor(|| {
            Histogram::new(DURATION_BOUNDS) as Histogram
        });
        let tool_calls = tools.iter().map(|tool| {
            let histogram = |outcome| durations.get_or_create(&OperationLabels { tool, outcome }).clone();
            let mut by_outcome: Vec<_> = Outcome::all().map(|outcome| (outcome.index(), histogram(outcome))).collect();
            by_outcome.sort_by_key(|(index, _)| *index);
            debug_assert_eq!(by_outcome.len(), Outcome::COUNT);
            by_outcome.into_iter().map(|(_, histogram)| histogram).collect()
        });
        let tool_calls = tool_calls.collect();
        registry.register_with_unit(
            "mcp_server_operation_duration",
            "Duration of MCP requests, from the decoded message to the result",
            Unit::Seconds,
            durations,
        );
        let (in_flight, connections) = (Gauge::default(), Gauge::default());
        registry.register("http_server_active_requests", "MCP requests in flight", in_flight.clone());
        registry.register("http_server_open_connections", "Open connections on the main listener", connections.clone());
        let build = Family::<BuildLabels, Gauge>::default();
        build.get_or_create(&BuildLabels { version: env!("CARGO_PKG_VERSION") }).set(1);
        registry.register("mcp_server_build_info", "Always 1; the label tells the version", build);
        Self { registry, tool_calls, in_flight, connections }
    }

    /// One tool call has ended.
    pub fn tool_called(&self, tool: usize, outcome: Outcome, took: Duration) {
        if let Some(histogram) = self.tool_calls.get(tool).and_then(|outcomes| outcomes.get(outcome.index())) {
            histogram.observe(took.as_secs_f64());
        }
    }

    /// Counts a request as in flight until the guard is dropped.
    pub fn request_in_flight(&self) -> GaugeGuard {
        GaugeGuard::of(&self.in_flight)
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

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct OperationLabels {
    tool: &'static str,
    outcome: Outcome,
}

impl std::hash::Hash for Outcome {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.index().hash(state);
    }
}

impl EncodeLabelSet for OperationLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let error_type = match self.outcome {
            Outcome::Ok => "",
            outcome => outcome.as_str(),
        };
        let labels = [("mcp_method_name", "tools/call"), ("gen_ai_tool_name", self.tool), ("error_type", error_type)];
        labels.as_slice().encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct BuildLabels {
    version: &'static str,
}

impl EncodeLabelSet for BuildLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        [("version", self.version)].as_slice().encode(encoder)
    }
}
