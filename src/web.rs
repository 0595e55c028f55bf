//! Which routes exist, in which layers, and whether we are ready.
//!
//! `Web::answer` is the one way of a request, read from the outside in; `web/listener.rs` brings the requests to it.

mod forwarded;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod guard;
pub mod health;
pub mod healthcheck;
mod listener;
mod message;
mod plain;
mod problem;
#[cfg(test)]
mod properties;
mod rate;
mod refusals;
mod request_body;

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use ipnet::IpNet;
use rmcp::model::InitializeRequestParams;
use rmcp::transport::streamable_http_server::session::never::NeverSessionManager;
use rmcp::transport::streamable_http_server::{StreamableHttpServerConfig, StreamableHttpService};
use tokio::sync::Semaphore;
use tower::ServiceExt as _;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tracing::{Instrument as _, error};

use guard::Presented;
use message::Message;
use plain::Refused;

pub use guard::Guard;
pub use health::Health;
pub use listener::{Lane, Limits, Listener, Stop};

use crate::auth::{Caller, Refusal, StepUp};
use crate::json;
use crate::problem::Problem;
use crate::settings::WebSettings;
use crate::telemetry::metrics::{Metrics, PROTOCOL_VERSIONS, Shed};
use crate::telemetry::trace::{RequestTrace, TRACEPARENT};
use crate::tools::{Permits, ToolServer, Written};
use rate::RateLimit;
use request_body::{BodyReader, ReadError};

/// Where clients find the protocol that we speak.
const DOCUMENTATION: &str = "https://modelcontextprotocol.io/specification/2026-07-28";

/// A request has at most so many header fields, and so many bytes of them.
const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 16 * 1024;
const MCP_PROTOCOL_VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");

/// The HTTP side of the server.
pub struct Web {
    main: Router,
    management: Router,
    health: Arc<Health>,
    is_guarded: bool,
    trusted_proxies: Vec<IpNet>,
    max_request_bytes: usize,
    metrics: Arc<Metrics>,
}

/// What the MCP endpoint needs to answer.
struct Endpoint {
    /// For plain calls.
    tools: ToolServer,
    /// For everything else.
    mcp: StreamableHttpService<ToolServer, NeverSessionManager>,
    /// The hosts and pages that requests may name.
    allowed: plain::Allowed,
    /// `None` lets everybody in.
    guard: Option<Arc<Guard>>,
    metrics: Arc<Metrics>,
    rate_limit: RateLimit,
    /// Room for requests at the same time.
    room: Arc<Semaphore>,
    max_request_bytes: usize,
    bodies: BodyReader,
}

impl Web {
    /// Wires the routes.
    pub fn new(
        settings: &WebSettings,
        tools: ToolServer,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
        guard: Option<Guard>,
    ) -> Self {
        let guard = guard.map(Arc::new);
        let max_buffered_bytes = tools.memory().limit();
        let endpoint = Arc::new(Endpoint {
            tools: tools.clone(),
            mcp: StreamableHttpService::new(move || Ok(tools.clone()), Arc::default(), transport(settings)),
            allowed: plain::Allowed::new(settings),
            guard: guard.clone(),
            metrics: Arc::clone(&metrics),
            rate_limit: RateLimit::new(&settings.rate_limit),
            room: Arc::new(Semaphore::new(settings.max_in_flight)),
            max_request_bytes: settings.max_request_bytes,
            bodies: BodyReader::new(settings.request_body_timeout, settings.max_request_bytes, max_buffered_bytes),
        });
        let mut mcp =
            Router::new().route("/mcp", post(mcp_endpoint)).route("/mcp/", post(mcp_endpoint)).with_state(endpoint);
        if let Some(guard) = &guard {
            for path in guard.metadata_paths() {
                mcp = mcp.route(&path, get(metadata).with_state(Arc::clone(guard)));
            }
        }
        mcp = mcp.method_not_allowed_fallback(problem::method_not_allowed);
        if !settings.allowed_origins.is_empty() {
            mcp = mcp.layer(cors(&settings.allowed_origins));
        }
        let main = Router::new()
            .route("/", get(who_am_i))
            .route("/health/live", get(health::live))
            .route("/health/ready", get(health::ready))
            .method_not_allowed_fallback(problem::method_not_allowed)
            .with_state(Arc::clone(&health))
            .merge(mcp)
            .fallback(problem::not_found);
        let management = Router::new()
            .route("/metrics", get(print_metrics))
            .method_not_allowed_fallback(problem::method_not_allowed)
            .with_state(Arc::clone(&metrics))
            .fallback(problem::not_on_the_management_port);
        let trusted_proxies = settings.trusted_proxies.clone();
        let max_request_bytes = settings.max_request_bytes;
        Self { main, management, health, metrics, is_guarded: guard.is_some(), trusted_proxies, max_request_bytes }
    }

