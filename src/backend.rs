//! How we speak to the backend: one pooled client, one way to send, one deadline for a whole tool call.
//!
//! Public methods say one intent each (`user`, `create_ticket`, …) and live beside their wire types in `backend/`. All of them
//! go through `BackendClient::send`, which adds the token, the trace, the caps, the repetitions and the error mapping. The
//! token never leaves the one origin: paths are built from checked [`Segment`]s, redirects are not followed, and no proxy is used.

#[cfg(feature = "benches")]
pub(crate) mod benching;
mod breaker;
mod budget;
mod caller;
mod data;
mod detail;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
#[cfg(test)]
pub(crate) mod properties;
mod record;
mod retry;
mod segment;
#[cfg(test)]
mod simulation;
mod tickets;
mod users;
mod window;

use std::borrow::Cow;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use reqwest::{Request, Response};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tracing::debug;
use url::Url;

pub use breaker::BreakerState;
use breaker::{Admission, Breakers, CallerBit, Source};
use budget::RetryBudget;
pub use caller::Principal;
use caller::{Bearer, Told};
pub use data::{Query, QueryRows};
pub use error::{BackendError, Failure, FormError};
pub use segment::{Segment, SegmentError};
pub use tickets::{NewTicket, Priority, Ticket, TicketPage, TicketStatus};
pub use users::{User, UserPage};

pub use crate::identity::IdentityError;
use crate::identity::{BearerToken, OnBehalfOf, TokenSource};
use crate::json;
use crate::memory::{ByteBudget, Full, Lease, SMALL_ANSWER};
use crate::settings::{BackendAuth, BackendSettings};
use crate::telemetry::metrics::{Exchange, Metrics, Shed};
use crate::telemetry::spans::{self, Description, Recording};
use crate::telemetry::trace::{TRACEPARENT, TRACESTATE, Trace, TraceContext};
use retry::Attempts;

/// A connection that takes longer than this counts as not to be had.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Idle connections are given up before a usual backend or load balancer gives them up.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Of an error's body this much is read, so that its connection can be used again.
const DRAINED_BYTES: usize = 64 * 1024;
/// And for this long: the status has decided already what the answer is, and the caller should not wait for more.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(250);

/// Memory that a write has before it is sent, so that an answer of any usual size can be kept.
const WRITE_RESERVE: usize = 64 * 1024;

/// A health check that takes longer has failed: an outage should not be noticed late.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// The backend, as the tools see it. Cheap to share, never rebuilt.
pub struct BackendClient {
    http: reqwest::Client,
    base_url: Url,
    identity: Arc<TokenSource>,
    /// Where tokens for users come from, when calls are made on their behalf.
    users: Option<OnBehalfOf>,
    auth: BackendAuth,
    forward_caller: bool,
    metrics: Arc<Metrics>,
    headers: HeaderMap,
    timeout: Duration,
    max_response_bytes: usize,
    max_attempts: u32,
    idempotent_creates: bool,
    /// Room for requests at the same time.
    permits: Semaphore,
    /// Keeps repetitions from multiplying an outage.
    budget: RetryBudget,
    breakers: Option<Breakers>,
    /// What answers may take in memory, from their first chunk until our own answer has been written.
    memory: Arc<ByteBudget>,
    /// Of the spans of attempts, by route.
    descriptions: [Description; Route::TEMPLATES.len()],
    /// Where tests put another backend, below everything that is ours.
    #[cfg(test)]
    wire: Option<simulation::Wire>,
}

/// The backend's routes: the closed set of values that metrics may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "`TEMPLATES` says what each is")]
pub enum Route {
    User,
    Users,
    CreateTicket,
    Tickets,
    Query,
    Health,
}

impl Route {
    /// Method and path template of each route, in order.
    pub const TEMPLATES: [(&'static str, &'static str); 6] = [
        ("GET", "/users/{user_id}"),
        ("GET", "/users"),
        ("POST", "/tickets"),
        ("GET", "/tickets"),
        ("GET", "/query/{dataset}"),
        ("GET", "/health"),
    ];

