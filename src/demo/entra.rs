//! A stand-in for Entra ID: the token endpoint, the discovery documents and the keys of one tenant, over HTTPS with a
//! certificate authority of its own, and the cluster whose service-account tokens that tenant trusts.
//!
//! Official clients get tokens from it by secret, by federated assertion and on behalf of users. Of callers of the MCP server it knows
//! three, and official MCP clients sign two of them in. It has no pages. It keeps secrets in plain options, because they guard nothing:
//! never point it at anything real.

mod callers;
mod documents;
mod grants;
mod keys;
mod on_behalf_of;
mod signin;
mod tokens;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, EXPIRES, LOCATION, PRAGMA, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use url::{Url, form_urlencoded};
use uuid::Uuid;

pub use self::callers::{AGENT_CLIENT_ID, API_APP_ID, DemoCaller, PEOPLES_CLIENT_ID};
use self::grants::{Form, Refusal};
use self::keys::{SharedKeys, SigningKey};
pub use self::keys::{TokenRejected, Verifier};
use self::signin::SignIns;
pub use self::tokens::TokenVersion;
use self::tokens::new_entra_key;
use super::fault::{FaultRule, Faults};
use super::wire::{Answer, Counter, InFlight, Log, Port, Server, digest, lock, read_body, without_credentials};

/// The tenant.
pub const TENANT_ID: &str = "6d0f2b1e-5a3c-4c8e-9f57-0c1d2e3f4a5b";
/// The server's own application.
pub const CLIENT_ID: &str = "2f7c9a40-8d1b-4e6a-b3f5-71c0d9e8a6b2";
/// Its secret.
pub const CLIENT_SECRET: &str = "demo8Q~only.secret-of-the-stand-in_0001";
/// A secret that it had until it expired.
pub const EXPIRED_CLIENT_SECRET: &str = "demo8Q~expired.secret-of-the-stand-in_0";
/// The backend's App ID URI.
pub const RESOURCE: &str = "api://mcp-demo-backend";
/// The scope to ask for a token of the backend.
pub const SCOPE: &str = "api://mcp-demo-backend/.default";
/// The backend's client id: the audience of its (version 2) tokens.
pub const RESOURCE_APP_ID: &str = "b7d1c3e5-0f2a-4b6c-8d9e-1a2b3c4d5e6f";
/// The app role that the backend wants and the server was granted.
pub const ROLE: &str = "Backend.Access";
/// The backend's delegated permission: what the server may do for users.
pub const USER_SCOPE: &str = "access_as_user";
/// The service account that may act as the application.
pub const SERVICE_ACCOUNT: &str = "system:serviceaccount:mcp-system:mcp-server";

/// An API that tokens can be asked for.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Its client id.
    pub app_id: String,
    /// Its App ID URIs.
    pub identifier_uris: Vec<String>,
    /// The version of its tokens.
    pub token_version: TokenVersion,
    /// The app roles that the client was granted.
    pub granted_roles: Vec<String>,
}

/// What the stand-in knows and how it behaves; the default fits this module's constants.
#[derive(Debug, Clone)]
pub struct EntraOptions {
    /// The tenant's id.
    pub tenant_id: String,
    /// The tenant's domain, by which it may be addressed too.
    pub tenant_domain: String,
    /// The one application that can get tokens.
    pub client_id: String,
    /// That application's object in the tenant: `oid` and `sub` of its tokens.
    pub service_principal_id: String,
    /// Its secrets.
    pub client_secrets: Vec<String>,
    /// Secrets that once were good.
    pub expired_client_secrets: Vec<String>,
    /// The subject that its federated credential trusts.
    pub federated_subject: String,
    /// The APIs of the tenant.
    pub resources: Vec<Resource>,
    /// Where the issuer of version 2 tokens is, without a path; `None` is the authority itself, as in the public cloud. Elsewhere it may be another host: in Azure China `https://login.partner.microsoftonline.cn`.
    pub issuer_origin: Option<String>,
    /// The same for version 1.
    pub v1_issuer_origin: String,
    /// How long tokens live; see also [`StandInEntra::set_token_lifetime`].
    pub token_lifetime: Duration,
    /// How far the clock of an assertion's issuer may be off.
    pub clock_skew: Duration,
    /// How many token requests are kept in the log.
    pub log_capacity: usize,
}