    /// The way of one request.
    async fn answer(&self, mut request: Request, peer: SocketAddr, lane: Lane) -> Response {
        let arrived = (lane != Lane::Management)
            .then(|| self.metrics.request_arrived(request.method().as_str(), request.uri().path()));
        let trace = RequestTrace::new(request.headers());
        request.extensions_mut().insert(trace.clone());
        let address = forwarded::client_address(peer, request.headers(), &self.trusted_proxies);
        request.extensions_mut().insert(Caller::unauthenticated(address));
        let has_too_large_a_head = has_too_large_a_head(&request);
        let waits_for_continue = request.headers().contains_key(header::EXPECT);
        let is_mcp = lane != Lane::Management && matches!(request.uri().path(), "/mcp" | "/mcp/");
        let presented = Presented::take(request.headers_mut());
        if self.is_guarded && lane == Lane::Main {
            request.extensions_mut().insert(presented);
        }
        let is_refused_by_lane = lane == Lane::HealthOnly && !request.uri().path().starts_with("/health/");
        // One handler reads bodies. Whatever else answers leaves the body to the end of this function.
        let is_read = is_mcp && request.method() == Method::POST && !has_too_large_a_head && !is_refused_by_lane;
        let unread = (!is_read).then(|| std::mem::take(request.body_mut()));
        let mut response = if has_too_large_a_head {
            problem::head_too_large()
        } else if is_refused_by_lane {
            self.metrics.shed(Shed::Connections);
            problem::overloaded("The server has no room for another connection.")
        } else {
            let routes = if lane == Lane::Management { &self.management } else { &self.main };
            let answer = routes.clone().oneshot(request).instrument(trace.span().clone());
            // A panic outside of the tools, which have a net of their own.
            match AssertUnwindSafe(answer).catch_unwind().await {
                Ok(Ok(response)) => response,
                Err(_panic) => {
                    self.metrics.panicked();
                    let mut response = problem::response(StatusCode::INTERNAL_SERVER_ERROR, Problem::internal());
                    // The body may have been lost half-way.
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                    response
                }
            }
        };
        // hyper closes a connection whose request was not read to its end, and a client that sends its next request on it, as every
        // client does after a 401, would get no answer: the rest is read, or the client is told.
        if let Some(unread) = unread.or_else(|| UnreadBody::take(&mut response))
            && (waits_for_continue && !unread.is_end_stream()
                || !request_body::drain(unread, self.max_request_bytes).await)
        {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        problem::speak_plainly(&mut response, &trace, is_mcp).await;
        response.headers_mut().insert(TRACEPARENT, trace.context().header());
        if lane == Lane::HealthOnly || self.health.is_draining() {
            // Makes room, or moves keep-alive clients over to the replicas that stay.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(arrived) = arrived {
            arrived.answered(response.status().as_u16());
        }
        response
    }
}

fn has_too_large_a_head(request: &Request) -> bool {
    let headers = request.headers();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    headers.len() > MAX_HEADERS || bytes + target + request.method().as_str().len() > MAX_HEAD_BYTES
}

/// What two readers of the same request could take for two different requests: a proxy or a gateway before us may have decided on
/// the other one.
fn is_ambiguous(request: &Request) -> Option<&'static str> {
    let headers = request.headers();
    let repeated = |name: &HeaderName| headers.get_all(name).iter().nth(1).is_some();
    // rmcp sees to `Mcp-Method` and `Mcp-Name`, and hyper to `Content-Length`.
    let once = [header::HOST, header::ORIGIN, header::CONTENT_TYPE, MCP_PROTOCOL_VERSION, header::TRANSFER_ENCODING];
    if headers.len() > headers.keys_len() && once.iter().any(repeated) {
        return Some(
            "`Host`, `Origin`, `Content-Type`, `MCP-Protocol-Version` and `Transfer-Encoding` may stand in a request once.",
        );
    }
    if headers.get(header::TRANSFER_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Some("The one `Transfer-Encoding` that this server reads is `chunked`.");
    }
    // RFC 9112 section 3.2.2: in a target in absolute form, the host in it counts, and rmcp checks the other.
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes);
    if request
        .uri()
        .authority()
        .is_some_and(|authority| host.is_none_or(|host| !host.eq_ignore_ascii_case(authority.as_str().as_bytes())))
    {
        return Some("The request's target names another host than its `Host` header.");
    }
    None
}

