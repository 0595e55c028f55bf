//! What is connected to what: the only place that builds things, and the order in which they stop.
//!
//! Building and running are separate, so that tests build the same thing: [`App::bind`] binds the listeners and wires the rooms,
//! [`App::serve`] runs until it is told to stop.

#[cfg(feature = "demo")]
pub mod demo;
mod descriptors;

use std::io;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, error_span, info, warn};

use crate::auth::{Refusal, Verifier, VerifierError};
use crate::backend::{BackendClient, BreakerState, Route};
use crate::identity::{IdentityStartError, OnBehalfOf, TokenSource, TokenStats};
use crate::settings::{BackendAuth, EntraInbound, IdentitySettings, InboundAuth, Settings};
use crate::telemetry::audit::{Audit, OpenError};
use crate::telemetry::logs;
use crate::telemetry::metrics::{Capacity, Figure, Kind, Metrics};
use crate::telemetry::spans::{ExportError, Spans};
use crate::tools::{TOOL_NAMES, ToolServer, Wiring};
use crate::web::{Guard, Health, Lane, Limits, Listener, Stop, Web};

/// How often the backend's health is asked, for all the probes together.
const HEALTH_INTERVAL: Duration = Duration::from_secs(2);
/// How often the allocator is given an occasion to return memory to the system.
const GIVE_BACK_INTERVAL: Duration = Duration::from_secs(5);
/// What calls get to say that they ran out of time, once the grace is over.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What is left gets to end after its connections were cut. Nothing in it waits for anything any more.
const AFTER_CUT: Duration = Duration::from_millis(250);
/// What the audit file and the collector of traces get to take what is left, once all calls are over.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// The server, bound and wired, serving nothing yet.
pub struct App {
    main: Listener,
    management: Option<Listener>,
    web: Arc<Web>,
    limits: Limits,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    backend: Arc<BackendClient>,
    audit: Arc<Audit>,
    spans: Option<Spans>,
    out_of_time: CancellationToken,
    /// Everything that has to end before the audit file is closed: connections, calls, and writes whose clients have left.
    tracker: TaskTracker,
    drain_delay: Duration,
    shutdown_grace: Duration,
}