impl Default for EntraOptions {
    fn default() -> Self {
        Self {
            tenant_id: TENANT_ID.into(),
            tenant_domain: "mcp-demo.onmicrosoft.com".into(),
            client_id: CLIENT_ID.into(),
            service_principal_id: "91e4d7c2-3b5a-4f60-8c1d-e2f3a4b5c6d7".into(),
            client_secrets: vec![CLIENT_SECRET.into()],
            expired_client_secrets: vec![EXPIRED_CLIENT_SECRET.into()],
            federated_subject: SERVICE_ACCOUNT.into(),
            resources: vec![
                Resource {
                    app_id: RESOURCE_APP_ID.into(),
                    identifier_uris: vec![RESOURCE.into()],
                    token_version: TokenVersion::V2,
                    granted_roles: vec![ROLE.into()],
                },
                Resource {
                    app_id: "797f4846-ba00-4fd7-ba43-dac1f8f63013".into(),
                    identifier_uris: vec![
                        "https://management.azure.com".into(),
                        "https://management.core.windows.net".into(),
                    ],
                    token_version: TokenVersion::V1,
                    granted_roles: Vec::new(),
                },
            ],
            issuer_origin: None,
            v1_issuer_origin: "https://sts.windows.net".into(),
            token_lifetime: Duration::from_secs(3599),
            clock_skew: Duration::from_secs(300),
            log_capacity: 2048,
        }
    }
}

/// One request to the token endpoint, as it came; secrets are replaced by their [`digest`].
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// Path and query.
    pub target: String,
    /// The form's fields in their order.
    pub form: Form,
    /// The headers.
    pub headers: HeaderMap,
    /// When it came.
    pub at: SystemTime,
    /// The status of the answer; `None` while, or because, there is none.
    pub status: Option<StatusCode>,
}

