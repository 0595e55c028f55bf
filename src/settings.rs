//! Which knobs exist: the one place that reads the environment.
//!
//! [`VARIABLES`] declares every variable; `.env.example`, the README and the chart are held against it by tests.
//! [`Settings::read`] parses them all and gives up once, with the whole list of mistakes. It opens no socket and reads
//! no secret file: of the disk it asks whether the federated token file exists, and whether there are certificates where
//! `SSL_CERT_FILE` and `SSL_CERT_DIR` say so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use secrecy::SecretString;
use url::Url;

mod inbound;
mod libraries;
mod parse;
mod reader;
mod telemetry;
#[cfg(test)]
mod tests;
mod variables;
mod vars;

pub use inbound::{EntraInbound, InboundAuth, Permission, PermissionNames, ToolSettings};
#[cfg(test)]
pub(crate) use inbound::{TOOLS, WRITING_TOOLS};
use reader::Reader;
pub use reader::{Mistake, SettingsError};
pub use telemetry::{AuditSettings, RootSampler, Sampling, TelemetrySettings, TraceSettings};
pub use variables::{LIBRARY_VARIABLES, VARIABLES, Variable};
pub use vars::{Environment, Vars};

/// Where the chart mounts the projected service-account token when no webhook sets `AZURE_FEDERATED_TOKEN_FILE`.
const BUILT_IN_TOKEN_FILE: &str = "/var/run/secrets/azure/tokens/token";
const DEFAULT_AUTHORITY: &str = "https://login.microsoftonline.com";
const DEFAULT_SCOPE: &str = "https://management.azure.com/.default";

/// Everything that an operator may set, checked and typed: after this nobody sees a string again.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who we are in Entra's eyes.
    pub identity: IdentitySettings,
    /// Where the backend is, and what a call to it may cost.
    pub backend: BackendSettings,
    /// The listeners and their limits.
    pub web: WebSettings,
    /// Who may call.
    pub inbound: InboundAuth,
    /// Which tools there are for anybody.
    pub tools: ToolSettings,
    /// What is logged.
    pub log: LogSettings,
    /// What else tells of the server's work: traces and the audit file.
    pub telemetry: TelemetrySettings,
    /// What is legal but deserves a WARN at each start, as whole sentences.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Reads the process environment and, where that is silent, `.env` in the working directory.
    pub fn from_env() -> Result<Settings, SettingsError> {
        Settings::read(&Environment::load())
    }

    /// Reads every variable; the error lists every mistake.
    pub fn read(vars: &impl Vars) -> Result<Settings, SettingsError> {
        Settings::read_with(vars, may_exist)
    }

    fn read_with(vars: &impl Vars, token_file_exists: impl Fn(&Path) -> bool) -> Result<Settings, SettingsError> {
        let mut reader = Reader::new(vars);
        let identity = identity(&mut reader, token_file_exists);
        let base_url = reader.required("BACKEND_API_URL", parse::base_url);
        if let Some(url) = &base_url
            && url.scheme() == "http"
            && !is_loopback(url)
        {
            reader.warn(format!(
                "BACKEND_API_URL is plain http to `{}`: the token for the backend crosses the network unencrypted \
                 unless a mesh encrypts it. Use https where there is none.",
                url.host_str().unwrap_or_default(),
            ));
        }
        let backend = backend(&mut reader, base_url);
        let host = reader.optional("HOST", parse::host, WebSettings::default().host);
        let allowed_hosts = allowed_hosts(&mut reader);
        let web = web(&mut reader, host, allowed_hosts, backend.as_ref());
        let tenant = identity.as_ref().map(|identity| identity.tenant_id.as_str());
        let inbound = inbound::inbound(&mut reader, tenant, host, web.allowed_hosts.as_deref());
        if let (Some(identity), Some(backend), Some(inbound)) = (&identity, &backend, &inbound) {
            inbound::exchangeable(&mut reader, backend.auth, inbound, &identity.client_id);
        }
        Settings::finish(reader, identity, backend, web, inbound)
    }

    /// The settings of `mcp-server demo`: it brings its own identity and backend, listens on 127.0.0.1 only, and
    /// honours every other variable of the listeners, the logs and the calls to the backend. With `inbound_client_id` its callers
    /// need tokens for that application.
    pub fn for_demo(
        vars: &impl Vars,
        identity: IdentitySettings,
        backend_base_url: Url,
        inbound_client_id: Option<&str>,
    ) -> Result<Settings, SettingsError> {
        let mut reader = Reader::new(vars);
        let backend = backend(&mut reader, Some(without_trailing_slash(backend_base_url)));
        let web = web(&mut reader, Ipv4Addr::LOCALHOST.into(), WebSettings::default().allowed_hosts, backend.as_ref());
        let inbound = match inbound_client_id {
            None => Some(InboundAuth::None),
            Some(client_id) => {
                let listener = SocketAddr::new(web.host, web.port);
                inbound::of_demo(&mut reader, client_id, &identity.tenant_id, listener)
            }
        };
        Settings::finish(reader, Some(identity), backend, web, inbound)
    }

    /// Reads what is the same for every server. What is `None` has a mistake among those that the error lists.
    fn finish(
        mut reader: Reader<'_, impl Vars>,
        identity: Option<IdentitySettings>,
        backend: Option<BackendSettings>,
        web: WebSettings,
        inbound: Option<InboundAuth>,
    ) -> Result<Settings, SettingsError> {
        let tools = inbound::tools(&mut reader);
        let log = log(&mut reader);
        let telemetry = telemetry::read(&mut reader);
        libraries::check(&mut reader);
        reader.refuse_secrets_elsewhere();
        let warnings = reader.take_warnings();
        let settings = identity.zip(backend).zip(inbound).map(|((identity, backend), inbound)| Settings {
            identity,
            backend,
            web,
            inbound,
            tools,
            log,
            telemetry,
            warnings,
        });
        reader.finish(settings)
    }
}

