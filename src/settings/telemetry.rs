//! Traces and the audit file: the variables of OpenTelemetry under their standard names, and ours.

use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use url::Url;

use super::reader::Reader;
use super::vars::Vars;
use super::{is_loopback, parse};

/// What tells of the server's work beside logs and metrics.
#[derive(Debug, Clone, Default)]
pub struct TelemetrySettings {
    /// Where traces go; `None` when they go nowhere.
    pub traces: Option<TraceSettings>,
    /// Where audit events go beside the log.
    pub audit: AuditSettings,
}

/// The export of traces.
#[derive(Debug, Clone)]
pub struct TraceSettings {
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_EXPORTER_OTLP_ENDPOINT` with its path: where spans are sent.
    pub endpoint: Url,
    /// `OTEL_EXPORTER_OTLP_HEADERS`; marked as sensitive, so that `Debug` does not show them.
    pub headers: HeaderMap,
    /// `OTEL_EXPORTER_OTLP_TIMEOUT`.
    pub timeout: Duration,
    /// `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`.
    pub sampling: Sampling,
    /// `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME`, which wins.
    pub resource: Vec<(String, String)>,
    /// `OTEL_BSP_SCHEDULE_DELAY`.
    pub schedule_delay: Duration,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`.
    pub max_queue: usize,
    /// `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`.
    pub max_batch: usize,
}

impl TraceSettings {
    /// The defaults, for a collector that takes traces at `endpoint`.
    pub fn new(endpoint: Url) -> Self {
        Self {
            endpoint,
            headers: HeaderMap::new(),
            timeout: Duration::from_secs(10),
            sampling: Sampling { parent_based: true, root: RootSampler::All },
            resource: vec![("service.name".to_owned(), "mcp-server".to_owned())],
            schedule_delay: Duration::from_secs(5),
            max_queue: 2_048,
            max_batch: 512,
        }
    }
}

/// Which traces are exported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Whether the caller's decision, where there is one, is ours too.
    pub parent_based: bool,
    /// What else decides.
    pub root: RootSampler,
}

/// Which of the traces are exported that nobody has decided about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RootSampler {
    /// Every one.
    All,
    /// None.
    None,
    /// This share of them, chosen by their ids.
    Share(f64),
}

/// The audit file.
#[derive(Debug, Clone, Default)]
pub struct AuditSettings {
    /// `AUDIT_LOG_FILE`.
    pub file: Option<PathBuf>,
    /// `AUDIT_REQUIRED`: no call without a file that can be written.
    pub required: bool,
}

pub(super) fn read(reader: &mut Reader<'_, impl Vars>) -> TelemetrySettings {
    TelemetrySettings { traces: traces(reader), audit: audit(reader) }
}

fn audit(reader: &mut Reader<'_, impl Vars>) -> AuditSettings {
    let file = reader.some("AUDIT_LOG_FILE", parse::written_file);
    let required = reader.optional("AUDIT_REQUIRED", parse::boolean, false);
    if required && file.is_none() && !reader.has_mistake(&["AUDIT_LOG_FILE", "AUDIT_REQUIRED"]) {
        reader.mistake("AUDIT_REQUIRED", "is true, but AUDIT_LOG_FILE is not set: name the file, or leave both out");
    }
    AuditSettings { file, required }
}

fn traces(reader: &mut Reader<'_, impl Vars>) -> Option<TraceSettings> {
    let base = reader.some("OTEL_EXPORTER_OTLP_ENDPOINT", parse::base_url);
    let endpoint = reader.some("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", parse::base_url);
    // Everything is read even where nothing is exported, so that no mistake waits for the day when it is.
    let headers = reader.list("OTEL_EXPORTER_OTLP_HEADERS", parse::header).unwrap_or_default();
    let _only_one = reader.some("OTEL_EXPORTER_OTLP_PROTOCOL", parse::otlp_protocol);
    let timeout = reader.some("OTEL_EXPORTER_OTLP_TIMEOUT", parse::milliseconds);
    let sampling = sampling(reader);
    let mut resource = reader.list("OTEL_RESOURCE_ATTRIBUTES", parse::name_and_value).unwrap_or_default();
    let service = reader.text("OTEL_SERVICE_NAME");
    let disabled = reader.optional("OTEL_SDK_DISABLED", parse::boolean, false);
    let schedule_delay = reader.some("OTEL_BSP_SCHEDULE_DELAY", parse::milliseconds);
    let max_queue = reader.some("OTEL_BSP_MAX_QUEUE_SIZE", parse::count);
    let max_batch = reader.some("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", parse::count);

    let endpoint = endpoint.or_else(|| base.map(traces_below)).filter(|_| !disabled)?;
    let headers: Vec<(HeaderName, HeaderValue)> = headers;
    if !headers.is_empty() && endpoint.scheme() == "http" && !is_loopback(&endpoint) {
        reader.warn(format!(
            "OTEL_EXPORTER_OTLP_HEADERS go to `{}` over plain http: whoever sees that traffic sees them. Use https.",
            endpoint.host_str().unwrap_or_default(),
        ));
    }
    let defaults = TraceSettings::new(endpoint);
    if let Some(service) = service {
        resource.retain(|(name, _)| name != "service.name");
        resource.push(("service.name".to_owned(), service));
    } else if !resource.iter().any(|(name, _)| name == "service.name") {
        resource.extend(defaults.resource.iter().cloned());
    }
    Some(TraceSettings {
        headers: headers.into_iter().collect(),
        timeout: timeout.unwrap_or(defaults.timeout),
        sampling,
        resource,
        schedule_delay: schedule_delay.unwrap_or(defaults.schedule_delay),
        max_queue: max_queue.unwrap_or(defaults.max_queue),
        max_batch: max_batch.unwrap_or(defaults.max_batch),
        ..defaults
    })
}

/// The address for traces below a collector's base URL.
fn traces_below(mut base: Url) -> Url {
    if let Ok(mut path) = base.path_segments_mut() {
        path.pop_if_empty().extend(["v1", "traces"]);
    }
    base
}

fn sampling(reader: &mut Reader<'_, impl Vars>) -> Sampling {
    let (parent_based, root) = reader.optional("OTEL_TRACES_SAMPLER", parse::sampler, (true, "always_on"));
    let share = reader.optional("OTEL_TRACES_SAMPLER_ARG", parse::share, 1.0);
    let root = match root {
        "always_off" => RootSampler::None,
        "traceidratio" => RootSampler::Share(share),
        _ => RootSampler::All,
    };
    Sampling { parent_based, root }
}
