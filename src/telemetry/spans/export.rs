//! The task that sends spans: OTLP over HTTP, as protobuf, in batches.
//!
//! A collector that does not answer costs the spans that find no room meanwhile, and one line in the log when that begins and one
//! when it ends; nothing else.

use std::error::Error;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use tracing::{info, warn};
use url::Url;

use super::queue::{Next, Queue};
use super::wire::Message;
use super::{Client, Counts, Ended, Record};
use crate::settings::TraceSettings;

/// A collector that takes longer to accept a connection is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a batch is sent, where the collector asks for patience.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// An answer has a few bytes.
const LONGEST_ANSWER: usize = 64 * 1024;

/// Why a batch was not taken.
struct Refusal {
    reason: String,
    /// Whether it may be taken later, and how long to wait at least.
    pause: Option<Duration>,
}

pub(super) struct Exporter {
    http: reqwest::Client,
    endpoint: Url,
    headers: HeaderMap,
    /// What stands before the spans of every batch, encoded.
    resource: Vec<u8>,
    scope: Vec<u8>,
    /// In spans.
    max_batch: u64,
    counts: Arc<Counts>,
    /// Whether the last batch was lost, which was said then.
    failing: bool,
}

/// Spans that are sent together, as they stand in the export.
struct Batch {
    /// What stands before the spans tells their size: there is so much room for it, and it is put there at the end.
    room: usize,
    message: Message,
    spans: u64,
    /// What the last request said of its client.
    client: Client,
}

impl Batch {
    fn lay_out(&mut self, span: &Ended<'_>) {
        span.write(&mut self.message, &mut self.client);
        self.spans += 1;
    }

    fn into_export(self, resource: &[u8], scope: &[u8]) -> Bytes {
        let mut bytes = self.message.into_bytes();
        let envelope = Message::envelope(resource, scope, bytes.len().saturating_sub(self.room));
        let start = self.room.saturating_sub(envelope.len());
        for (to, from) in bytes.iter_mut().skip(start).zip(envelope) {
            *to = from;
        }
        let mut export = Bytes::from(bytes);
        export.advance(start);
        export
    }
}

impl Exporter {
    pub(super) fn new(settings: &TraceSettings, max_batch: usize, counts: Arc<Counts>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(settings.timeout)
            .redirect(reqwest::redirect::Policy::none()) // the headers may hold a key
            .retry(reqwest::retry::never())
            .no_proxy()
            .build()?;
        let mut headers = settings.headers.clone();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(concat!(
            "mcp-server/",
            env!("CARGO_PKG_VERSION"),
            " (OTLP exporter)"
        )));
        let resource = settings.resource.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let about_us = [
            ("service.version", env!("CARGO_PKG_VERSION")),
            ("telemetry.sdk.name", "opentelemetry"),
            ("telemetry.sdk.language", "rust"),
        ];
        let attributes = resource.chain(about_us).map(|(name, value)| attribute(name, value)).collect();
        let resource = Resource { attributes, ..Default::default() };
        let scope = InstrumentationScope {
            name: "mcp-server".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        Ok(Self {
            http,
            endpoint: settings.endpoint.clone(),
            headers,
            resource: resource.encode_to_vec(),
            scope: scope.encode_to_vec(),
            max_batch: max_batch as u64,
            counts,
            failing: false,
        })
    }

    /// Lays spans out and sends them in batches, until nobody is left to make spans.
    pub(super) async fn run(mut self, queue: Arc<Queue<Record>>) {
        let mut batch = self.begin_batch(0);
        while let Some(next) = queue.next().await {
            match next {
                Next::Requests(piece) => {
                    for record in piece.requests {
                        for span in record.spans() {
                            batch.lay_out(&span);
                            if batch.spans >= self.max_batch {
                                self.export(&mut batch).await;
                            }
                        }
                    }
                    // Behind a collector that was slow many pieces wait: whatever else the runtime has to do has its turn.
                    tokio::task::yield_now().await;
                }
                Next::Send => self.export(&mut batch).await,
                Next::Flushed(done) => _ = done.send(()),
            }
        }
    }

    /// A batch that will have about so many bytes.
    fn begin_batch(&self, bytes: usize) -> Batch {
        let room = Message::longest_envelope(&self.resource, &self.scope);
        Batch { room, message: Message::with_room(room, bytes), spans: 0, client: Client::default() }
    }

    /// Sends a batch, gives it up where the collector does not want it, and begins the next.
    async fn export(&mut self, batch: &mut Batch) {
        let next = self.begin_batch(batch.message.len());
        let batch = mem::replace(batch, next);
        let spans = batch.spans;
        let body = batch.into_export(&self.resource, &self.scope);
        let mut attempt = 1;
        let refusal = loop {
            match self.send(body.clone()).await {
                Ok(rejected) => {
                    self.counts.exported.fetch_add(spans.saturating_sub(rejected), Relaxed);
                    self.counts.dropped.fetch_add(rejected, Relaxed);
                    if mem::take(&mut self.failing) {
                        let dropped = self.counts.dropped.load(Relaxed);
                        info!("the collector takes spans again; {dropped} were dropped so far");
                    }
                    return;
                }
                Err(Refusal { pause: Some(pause), .. }) if attempt < ATTEMPTS => {
                    let window = FIRST_PAUSE * 2_u32.saturating_pow(attempt);
                    let pause = pause.max(window.mul_f64(fastrand::f64()));
                    tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
                    attempt += 1;
                }
                Err(refusal) => break refusal,
            }
        };
        self.counts.dropped.fetch_add(spans, Relaxed);
        if !mem::replace(&mut self.failing, true) {
            warn!(cause = refusal.reason, "the collector takes no spans: they are dropped until it does");
        }
    }

    /// Sends once; gives the number of spans that the collector did not want.
    async fn send(&self, body: Bytes) -> Result<u64, Refusal> {
        let request = self.http.post(self.endpoint.clone()).headers(self.headers.clone()).body(body);
        let mut response = request.send().await.map_err(Refusal::from)?;
        let status = response.status();
        if !status.is_success() {
            let patience = [429, 502, 503, 504].contains(&status.as_u16());
            let pause = patience.then(|| asked_pause(response.headers()));
            return Err(Refusal { reason: format!("it answered {}", described(status)), pause });
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(Refusal::from)? {
            if answer.len() + chunk.len() > LONGEST_ANSWER {
                break;
            }
            answer.extend_from_slice(&chunk);
        }
        let answer = ExportTraceServiceResponse::decode(answer.as_slice()).unwrap_or_default();
        Ok(answer.partial_success.map_or(0, |partial| partial.rejected_spans.unsigned_abs()))
    }
}

fn attribute(name: &str, value: &str) -> KeyValue {
    let value = Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) });
    KeyValue { key: name.to_owned(), value, ..Default::default() }
}

fn described(status: StatusCode) -> String {
    status
        .canonical_reason()
        .map_or_else(|| status.as_u16().to_string(), |reason| format!("{} {reason}", status.as_u16()))
}

fn asked_pause(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    Duration::from_secs(seconds.unwrap_or(0))
}

impl From<reqwest::Error> for Refusal {
    fn from(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut root: &dyn Error = &error;
        while let Some(source) = root.source() {
            root = source;
        }
        let reason = root.to_string();
        // Nobody there: the next batch will see.
        let pause = (!error.is_connect() && !error.is_timeout()).then_some(Duration::ZERO);
        Self { reason, pause }
    }
}