/// Who we are in Entra's eyes, and for which resource we ask tokens.
#[derive(Debug, Clone)]
pub struct IdentitySettings {
    /// `AZURE_TENANT_ID`: a GUID or a verified domain name, lower case; never `common` and its like.
    pub tenant_id: String,
    /// `AZURE_CLIENT_ID`: a GUID, lower case.
    pub client_id: String,
    /// `AZURE_AUTHORITY_HOST`: https, no path, query, fragment or user info.
    pub authority: Url,
    /// `AZURE_SCOPES`: all of one resource, each ending in `/.default`.
    pub scopes: Vec<String>,
    /// What proves that we are who we say.
    pub credential: Credential,
    /// A certificate authority to trust beside the platform's, as PEM. No variable sets it: the demo and the tests do.
    pub extra_ca_pem: Option<String>,
}

impl IdentitySettings {
    /// An Entra that does not exist.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Self {
        Self {
            tenant_id: "contoso.example".to_owned(),
            client_id: "66666666-7777-8888-9999-000000000000".to_owned(),
            authority: "https://localhost:1".parse().unwrap(),
            scopes: vec!["api://backend/.default".to_owned()],
            credential: Credential::ClientSecret { secret: "secret".to_owned().into() },
            extra_ca_pem: None,
        }
    }

    /// The choice in one phrase, for the INFO line at start; it holds no secret.
    pub fn summary(&self) -> String {
        let credential = match &self.credential {
            Credential::WorkloadIdentity { token_file } => {
                format!("workload identity with the token file `{}`", token_file.display())
            }
            Credential::ClientSecret { .. } => "client secret".to_owned(),
        };
        let (client, tenant, authority) = (&self.client_id, &self.tenant_id, &self.authority);
        format!("{credential}, client `{client}`, tenant `{tenant}`, authority `{authority}`")
    }
}

/// The credential chain's choice (contract §3), made once, from configuration alone.
#[derive(Debug, Clone)]
pub enum Credential {
    /// The Kubernetes service-account token in `token_file` is exchanged for an Entra token.
    WorkloadIdentity {
        /// The file was there at start; it is read at each exchange.
        token_file: PathBuf,
    },
    /// The service-principal fallback.
    ClientSecret {
        /// `AZURE_CLIENT_SECRET`.
        secret: SecretString,
    },
}