    /// Those that tools call.
    pub const OF_TOOLS: [Self; 5] = [Self::User, Self::Users, Self::CreateTicket, Self::Tickets, Self::Query];

    /// Method and path template in one.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "GET /users/{user_id}",
            Self::Users => "GET /users",
            Self::CreateTicket => "POST /tickets",
            Self::Tickets => "GET /tickets",
            Self::Query => "GET /query/{dataset}",
            Self::Health => "GET /health",
        }
    }
}

/// What one tool call may spend on the backend, and what it did spend.
#[derive(Debug)]
pub struct Call {
    deadline: Instant,
    timeout: Duration,
    trace: Trace,
    /// Where it is traced, if it is.
    recording: Option<Recording>,
    bearer: Bearer,
    told: Option<Told>,
    /// Who calls, as far as the circuit breaker tells callers apart.
    caller: CallerBit,
    attempts: AtomicU32,
    status: AtomicU16,
    /// The status of the attempt that is being made.
    attempt_status: AtomicU16,
    /// The `Idempotency-Key` of its write, once that was about to be sent.
    idempotency_key: OnceLock<String>,
    /// Whether that write may have been applied, as far as is known now. Shared with [`Write`].
    unsettled: OnceLock<Arc<AtomicBool>>,
    at_backend_micros: AtomicU64,
    /// The memory of its result.
    memory: Lease,
}

impl Call {
    /// Hands over the memory of its result.
    pub fn take_memory(&self) -> Lease {
        self.memory.take()
    }

    /// How often the backend was asked.
    pub fn attempts(&self) -> u32 {
        self.attempts.load(Relaxed)
    }

    /// The status of its last answer, if there was one.
    pub fn status(&self) -> Option<u16> {
        some_status(&self.status)
    }

    /// The `Idempotency-Key` that went along with its write, if there was one.
    pub fn idempotency_key(&self) -> Option<&str> {
        self.idempotency_key.get().map(String::as_str)
    }

    /// Whether it has sent a write that the backend may have applied, and no answer has said otherwise. Also true of one that succeeded.
    pub fn may_have_written(&self) -> bool {
        self.unsettled.get().is_some_and(|unsettled| unsettled.load(Relaxed))
    }

    /// Where it is traced, if it is.
    pub fn recording(&self) -> Option<&Recording> {
        self.recording.as_ref()
    }

    /// How long the backend had it, in all attempts together.
    pub fn at_backend(&self) -> Duration {
        Duration::from_micros(self.at_backend_micros.load(Relaxed))
    }

    /// When the call has to be over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The whole time that it had.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

fn some_status(status: &AtomicU16) -> Option<u16> {
    Some(status.load(Relaxed)).filter(|status| *status != 0)
}

/// A request before it has a token: what stays the same over its attempts.
struct Outgoing {
    route: Route,
    url: Url,
    write: Option<Write>,
    /// The status of the current attempt's answer; 0 until its status line has come.
    status: AtomicU16,
}

/// The body of a write, and what proves its fate.
struct Write {
    body: Bytes,
    /// Sent as `Idempotency-Key`, the same over all attempts.
    key: String,
    /// Set when the connection first asks for the body: until then not a byte has left.
    sent: Arc<AtomicBool>,
    /// Set when an attempt may have been applied. What later attempts come to does not change that.
    doubtful: AtomicBool,
    /// Set when the backend answered an attempt with a status that says it was applied, whatever became of the rest of the answer.
    applied: AtomicBool,
    /// Set with `sent`, and cleared when an attempt has ended and none so far can have been applied: what is true of a call that is
    /// dropped half-way.
    unsettled: Arc<AtomicBool>,
}

impl BackendClient {
    /// Builds the one HTTP client.
    ///
    /// # Errors
    ///
    /// When the platform's TLS cannot be set up.
    pub fn new(
        settings: &BackendSettings,
        identity: Arc<TokenSource>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .pool_max_idle_per_host(usize::MAX)
            .redirect(reqwest::redirect::Policy::none())
            // Repeating is decided in `retry.rs` alone. (hyper still replaces a pooled connection that closed unused.)
            .retry(reqwest::retry::never())
            .tcp_nodelay(true)
            .no_proxy()
            .build()?;
        Ok(Self::with_client(http, settings, identity, metrics))
    }

