//! The server under test with its stand-ins, and a small MCP client that speaks both eras.

pub mod callers;
pub mod calls;
pub mod canaries;
pub mod collector;
pub mod process;
pub mod scrape;
pub mod wire;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mcp_server::app::{App, AppError};
use mcp_server::demo::backend::RecordedRequest;
use mcp_server::demo::{DemoOptions, StandIns};
use mcp_server::settings::{
    BackendSettings, IdentitySettings, InboundAuth, LogSettings, Settings, TelemetrySettings, ToolSettings, WebSettings,
};
use serde_json::{Map, Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The two ways to speak MCP: with `initialize` first, and with everything in each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Era {
    Legacy,
    Modern,
}

impl Era {
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Modern];

    pub fn version(self) -> &'static str {
        match self {
            Self::Legacy => "2025-11-25",
            Self::Modern => "2026-07-28",
        }
    }
}

/// The server, running in this process through the same code as the binary, against stand-ins of its own.
pub struct TestApp {
    pub stand_ins: Arc<StandIns>,
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub http: reqwest::Client,
    shutdown: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), AppError>>,
    _watch: canaries::Watch,
}

impl TestApp {
    /// With the defaults of the contract, on ports that the system chooses; the backend's health is not polled, so that
    /// the stand-in sees only what tools send.
    pub async fn spawn() -> Self {
        Self::spawn_with(|_| {}).await
    }

    /// The same with other settings.
    pub async fn spawn_with(change: impl FnOnce(&mut Settings)) -> Self {
        let stand_ins = StandIns::start(DemoOptions::default()).await.unwrap();
        Self::spawn_against(stand_ins, change).await
    }

    /// The same with stand-ins that were prepared beforehand, and may serve several servers.
    pub async fn spawn_against(stand_ins: impl Into<Arc<StandIns>>, change: impl FnOnce(&mut Settings)) -> Self {
        let watch = canaries::Watch::begin();
        let stand_ins = stand_ins.into();
        let mut settings = settings(stand_ins.identity_settings(), &stand_ins);
        change(&mut settings);
        let app = App::bind(&settings).unwrap();
        let (address, metrics_address) = (app.address(), app.metrics_address().unwrap());
        let (shutdown, told) = oneshot::channel::<()>();
        let running = tokio::spawn(app.serve(async move {
            let _ = told.await;
        }));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { stand_ins, address, metrics_address, http, shutdown: Some(shutdown), running, _watch: watch }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What the backend was asked, without health checks.
    pub fn backend_requests(&self) -> Vec<RecordedRequest> {
        let requests = self.stand_ins.backend.requests();
        requests.into_iter().filter(|request| request.target != "/health").collect()
    }

    /// Sends one MCP request and returns the whole HTTP answer.
    pub async fn send(&self, era: Era, method: &str, params: Value) -> reqwest::Response {
        self.request(era, method, params).send().await.unwrap()
    }

    /// One MCP request, for those who want to change it before it is sent.
    pub fn request(&self, era: Era, method: &str, params: Value) -> reqwest::RequestBuilder {
        let name = params["name"].as_str().map(str::to_owned);
        let body = message(era, method, params);
        let request = self
            .http
            .post(self.url("/mcp"))
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .header("mcp-protocol-version", era.version());
        let request = match (era, name) {
            (Era::Modern, Some(name)) => request.header("mcp-method", method).header("mcp-name", name),
            (Era::Modern, None) => request.header("mcp-method", method),
            (Era::Legacy, _) => request,
        };
        request.body(body.to_string())
    }

    /// Sends one MCP request and returns its JSON-RPC result; anything else fails the test.
    pub async fn result(&self, era: Era, method: &str, params: Value) -> Value {
        let answer = self.send(era, method, params).await;
        let status = answer.status();
        let text = answer.text().await.unwrap();
        let answer: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{status} {error}: {text}"));
        assert!(answer["result"].is_object(), "{status}: {answer}");
        answer["result"].clone()
    }

    /// Calls a tool.
    pub async fn call(&self, era: Era, tool: &str, arguments: Value) -> CallResult {
        CallResult(self.result(era, "tools/call", json!({ "name": tool, "arguments": arguments })).await)
    }

    /// Waits until `/health/ready` answers 200.
    pub async fn until_ready(&self) {
        until(|| async { self.http.get(self.url("/health/ready")).send().await.is_ok_and(|a| a.status() == 200) })
            .await;
    }

    /// What the management listener prints for those that ask for OpenMetrics.
    pub async fn metrics(&self) -> String {
        let request = self.http.get(format!("http://{}/metrics", self.metrics_address));
        let answer = request.header("accept", "application/openmetrics-text").send().await.unwrap();
        answer.text().await.unwrap()
    }

    /// One figure, by its name with its labels.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.metrics().await;
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no `{series}` in {text}")).parse().unwrap()
    }