impl Credential {
    /// The federated token file, where one is used.
    pub fn token_file(&self) -> Option<&Path> {
        match self {
            Credential::WorkloadIdentity { token_file } => Some(token_file),
            Credential::ClientSecret { .. } => None,
        }
    }
}

/// Requests to the backend at the same time, unless the settings say otherwise.
const BACKEND_CONCURRENCY: usize = 1_024;

/// The calls of one tool, where the settings do not bound them: there is always room for the other tools.
fn half_of(concurrency: usize) -> usize {
    (concurrency / 2).max(1)
}

/// How we reach the backend, and how much one tool call may spend on it.
#[derive(Debug, Clone)]
pub struct BackendSettings {
    /// `BACKEND_API_URL`, without a trailing slash in its path (`Url` shows an empty path as `/` all the same).
    pub base_url: Url,
    /// `BACKEND_API_TIMEOUT`: the deadline of one tool call.
    pub timeout: Duration,
    /// `BACKEND_MAX_RESPONSE_BYTES`: the largest response body that is read.
    pub max_response_bytes: usize,
    /// `MAX_BUFFERED_BYTES`: memory for answers of the backend, our own unsent answers and parsed requests, all together.
    pub max_buffered_bytes: usize,
    /// `BACKEND_MAX_CONCURRENCY`: requests to the backend at the same time; more are refused at once.
    pub max_concurrency: usize,
    /// `BACKEND_MAX_ATTEMPTS`: how often one call may ask; 1 switches repetitions off.
    pub max_attempts: u32,
    /// `BACKEND_RETRY_PERCENT`: repetitions that the calls of the last ten seconds pay for, in percent of them.
    pub retry_percent: u32,
    /// `BACKEND_RETRY_FLOOR`: repetitions a second that are always allowed.
    pub retry_floor: u32,
    /// `BACKEND_CIRCUIT_BREAKER`.
    pub circuit_breaker: bool,
    /// `BACKEND_IDEMPOTENT_CREATES`: the backend honours `Idempotency-Key`, so a write may be repeated like a read.
    pub idempotent_creates: bool,
    /// `BACKEND_AUTH`.
    pub auth: BackendAuth,
    /// `FORWARD_CALLER`: the backend is told who calls.
    pub forward_caller: bool,
    /// `READINESS_CHECK_BACKEND`.
    pub check_in_readiness: bool,
}

/// Whose token the backend gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendAuth {
    /// The server's own.
    Server,
    /// One for the user who calls.
    OnBehalfOf {
        /// `OBO_APP_FALLBACK`: an app that calls without a user acts with the server's own token; else it is refused.
        app_fallback: bool,
    },
}

impl BackendSettings {
    /// The defaults, for a backend at `base_url`.
    pub fn new(base_url: Url) -> BackendSettings {
        BackendSettings {
            base_url: without_trailing_slash(base_url),
            timeout: Duration::from_secs(10),
            max_response_bytes: 4 << 20,
            max_buffered_bytes: 128 << 20,
            max_concurrency: BACKEND_CONCURRENCY,
            max_attempts: 3,
            retry_percent: 20,
            retry_floor: 10,
            circuit_breaker: true,
            idempotent_creates: false,
            auth: BackendAuth::Server,
            forward_caller: false,
            check_in_readiness: true,
        }
    }
}