    fn with_client(
        http: reqwest::Client,
        settings: &BackendSettings,
        identity: Arc<TokenSource>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let headers = HeaderMap::from_iter([
            (header::ACCEPT, HeaderValue::from_static("application/json")),
            // Nothing here decodes; and without the header a server may choose any coding (RFC 9110 section 12.5.3).
            (header::ACCEPT_ENCODING, HeaderValue::from_static("identity")),
            (header::USER_AGENT, HeaderValue::from_static(concat!("mcp-server/", env!("CARGO_PKG_VERSION")))),
        ]);
        let (host, port) = (settings.base_url.host_str(), settings.base_url.port_or_known_default());
        let (host, port) = (host.unwrap_or_default(), port.unwrap_or_default());
        Self {
            http,
            base_url: settings.base_url.clone(),
            identity,
            users: None,
            auth: settings.auth,
            forward_caller: settings.forward_caller,
            metrics,
            headers,
            timeout: settings.timeout,
            max_response_bytes: settings.max_response_bytes,
            max_attempts: settings.max_attempts,
            idempotent_creates: settings.idempotent_creates,
            permits: Semaphore::new(settings.max_concurrency),
            budget: RetryBudget::new(settings.retry_floor, settings.retry_percent),
            breakers: settings.circuit_breaker.then(Breakers::new),
            memory: ByteBudget::new(settings.max_buffered_bytes),
            descriptions: Route::TEMPLATES.map(|(method, path)| Description::of_attempts(method, path, host, port)),
            #[cfg(test)]
            wire: None,
        }
    }

    /// The same client, with where tokens for users come from. Without it, what has to be done on behalf of a user is refused.
    #[must_use]
    pub fn with_users(self, users: OnBehalfOf) -> Self {
        Self { users: Some(users), ..self }
    }

    /// Starts the clock of one tool call, which is recorded there if it is traced. `address` is that of the client.
    pub fn begin_call_for(
        &self,
        trace: Trace,
        recording: Option<Recording>,
        caller: Option<Principal<'_>>,
        address: Option<IpAddr>,
    ) -> Call {
        let mut call = Call { recording, ..self.begin_call(trace) };
        call.caller = match (caller, address) {
            (Some(caller), _) => CallerBit::of_identity(caller.tenant, caller.object),
            (None, Some(address)) => CallerBit::of_address(address),
            (None, None) => call.caller,
        };
        if let BackendAuth::OnBehalfOf { app_fallback } = self.auth {
            call.bearer = Bearer::on_behalf_of(caller, app_fallback);
        }
        if let (true, Some(caller)) = (self.forward_caller, caller) {
            call.told = Told::of(caller);
            if call.told.is_none() {
                // The backend may decide by what it is told: to tell it nothing would be to say that the server itself calls.
                call.bearer = Bearer::Nobody;
            }
        }
        call
    }

    /// Starts the clock of a call that the server makes for itself.
    pub fn begin_call(&self, trace: Trace) -> Call {
        Call {
            deadline: Instant::now() + self.timeout,
            timeout: self.timeout,
            trace,
            recording: None,
            bearer: Bearer::Server,
            told: None,
            caller: CallerBit::SERVER,
            attempts: AtomicU32::new(0),
            status: AtomicU16::new(0),
            attempt_status: AtomicU16::new(0),
            idempotency_key: OnceLock::new(),
            unsettled: OnceLock::new(),
            at_backend_micros: AtomicU64::new(0),
            memory: self.memory.lease(SMALL_ANSWER),
        }
    }

