//! The table of variables: their names, meanings and defaults, declared once.

/// One environment variable, as the documents show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variable {
    /// The name in the environment.
    pub name: &'static str,
    /// What it sets, in one sentence.
    pub meaning: &'static str,
    /// What an unset or empty variable means, written as it would be set.
    pub default: Option<&'static str>,
    /// Whether the server refuses to start without it.
    pub required: bool,
    /// Whether its value must never be shown.
    pub secret: bool,
}

const fn required(name: &'static str, meaning: &'static str) -> Variable {
    Variable { name, meaning, default: None, required: true, secret: false }
}

const fn optional(name: &'static str, default: &'static str, meaning: &'static str) -> Variable {
    Variable { name, meaning, default: Some(default), required: false, secret: false }
}

const fn without_default(name: &'static str, meaning: &'static str) -> Variable {
    Variable { name, meaning, default: None, required: false, secret: false }
}

const fn secret(name: &'static str, meaning: &'static str) -> Variable {
    Variable { name, meaning, default: None, required: false, secret: true }
}

/// Every variable that this server reads, in the order in which the documents list them.
pub const VARIABLES: &[Variable] = &[
    required("AZURE_TENANT_ID", "Entra tenant, as a GUID or a domain name."),
    required("AZURE_CLIENT_ID", "Client id of the user-assigned managed identity, or of the app registration."),
    optional(
        "AZURE_AUTHORITY_HOST",
        "https://login.microsoftonline.com",
        "Entra authority, https only, with or without a trailing slash.",
    ),
    optional(
        "AZURE_FEDERATED_TOKEN_FILE",
        "/var/run/secrets/azure/tokens/token",
        "Projected service-account token; where the file exists, workload identity is used (the AKS webhook sets this).",
    ),
    secret("AZURE_CLIENT_SECRET", "Client secret, used where no federated token file exists."),
    optional(
        "AZURE_SCOPES",
        "https://management.azure.com/.default",
        "Scope of the token for the backend; set it to `api://<backend-app-id>/.default`, for the default, kept for compatibility, is a token for Azure itself.",
    ),
    required("BACKEND_API_URL", "Base URL of the backend, http or https, which may carry a path prefix."),
    optional(
        "BACKEND_API_TIMEOUT",
        "10",
        "Seconds that one tool call may spend on the backend in all: token, attempts, waits between them, and body.",
    ),
    optional(
        "BACKEND_MAX_RESPONSE_BYTES",
        "4194304",
        "Largest response of the backend that is read, from 1024 to 67108864 bytes.",
    ),
    optional(
        "MAX_BUFFERED_BYTES",
        "134217728",
        "Memory for answers of the backend, from their first byte to the last byte that a client has taken of ours, and for large requests, all together, from 1048576 to 68719476736 bytes; what does not fit is refused at once.",
    ),
    optional(
        "BACKEND_MAX_CONCURRENCY",
        "1024",
        "Requests to the backend at the same time, from 1 to 65536; more are refused at once.",
    ),
    optional("BACKEND_MAX_ATTEMPTS", "3", "How often one call may ask the backend, from 1 (never again) to 10."),
    optional(
        "BACKEND_RETRY_PERCENT",
        "20",
        "Repetitions, in percent of the calls of the last ten seconds, beyond BACKEND_RETRY_FLOOR; from 0 to 100.",
    ),
    optional("BACKEND_RETRY_FLOOR", "10", "Repetitions a second that are always allowed, from 0 to 10000."),
    optional(
        "BACKEND_CIRCUIT_BREAKER",
        "true",
        "Whether calls of a route of the backend fail at once while it keeps failing; one tries again after 1 to 31 seconds.",
    ),
    optional(
        "BACKEND_IDEMPOTENT_CREATES",
        "false",
        "Set it when the backend honours `Idempotency-Key`: only then is a ticket sent again whose outcome is unknown.",
    ),
    optional(
        "BACKEND_AUTH",
        "server",
        "Whose token the backend gets: `server` (the server's own) or `on-behalf-of` (one for the user who calls; needs INBOUND_AUTH=entra).",
    ),
    optional(
        "OBO_APP_FALLBACK",
        "false",
        "With BACKEND_AUTH=on-behalf-of: whether apps that call without a user act with the server's own token instead of being refused.",
    ),
    optional(
        "FORWARD_CALLER",
        "false",
        "Whether the backend is told who calls, in `X-Caller-Subject`, `X-Caller-App` and `X-Caller-Tenant`; needs INBOUND_AUTH=entra.",
    ),
    optional("READINESS_CHECK_BACKEND", "true", "Whether the backend's health counts in `/health/ready`."),
    optional(
        "LOG_LEVEL",
        "INFO",
        "DEBUG, INFO, WARNING, ERROR or CRITICAL, or a tracing filter directive such as `info,mcp_server=debug`.",
    ),
    optional("DEBUG", "false", "Human-readable logs instead of JSON, and causes in the `details` of errors."),
    without_default(
        "AUDIT_LOG_FILE",
        "File that audit events are added to as a chain of hashes, beside their lines in the log; `mcp-server audit verify FILE` checks it.",
    ),
    optional(
        "AUDIT_REQUIRED",
        "false",
        "Whether calls are refused while AUDIT_LOG_FILE cannot be written; otherwise that is logged and counted only.",
    ),
    without_default(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "Base URL of an OpenTelemetry collector that takes OTLP over HTTP; `/v1/traces` is added. Switches the export of traces on.",
    ),
    without_default(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "URL that traces are sent to, as it stands; wins over OTEL_EXPORTER_OTLP_ENDPOINT.",
    ),
    secret(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "Headers for the collector, `name=value,name=value`, values percent-encoded; usually its API key.",
    ),
    optional("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf", "The one protocol for traces that this server speaks."),
    optional("OTEL_EXPORTER_OTLP_TIMEOUT", "10000", "Milliseconds that the collector may take for a batch of spans."),
    optional(
        "OTEL_TRACES_SAMPLER",
        "parentbased_always_on",
        "Which traces are exported: always_on, always_off, traceidratio, or one of these after `parentbased_`.",
    ),
    optional("OTEL_TRACES_SAMPLER_ARG", "1", "The share of traces for the `traceidratio` samplers, from 0 to 1."),
    optional("OTEL_SERVICE_NAME", "mcp-server", "The name of this service in exported traces."),
    without_default(
        "OTEL_RESOURCE_ATTRIBUTES",
        "More about this process for exported traces, `name=value,name=value`, values percent-encoded.",
    ),
    optional("OTEL_SDK_DISABLED", "false", "Switches the export off, whatever else is set."),
    optional("OTEL_BSP_SCHEDULE_DELAY", "5000", "Milliseconds that a span waits for others at most before it is sent."),
    optional(
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "2048",
        "Spans that wait for the collector, from 1 to 65536; more are dropped, and counted.",
    ),
    optional("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512", "Spans in one request to the collector, from 1 to 65536."),
    optional("HOST", "0.0.0.0", "IP address (or `localhost`) that the main listener binds."),
    optional("PORT", "8000", "Port of the main listener; 0 lets the system choose."),
    optional("METRICS_PORT", "9090", "Port of the management listener with `/metrics`; 0 turns it off."),
    optional(
        "ALLOWED_HOSTS",
        "localhost,127.0.0.1,[::1]",
        "`Host` values that `/mcp` accepts, each `host` or `host:port`; `*` turns this guard against DNS rebinding off.",
    ),
    without_default(
        "ALLOWED_ORIGINS",
        "Browser origins that `/mcp` accepts and answers CORS for, such as `https://app.example.com`; requests without `Origin` always pass.",
    ),
    optional(
        "INBOUND_AUTH",
        "none",
        "Who may call: `entra` wants a token of Entra ID from every caller, `none` leaves it to the network.",
    ),
    without_default(
        "INBOUND_AUDIENCE",
        "With `entra`: client id of this server's app registration, the audience of its tokens; beside it its App ID URI, where version 1 tokens are to be accepted too.",
    ),
    without_default(
        "INBOUND_TENANTS",
        "With `entra`: tenants whose tokens are accepted, as GUIDs; unset means AZURE_TENANT_ID alone.",
    ),
    without_default(
        "INBOUND_CLIENTS",
        "With `entra`: client ids of the only applications that may call; unset means any application of the tenants.",
    ),
    without_default(
        "INBOUND_SCOPE_NAMES",
        "With `entra`: what permissions are called as delegated scopes, such as `users.read=Users.Read`; others keep their names: users.read, tickets.read, tickets.write, data.read.",
    ),
    without_default(
        "INBOUND_ROLE_NAMES",
        "With `entra`: the same for app roles, which apps without a user are granted.",
    ),
    without_default(
        "PUBLIC_URL",
        "URL of the MCP endpoint as clients write it, such as `https://mcp.example.com/mcp`; required with INBOUND_AUTH=entra.",
    ),
    without_default("ENABLED_TOOLS", "The only tools that exist, for whoever calls; unset means all five."),
    optional("READ_ONLY", "false", "Whether tools that change something (`create_ticket`) are switched off."),
    without_default(
        "TRUSTED_PROXIES",
        "Networks of the proxies in front, such as `10.0.0.0/8,fd00::/8`: only they are believed when `X-Forwarded-For` names the client.",
    ),
    optional(
        "RATE_LIMIT_PER_CALLER",
        "100",
        "MCP requests a second that one caller with an identity may send to one replica, from 0 (no limit) to 10000; more get 429.",
    ),
    optional(
        "RATE_LIMIT_PER_ADDRESS",
        "0",
        "The same for one client address, of callers without an identity; off, because all clients of one gateway share its address.",
    ),
    optional(
        "RATE_LIMIT_REFUSED_TOKENS",
        "100",
        "With INBOUND_AUTH=entra: refused tokens a second from one client address, from 0 (no limit) to 10000; beyond that, tokens that were not good before get 429 unchecked.",
    ),
    optional(
        "RATE_LIMIT_BURST",
        "200",
        "MCP requests that may come, and tokens that may be refused, at once before a rate limit counts, from 1 to 65536.",
    ),
    optional("MAX_REQUEST_BYTES", "98304", "Largest request body, from 1024 to 67108864 bytes."),
    optional(
        "MAX_CONNECTIONS",
        "1024",
        "Connections open at the same time on the main listener, from 1 to 65536; beyond that, the one that has been idle for longest is closed for a new request.",
    ),
    optional(
        "MAX_IN_FLIGHT",
        "768",
        "MCP requests at the same time, from 1 to 65536; more are answered with 503 at once.",
    ),
    without_default(
        "MAX_IN_FLIGHT_PER_TOOL",
        "Calls of one tool at the same time, from 1 to 65536; unset means half of BACKEND_MAX_CONCURRENCY. More are refused at once, so that one tool cannot take all.",
    ),
    optional(
        "MAX_IN_FLIGHT_PER_CALLER",
        "256",
        "MCP requests of one caller with an identity at the same time, from 0 (no limit) to 65536; more get 429, so that one caller cannot take all.",
    ),
    optional("REQUEST_HEADER_TIMEOUT", "10", "Seconds that a client may take to send the head of a request."),
    optional(
        "REQUEST_BODY_TIMEOUT",
        "10",
        "Seconds that a client may take to send the body of a request, apart from the time that a call has; more get 408, before anything is run.",
    ),
    optional("KEEP_ALIVE_TIMEOUT", "75", "Seconds that a connection may stay idle between requests."),
    optional(
        "RESPONSE_WRITE_TIMEOUT",
        "30",
        "Seconds that a client may take to take in an answer, counted from the first byte that does not fit into the network's buffers; then its connection is closed.",
    ),
    optional(
        "DRAIN_DELAY",
        "5",
        "Seconds after SIGTERM in which new work is still accepted, while endpoint lists catch up; a part of SHUTDOWN_GRACE, and by default no more than half of it.",
    ),
    optional("SHUTDOWN_GRACE", "25", "Seconds, from SIGTERM, that calls in flight get to finish."),
];

/// Variables that the TLS and HTTP libraries read for themselves, straight from the process environment: this server
/// cannot hand them what stands in `.env`, and says so.
pub const LIBRARY_VARIABLES: &[Variable] = &[
    without_default(
        "SSL_CERT_FILE",
        "PEM file with the certificate authorities to trust, for Entra and the backend, in place of the system's.",
    ),
    without_default(
        "SSL_CERT_DIR",
        "Directory with the certificate authorities to trust, for Entra and the backend, in place of the system's.",
    ),
    without_default("HTTPS_PROXY", "Proxy on the way to Entra; never used for the backend."),
    without_default("ALL_PROXY", "The same, where HTTPS_PROXY is not set."),
    without_default("NO_PROXY", "Hosts that are reached without the proxy, comma separated."),
];