/// What the listeners accept, and for how long.
#[derive(Debug, Clone)]
pub struct WebSettings {
    /// `HOST`.
    pub host: IpAddr,
    /// `PORT`; 0 lets the system choose.
    pub port: u16,
    /// `METRICS_PORT`; `None` when the variable is 0. (Tests may hold `Some(0)`: the system chooses.)
    pub metrics_port: Option<u16>,
    /// `ALLOWED_HOSTS`: `host` (any port) or `host:port`, lower case, IPv6 in brackets; `None` when the guard is off (`*`).
    pub allowed_hosts: Option<Vec<String>>,
    /// `ALLOWED_ORIGINS`, as browsers send them: scheme and host in lower case, no default port, no trailing slash.
    pub allowed_origins: Vec<String>,
    /// `TRUSTED_PROXIES`: whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// `RATE_LIMIT_PER_CALLER`, `RATE_LIMIT_PER_ADDRESS`, `RATE_LIMIT_REFUSED_TOKENS`, `RATE_LIMIT_BURST` and
    /// `MAX_IN_FLIGHT_PER_CALLER`.
    pub rate_limit: RateLimitSettings,
    /// `MAX_REQUEST_BYTES`.
    pub max_request_bytes: usize,
    /// `MAX_CONNECTIONS`: connections open at the same time on the main listener.
    pub max_connections: usize,
    /// `MAX_IN_FLIGHT`: MCP requests at the same time; more are answered with 503 at once.
    pub max_in_flight: usize,
    /// `MAX_IN_FLIGHT_PER_TOOL`: calls of one tool at the same time; more are refused at once. By default half of
    /// `BACKEND_MAX_CONCURRENCY`: a tool that hangs must not take the room of all others.
    pub max_in_flight_per_tool: usize,
    /// `REQUEST_HEADER_TIMEOUT`: how long a client may take to send a request's head.
    pub request_header_timeout: Duration,
    /// `REQUEST_BODY_TIMEOUT`: how long a client may take to send a request's body.
    pub request_body_timeout: Duration,
    /// `KEEP_ALIVE_TIMEOUT`: how long a connection may stay idle between requests.
    pub keep_alive_timeout: Duration,
    /// `RESPONSE_WRITE_TIMEOUT`: how long a client may take to take in an answer.
    pub response_write_timeout: Duration,
    /// `DRAIN_DELAY`: how long new work is still accepted after SIGTERM, while endpoint lists catch up.
    pub drain_delay: Duration,
    /// `SHUTDOWN_GRACE`: how long, from SIGTERM, calls in flight may go on.
    pub shutdown_grace: Duration,
}

/// How much one caller may ask of one replica.
///
/// Callers with an identity are limited by default: the identity is theirs alone. Addresses are not: everybody behind one gateway
/// has the gateway's, and a limit meant for one client would be one for all of them. Refused tokens are counted by address all the
/// same, for there is nothing else to count them by; who had a good token before does not feel it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateLimitSettings {
    /// Requests a second of one caller with an identity; 0 means no limit.
    pub per_caller: f64,
    /// Requests a second of one client address, of callers without an identity; 0 means no limit.
    pub per_address: f64,
    /// Refused tokens a second of one client address; 0 means no limit.
    pub refused_tokens: f64,
    /// Requests that may come at once, and tokens that may be refused at once.
    pub burst: u32,
    /// `MAX_IN_FLIGHT_PER_CALLER`: requests at the same time of one caller with an identity; 0 means no limit.
    pub in_flight: u32,
}

impl Default for RateLimitSettings {
    fn default() -> RateLimitSettings {
        RateLimitSettings { per_caller: 100.0, per_address: 0.0, refused_tokens: 100.0, burst: 200, in_flight: 256 }
    }
}

impl Default for WebSettings {
    fn default() -> WebSettings {
        WebSettings {
            host: Ipv4Addr::UNSPECIFIED.into(),
            port: 8000,
            metrics_port: Some(9090),
            allowed_hosts: Some(["localhost", "127.0.0.1", "[::1]"].map(str::to_owned).to_vec()),
            allowed_origins: Vec::new(),
            trusted_proxies: Vec::new(),
            rate_limit: RateLimitSettings::default(),
            max_request_bytes: 96 << 10,
            max_connections: 1024,
            max_in_flight: 768,
            max_in_flight_per_tool: half_of(BACKEND_CONCURRENCY),
            request_header_timeout: Duration::from_secs(10),
            request_body_timeout: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(75),
            response_write_timeout: Duration::from_secs(30),
            drain_delay: Duration::from_secs(5),
            shutdown_grace: Duration::from_secs(25),
        }
    }
}

/// What is logged, and in which form.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// `LOG_LEVEL`, as a tracing filter directive (the contract's five words already translated).
    pub filter: String,
    /// `DEBUG`: human-readable lines instead of JSON, and causes in error `details`.
    pub debug: bool,
}

impl Default for LogSettings {
    fn default() -> LogSettings {
        LogSettings { filter: "info".to_owned(), debug: false }
    }
}