    /// Asks `GET /health` once.
    ///
    /// # Errors
    ///
    /// When the backend cannot be asked, or says anything but `healthy`.
    pub async fn health(&self) -> Result<(), BackendError> {
        #[derive(serde::Deserialize)]
        struct Health {
            status: String,
        }
        // Past the breaker and the permits: a probe of our own must see the backend, not our opinion of it.
        let mut call = self.begin_call(Trace::begin());
        call.timeout = call.timeout.min(HEALTH_TIMEOUT);
        call.deadline = Instant::now() + call.timeout;
        let request = Outgoing::read(Route::Health, self.url(&["health"]));
        let token = self.token(&call, &request, None).await?;
        let answer = self.exchange(&call, &request, &token).await;
        if let Err(BackendError { failure: Failure::Unauthorized, .. }) = &answer {
            // The next check, or call, goes with the token that this begins to fetch: an idle server heals too.
            self.identity.reject(&token);
        }
        let body = answer?;
        let word = match self.decode::<Health>(&request, &body) {
            Ok(health) if health.status == "healthy" => return Ok(()),
            Ok(health) => health.status,
            // Some frameworks answer with a word alone.
            Err(error) => bare_word(&body).ok_or(error)?,
        };
        Err(self.fail(&request, Failure::Unhealthy(detail::shown(&word, 40))))
    }

    /// What bounds the memory of answers, of the backend and of our own.
    pub fn memory(&self) -> &Arc<ByteBudget> {
        &self.memory
    }

    /// What the breaker of a route does with calls now.
    pub fn breaker_state(&self, route: Route) -> BreakerState {
        self.breakers.as_ref().map_or(BreakerState::Closed, |breakers| breakers.state(route))
    }

    /// The address of a route: the base with these segments appended, each percent-encoded as one.
    fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base_url.clone();
        if segments.iter().all(|segment| segment::encoded(segment) == *segment) {
            if let Ok(mut path) = url.path_segments_mut() {
                path.pop_if_empty().extend(segments);
            }
            return url;
        }
        // `Url` leaves brackets and some others as they are, and would encode a `%` of ours once more: a whole path it takes as given.
        let mut path = url.path().strip_suffix('/').unwrap_or(url.path()).to_owned();
        for segment in segments {
            path.push('/');
            path.push_str(&segment::encoded(segment));
        }
        url.set_path(&path);
        url
    }

    /// Sends a request, repeats it where that is safe, and reads its answer, all before the call's deadline.
    async fn send<T: DeserializeOwned>(&self, call: &Call, request: Outgoing) -> Result<T, BackendError> {
        let body = self.whole_answer(call, &request).await?;
        self.decode(&request, &body)
    }

    /// The body of the answer, and the memory for what is made of it, which is hardly ever larger.
    async fn whole_answer(&self, call: &Call, request: &Outgoing) -> Result<Bytes, BackendError> {
        if request.write.is_none() {
            let body = self.repeat(call, request).await?;
            call.memory.grow(body.len()).map_err(|Full| self.no_memory(request, true))?;
            return Ok(body);
        }
        let reserve = self.memory.lease_reserved(0);
        reserve.grow(WRITE_RESERVE).map_err(|Full| self.no_memory(request, false))?;
        let body = self.repeat(call, request).await?;
        // Of an answer that is larger, the memory was there a moment ago.
        call.memory.set(body.len());
        Ok(body)
    }

    fn no_memory(&self, request: &Outgoing, sent: bool) -> BackendError {
        self.metrics.shed(Shed::Memory);
        self.fail(request, Failure::NoMemory { sent })
    }

    /// Attempts, with pauses between them, until there is an answer or none can be hoped for.
    async fn repeat(&self, call: &Call, request: &Outgoing) -> Result<Bytes, BackendError> {
        let mut attempts = Attempts::new(self.max_attempts);
        let mut earlier = None;
        self.budget.deposit();
        loop {
            let error = match self.attempt_with_token(call, request).await {
                Ok(body) => return Ok(body),
                // The repetition was not even sent: what the backend did say tells more.
                Err(error) if error.was_turned_away() => return Err(earlier.unwrap_or(error)),
                Err(error) => error,
            };
            let Some(setback) = error.setback() else { return Err(error) };
            let unsafe_write = request.write.is_some() && !self.idempotent_creates;
            if !retry::may_repeat(unsafe_write, setback) {
                return Err(error);
            }
            let Some(wait) = attempts.next_wait(error.retry_after(), call.left()) else { return Err(error) };
            if !self.budget.withdraw() {
                self.metrics.retry_budget_exhausted();
                debug!(reason = %error, "not asking the backend again: too many calls are being repeated");
                return Err(error);
            }
            self.metrics.retried(setback.reason());
            debug!(reason = %error, wait_ms = wait.as_millis(), "asking the backend again after {} ms", wait.as_millis());
            tokio::time::sleep(wait).await;
            earlier = Some(error);
        }
    }

