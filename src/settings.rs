//! Which knobs exist: the one place that reads the environment.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretString;
use url::Url;

/// Everything that an operator may set, checked and typed: after this nobody sees a string again.
#[derive(Debug, Clone)]
pub struct Settings {
    pub identity: IdentitySettings,
    pub backend: BackendSettings,
    pub web: WebSettings,
    pub log: LogSettings,
    /// What is legal but deserves a WARN at each start, as whole sentences.
    pub warnings: Vec<String>,
}

/// Who we are in Entra's eyes, and for which resource we ask tokens.
#[derive(Debug, Clone)]
pub struct IdentitySettings {
    /// `AZURE_TENANT_ID`: a GUID or a verified domain name; never `common` and its like.
    pub tenant_id: String,
    /// `AZURE_CLIENT_ID`.
    pub client_id: String,
    /// `AZURE_AUTHORITY_HOST`: https, no path, query, fragment or user info.
    pub authority: Url,
    /// `AZURE_SCOPES`: all of one resource, each ending in `/.default`.
    pub scopes: Vec<String>,
    pub credential: Credential,
    /// A certificate authority to trust beside the platform's, as PEM. No variable sets it: the demo and the tests do.
    pub extra_ca_pem: Option<String>,
}

/// The credential chain's choice (contract §3), made once, from configuration alone.
#[derive(Debug, Clone)]
pub enum Credential {
    /// The Kubernetes service-account token in `token_file` is exchanged for an Entra token.
    WorkloadIdentity {
        token_file: PathBuf,
    },
    ClientSecret {
        secret: SecretString,
    },
}

/// How we reach the backend, and how much one tool call may spend on it.
#[derive(Debug, Clone)]
pub struct BackendSettings {
    /// `BACKEND_API_URL`, without a trailing slash in its path.
    pub base_url: Url,
    /// `BACKEND_API_TIMEOUT`: the deadline of one tool call.
    pub timeout: Duration,
    /// `BACKEND_MAX_RESPONSE_BYTES`: the largest response body that is read.
    pub max_response_bytes: usize,
    /// `READINESS_CHECK_BACKEND`.
    pub check_in_readiness: bool,
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
    /// `MAX_REQUEST_BYTES`.
    pub max_request_bytes: usize,
    /// `MAX_CONNECTIONS`: connections open at the same time on the main listener.
    pub max_connections: usize,
    /// `REQUEST_HEADER_TIMEOUT`: how long a client may take to send a request's head.
    pub request_header_timeout: Duration,
    /// `KEEP_ALIVE_TIMEOUT`: how long a connection may stay idle between requests.
    pub keep_alive_timeout: Duration,
    /// `DRAIN_DELAY`: how long new work is still accepted after SIGTERM, while endpoint lists catch up.
    pub drain_delay: Duration,
    /// `SHUTDOWN_GRACE`: how long, from SIGTERM, calls in flight may go on.
    pub shutdown_grace: Duration,
}

/// What is logged, and in which form.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// `LOG_LEVEL`, as a tracing filter directive (the contract's five words already translated).
    pub filter: String,
    /// `DEBUG`: human-readable lines instead of JSON, and causes in error `details`.
    pub debug: bool,
}