/// Where `mcp-server healthcheck` asks: `HOST` when it is one address, loopback when it stands for all; and `PORT`.
pub fn healthcheck_address(vars: &impl Vars) -> Result<SocketAddr, SettingsError> {
    let mut reader = Reader::new(vars);
    let defaults = WebSettings::default();
    let host = match reader.optional("HOST", parse::host, defaults.host) {
        IpAddr::V4(all) if all.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(all) if all.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        one => one,
    };
    let port = reader.optional("PORT", parse::port, defaults.port);
    if port == 0 {
        reader.mistake("PORT", "`0` lets the system choose, so a health check cannot know where to ask");
    }
    reader.finish(Some(SocketAddr::new(host, port)))
}

/// Whether this process runs in a Kubernetes pod, where the demo refuses to start.
pub fn in_kubernetes(vars: &impl Vars) -> bool {
    vars.get("KUBERNETES_SERVICE_HOST").is_some_and(|host| !host.is_empty())
}

fn identity(reader: &mut Reader<'_, impl Vars>, token_file_exists: impl Fn(&Path) -> bool) -> Option<IdentitySettings> {
    refuse_identity_bindings(reader);
    let tenant_id = reader.required("AZURE_TENANT_ID", parse::tenant_id);
    let client_id = reader.required("AZURE_CLIENT_ID", parse::client_id);
    let authority =
        reader.some("AZURE_AUTHORITY_HOST", parse::authority).or_else(|| parse::authority(DEFAULT_AUTHORITY).ok());
    let scopes = scopes(reader);
    let credential = credential(reader, token_file_exists);
    if (tenant_id.is_none() || client_id.is_none() || credential.is_none()) && webhook_is_missing(reader) {
        reader.likely_cause(WEBHOOK_IS_MISSING);
    }
    Some(IdentitySettings {
        tenant_id: tenant_id?,
        client_id: client_id?,
        authority: authority?,
        scopes,
        credential: credential?,
        extra_ca_pem: None,
    })
}

/// What an operator who gave the chart all its values has to hear: the variables that are missing are not theirs to set.
const WEBHOOK_IS_MISSING: &str = "in Kubernetes the Azure workload identity webhook sets AZURE_TENANT_ID, AZURE_CLIENT_ID and \
    AZURE_FEDERATED_TOKEN_FILE, and here it has not. Install it in the cluster (AKS: `az aks update --enable-oidc-issuer \
    --enable-workload-identity`), see that the pod has the label `azure.workload.identity/use: \"true\"` and that its service account has the \
    annotation `azure.workload.identity/client-id`, and make the pod anew; or do without it (the chart's `workloadIdentity.webhook=false`)";

/// Whether this runs in Kubernetes, means to use workload identity, and nothing is here of what the webhook injects.
fn webhook_is_missing(reader: &mut Reader<'_, impl Vars>) -> bool {
    let mut is_set = |name| reader.text(name).is_some();
    is_set("KUBERNETES_SERVICE_HOST") && !is_set("AZURE_FEDERATED_TOKEN_FILE") && !is_set("AZURE_CLIENT_SECRET")
}

/// AKS identity bindings send the exchange to a proxy in the cluster, with another audience. `azure_identity` 1.0 would
/// go to Entra all the same, with a token that Entra rejects.
fn refuse_identity_bindings(reader: &mut Reader<'_, impl Vars>) {
    for name in [
        "AZURE_KUBERNETES_TOKEN_PROXY",
        "AZURE_KUBERNETES_SNI_NAME",
        "AZURE_KUBERNETES_CA_FILE",
        "AZURE_KUBERNETES_CA_DATA",
    ] {
        if reader.text(name).is_some() {
            reader.mistake(
                name,
                "is set, but this release does not support AKS identity bindings; use a federated credential \
                 of the managed identity, and leave the variable out",
            );
        }
    }
}