    /// One attempt; when the backend refuses the token, one more with a new one.
    async fn attempt_with_token(&self, call: &Call, request: &Outgoing) -> Result<Bytes, BackendError> {
        request.status.store(0, Relaxed);
        let token = self.token(call, request, None).await?;
        match self.attempt(call, request, &token).await {
            Err(BackendError { failure: Failure::Unauthorized, .. })
                if self.reject(call, &token) && call.left() > retry::LEAST_ATTEMPT =>
            {
                self.metrics.retried(retry::REASON_UNAUTHORIZED);
                let token = self.token(call, request, Some(&token)).await;
                let token = token.map_err(|error| BackendError { token_rejected: true, ..error })?;
                let answer = self.attempt(call, request, &token).await;
                answer.map_err(|error| BackendError { token_replaced: true, ..error })
            }
            answer => answer,
        }
    }

    /// A token, at once when one is held; other than the rejected one, which may be held still.
    async fn token(
        &self,
        call: &Call,
        request: &Outgoing,
        rejected: Option<&Arc<BearerToken>>,
    ) -> Result<Arc<BearerToken>, BackendError> {
        let token = async {
            match (&call.bearer, &self.users, rejected) {
                (Bearer::Server, _, None) => self.identity.token().await.map_err(Failure::Identity),
                (Bearer::Server, _, Some(token)) => self.identity.replacement(token).await.map_err(Failure::Identity),
                (Bearer::User(user), Some(users), None) => users.token(user).await.map_err(Failure::OnBehalfOf),
                (Bearer::User(user), Some(users), Some(token)) => {
                    users.replacement(user, token).await.map_err(Failure::OnBehalfOf)
                }
                (Bearer::User(_), None, _) | (Bearer::Nobody, ..) => Err(Failure::NoUser),
            }
        };
        let token = timeout_at(call.deadline, token).await.unwrap_or_else(|_elapsed| {
            // It was Entra that gave no answer: the backend was not asked.
            let late = IdentityError::waited_for(self.identity.credential(), call.timeout);
            Err(match &call.bearer {
                Bearer::User(_) => Failure::OnBehalfOf(late),
                Bearer::Server | Bearer::Nobody => Failure::Identity(late),
            })
        });
        token.map_err(|failure| self.fail(request, failure))
    }

    /// The backend refused this token: whether another one may be expected.
    fn reject(&self, call: &Call, token: &Arc<BearerToken>) -> bool {
        match (&call.bearer, &self.users) {
            (Bearer::Server, _) => self.identity.reject(token),
            (Bearer::User(user), Some(users)) => users.reject(user, token),
            (Bearer::User(_), None) | (Bearer::Nobody, _) => false,
        }
    }

    /// One attempt, if there is room for it and the backend is worth asking.
    async fn attempt(&self, call: &Call, request: &Outgoing, token: &BearerToken) -> Result<Bytes, BackendError> {
        request.status.store(0, Relaxed);
        let Ok(_permit) = self.permits.try_acquire() else {
            self.metrics.shed(Shed::Backend);
            return Err(self.fail(request, Failure::Busy));
        };
        let _taken = self.metrics.backend_permit();
        let admission = match &self.breakers {
            None => None,
            Some(breakers) => {
                let source = Source::new(call.caller, request.url.path());
                Some(breakers.admit(request.route, source).map_err(|wait| {
                    self.metrics.shed(Shed::Breaker);
                    self.fail(request, Failure::CircuitOpen(wait))
                })?)
            }
        };
        let answer = self.exchange(call, request, token).await;
        if let Some(admission) = admission {
            Admission::settle(admission, answer.as_ref().err().map_or(breaker::Verdict::Works, BackendError::verdict));
        }
        answer
    }

