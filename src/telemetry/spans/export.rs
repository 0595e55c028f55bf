//! The task that sends spans: OTLP over HTTP, as protobuf, in batches.
//!
//! A collector that does not answer costs the spans that find no room meanwhile, and one line in the log when that begins and one
//! when it ends; nothing else.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use opentelemetry::KeyValue;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::transform::common::tonic::{Attributes, ResourceAttributesWithSchema};
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::trace::SpanData;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{info, warn};
use url::Url;

use super::Counts;
use crate::settings::TraceSettings;

/// A collector that takes longer to accept a connection is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a batch is sent, where the collector asks for patience.
const ATTEMPTS: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// An answer has a few bytes.
const LONGEST_ANSWER: usize = 64 * 1024;

/// What the task is told.
pub(super) enum Message {
    Span(Box<SpanData>),
    /// Send what there is, and say when that is done.
    Flush(oneshot::Sender<()>),
}

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
    resource: ResourceAttributesWithSchema,
    schedule_delay: Duration,
    max_batch: usize,
    counts: Arc<Counts>,
    /// Whether the last batch was lost, which was said then.
    failing: bool,
}

impl Exporter {
    pub(super) fn new(settings: &TraceSettings, counts: Arc<Counts>) -> Result<Self, reqwest::Error> {
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
        let resource = settings.resource.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
        let about_us = [
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("telemetry.sdk.name", "opentelemetry"),
            KeyValue::new("telemetry.sdk.language", "rust"),
        ];
        let attributes = Attributes::from(resource.chain(about_us).collect::<Vec<_>>());
        Ok(Self {
            http,
            endpoint: settings.endpoint.clone(),
            headers,
            resource: ResourceAttributesWithSchema { attributes, schema_url: None },
            schedule_delay: settings.schedule_delay,
            max_batch: settings.max_batch,
            counts,
            failing: false,
        })
    }

    /// Sends batches until nobody is left to make spans.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        let mut batch = Vec::new();
        let mut due = Instant::now();
        loop {
            let message = tokio::select! {
                biased;
                message = queue.recv(), if batch.len() < self.max_batch => message,
                () = tokio::time::sleep_until(due), if !batch.is_empty() => {
                    self.export(std::mem::take(&mut batch)).await;
                    continue;
                }
            };
            match message {
                Some(Message::Span(span)) => {
                    if batch.is_empty() {
                        due = Instant::now() + self.schedule_delay;
                    }
                    batch.push(*span);
                    if batch.len() >= self.max_batch {
                        due = Instant::now();
                    }
                }
                Some(Message::Flush(done)) => {
                    self.export(std::mem::take(&mut batch)).await;
                    let _ = done.send(());
                }
                None => return self.export(batch).await,
            }
        }
    }

    /// Sends one batch, and gives it up where the collector does not want it.
    async fn export(&mut self, batch: Vec<SpanData>) {
        if batch.is_empty() {
            return;
        }
        let spans = batch.len() as u64;
        let request =
            ExportTraceServiceRequest { resource_spans: group_spans_by_resource_and_scope(batch, &self.resource) };
        let body = bytes::Bytes::from(request.encode_to_vec());
        let mut attempt = 1;
        let refusal = loop {
            match self.send(body.clone()).await {
                Ok(rejected) => {
                    self.counts.exported.fetch_add(spans.saturating_sub(rejected), Relaxed);
                    self.counts.dropped.fetch_add(rejected, Relaxed);
                    if std::mem::take(&mut self.failing) {
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
        if !std::mem::replace(&mut self.failing, true) {
            warn!(cause = refusal.reason, "the collector takes no spans: they are dropped until it does");
        }
    }

    /// Sends once; gives the number of spans that the collector did not want.
    async fn send(&self, body: bytes::Bytes) -> Result<u64, Refusal> {
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