fn scopes(reader: &mut Reader<'_, impl Vars>) -> Vec<String> {
    let mut scopes = reader.list("AZURE_SCOPES", parse::scope).unwrap_or_else(|| vec![DEFAULT_SCOPE.to_owned()]);
    // Only `/.default` is left after parsing, so two scopes of one resource are the same scope twice.
    scopes.dedup();
    if scopes.len() > 1 {
        let all: Vec<_> = scopes.iter().map(|scope| reader.shown("AZURE_SCOPES", scope)).collect();
        let all = all.join(", ");
        reader.mistake(
            "AZURE_SCOPES",
            format!("{all} belong to different resources, but a token is for one; expected one `<resource>/.default`"),
        );
    }
    if scopes.iter().any(|scope| scope == DEFAULT_SCOPE) {
        reader.warn(format!(
            "AZURE_SCOPES is `{DEFAULT_SCOPE}`, so the backend receives a token for Azure Resource Manager: rights over \
             Azure that it has no business with, in a token that it should refuse. \
             Set AZURE_SCOPES to `api://<backend-app-id>/.default`."
        ));
    }
    scopes
}

/// Existence alone decides. A token file that cannot be read is a failure of workload identity, to be reported as such,
/// and no reason to fall through to the secret.
fn credential(reader: &mut Reader<'_, impl Vars>, token_file_exists: impl Fn(&Path) -> bool) -> Option<Credential> {
    let configured = reader.some("AZURE_FEDERATED_TOKEN_FILE", parse::token_file);
    let secret = reader.text("AZURE_CLIENT_SECRET");
    if reader.has_mistake(&["AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_SECRET"]) {
        return None;
    }
    let token_file = configured.clone().unwrap_or_else(|| BUILT_IN_TOKEN_FILE.into());
    if token_file_exists(&token_file) {
        return Some(Credential::WorkloadIdentity { token_file });
    }
    let path = reader.shown("AZURE_FEDERATED_TOKEN_FILE", &token_file.display().to_string());
    let Some(secret) = secret else {
        let unset = if configured.is_some() { "" } else { " and AZURE_FEDERATED_TOKEN_FILE is not set" };
        reader.mistake(
            "AZURE_FEDERATED_TOKEN_FILE or AZURE_CLIENT_SECRET",
            format!(
                "there is no credential: workload identity needs a federated token file, but {path} does not exist\
                 {unset}; a client secret needs AZURE_CLIENT_SECRET, which is not set"
            ),
        );
        return None;
    };
    if configured.is_some() {
        reader.warn(format!(
            "AZURE_FEDERATED_TOKEN_FILE is {path}, but that file does not exist: AZURE_CLIENT_SECRET is used instead."
        ));
    }
    Some(Credential::ClientSecret { secret: secret.into() })
}

fn backend(reader: &mut Reader<'_, impl Vars>, base_url: Option<Url>) -> Option<BackendSettings> {
    // Read even when the URL is missing, so that no mistake waits for the next start.
    let timeout = reader.some("BACKEND_API_TIMEOUT", parse::seconds);
    let max_response_bytes = reader.some("BACKEND_MAX_RESPONSE_BYTES", parse::bytes);
    let max_buffered_bytes = reader.some("MAX_BUFFERED_BYTES", parse::buffered_bytes);
    let max_concurrency = reader.some("BACKEND_MAX_CONCURRENCY", parse::count);
    let max_attempts = reader.some("BACKEND_MAX_ATTEMPTS", parse::attempts);
    let retry_percent = reader.some("BACKEND_RETRY_PERCENT", parse::percent);
    let retry_floor = reader.some("BACKEND_RETRY_FLOOR", parse::per_second);
    let circuit_breaker = reader.some("BACKEND_CIRCUIT_BREAKER", parse::boolean);
    let idempotent_creates = reader.some("BACKEND_IDEMPOTENT_CREATES", parse::boolean);
    let auth = backend_auth(reader);
    let forward_caller = reader.optional("FORWARD_CALLER", parse::boolean, false);
    if forward_caller && !asks_who_calls(reader) {
        reader.mistake("FORWARD_CALLER", "`true` has nobody to tell the backend of unless INBOUND_AUTH is `entra`");
    }
    let check_in_readiness = reader.some("READINESS_CHECK_BACKEND", parse::boolean);
    let defaults = BackendSettings::new(base_url?);
    let (buffered, response) = (
        max_buffered_bytes.unwrap_or(defaults.max_buffered_bytes),
        max_response_bytes.unwrap_or(defaults.max_response_bytes),
    );
    if buffered / 2 < response {
        reader.warn(format!(
            "MAX_BUFFERED_BYTES is {buffered}, less than twice BACKEND_MAX_RESPONSE_BYTES: an answer of {response} bytes is read and then \
             copied, and never fits."
        ));
    }
    Some(BackendSettings {
        timeout: timeout.unwrap_or(defaults.timeout),
        max_response_bytes: response,
        max_buffered_bytes: buffered,
        max_concurrency: max_concurrency.unwrap_or(defaults.max_concurrency),
        max_attempts: max_attempts.unwrap_or(defaults.max_attempts),
        retry_percent: retry_percent.unwrap_or(defaults.retry_percent),
        retry_floor: retry_floor.unwrap_or(defaults.retry_floor),
        circuit_breaker: circuit_breaker.unwrap_or(defaults.circuit_breaker),
        idempotent_creates: idempotent_creates.unwrap_or(defaults.idempotent_creates),
        auth,
        forward_caller,
        check_in_readiness: check_in_readiness.unwrap_or(defaults.check_in_readiness),
        ..defaults
    })
}