    /// Sends once and reads the answer, before the deadline.
    async fn exchange(&self, call: &Call, request: &Outgoing, token: &BearerToken) -> Result<Bytes, BackendError> {
        let _busy = self.metrics.backend_in_flight();
        let (started, context) = (Instant::now(), call.trace.context.child());
        let resends = call.attempts.fetch_add(1, Relaxed);
        call.attempt_status.store(0, Relaxed);
        let (route, outcome) = (request.route, Exchange::Cancelled);
        let mut asking = Asking { client: self, call, route, context, resends, started, outcome };
        let answer = match timeout_at(call.deadline, self.ask(call, request, token, context)).await {
            Ok(Ok(response)) => self.answer(call, request, response).await,
            Ok(Err(error)) => Err(error),
            Err(_elapsed) => Err(self.fail(request, Failure::Timeout(call.timeout))),
        };
        if let (Some(write), Err(error)) = (&request.write, &answer) {
            write.unsettled.store(error.unknown_write.is_some(), Relaxed);
        }
        asking.outcome = answer.as_ref().err().map_or(Exchange::Success, |error| error.failure.exchange());
        answer
    }

    /// Sends, and waits for the head of the answer.
    async fn ask(
        &self,
        call: &Call,
        request: &Outgoing,
        token: &BearerToken,
        context: TraceContext,
    ) -> Result<Response, BackendError> {
        let mut headers = self.headers.clone();
        headers.insert(header::AUTHORIZATION, token.authorization().clone());
        headers.insert(TRACEPARENT, context.header());
        if let Some(state) = &call.trace.state {
            headers.insert(TRACESTATE, state.clone());
        }
        if let Some(told) = &call.told {
            told.write_to(&mut headers);
        }
        let method = if request.write.is_some() { Method::POST } else { Method::GET };
        let mut outgoing = Request::new(method, request.url.clone());
        if let Some(write) = &request.write {
            call.idempotency_key.get_or_init(|| write.key.clone());
            call.unsettled.get_or_init(|| Arc::clone(&write.unsettled));
            // An earlier attempt was refused or never left, or there would be no other; unless the backend tells repetitions apart.
            if !self.idempotent_creates {
                write.sent.store(false, Relaxed);
            }
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            if let Ok(key) = HeaderValue::from_str(&write.key) {
                headers.insert("idempotency-key", key);
            }
            *outgoing.body_mut() = Some(reqwest::Body::wrap(WitnessedBody::of(write)));
        }
        *outgoing.headers_mut() = headers;

        self.execute(outgoing).await.map_err(|error| self.transport(request, error))
    }

    #[cfg(not(test))]
    async fn execute(&self, outgoing: Request) -> reqwest::Result<Response> {
        self.http.execute(outgoing).await
    }

    /// What an answer comes to. The status alone decides that for an error; a success is read to its end, before the deadline.
    async fn answer(&self, call: &Call, request: &Outgoing, response: Response) -> Result<Bytes, BackendError> {
        let status = response.status();
        call.status.store(status.as_u16(), Relaxed);
        call.attempt_status.store(status.as_u16(), Relaxed);
        request.status.store(status.as_u16(), Relaxed);
        let coding = content_coding(response.headers());
        if status.is_success() {
            if let Some(write) = &request.write {
                write.applied.fetch_or(says_applied(&response), Relaxed);
            }
            if let Some(coding) = coding {
                drain(call, response, None).await;
                return Err(self.fail(request, Failure::Encoded(coding)));
            }
            return match timeout_at(call.deadline, self.body(request, response)).await {
                Ok(body) => body,
                Err(_elapsed) => Err(self.fail(request, Failure::Timeout(call.timeout))),
            };
        }
        let failure = match status {
            StatusCode::UNAUTHORIZED => Failure::Unauthorized,
            status => {
                Failure::Status { status, retry_after: retry::retry_after(response.headers(), SystemTime::now()) }
            }
        };
        let mut kept = Vec::new();
        let described = coding.is_none() && detail::is_described(response.headers());
        drain(call, response, described.then_some(&mut kept)).await;
        Err(BackendError { detail: detail::of(&kept), ..self.fail(request, failure) })
    }

