//! The way to the collector: OTLP over HTTP, as protobuf, through our own HTTP client and TLS.
//!
//! The SDK's exporter encodes and repeats; this counts what became of the spans, and says in the log when the collector stops taking
//! them and when it takes them again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Limited};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter as Otlp, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::Counts;
use crate::settings::TraceSettings;

/// A collector that takes longer to accept a connection is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A collector's answer has a few bytes.
const LONGEST_ANSWER: usize = 64 * 1024;

/// Why spans cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The HTTP client.
    #[error("the HTTP client of the trace exporter cannot be built")]
    Client(#[from] reqwest::Error),
    /// The SDK's exporter.
    #[error("the trace exporter cannot be built")]
    Exporter(#[from] ExporterBuildError),
}

/// The SDK's exporter, and what became of what it was given.
#[derive(Debug)]
pub(super) struct Exporter {
    otlp: Otlp,
    counts: Arc<Counts>,
    /// Whether the last batch was lost.
    failing: AtomicBool,
}

impl Exporter {
    pub(super) fn new(settings: &TraceSettings, counts: Arc<Counts>) -> Result<Self, ExportError> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(settings.timeout)
            .redirect(reqwest::redirect::Policy::none()) // the headers may hold a key
            .retry(reqwest::retry::never())
            .no_proxy()
            .build()?;
        let mut headers = settings.headers.clone();
        headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(concat!(
            "mcp-server/",
            env!("CARGO_PKG_VERSION"),
            " (OTLP exporter)"
        )));
        let client = Client { http, headers, runtime: Handle::current() };
        let otlp = Otlp::builder()
            .with_http()
            .with_http_client(client)
            .with_endpoint(settings.endpoint.as_str())
            .with_timeout(settings.timeout)
            .build()?;
        Ok(Self { otlp, counts, failing: AtomicBool::new(false) })
    }
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        self.counts.sent.fetch_add(spans, Relaxed);
        let result = self.otlp.export(batch).await;
        match &result {
            Ok(()) => {
                self.counts.exported.fetch_add(spans, Relaxed);
                if self.failing.swap(false, Relaxed) {
                    let dropped = self.counts.dropped.load(Relaxed);
                    info!("the collector takes spans again; {dropped} were dropped so far");
                }
            }
            Err(error) => {
                self.counts.dropped.fetch_add(spans, Relaxed);
                if !self.failing.swap(true, Relaxed) {
                    warn!(cause = %error, "the collector takes no spans: they are dropped until it does");
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.otlp.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.otlp.set_resource(resource);
    }
}

/// Our client for the SDK's thread, which has no runtime: requests run on the server's.
#[derive(Debug)]
struct Client {
    http: reqwest::Client,
    /// Of every request; values are marked as sensitive.
    headers: HeaderMap,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let mut request = reqwest::Request::try_from(request)?;
        request.headers_mut().extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        let http = self.http.clone();
        self.runtime
            .spawn(async move {
                let answer = Response::from(http.execute(request).await.map_err(reqwest::Error::without_url)?);
                let (head, body) = answer.into_parts();
                let body = Limited::new(body, LONGEST_ANSWER).collect().await?.to_bytes();
                Ok(Response::from_parts(head, body))
            })
            .await?
    }
}