fn backend_auth(reader: &mut Reader<'_, impl Vars>) -> BackendAuth {
    let on_behalf_of = reader.optional("BACKEND_AUTH", parse::backend_auth, false);
    let app_fallback = reader.optional("OBO_APP_FALLBACK", parse::boolean, false);
    if on_behalf_of && !asks_who_calls(reader) {
        reader.mistake(
            "BACKEND_AUTH",
            "`on-behalf-of` exchanges the caller's token, and without INBOUND_AUTH=entra there is none; expected both or neither",
        );
    }
    if app_fallback && !on_behalf_of && !reader.has_mistake(&["BACKEND_AUTH"]) {
        reader.mistake("OBO_APP_FALLBACK", "`true` has no meaning unless BACKEND_AUTH is `on-behalf-of`");
    }
    if on_behalf_of { BackendAuth::OnBehalfOf { app_fallback } } else { BackendAuth::Server }
}

/// Whether callers have to prove who they are.
fn asks_who_calls(reader: &mut Reader<'_, impl Vars>) -> bool {
    reader.text("INBOUND_AUTH").is_some_and(|auth| auth.eq_ignore_ascii_case("entra"))
}

fn rate_limit(reader: &mut Reader<'_, impl Vars>) -> RateLimitSettings {
    let defaults = RateLimitSettings::default();
    RateLimitSettings {
        per_caller: reader.optional("RATE_LIMIT_PER_CALLER", parse::rate, defaults.per_caller),
        per_address: reader.optional("RATE_LIMIT_PER_ADDRESS", parse::rate, defaults.per_address),
        refused_tokens: reader.optional("RATE_LIMIT_REFUSED_TOKENS", parse::rate, defaults.refused_tokens),
        burst: reader.optional("RATE_LIMIT_BURST", parse::burst, defaults.burst),
        in_flight: reader.optional("MAX_IN_FLIGHT_PER_CALLER", parse::in_flight, defaults.in_flight),
    }
}

fn allowed_hosts(reader: &mut Reader<'_, impl Vars>) -> Option<Vec<String>> {
    let Some(hosts) = reader.list("ALLOWED_HOSTS", parse::allowed_host) else {
        return WebSettings::default().allowed_hosts;
    };
    if !hosts.iter().any(|host| host == "*") {
        return Some(hosts);
    }
    if hosts.len() > 1 {
        reader.mistake("ALLOWED_HOSTS", "`*` turns the guard off, so it stands alone or not at all");
    }
    reader.warn(
        "ALLOWED_HOSTS is `*`, so `/mcp` accepts any Host and nothing guards it against DNS rebinding. \
         List the names that clients use.",
    );
    None
}