    /// Waits until no request is in flight, neither here nor at the backend.
    pub async fn until_idle(&self) {
        until(async || {
            self.metric("http_server_active_requests").await == 0.0
                && self.metric("http_client_active_requests").await == 0.0
        })
        .await;
    }

    /// Tells the server to stop, without waiting for it.
    pub fn begin_shutdown(&mut self) {
        let _ = self.shutdown.take().unwrap().send(());
    }

    /// Waits for the server to have stopped.
    pub async fn stopped(self) -> Result<(), AppError> {
        self.running.await.unwrap()
    }
}

/// The settings of the contract's defaults against these stand-ins, on free ports, and quick to stop.
pub fn settings(identity: IdentitySettings, stand_ins: &StandIns) -> Settings {
    let backend = BackendSettings { check_in_readiness: false, ..BackendSettings::new(stand_ins.backend.base_url()) };
    let web = WebSettings {
        host: [127, 0, 0, 1].into(),
        port: 0,
        metrics_port: Some(0),
        drain_delay: Duration::ZERO,
        ..WebSettings::default()
    };
    let (inbound, tools) = (InboundAuth::None, ToolSettings::default());
    let (log, telemetry) = (LogSettings::default(), TelemetrySettings::default());
    Settings { identity, backend, web, inbound, tools, log, telemetry, warnings: Vec::new() }
}

/// A JSON-RPC request as a client of this era writes it.
pub fn message(era: Era, method: &str, mut params: Value) -> Value {
    if era == Era::Modern {
        let meta = params.as_object_mut().unwrap().entry("_meta").or_insert_with(|| Map::new().into());
        meta["io.modelcontextprotocol/protocolVersion"] = json!(era.version());
        meta["io.modelcontextprotocol/clientCapabilities"] = json!({});
    }
    json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params })
}

/// The error object in the body of an HTTP error of `/mcp`, after checking what is around it.
#[track_caller]
pub fn error_object(body: &Value) -> &Value {
    let error = &body["error"];
    assert_eq!((&body["jsonrpc"], body.get("id").is_some()), (&json!("2.0"), true), "{body}");
    assert!(error["code"].is_i64() && error["message"].is_string(), "{body}");
    assert_eq!(error["message"], error["data"]["message"], "{body}");
    &error["data"]
}

/// The result of a tool call.
#[derive(Debug)]
pub struct CallResult(pub Value);

impl CallResult {
    /// The structured content of a success, after checking that the text is the same object.
    pub fn structured(&self) -> &Value {
        assert_eq!(self.0["isError"], false, "{}", self.0);
        let text: Value = serde_json::from_str(self.text()).unwrap();
        assert_eq!(text, self.0["structuredContent"]);
        &self.0["structuredContent"]
    }

    /// The error object of a failure, after checking that there is nothing beside it.
    pub fn error(&self) -> Value {
        assert_eq!(self.0["isError"], true, "{}", self.0);
        assert_eq!(self.0.get("structuredContent"), None);
        serde_json::from_str(self.text()).unwrap()
    }

    pub fn text(&self) -> &str {
        assert_eq!(self.0["content"].as_array().unwrap().len(), 1);
        assert_eq!(self.0["content"][0]["type"], "text");
        self.0["content"][0]["text"].as_str().unwrap()
    }
}

/// Asks again and again until the answer is yes; a test that never gets one fails after a minute, which no machine is
/// too busy for.
pub async fn until<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let polling = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), polling).await.expect("the condition never came true");
}