    fn decode<T: DeserializeOwned>(&self, request: &Outgoing, body: &[u8]) -> Result<T, BackendError> {
        self.parse(request, body, |body| serde_json::from_slice(body))
    }

    /// Parses an answer. One that cannot be read is tried once more as it is meant: without a byte order mark, and with U+FFFD for
    /// halves of surrogate pairs. Nearly every answer is right the first time, and is not searched for them.
    fn parse<T, E: Into<FormError>>(
        &self,
        request: &Outgoing,
        body: &[u8],
        parse: impl Fn(&[u8]) -> Result<T, E>,
    ) -> Result<T, BackendError> {
        let unreadable = |error: E| self.fail(request, Failure::Unreadable(error.into()));
        parse(body).or_else(|error| {
            let copy = self.memory.lease(SMALL_ANSWER);
            copy.grow(body.len()).map_err(|Full| self.no_memory(request, true))?;
            match json::repaired(body) {
                Cow::Borrowed(rest) if rest.len() == body.len() => Err(unreadable(error)),
                repaired => parse(&repaired).map_err(unreadable),
            }
        })
    }

    /// Reads a body up to the cap. A body that arrives in one piece is not copied.
    async fn body(&self, request: &Outgoing, mut response: Response) -> Result<Bytes, BackendError> {
        let limit = self.max_response_bytes;
        let too_large = || self.fail(request, Failure::TooLarge(limit));
        if response.content_length().is_some_and(|length| length > limit as u64) {
            return Err(too_large());
        }
        let lease = self.memory.lease(if request.write.is_some() { WRITE_RESERVE } else { SMALL_ANSWER });
        let announced = response.content_length().map_or(0, |length| length as usize);
        let mut whole = BytesMut::new();
        let mut only = Bytes::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.transport(request, error))? {
            if whole.len() + only.len() + chunk.len() > limit {
                return Err(too_large());
            }
            lease.grow(chunk.len()).map_err(|Full| self.no_memory(request, true))?;
            if only.is_empty() && whole.is_empty() {
                only = chunk;
            } else {
                if whole.is_empty() {
                    whole.reserve(announced);
                }
                whole.extend_from_slice(&std::mem::take(&mut only));
                whole.extend_from_slice(&chunk);
            }
        }
        Ok(lease.attach(if whole.is_empty() { only } else { whole.freeze() }))
    }

    fn transport(&self, request: &Outgoing, error: reqwest::Error) -> BackendError {
        let not_sent = match &request.write {
            Some(write) => !write.sent.load(Relaxed),
            None => error.is_connect(),
        };
        // The error's text would hold the URL with its query.
        let error = error.without_url();
        self.fail(request, if not_sent { Failure::Unreachable(error) } else { Failure::Interrupted(error) })
    }

    /// Adds to a failure what the request knows: its path, and the fate of a write.
    fn fail(&self, request: &Outgoing, failure: Failure) -> BackendError {
        let path = request.url.path();
        let path = path.strip_prefix(self.base_url.path().trim_end_matches('/')).unwrap_or(path).to_owned();
        let unknown = |write: &&Write| {
            let doubtful = write.sent.load(Relaxed) && failure.may_have_been_applied();
            write.doubtful.fetch_or(doubtful, Relaxed) || doubtful
        };
        let unknown_write = request.write.as_ref().filter(unknown).map(|write| write.key.clone());
        BackendError {
            status: some_status(&request.status),
            applied: request.write.as_ref().is_some_and(|write| write.applied.load(Relaxed)),
            failure,
            route: request.route,
            path,
            write: request.write.is_some(),
            unknown_write,
            token_rejected: false,
            token_replaced: false,
            detail: None,
        }
    }
}

impl Outgoing {
    fn read(route: Route, url: Url) -> Self {
        Self { route, url, write: None, status: AtomicU16::new(0) }
    }

    fn write(route: Route, url: Url, body: Bytes) -> Self {
        let write = Write {
            body,
            key: uuid::Uuid::new_v4().to_string(),
            sent: Arc::default(),
            doubtful: AtomicBool::default(),
            applied: AtomicBool::default(),
            unsettled: Arc::default(),
        };
        Self { route, url, write: Some(write), status: AtomicU16::new(0) }
    }
}