/// How rmcp serves: without MCP sessions, so that any replica answers any request, and as plain JSON unless a tool streams. Hosts and
/// origins are judged before (`web::plain`).
fn transport(settings: &WebSettings) -> StreamableHttpServerConfig {
    StreamableHttpServerConfig::default()
        .with_legacy_session_mode(false)
        .with_json_response(true)
        .disable_allowed_hosts()
        .disable_allowed_origins()
        .with_max_request_body_bytes(settings.max_request_bytes)
}

/// Lets the pages of these origins call the endpoint. Without origins there is no CORS at all.
fn cors(origins: &[String]) -> CorsLayer {
    let origins: Vec<_> = origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()).collect();
    CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::POST, Method::GET, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            HeaderName::from_static("mcp-session-id"),
            MCP_PROTOCOL_VERSION,
            TRACEPARENT,
            header::WWW_AUTHENTICATE,
            header::RETRY_AFTER,
        ])
        .max_age(Duration::from_secs(3600))
}

/// `POST /mcp`: MCP over streamable HTTP.
async fn mcp_endpoint(State(endpoint): State<Arc<Endpoint>>, mut request: Request) -> Response {
    if let Some(why) = is_ambiguous(&request) {
        return UnreadBody::leave(request.into_body(), problem::ambiguous(why));
    }
    let Some(guard) = &endpoint.guard else { return serve_mcp(&endpoint, request).await };
    let caller = match guard.admit(&mut request).await {
        Ok(caller) => caller,
        Err(refused) => return UnreadBody::leave(request.into_body(), *refused),
    };
    let step_up = StepUp::default();
    request.extensions_mut().insert(step_up.clone());
    let trace = request.extensions().get::<RequestTrace>().cloned();
    let response = serve_mcp(&endpoint, request).await;
    if let Some(problem) = step_up.demanded() {
        return problem::in_place_of(&response, guard.step_up(problem));
    }
    // Which tool is called, and so what the caller needs, is known once the body has been read: the tools find out, and rmcp has
    // no word for it.
    match caller.lacked() {
        Some(lacked) => {
            let refused = guard.refuse(Refusal::ToolPermission(lacked), &caller, trace.as_ref());
            problem::in_place_of(&response, refused)
        }
        None => response,
    }
}

/// The body of a request that was answered without it, on its way with the response to [`Web::answer`], which drains it. Meanwhile the
/// request takes no place from others.
#[derive(Clone)]
struct UnreadBody(Arc<Mutex<Option<Body>>>);

impl UnreadBody {
    fn leave(body: Body, mut response: Response) -> Response {
        response.extensions_mut().insert(Self(Arc::new(Mutex::new(Some(body)))));
        response
    }