impl TokenRequest {
    /// A field of the form.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        self.form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The running stand-in; dropping it stops it.
pub struct StandInEntra {
    state: Arc<State>,
    server: Server,
    ca_pem: String,
    authority: Url,
}

/// What the tenant holds, without the HTTP around it.
struct Directory {
    options: EntraOptions,
    /// Without a trailing slash.
    authority: String,
    /// With one, as Kubernetes issuers of AKS have it.
    cluster_issuer: String,
    keys: SharedKeys,
    /// Made when it is first needed, for making it takes longer than all the rest of the start.
    cluster_key: OnceLock<Option<SigningKey>>,
    token_lifetime_secs: AtomicU64,
    signins: SignIns,
    /// The authentication context that users need for the backend.
    demanded_context: Mutex<Option<String>>,
}

struct State {
    directory: Directory,
    faults: Faults,
    log: Log<TokenRequest>,
    token_requests: Counter,
    key_requests: Counter,
    at_once: Arc<AtOnce>,
    cancelled: Arc<Counter>,
    line_breaks: std::sync::atomic::AtomicBool,
}

/// How many are inside, and how many were at most.
#[derive(Default)]
struct AtOnce {
    now: AtomicU64,
    most: AtomicU64,
}

impl AtOnce {
    fn enter(self: &Arc<Self>) -> Inside {
        let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(now, Ordering::Relaxed);
        Inside(Arc::clone(self))
    }
}

struct Inside(Arc<AtOnce>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

impl StandInEntra {
    /// Starts it on a free port of loopback.
    ///
    /// # Errors
    /// When no port can be bound or no key can be made.
    pub async fn start(options: EntraOptions) -> io::Result<Self> {
        let port = Port::bind().await?;
        let authority = format!("https://localhost:{}", port.addr.port());
        let (tls, ca_pem) = certify()?;
        let state = Arc::new(State {
            faults: Faults::default(),
            log: Log::new(options.log_capacity),
            token_requests: Counter::default(),
            key_requests: Counter::default(),
            at_once: Arc::default(),
            cancelled: Arc::default(),
            line_breaks: false.into(),
            directory: Directory {
                token_lifetime_secs: options.token_lifetime.as_secs().into(),
                demanded_context: Mutex::default(),
                cluster_issuer: format!("{authority}/cluster/"),
                keys: SharedKeys::new(new_entra_key().await?),
                cluster_key: OnceLock::new(),
                signins: SignIns::default(),
                authority: authority.clone(),
                options,
            },
        });
        let serving = Arc::clone(&state);
        let server = port.serve(Some(tls), move |request| answer(Arc::clone(&serving), request));
        let authority = Url::parse(&authority).map_err(io::Error::other)?;
        Ok(Self { state, server, ca_pem, authority })
    }

    /// What to set as authority: `https://localhost:PORT/`.
    #[must_use]
    pub fn authority(&self) -> Url {
        self.authority.clone()
    }

    /// The certificate authority to trust.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The tenant and its applications.
    #[must_use]
    pub fn options(&self) -> &EntraOptions {
        &self.state.directory.options
    }

    /// From now on a user has to have met this authentication context (such as `c1`) before anybody may act on their behalf: their
    /// token's claim `acrs` has to name it. `None` lifts it.
    pub fn demand_context(&self, context: Option<&str>) {
        *lock(&self.state.directory.demanded_context) = context.map(str::to_owned);
    }

    /// Writes `\r\n` into error descriptions, as Entra did until 2023, instead of spaces.
    pub fn set_line_breaks(&self, on: bool) {
        self.state.line_breaks.store(on, Ordering::Relaxed);
    }

    /// Replaces all fault rules; `None` or an empty list makes it honest again.
    pub fn set_fault(&self, rules: impl IntoIterator<Item = FaultRule>) {
        self.state.faults.set(rules);
    }

    /// Adds a fault rule.
    pub fn add_fault(&self, rule: FaultRule) {
        self.state.faults.add(rule);
    }

    /// Cuts all connections and refuses new ones, or listens again.
    ///
    /// # Errors
    /// When the port cannot be kept or taken again.
    pub async fn set_down(&self, down: bool) -> io::Result<()> {
        self.server.set_down(down).await
    }

    /// The newest token requests, oldest first.
    #[must_use]
    pub fn token_requests(&self) -> Vec<TokenRequest> {
        self.state.log.all()
    }

    /// How many token requests came.
    #[must_use]
    pub fn token_request_count(&self) -> &Counter {
        &self.state.token_requests
    }

    /// How often a tenant's keys were asked for.
    #[must_use]
    pub fn key_request_count(&self) -> &Counter {
        &self.state.key_requests
    }

    /// How many token requests there were at the same time, at most.
    #[must_use]
    pub fn token_requests_at_once(&self) -> u64 {
        self.state.at_once.most.load(Ordering::Relaxed)
    }

    /// How many requests lost their client before they were answered.
    #[must_use]
    pub fn cancelled_count(&self) -> &Counter {
        &self.state.cancelled
    }

    /// How many connections were accepted.
    #[must_use]
    pub fn connection_count(&self) -> &Counter {
        &self.server.connections
    }
}

impl Directory {
    fn is_tenant(&self, name: &str) -> bool {
        name.eq_ignore_ascii_case(&self.options.tenant_id) || name.eq_ignore_ascii_case(&self.options.tenant_domain)
    }
}

/// A new certificate authority (as PEM) and the acceptor with a certificate by it for `localhost` and `127.0.0.1`.
fn certify() -> io::Result<(TlsAcceptor, String)> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "Stand-in for Entra ID: demo certificate authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let authority = CertifiedIssuer::self_signed(authority, key).map_err(io::Error::other)?;

    let mut leaf =
        CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).map_err(io::Error::other)?;
    leaf.distinguished_name.push(DnType::CommonName, "localhost");
    leaf.use_authority_key_identifier_extension = true;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate().map_err(io::Error::other)?;
    let certificate = leaf.signed_by(&key, &authority).map_err(io::Error::other)?;

    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(config)), authority.pem()))
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> Answer {
    let in_flight = InFlight::new(&state.cancelled);
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let to_token_endpoint = matches!(segments.as_slice(), [_, "oauth2", "v2.0", "token"]);
    if matches!(segments.as_slice(), [_, "discovery", "v2.0", "keys"]) {
        state.key_requests.add();
    }
    let _one_of = to_token_endpoint.then(|| state.at_once.enter());
    let body = read_body(body).await;
    let form: Form = form_urlencoded::parse(body.as_deref().unwrap_or_default()).into_owned().collect();
    let entry = to_token_endpoint.then(|| {
        let entry = state.log.push(TokenRequest {
            target: head.uri.to_string(),
            form: form.iter().map(cut_secret).collect(),
            headers: without_credentials(&head.headers),
            at: SystemTime::now(),
            status: None,
        });
        state.token_requests.add();
        entry
    });

    let query: Form = form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let correlation = correlation_id(&head.headers, &query, &form);
    let line_breaks = state.line_breaks.load(Ordering::Relaxed);
    let refuse = |refusal: &Refusal| error_response(refusal, &state.directory.authority, correlation, line_breaks);
    let honest = || {
        if let ([tenant, "oauth2", "v2.0", "authorize"], &Method::GET) = (segments.as_slice(), &head.method) {
            let to = match state.directory.is_tenant(tenant) {
                true => signin::authorize(&state.directory, &query),
                false => Err(Refusal::unknown_tenant("invalid_request", tenant)),
            };
            return to.map_or_else(|refusal| refuse(&refusal), |url| redirect(&url));
        }
        let outcome = match segments.as_slice() {
            _ if body.is_none() => Err(Refusal {
                status: StatusCode::PAYLOAD_TOO_LARGE,
                ..Refusal::bad_request("invalid_request", 90014, "The request body is too large.")
            }),
            [tenant, "oauth2", "v2.0", "token"] if head.method == Method::POST => {
                if state.directory.is_tenant(tenant) {
                    grants::grant(&state.directory, &form)
                } else {
                    Err(Refusal::unknown_tenant("invalid_request", tenant))
                }
            }
            [_, "oauth2", "v2.0", "token"] => Err(Refusal {
                status: StatusCode::METHOD_NOT_ALLOWED,
                ..Refusal::bad_request(
                    "invalid_request",
                    900_561,
                    format!("The endpoint only accepts POST requests. Received a {} request.", head.method),
                )
            }),
            path if head.method == Method::GET => match state.directory.document(path) {
                Some(document) => document,
                None => return not_found(),
            },
            _ => return not_found(),
        };
        match outcome {
            Ok(document) => json_response(StatusCode::OK, &document, correlation),
            Err(refusal) => refuse(&refusal),
        }
    };
    let request_line = format!("{} {}", head.method, path);
    let answer = state.faults.answer(&request_line, in_flight, |status| fault_response(status, refuse), honest).await;
    if let (Some(entry), Ok(answer)) = (entry, &answer) {
        state.log.amend(entry, |request| request.status = Some(answer.status()));
    }
    answer
}