/// One exchange on its way: counted and traced when it is dropped, also when that is because its client left.
struct Asking<'a> {
    client: &'a BackendClient,
    call: &'a Call,
    route: Route,
    context: TraceContext,
    resends: u32,
    started: Instant,
    outcome: Exchange,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let Self { client, call, route, context, resends, started, outcome } = *self;
        let took = started.elapsed();
        if let Some(recording) = &call.recording
            && let Some(description) = client.descriptions.get(route as usize)
        {
            let (status, error) =
                (some_status(&call.attempt_status), (outcome != Exchange::Success).then(|| outcome.as_str()));
            let started = started.into_std();
            recording.attempt(&spans::Attempt { context, description, resends, started, took, status, error });
        }
        call.at_backend_micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
        client.metrics.backend_asked(route as usize, outcome, took);
    }
}

/// Whether the head of a successful answer to a write says that it was applied. 202 promises it only, and a web page with 200 is
/// mostly a sign-in or a gateway's.
fn says_applied(response: &Response) -> bool {
    match response.status() {
        StatusCode::ACCEPTED => false,
        StatusCode::OK => {
            let media_type =
                response.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
            !media_type.get(..9).is_some_and(|beginning| beginning.eq_ignore_ascii_case(b"text/html"))
        }
        _ => true,
    }
}

/// A short text that is all of a body, as a JSON string or plain.
fn bare_word(body: &[u8]) -> Option<String> {
    let word = serde_json::from_slice(body).ok().or_else(|| Some(str::from_utf8(body).ok()?.trim().to_owned()))?;
    let plain = |character: char| character.is_alphanumeric() || matches!(character, ' ' | '_' | '-' | '.' | '!');
    let is_word = word.starts_with(char::is_alphabetic) && word.chars().all(plain) && word.len() <= 64;
    is_word.then_some(word)
}

/// The content coding of an answer, unless it is none.
fn content_coding(headers: &HeaderMap) -> Option<Box<str>> {
    let values = headers.get_all(header::CONTENT_ENCODING).iter();
    let coded = |value: &&HeaderValue| !value.is_empty() && !value.as_bytes().eq_ignore_ascii_case(b"identity");
    let value = values.into_iter().find(coded)?;
    Some(detail::shown(&String::from_utf8_lossy(value.as_bytes()), 40))
}

/// Reads a short body to its end, so that the connection goes back to the pool; a long or slow one costs the connection instead.
/// What it begins with can be kept.
async fn drain(call: &Call, mut response: Response, mut kept: Option<&mut Vec<u8>>) {
    let reading = async {
        let mut read = 0;
        while let Ok(Some(chunk)) = response.chunk().await {
            read += chunk.len();
            if let Some(kept) = &mut kept {
                let room = detail::KEPT_BYTES.saturating_sub(kept.len()).min(chunk.len());
                kept.extend_from_slice(chunk.get(..room).unwrap_or_default());
            }
            if read > DRAINED_BYTES {
                return;
            }
        }
    };
    let until = call.deadline.min(Instant::now() + DRAIN_TIMEOUT);
    let _ = timeout_at(until, reading).await;
}

/// A body that tells when the connection asks for it. hyper does so right after it has put the head into its buffer and before
/// it flushes: a body that was never asked for belongs to a request of which not a byte was sent.
struct WitnessedBody {
    data: Option<Bytes>,
    sent: Arc<AtomicBool>,
    unsettled: Arc<AtomicBool>,
}

impl WitnessedBody {
    fn of(write: &Write) -> Self {
        let (sent, unsettled) = (Arc::clone(&write.sent), Arc::clone(&write.unsettled));
        Self { data: Some(write.body.clone()), sent, unsettled }
    }
}

impl Body for WitnessedBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.sent.store(true, Relaxed);
        self.unsettled.store(true, Relaxed);
        Poll::Ready(self.data.take().map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.data.as_ref().map_or(0, |data| data.len() as u64))
    }
}