    fn take(response: &mut Response) -> Option<Body> {
        let Self(body) = response.extensions_mut().remove()?;
        body.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A request whose caller may come in.
async fn serve_mcp(endpoint: &Endpoint, request: Request) -> Response {
    if request.body().size_hint().lower() > endpoint.max_request_bytes as u64 {
        // Before the body has arrived, or a client that waits for `100 Continue` has sent it.
        return problem::body_too_large();
    }
    // Known by now. Routes without callers, as those for health, have no such limit.
    let caller = request.extensions().get::<Caller>();
    let charged = match caller.map(|caller| endpoint.rate_limit.charge(caller)).transpose() {
        Ok(charged) => charged.flatten(),
        Err(wait) => {
            endpoint.metrics.shed(Shed::Caller);
            return UnreadBody::leave(request.into_body(), problem::too_many_requests(wait));
        }
    };
    let (mut parts, mut body) = request.into_parts();
    let body = match endpoint.bodies.read(&mut body).await {
        Ok(body) => body,
        Err(ReadError::NoMemory) => {
            endpoint.metrics.shed(Shed::Memory);
            let full = problem::overloaded("The server has no memory left for a request of this size.");
            return UnreadBody::leave(body, full);
        }
        Err(ReadError::TooSlow(timeout)) => return problem::body_too_slow(timeout),
        Err(ReadError::TooLarge) => return problem::body_too_large(),
        Err(ReadError::Incomplete) => return problem::broken_off(),
    };
    // From here on the client can hold nothing up: what a request takes from others is taken now, and the call has a deadline.
    let seat = match charged.map(|charged| charged.seat()).transpose() {
        Ok(seat) => seat,
        Err(wait) => {
            endpoint.metrics.shed(Shed::Caller);
            return refused_message(&body, problem::too_many_requests(wait));
        }
    };
    let Ok(room) = Arc::clone(&endpoint.room).try_acquire_owned() else {
        endpoint.metrics.shed(Shed::Server);
        let full = problem::overloaded("The server has as many requests as it takes at the same time.");
        return refused_message(&body, full);
    };
    // The call holds them as well: it may go on when its client has left, and this future is dropped.
    let permits = Permits::new((seat, room, endpoint.metrics.request_in_flight()));
    parts.extensions.insert(permits.clone());
    let response = answer_message(endpoint, parts, body).await;
    drop(permits);
    response
}

/// A refusal of a message that has been read, with its id.
fn refused_message(body: &[u8], refusal: Response) -> Response {
    problem::to_request(refusal, Message::read(body).ok().and_then(|message| message.id))
}

/// A plain call takes the short way to its tool; every other message is read for what is wrong with it, and is then rmcp's.
async fn answer_message(endpoint: &Endpoint, parts: Parts, body: Bytes) -> Response {
    let Ok(_memory) = endpoint.tools.memory().lease_parsing(&body) else {
        endpoint.metrics.shed(Shed::Memory);
        let full = problem::overloaded("The server has no memory left for a message of this size and shape.");
        return refused_message(&body, full);
    };
    let refused = match plain::head(&parts.headers, &endpoint.allowed) {
        Ok(head) => match head.and_then(|head| endpoint.tools.plain_call(head, &body, &parts.extensions)) {
            Some(call) => {
                let answer = Body::new(endpoint.tools.answer(call).await);
                return ([(header::CONTENT_TYPE, problem::JSON)], answer).into_response();
            }
            None => None,
        },
        Err(refused) => Some(refused),
    };
    answer_any(endpoint, parts, body, refused).await
}

/// Boxed, for rmcp's future is large, and plain calls would carry the room for it with them.
fn answer_any(endpoint: &Endpoint, parts: Parts, body: Bytes, refused: Option<Refused>) -> BoxFuture<'_, Response> {
    Box::pin(async move {
        let body = json::repaired_bytes(body);
        let (id, response) = match (Message::read(&body), refused) {
            (Ok(message), None) => {
                let response = by_rmcp(endpoint, parts, body.clone(), &message).await;
                (message.id, response)
            }
            (Ok(message), Some(refused)) => (message.id, refused.response()),
            (Err(unreadable), Some(refused)) => (unreadable.id, refused.response()),
            (Err(unreadable), None) => (unreadable.id.clone(), unreadable.response()),
        };
        problem::to_request(response, id)
    })
}

/// Serves a message whose envelope and head are right. What a tool has written takes the place of rmcp's response.
async fn by_rmcp(endpoint: &Endpoint, mut parts: Parts, body: Bytes, message: &Message<'_>) -> Response {
    if message.method == "initialize" {
        // Its body says which revision the client wants; clients that remember another one send that in the header. Where rmcp cannot
        // decode it, it is a request like any other.
        if !message.has_protocol_version() || message.params_are::<InitializeRequestParams>() {
            parts.headers.remove(MCP_PROTOCOL_VERSION);
        }
    } else if !names_a_served_revision(&parts.headers) && !message.has_protocol_version() {
        return problem::unserved_revision();
    }
    // rmcp wants to see both, whatever the client accepts.
    parts.headers.insert(header::ACCEPT, plain::ACCEPT);
    let written = Written::to(body.clone());
    parts.extensions.insert(written.clone());
    let response = endpoint.mcp.handle(Request::from_parts(parts, Body::from(body))).await.map(Body::new);
    match (response.status(), written.response()) {
        (StatusCode::OK, Some(written)) => response.map(|_| Body::new(written)),
        // How rmcp says that it cannot decode a message.
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, _) => {
            message.undecodable(&problem::text_of(response.into_body()).await).response()
        }
        (StatusCode::OK | StatusCode::NOT_FOUND, _) if !message.is_served() => message.in_a_sentence(response).await,
        (status, _) if status.is_server_error() => {
            let text = problem::text_of(response.into_body()).await;
            error!("rmcp failed with {status}: {}", text.chars().take(200).collect::<String>().escape_debug());
            problem::response(StatusCode::INTERNAL_SERVER_ERROR, Problem::internal())
        }
        _ => response,
    }
}