fn web(
    reader: &mut Reader<'_, impl Vars>,
    host: IpAddr,
    allowed_hosts: Option<Vec<String>>,
    backend: Option<&BackendSettings>,
) -> WebSettings {
    let defaults = WebSettings::default();
    let port = reader.optional("PORT", parse::port, defaults.port);
    let metrics_port = match reader.optional("METRICS_PORT", parse::port, defaults.metrics_port.unwrap_or(0)) {
        0 => None,
        port => Some(port),
    };
    if metrics_port == Some(port) && !reader.has_mistake(&["PORT", "METRICS_PORT"]) {
        reader.mistake(
            "METRICS_PORT",
            format!(
                "`{port}` is also PORT; metrics have a listener of their own: expected another port, or 0 for none"
            ),
        );
    }

    let shutdown_grace = reader.optional("SHUTDOWN_GRACE", parse::seconds, defaults.shutdown_grace);
    // A short grace alone must not be a mistake: the default of the delay shrinks with it.
    let default_delay = defaults.drain_delay.min(shutdown_grace / 2);
    let drain_delay = reader.optional("DRAIN_DELAY", parse::seconds_or_zero, default_delay);
    if drain_delay > shutdown_grace && !reader.has_mistake(&["DRAIN_DELAY", "SHUTDOWN_GRACE"]) {
        let (delay, grace) = (drain_delay.as_secs_f64(), shutdown_grace.as_secs_f64());
        reader.mistake(
            "DRAIN_DELAY",
            format!("`{delay}` is longer than SHUTDOWN_GRACE, of which it is a part; expected at most {grace}"),
        );
    }

    let max_in_flight = reader.optional("MAX_IN_FLIGHT", parse::count, defaults.max_in_flight);
    let concurrency = backend.map_or(BACKEND_CONCURRENCY, |backend| backend.max_concurrency);
    let max_in_flight_per_tool = reader.optional("MAX_IN_FLIGHT_PER_TOOL", parse::count, half_of(concurrency));
    for (name, limit) in [("MAX_IN_FLIGHT", max_in_flight), ("BACKEND_MAX_CONCURRENCY", concurrency)] {
        if max_in_flight_per_tool >= limit && limit > 1 {
            reader.warn(format!(
                "MAX_IN_FLIGHT_PER_TOOL is {max_in_flight_per_tool} and {name} is {limit}: one tool whose calls hang can take \
                 the room of all others. Set it to half of {name} at most."
            ));
        }
    }

    WebSettings {
        host,
        port,
        metrics_port,
        allowed_hosts,
        allowed_origins: reader.list("ALLOWED_ORIGINS", parse::allowed_origin).unwrap_or_default(),
        trusted_proxies: reader.list("TRUSTED_PROXIES", parse::network).unwrap_or_default(),
        rate_limit: rate_limit(reader),
        max_request_bytes: reader.optional("MAX_REQUEST_BYTES", parse::bytes, defaults.max_request_bytes),
        max_connections: reader.optional("MAX_CONNECTIONS", parse::count, defaults.max_connections),
        max_in_flight,
        max_in_flight_per_tool,
        request_header_timeout: reader.optional(
            "REQUEST_HEADER_TIMEOUT",
            parse::seconds,
            defaults.request_header_timeout,
        ),
        request_body_timeout: reader.optional("REQUEST_BODY_TIMEOUT", parse::seconds, defaults.request_body_timeout),
        keep_alive_timeout: reader.optional("KEEP_ALIVE_TIMEOUT", parse::seconds, defaults.keep_alive_timeout),
        response_write_timeout: reader.optional(
            "RESPONSE_WRITE_TIMEOUT",
            parse::seconds,
            defaults.response_write_timeout,
        ),
        drain_delay,
        shutdown_grace,
    }
}

fn log(reader: &mut Reader<'_, impl Vars>) -> LogSettings {
    let defaults = LogSettings::default();
    LogSettings {
        filter: reader.optional("LOG_LEVEL", parse::log_filter, defaults.filter),
        debug: reader.optional("DEBUG", parse::boolean, defaults.debug),
    }
}

/// A path that we may not look at counts as there: workload identity was meant, and its own error will say what is wrong.
fn may_exist(path: &Path) -> bool {
    path.try_exists().unwrap_or(true)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn without_trailing_slash(mut url: Url) -> Url {
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    url
}