/// What a status means when it is sent on purpose, without a body given: Entra's own answer to it.
fn fault_response(status: StatusCode, refuse: impl Fn(&Refusal) -> Response<Bytes>) -> Response<Bytes> {
    if status == StatusCode::TOO_MANY_REQUESTS {
        // The one error that Entra sends as plain text.
        let mut response = Response::new(Bytes::from_static(b"Too Many Requests"));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("60"));
        return response;
    }
    if status.is_server_error() {
        let text = "A transient error has occurred. Please try again.";
        return refuse(&Refusal { status, ..Refusal::bad_request("temporarily_unavailable", 90033, text) });
    }
    refuse(&Refusal { status, ..Refusal::bad_request("invalid_request", 90014, "The request was refused.") })
}

/// The client's own id of this exchange, wherever the official clients put it; ours if it gave none.
fn correlation_id(headers: &HeaderMap, query: &Form, form: &Form) -> Uuid {
    let header = headers.get("client-request-id").and_then(|value| value.to_str().ok());
    let fields = query.iter().chain(form).filter(|(name, _)| name == "client-request-id");
    header
        .into_iter()
        .chain(fields.map(|(_, value)| value.as_str()))
        .find_map(|text| Uuid::try_parse(text).ok())
        .unwrap_or_else(Uuid::new_v4)
}

fn cut_secret((name, value): &(String, String)) -> (String, String) {
    let secret =
        ["client_secret", "client_assertion", "assertion", "code", "password", "refresh_token", "user_assertion"];
    let shown = if secret.contains(&name.as_str()) { digest(value) } else { value.clone() };
    (name.clone(), shown)
}

fn error_response(refusal: &Refusal, authority: &str, correlation: Uuid, line_breaks: bool) -> Response<Bytes> {
    let now = OffsetDateTime::now_utc();
    let (date, time) = (now.date(), now.time());
    let timestamp = format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    );
    let trace = Uuid::new_v4();
    let gap = if line_breaks { "\r\n" } else { " " };
    let description = format!(
        "AADSTS{}: {}{gap}Trace ID: {trace}{gap}Correlation ID: {correlation}{gap}Timestamp: {timestamp}",
        refusal.aadsts, refusal.text
    );
    let mut body = json!({
        "error": refusal.error,
        "error_description": description,
        "error_codes": [refusal.aadsts],
        "timestamp": timestamp,
        "trace_id": trace.to_string(),
        "correlation_id": correlation.to_string(),
        "error_uri": format!("{authority}/error?code={}", refusal.aadsts),
    });
    if let Some(claims) = &refusal.claims {
        // An object in a string, as Entra sends it.
        keys::overlay(&mut body, &json!({ "suberror": "basic_action", "claims": claims.to_string() }));
    }
    let mut response = json_response(refusal.status, &body, correlation);
    if let Ok(trace) = HeaderValue::try_from(trace.to_string()) {
        response.headers_mut().insert("x-ms-request-id", trace);
    }
    response
}

fn json_response(status: StatusCode, body: &Value, correlation: Uuid) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, "application/json; charset=utf-8"),
        (CACHE_CONTROL, "no-store, no-cache"),
        (PRAGMA, "no-cache"),
        (EXPIRES, "-1"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    for (name, id) in [("x-ms-request-id", Uuid::new_v4()), ("client-request-id", correlation)] {
        if let Ok(id) = HeaderValue::try_from(id.to_string()) {
            headers.insert(name, id);
        }
    }
    response
}

fn redirect(to: &Url) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::FOUND;
    if let Ok(to) = HeaderValue::try_from(to.as_str()) {
        response.headers_mut().insert(LOCATION, to);
    }
    response
}

fn not_found() -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

#[cfg(test)]
mod tests;