/// Without the header, a request is one of 2025-03-26.
fn names_a_served_revision(headers: &HeaderMap) -> bool {
    let Some(version) = headers.get(MCP_PROTOCOL_VERSION) else { return true };
    PROTOCOL_VERSIONS.iter().any(|served| *version == **served)
}

/// `GET /.well-known/oauth-protected-resource…`: where callers get their tokens. Asked without one.
async fn metadata(State(guard): State<Arc<Guard>>) -> Response {
    guard.metadata()
}

/// `GET /`: JSON for programs, a page for people.
async fn who_am_i(headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accept.contains("text/html") {
        const PAGE: &str = concat!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>mcp-server</title>",
            "<h1>mcp-server ",
            env!("CARGO_PKG_VERSION"),
            "</h1><p>This is a Model Context Protocol server. Point an MCP client at <code>/mcp</code> on this host; ",
            "<a href=\"/health/ready\">is it ready?</a></p></html>"
        );
        return axum::response::Html(PAGE).into_response();
    }
    Json(serde_json::json!({
        "service": "mcp-server",
        "version": env!("CARGO_PKG_VERSION"),
        "mcp_endpoint": "/mcp",
        "docs": DOCUMENTATION,
    }))
    .into_response()
}

/// `GET /metrics`, on the management listener alone: OpenMetrics for those that ask for it by name, as a Prometheus does, and text that
/// a browser shows for all others.
async fn print_metrics(State(metrics): State<Arc<Metrics>>, headers: HeaderMap) -> Response {
    let is_open_metrics = plain::prefers_open_metrics(&headers);
    let content_type = HeaderValue::from_static(if is_open_metrics {
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    } else {
        "text/plain; version=0.0.4; charset=utf-8"
    });
    let encode = move || if is_open_metrics { metrics.encode() } else { metrics.encode_text() };
    // Some figures are read from files, and all together take a while to print: not on a thread that answers calls.
    match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(text)) => {
            let headers = [(header::CONTENT_TYPE, content_type), (header::VARY, HeaderValue::from_static("accept"))];
            (headers, text).into_response()
        }
        _ => problem::response(StatusCode::INTERNAL_SERVER_ERROR, Problem::internal()),
    }
}