/// Why the server cannot start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// A listener's address cannot be had: taken, not ours, or not for us; the system's reason tells which.
    #[error("cannot listen on {address}, as HOST and {variable} ask")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Which setting chooses the port.
        variable: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The identity cannot work with this configuration on this machine.
    #[error("cannot set up the identity")]
    Identity(#[from] IdentityStartError),
    /// Callers' tokens cannot be checked on this machine.
    #[error("cannot check the tokens of callers")]
    Verifier(#[from] VerifierError),
    /// An HTTP client cannot be built: the platform's certificates, most likely.
    #[error("cannot build an HTTP client")]
    Client(#[from] reqwest::Error),
    /// Spans cannot be exported on this machine.
    #[error(transparent)]
    Traces(#[from] ExportError),
    /// The audit file cannot be used.
    #[error(transparent)]
    Audit(#[from] OpenError),
    /// A task that should run for ever has ended.
    #[error("a task that the server cannot do without has ended: `{task}`")]
    TaskEnded {
        /// Which one.
        task: &'static str,
        /// How, if it panicked.
        #[source]
        source: Option<JoinError>,
    },
}

impl App {
    /// Binds the listeners and builds the rooms. Entra and the backend are not waited for: the server is alive without them, and
    /// not ready. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When an address is taken, or TLS cannot be set up on this machine.
    pub fn bind(settings: &Settings) -> Result<Self, AppError> {
        let bind = |port, variable| {
            let address = SocketAddr::new(settings.web.host, port);
            Listener::bind(address).map_err(|source| AppError::Bind { address, variable, source })
        };
        let main = bind(settings.web.port, "PORT")?;
        let management = settings.web.metrics_port.map(|port| bind(port, "METRICS_PORT")).transpose()?;

        for warning in &settings.warnings {
            warn!("{warning}");
        }
        descriptors::raise_limit(settings);
        let audit = Arc::new(Audit::start(&settings.telemetry.audit)?);
        let spans = settings.telemetry.traces.as_ref().map(Spans::start).transpose()?;
        let identity = TokenSource::start(&settings.identity, settings.backend.timeout)?;
        let observed = Arc::new(Observed::default());
        let mut metrics = metrics_of(settings, &identity, &observed);
        observe_telemetry(&mut metrics, &audit, spans.as_ref());
        let metrics = Arc::new(metrics);
        let mut backend = BackendClient::new(&settings.backend, Arc::clone(&identity), Arc::clone(&metrics))?;
        if matches!(settings.backend.auth, BackendAuth::OnBehalfOf { .. }) {
            backend = backend.with_users(OnBehalfOf::new(&settings.identity, settings.backend.timeout)?);
        }
        let backend = Arc::new(backend);
        // The backend counts in the figures and so holds them: they hold it weakly.
        let _ = observed.backend.set(Arc::downgrade(&backend));
        let inbound = inbound(settings)?;
        let verifier = inbound.as_ref().map(|(_, verifier)| Arc::clone(verifier));
        // Without Entra's keys every caller would be sent away: not ready, as without a token of our own.
        let has_tokens = move || identity.is_healthy() && verifier.as_ref().is_none_or(|verifier| verifier.is_ready());
        let health = Arc::new(Health::new(has_tokens, settings.backend.check_in_readiness));
        let _ = observed.health.set(Arc::clone(&health));
        let (out_of_time, tracker) = (CancellationToken::new(), TaskTracker::new());
        let wiring = Wiring {
            backend: Arc::clone(&backend),
            metrics: Arc::clone(&metrics),
            audit: Arc::clone(&audit),
            spans: spans.clone(),
            max_in_flight_per_tool: settings.web.max_in_flight_per_tool,
            tell_causes: settings.log.debug,
            out_of_time: out_of_time.clone(),
            tracker: tracker.clone(),
        };
        let tools = ToolServer::new(wiring, |tool, writes| settings.tools.allows(tool, writes));
        let guard = inbound.map(|(inbound, verifier)| {
            let told = (Arc::clone(&metrics), Arc::clone(&audit));
            Guard::new(inbound, &settings.web.rate_limit, verifier, told, tools.permissions())
        });
        let web = Web::new(&settings.web, tools, Arc::clone(&metrics), Arc::clone(&health), guard);
        Ok(Self {
            main,
            management,
            web: Arc::new(web),
            limits: Limits::from(&settings.web),
            metrics,
            health,
            backend,
            audit,
            spans,
            out_of_time,
            tracker,
            drain_delay: settings.web.drain_delay,
            shutdown_grace: settings.web.shutdown_grace,
        })
    }

    /// Where MCP is served.
    pub fn address(&self) -> SocketAddr {
        self.main.address()
    }

    /// Where metrics are served, if they are.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.management.as_ref().map(Listener::address)
    }

    /// Serves until `shutdown` resolves, then stops in good order:
    ///
    /// 1. `/health/ready` answers 503 `draining`, and every answer closes its connection;
    /// 2. for `DRAIN_DELAY`, new calls are still answered, while the endpoint lists of load balancers catch up;
    /// 3. nothing new is accepted; calls in flight, and writes whose clients have left, have until `SHUTDOWN_GRACE` after the signal;
    /// 4. what is left is answered as TIMEOUT_ERROR; connections that are open still are cut;
    /// 5. once every call has its record, the audit file is closed.
    ///
    /// # Errors
    ///
    /// When a task that the server cannot do without ends by itself; the stop is in good order all the same.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), AppError> {
        self.start().until(shutdown).await
    }

    fn start(self) -> Serving {
        info!(server.address = %self.address().ip(), server.port = self.address().port(), "serving MCP on http://{}/mcp", self.address());
        let stop = Stop::default();
        let mut tasks = JoinSet::new();
        let mut listen = |listener: Listener, lane, connections: TaskTracker, stop| {
            let (web, limits, metrics) = (Arc::clone(&self.web), self.limits.clone(), Arc::clone(&self.metrics));
            let accept = listener.serve(web, lane, limits, metrics, connections, stop);
            tasks.spawn(async move {
                accept.await;
                "accept connections"
            });
        };
        listen(self.main, Lane::Main, self.tracker.clone(), stop.clone());
        if let Some(management) = self.management {
            info!("serving metrics on http://{}/metrics", management.address());
            // Never told to stop: it answers until the process ends.
            listen(management, Lane::Management, TaskTracker::new(), Stop::default());
        }
        if self.health.checks_backend() {
            let (backend, health, metrics) = (self.backend, Arc::clone(&self.health), Arc::clone(&self.metrics));
            let watch = async move {
                through_panics(&metrics, || watch_backend(&backend, &health)).await;
                "watch the backend"
            };
            tasks.spawn(watch.instrument(error_span!("watch_backend")));
        }
        tasks.spawn(async {
            give_memory_back().await;
            "give memory back"
        });
        Serving {
            tasks,
            tracker: self.tracker,
            stop,
            health: self.health,
            audit: self.audit,
            spans: self.spans,
            out_of_time: self.out_of_time,
            drain_delay: self.drain_delay,
            shutdown_grace: self.shutdown_grace,
        }
    }
}

/// The server, serving.
struct Serving {
    /// Tasks that never end by themselves; each gives its name if it does.
    tasks: JoinSet<&'static str>,
    /// Everything that has to end before the audit file is closed.
    tracker: TaskTracker,
    stop: Stop,
    health: Arc<Health>,
    audit: Arc<Audit>,
    spans: Option<Spans>,
    out_of_time: CancellationToken,
    drain_delay: Duration,
    shutdown_grace: Duration,
}

impl Serving {
    async fn until(mut self, shutdown: impl Future<Output = ()>) -> Result<(), AppError> {
        let ended = tokio::select! {
            () = shutdown => None,
            ended = self.tasks.join_next() => ended,
        };
        let stopping_since = Instant::now();
        self.health.drain();
        info!(
            "stopping: new calls are still answered for {:?}, calls in flight have {:?}",
            self.drain_delay, self.shutdown_grace
        );
        tokio::time::sleep(self.drain_delay).await;
        self.stop.gracefully.cancel();
        self.tracker.close();
        let in_time = tokio::time::timeout_at(stopping_since + self.shutdown_grace, self.tracker.wait()).await;
        if in_time.is_err() {
            warn!("connections or calls are still busy after {:?}: giving up on the calls", self.shutdown_grace);
            self.out_of_time.cancel();
            if tokio::time::timeout(LAST_WORDS, self.tracker.wait()).await.is_err() {
                // No call may begin or end any more when the audit file is closed.
                self.stop.at_once.cancel();
                let _ = tokio::time::timeout(AFTER_CUT, self.tracker.wait()).await;
            }
        }
        let flush = async {
            if let Some(spans) = &self.spans {
                spans.shutdown(LAST_WRITES).await;
            }
        };
        tokio::join!(flush, self.audit.close(LAST_WRITES));
        info!("stopped");
        match ended {
            None => Ok(()),
            Some(Ok(task)) => Err(AppError::TaskEnded { task, source: None }),
            Some(Err(panic)) => Err(AppError::TaskEnded { task: "a background task", source: Some(panic) }),
        }
    }
}

/// Runs what should never end, and again after each panic: a bug in it must not cost the server the whole of it.
async fn through_panics<F: Future<Output = ()>>(metrics: &Metrics, work: impl Fn() -> F) {
    while AssertUnwindSafe(work()).catch_unwind().await.is_err() {
        metrics.panicked();
        metrics.task_restarted();
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// What checks the tokens of callers, where they have to have some.
fn inbound(settings: &Settings) -> Result<Option<(&EntraInbound, Arc<Verifier>)>, AppError> {
    let InboundAuth::Entra(inbound) = &settings.inbound else { return Ok(None) };
    let IdentitySettings { authority, extra_ca_pem, .. } = &settings.identity;
    let exchanged = matches!(settings.backend.auth, BackendAuth::OnBehalfOf { .. });
    let verifier = Verifier::start(inbound, authority, extra_ca_pem.as_deref(), exchanged)?;
    info!("callers need a token of Entra ID for `{}`", inbound.public_url);
    Ok(Some((inbound, Arc::new(verifier))))
}

/// What the figures read when somebody asks for them, and what is built after them because it counts in them itself.
#[derive(Default)]
struct Observed {
    backend: OnceLock<Weak<BackendClient>>,
    health: OnceLock<Arc<Health>>,
}

/// The figures, with those that the rooms hold in memory anyway.
fn metrics_of(settings: &Settings, identity: &Arc<TokenSource>, observed: &Arc<Observed>) -> Metrics {
    let mut metrics = Metrics::new(&TOOL_NAMES, &Route::TEMPLATES);
    metrics.count_refusals(&Refusal::WORDS);
    metrics.observe_runtime(&Handle::current());
    let capacity = Capacity {
        connections: settings.web.max_connections,
        server: settings.web.max_in_flight,
        tool: settings.web.max_in_flight_per_tool,
        backend: settings.backend.max_concurrency,
        memory: settings.backend.max_buffered_bytes,
    };
    let seen = Arc::clone(observed);
    metrics.observe_capacity(capacity, move || {
        seen.backend.get().and_then(Weak::upgrade).map_or(0, |backend| backend.memory().used())
    });
    let seen = Arc::clone(observed);
    let figure = Figure::new("mcp_server_ready", "What /health/ready says: 1 when calls should come here, 0 when not");
    metrics.observe(Kind::Gauge, figure, move || seen.health.get().is_some_and(|health| health.is_ready()).into());
    let seen = Arc::clone(observed);
    let figure = Figure::new(
        "mcp_server_backend_circuit_breaker",
        "What the circuit breaker of a route does with calls: 0 lets them through, 1 tries one, 2 refuses them",
    );
    metrics.observe_each(Kind::Gauge, figure, move || {
        let backend = seen.backend.get().and_then(Weak::upgrade);
        let of = |route: Route| {
            let state = match backend.as_ref().map(|backend| backend.breaker_state(route)) {
                None | Some(BreakerState::Closed) => 0.0,
                Some(BreakerState::HalfOpen) => 1.0,
                Some(BreakerState::Open) => 2.0,
            };
            (vec![("route", route.name())], state)
        };
        Route::OF_TOOLS.map(of).to_vec()
    });
    observe_identity(&mut metrics, identity);
    metrics
}

fn observe_identity(metrics: &mut Metrics, identity: &Arc<TokenSource>) {
    let mut add = |kind, figure, read: fn(TokenStats) -> f64| {
        let source = Arc::clone(identity);
        metrics.observe(kind, figure, move || read(source.stats()));
    };
    let figure = Figure::seconds("mcp_server_token_expires_in", "Time until the token expires; 0 without one");
    add(Kind::Gauge, figure, |stats| stats.expires_in.unwrap_or_default().as_secs_f64());
    let figure = Figure::seconds("mcp_server_token_age", "Time since the token was received; 0 without one");
    add(Kind::Gauge, figure, |stats| stats.age.unwrap_or_default().as_secs_f64());
    let help = "Panics of the task that refreshes the token, which was started again";
    add(Kind::Counter, Figure::new("mcp_server_token_task_restarts", help), |stats| stats.restarts as f64);
    let help = "Refreshes that a 401 of the backend forced";
    add(Kind::Counter, Figure::new("mcp_server_token_refreshes_forced", help), |stats| stats.forced as f64);

    let source = Arc::clone(identity);
    let help =
        "Exchanges for a token: failures are transient, or have a configuration behind them that someone must mend";
    metrics.observe_each(Kind::Counter, Figure::new("mcp_server_token_refreshes", help), move || {
        let stats = source.stats();
        [
            ("success", stats.succeeded),
            ("transient", stats.failed_transient),
            ("configuration", stats.failed_configuration),
        ]
        .map(|(result, count)| (vec![("result", result)], count as f64))
        .to_vec()
    });
    let labels = vec![("credential", identity.credential())];
    let figure = Figure::new("mcp_server_identity_info", "Always 1; the label tells which credential is used");
    metrics.observe_each(Kind::Gauge, figure, move || vec![(labels.clone(), 1.0)]);
}

/// What the log, the traces and the audit could not keep.
fn observe_telemetry(metrics: &mut Metrics, audit: &Arc<Audit>, spans: Option<&Spans>) {
    let help = "Log lines that were dropped because nobody read them in time";
    metrics.observe(Kind::Counter, Figure::new("mcp_server_log_lines_dropped", help), || logs::dropped_lines() as f64);
    let (sent, kept) = (spans.cloned(), spans.cloned());
    let figure = Figure::new("mcp_server_spans_exported", "Spans that the collector has taken");
    metrics.observe(Kind::Counter, figure, move || sent.as_ref().map_or(0.0, |spans| spans.exported() as f64));
    let help = "Spans that were not sent because the collector is too slow, or not there";
    let figure = Figure::new("mcp_server_spans_dropped", help);
    metrics.observe(Kind::Counter, figure, move || kept.as_ref().map_or(0.0, |spans| spans.dropped() as f64));
    let file = Arc::clone(audit);
    let figure = Figure::new("mcp_server_audit_events_lost", "Audit events that are not in the audit file");
    metrics.observe(Kind::Counter, figure, move || file.lost() as f64);
    let file = Arc::clone(audit);
    let figure = Figure::new("mcp_server_audit_writable", "Whether the audit file can be written; 1 without one");
    metrics.observe(Kind::Gauge, figure, move || f64::from(u8::from(file.is_writable())));
}

/// mimalloc returns what was freed to the system a second later, but only when something large is allocated or freed after that. Where
/// nothing happens after a burst of large answers, it would keep all of them.
async fn give_memory_back() {
    let mut ticks = tokio::time::interval(GIVE_BACK_INTERVAL);
    loop {
        ticks.tick().await;
        // Larger than what threads keep for themselves. It is not written to, and so costs no memory.
        drop(std::hint::black_box(Vec::<u8>::with_capacity(1 << 20)));
    }
}

/// Asks the backend for its health, for ever, and says so when the answer changes.
async fn watch_backend(backend: &BackendClient, health: &Health) {
    let mut ticks = tokio::time::interval(HEALTH_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let answer = backend.health().await;
        let changed = health.backend_checked(answer.is_ok());
        match answer {
            Ok(()) if changed => info!("the backend is healthy"),
            Err(error) if changed => warn!(
                cause = chain(&error),
                backend_detail = error.detail.as_deref(),
                "the backend counts as unhealthy now: {error}"
            ),
            _ => {}
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;
    use crate::settings::{BackendSettings, LogSettings, TelemetrySettings, ToolSettings, WebSettings};

    /// A server whose Entra and backend do not exist, serving on ports that the system chooses.
    fn serving() -> Serving {
        let identity = IdentitySettings::nowhere();
        let web = WebSettings {
            host: [127, 0, 0, 1].into(),
            port: 0,
            metrics_port: None,
            drain_delay: Duration::from_millis(10),
            ..WebSettings::default()
        };
        let backend = BackendSettings::new("http://127.0.0.1:1".parse().unwrap());
        let log = LogSettings::default();
        let (inbound, tools, telemetry) = (InboundAuth::None, ToolSettings::default(), TelemetrySettings::default());
        let settings = Settings { identity, backend, web, inbound, tools, log, telemetry, warnings: Vec::new() };
        App::bind(&settings).unwrap().start()
    }

    #[tokio::test]
    async fn a_server_that_loses_a_task_it_cannot_do_without_drains_and_says_which() {
        let mut lost = serving();
        let health = Arc::clone(&lost.health);
        lost.tasks.spawn(async { "accept connections" });
        let error = lost.until(pending()).await.unwrap_err();
        assert!(matches!(error, AppError::TaskEnded { task: "accept connections", source: None }), "{error}");
        assert!(health.is_draining());

        let mut panicking = serving();
        panicking.tasks.spawn(async { panic!("a bug in a task") });
        let error = panicking.until(pending()).await.unwrap_err();
        assert!(matches!(&error, AppError::TaskEnded { source: Some(panic), .. } if panic.is_panic()), "{error}");
        serving().until(async {}).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_panics_starts_again_after_a_pause_and_is_counted() {
        let metrics = Metrics::new(&TOOL_NAMES, &Route::TEMPLATES);
        let (runs, begin) = (AtomicU32::new(0), Instant::now());
        through_panics(&metrics, || async {
            assert!(runs.fetch_add(1, Relaxed) >= 3, "a bug in the work");
        })
        .await;
        assert_eq!((runs.load(Relaxed), begin.elapsed()), (4, 3 * HEALTH_INTERVAL));
        assert!(metrics.encode().unwrap().contains("mcp_server_task_restarts_total 3"));
    }
}
