//! An OpenTelemetry collector: takes OTLP over HTTP, by the types of `opentelemetry-proto`, and keeps what it was sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::routing::post;
use http::{HeaderMap, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message as _;

use super::until;

#[derive(Clone, Default)]
pub struct Collector(Arc<Mutex<Taken>>);

#[derive(Default)]
struct Taken {
    requests: Vec<(HeaderMap, ExportTraceServiceRequest)>,
    /// What the next requests are answered instead of being taken.
    refusals: Vec<StatusCode>,
}

impl Collector {
    /// Starts one, and gives the base URL of its OTLP endpoint.
    pub async fn start() -> (Self, url::Url) {
        let collector = Self::default();
        let routes = Router::new().route("/v1/traces", post(take)).with_state(collector.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        (collector, base_url(address))
    }

    pub fn refuse(&self, statuses: impl IntoIterator<Item = u16>) {
        let statuses = statuses.into_iter().map(|status| StatusCode::from_u16(status).unwrap());
        self.0.lock().unwrap().refusals.extend(statuses);
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Seen> {
        let taken = self.0.lock().unwrap();
        let resources = taken.requests.iter().flat_map(|(_, request)| &request.resource_spans);
        let seen = resources.flat_map(|resource| {
            let about = attributes(&resource.resource.as_ref().unwrap().attributes);
            let spans = resource.scope_spans.iter().flat_map(|scope| &scope.spans);
            spans.map(move |span| Seen::new(span, about.clone())).collect::<Vec<_>>()
        });
        seen.collect()
    }

    /// How many spans there were in each request.
    pub fn batches(&self) -> Vec<usize> {
        let taken = self.0.lock().unwrap();
        let scopes = |(_, request): &(HeaderMap, ExportTraceServiceRequest)| {
            let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
            scopes.map(|scope| scope.spans.len()).sum()
        };
        taken.requests.iter().map(scopes).collect()
    }

    /// Waits for so many spans, or more.
    pub async fn until_at_least(&self, count: usize) {
        until(async || self.spans().len() >= count).await;
    }

    /// Waits for so many spans.
    pub async fn until(&self, count: usize) -> Vec<Seen> {
        until(async || self.spans().len() >= count).await;
        let spans = self.spans();
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }

    pub fn headers(&self) -> HeaderMap {
        self.0.lock().unwrap().requests[0].0.clone()
    }

    /// Everything that it was ever told, as text.
    pub fn everything(&self) -> String {
        format!("{:?}", self.0.lock().unwrap().requests)
    }
}

pub fn base_url(address: SocketAddr) -> url::Url {
    url::Url::parse(&format!("http://{address}")).unwrap()
}

async fn take(State(collector): State<Collector>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let mut taken = collector.0.lock().unwrap();
    if !taken.refusals.is_empty() {
        return taken.refusals.remove(0);
    }
    assert_eq!(headers["content-type"], "application/x-protobuf");
    taken.requests.push((headers, ExportTraceServiceRequest::decode(body).unwrap()));
    StatusCode::OK
}

/// A span as a test wants to look at it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub name: String,
    pub kind: SpanKind,
    pub trace_id: String,
    pub span_id: String,
    pub parent: String,
    /// Trace and span id of what it is linked to.
    pub links: Vec<(String, String)>,
    pub attributes: BTreeMap<String, String>,
    pub resource: BTreeMap<String, String>,
    pub failed: bool,
    pub nanoseconds: u64,
}

impl Seen {
    fn new(span: &Span, resource: BTreeMap<String, String>) -> Self {
        Self {
            name: span.name.clone(),
            kind: span.kind(),
            trace_id: hex(&span.trace_id),
            span_id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
            attributes: attributes(&span.attributes),
            resource,
            failed: span.status.as_ref().is_some_and(|status| status.code == 2),
            nanoseconds: span.end_time_unix_nano - span.start_time_unix_nano,
        }
    }

    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Option<AnyValue>| match value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(&attribute.value))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
