//! Every variable, good and bad; nothing here touches the process or the working directory.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use secrecy::ExposeSecret;

use super::vars::EnvFile;
use super::*;

const TENANT: &str = "11111111-2222-3333-4444-555555555555";
const CLIENT: &str = "66666666-7777-8888-9999-000000000000";
const SECRET: &str = "canary-of-a-secret";

/// What nobody can do without, and `extra` over it.
fn vars(extra: &[(&str, &str)]) -> BTreeMap<String, String> {
    [
        ("AZURE_TENANT_ID", TENANT),
        ("AZURE_CLIENT_ID", CLIENT),
        ("AZURE_CLIENT_SECRET", SECRET),
        ("BACKEND_API_URL", "https://backend.internal"),
    ]
    .iter()
    .chain(extra)
    .map(|&(name, value)| (name.to_owned(), value.to_owned()))
    .collect()
}

/// As on a machine without any token file.
fn read(extra: &[(&str, &str)]) -> Result<Settings, SettingsError> {
    Settings::read_with(&vars(extra), |_| false)
}

fn mistakes(extra: &[(&str, &str)]) -> Vec<String> {
    read(extra).map_or_else(|error| error.mistakes().iter().map(Mistake::to_string).collect(), |_| Vec::new())
}

#[test]
fn every_good_value_is_understood() {
    type Show = fn(&Settings) -> String;
    let tenant: Show = |settings| settings.identity.tenant_id.clone();
    let client: Show = |settings| settings.identity.client_id.clone();
    let authority: Show = |settings| settings.identity.authority.to_string();
    let scopes: Show = |settings| settings.identity.scopes.join(" ");
    let base_url: Show = |settings| settings.backend.base_url.to_string();
    let timeout: Show = |settings| format!("{:?}", settings.backend.timeout);
    let response: Show = |settings| settings.backend.max_response_bytes.to_string();
    let readiness: Show = |settings| settings.backend.check_in_readiness.to_string();
    let filter: Show = |settings| settings.log.filter.clone();
    let debug: Show = |settings| settings.log.debug.to_string();
    let host: Show = |settings| settings.web.host.to_string();
    let port: Show = |settings| settings.web.port.to_string();
    let metrics: Show = |settings| format!("{:?}", settings.web.metrics_port);
    let hosts: Show = |settings| settings.web.allowed_hosts.as_ref().map_or("any".to_owned(), |hosts| hosts.join(" "));
    let origins: Show = |settings| settings.web.allowed_origins.join(" ");
    let request: Show = |settings| settings.web.max_request_bytes.to_string();
    let connections: Show = |settings| settings.web.max_connections.to_string();
    let header: Show = |settings| format!("{:?}", settings.web.request_header_timeout);
    let body: Show = |settings| format!("{:?}", settings.web.request_body_timeout);
    let idle: Show = |settings| format!("{:?}", settings.web.keep_alive_timeout);
    let write: Show = |settings| format!("{:?}", settings.web.response_write_timeout);
    let drain: Show = |settings| format!("{:?}", settings.web.drain_delay);
    let grace: Show = |settings| format!("{:?}", settings.web.shutdown_grace);

    let rows: &[(&str, &str, Show, &str)] = &[
        ("AZURE_TENANT_ID", "  11111111-2222-3333-4444-55555555AAAA\n", tenant, "11111111-2222-3333-4444-55555555aaaa"),
        ("AZURE_TENANT_ID", "Contoso.onmicrosoft.com", tenant, "contoso.onmicrosoft.com"),
        ("AZURE_CLIENT_ID", "AAAAAAAA-7777-8888-9999-000000000000", client, "aaaaaaaa-7777-8888-9999-000000000000"),
        ("AZURE_AUTHORITY_HOST", "", authority, "https://login.microsoftonline.com/"),
        ("AZURE_AUTHORITY_HOST", "https://login.microsoftonline.us/", authority, "https://login.microsoftonline.us/"),
        ("AZURE_AUTHORITY_HOST", "HTTPS://Localhost:8443", authority, "https://localhost:8443/"),
        ("AZURE_SCOPES", "", scopes, "https://management.azure.com/.default"),
        ("AZURE_SCOPES", "api://app/.default", scopes, "api://app/.default"),
        ("AZURE_SCOPES", "api://app/.default, api://app/.default,", scopes, "api://app/.default"),
        ("AZURE_SCOPES", "https://vault.azure.net//.default", scopes, "https://vault.azure.net//.default"),
        ("BACKEND_API_URL", "http://127.0.0.1:9000", base_url, "http://127.0.0.1:9000/"),
        ("BACKEND_API_URL", "https://Backend.internal/v1/", base_url, "https://backend.internal/v1"),
        ("BACKEND_API_URL", "https://backend.internal:8443/a@b/v1//", base_url, "https://backend.internal:8443/a@b/v1"),
        ("BACKEND_API_TIMEOUT", "0.25", timeout, "250ms"),
        ("BACKEND_API_TIMEOUT", " ", timeout, "10s"),
        ("BACKEND_API_TIMEOUT", "86400", timeout, "86400s"),
        ("BACKEND_MAX_CONCURRENCY", "1", |s| s.backend.max_concurrency.to_string(), "1"),
        ("BACKEND_MAX_ATTEMPTS", "10", |s| s.backend.max_attempts.to_string(), "10"),
        ("BACKEND_RETRY_PERCENT", "0", |s| s.backend.retry_percent.to_string(), "0"),
        ("BACKEND_RETRY_FLOOR", "0", |s| s.backend.retry_floor.to_string(), "0"),
        ("BACKEND_CIRCUIT_BREAKER", "no", |s| s.backend.circuit_breaker.to_string(), "false"),
        ("BACKEND_IDEMPOTENT_CREATES", "YES", |s| s.backend.idempotent_creates.to_string(), "true"),
        (
            "TRUSTED_PROXIES",
            "10.1.2.3/8, 192.0.2.9,FD00::/8",
            |s| format!("{:?}", s.web.trusted_proxies),
            "[10.0.0.0/8, 192.0.2.9/32, fd00::/8]",
        ),
        ("RATE_LIMIT_PER_CALLER", "0.5", |s| s.web.rate_limit.per_caller.to_string(), "0.5"),
        ("RATE_LIMIT_PER_CALLER", "0", |s| s.web.rate_limit.per_caller.to_string(), "0"),
        ("RATE_LIMIT_PER_ADDRESS", "10000", |s| s.web.rate_limit.per_address.to_string(), "10000"),
        ("RATE_LIMIT_REFUSED_TOKENS", "0", |s| s.web.rate_limit.refused_tokens.to_string(), "0"),
        ("RATE_LIMIT_BURST", "1", |s| s.web.rate_limit.burst.to_string(), "1"),
        ("MAX_IN_FLIGHT_PER_CALLER", "0", |s| s.web.rate_limit.in_flight.to_string(), "0"),
        ("BACKEND_AUTH", "Server", |s| format!("{:?}", s.backend.auth), "Server"),
        ("MAX_IN_FLIGHT", "7", |s| s.web.max_in_flight.to_string(), "7"),
        ("MAX_IN_FLIGHT_PER_TOOL", "7", |s| s.web.max_in_flight_per_tool.to_string(), "7"),
        ("MAX_IN_FLIGHT_PER_TOOL", "", |s| s.web.max_in_flight_per_tool.to_string(), "512"),
        ("BACKEND_MAX_CONCURRENCY", "301", |s| s.web.max_in_flight_per_tool.to_string(), "150"),
        ("BACKEND_MAX_CONCURRENCY", "1", |s| s.web.max_in_flight_per_tool.to_string(), "1"),
        ("BACKEND_MAX_RESPONSE_BYTES", "1024", response, "1024"),
        ("BACKEND_MAX_RESPONSE_BYTES", "67108864", response, "67108864"),
        ("MAX_BUFFERED_BYTES", "1048576", |s| s.backend.max_buffered_bytes.to_string(), "1048576"),
        ("READINESS_CHECK_BACKEND", "No", readiness, "false"),
        ("READINESS_CHECK_BACKEND", "0", readiness, "false"),
        ("LOG_LEVEL", "debug", filter, "debug"),
        ("LOG_LEVEL", "Info", filter, "info"),
        ("LOG_LEVEL", "WARNING", filter, "warn"),
        ("LOG_LEVEL", "warn", filter, "warn"),
        ("LOG_LEVEL", "ERROR", filter, "error"),
        ("LOG_LEVEL", "CRITICAL", filter, "error"),
        ("LOG_LEVEL", "TRACE", filter, "trace"),
        ("LOG_LEVEL", "WARNING, mcp_server::web=debug,hyper=off", filter, "warn,mcp_server::web=debug,hyper=off"),
        ("DEBUG", "YES", debug, "true"),
        ("DEBUG", "1", debug, "true"),
        ("DEBUG", "True", debug, "true"),
        ("DEBUG", "false", debug, "false"),
        ("HOST", "LocalHost", host, "127.0.0.1"),
        ("HOST", "::", host, "::"),
        ("PORT", "0", port, "0"),
        ("PORT", "65535", port, "65535"),
        ("METRICS_PORT", "0", metrics, "None"),
        ("METRICS_PORT", "9191", metrics, "Some(9191)"),
        ("ALLOWED_HOSTS", ", ,", hosts, "localhost 127.0.0.1 [::1]"),
        ("ALLOWED_HOSTS", "*", hosts, "any"),
        (
            "ALLOWED_HOSTS",
            "MCP.example.com, mcp_server:8000 ,10.0.0.1:80",
            hosts,
            "mcp.example.com mcp_server:8000 10.0.0.1:80",
        ),
        (
            "ALLOWED_HOSTS",
            "mcp.default.svc.cluster.local.,mcp.:8000,127.0.0.1.",
            hosts,
            "mcp.default.svc.cluster.local mcp:8000 127.0.0.1",
        ),
        ("ALLOWED_HOSTS", "::1,[0:0::1]:8000,[FE80::1]", hosts, "[::1] [::1]:8000 [fe80::1]"),
        (
            "ALLOWED_ORIGINS",
            "HTTPS://App.Example.com:443/,http://localhost:6274",
            origins,
            "https://app.example.com http://localhost:6274",
        ),
        (
            "ALLOWED_ORIGINS",
            "https://bücher.example,http://[::1]:80",
            origins,
            "https://xn--bcher-kva.example http://[::1]",
        ),
        ("ALLOWED_ORIGINS", "vscode-webview://0A1b2C", origins, "vscode-webview://0a1b2c"),
        ("MAX_REQUEST_BYTES", "1024", request, "1024"),
        ("MAX_CONNECTIONS", "1", connections, "1"),
        ("MAX_CONNECTIONS", "65536", connections, "65536"),
        ("REQUEST_HEADER_TIMEOUT", "2.5", header, "2.5s"),
        ("REQUEST_BODY_TIMEOUT", "", body, "10s"),
        ("REQUEST_BODY_TIMEOUT", "0.25", body, "250ms"),
        ("KEEP_ALIVE_TIMEOUT", "60", idle, "60s"),
        ("RESPONSE_WRITE_TIMEOUT", "0.5", write, "500ms"),
        ("DRAIN_DELAY", "0", drain, "0ns"),
        ("DRAIN_DELAY", "25", drain, "25s"),
        ("SHUTDOWN_GRACE", "30", grace, "30s"),
        ("SHUTDOWN_GRACE", "30", drain, "5s"),
        ("SHUTDOWN_GRACE", "2", drain, "1s"),
    ];
    for (name, value, show, expected) in rows {
        let settings = read(&[(name, value)]).unwrap_or_else(|error| panic!("{name}={value:?}: {error}"));
        assert_eq!(show(&settings), *expected, "{name}={value:?}");
    }
}

#[test]
fn every_bad_value_is_named_with_what_would_be_accepted() {
    let rows: &[(&str, &[&str], &str)] = &[
        ("AZURE_TENANT_ID", &["common", "Organizations", "consumers"], "expected the tenant's GUID or domain name"),
        (
            "AZURE_TENANT_ID",
            &[
                "..",
                ".",
                "contoso",
                "a/b.c",
                "contoso..com",
                "-a.com",
                "1.2.3.4",
                "{11111111-2222-3333-4444-555555555555}",
            ],
            "expected a GUID, or a domain name",
        ),
        ("AZURE_CLIENT_ID", &["my-app", "66666666777788889999000000000000", "api://x"], "expected a GUID"),
        (
            "AZURE_AUTHORITY_HOST",
            &["http://login.example", "login.example", "https:login.example", "https:///x", "https://", "https://a b"],
            "is not an absolute https URL",
        ),
        ("AZURE_AUTHORITY_HOST", &["https://login.example/tenant", "https://login.example//"], "has a path"),
        (
            "AZURE_AUTHORITY_HOST",
            &["https://login.example/?x", "https://login.example#", "https://login.example?"],
            "has a query or a fragment",
        ),
        ("AZURE_AUTHORITY_HOST", &["https://u:p@login.example", "https://@login.example"], "has user info"),
        (
            "AZURE_SCOPES",
            &["api://app/read", "/.default", ".default", "api://a b/.default", "api://app/.default api://app/.default"],
            "expected `<resource>/.default`",
        ),
        (
            "BACKEND_API_URL",
            &[
                "ftp://x",
                "backend:8080",
                "//backend",
                "http:/backend",
                "http://",
                "http:\\\\backend",
                "http://back end",
                "http://backend:99999",
            ],
            "is not an absolute http or https URL",
        ),
        ("BACKEND_API_URL", &["http://user:pass@backend", "http://token@backend/v1"], "has user info"),
        ("BACKEND_API_URL", &["http://backend?key=value", "http://backend/v1#part"], "has a query or a fragment"),
        (
            "BACKEND_API_TIMEOUT",
            &["0", "-1", "ten", "NaN", "inf", "10s", "86401", "1e-30"],
            "is not a number of seconds above 0 and up to 86400",
        ),
        (
            "BACKEND_MAX_RESPONSE_BYTES",
            &["1023", "67108865", "4MiB", "-1", "1.5"],
            "is not a whole number from 1024 to 67108864",
        ),
        ("MAX_BUFFERED_BYTES", &["0", "1048575", "128Mi"], "is not a whole number from 1048576 to 68719476736"),
        ("READINESS_CHECK_BACKEND", &["on", "2"], "expected true, false, 1, 0, yes or no"),
        (
            "LOG_LEVEL",
            &["verbose", "mcp_server", "mcp_server=loud", "info,nonsense", "=debug", "mcp_server=", "[call]=debug"],
            "expected DEBUG, INFO, WARNING, ERROR or CRITICAL",
        ),
        ("DEBUG", &["*", "maybe"], "expected true, false, 1, 0, yes or no"),
        ("HOST", &["example.com", "0.0.0.0:80", "256.0.0.1"], "expected an IP address or `localhost`"),
        ("PORT", &["65536", "-1", "http", "80.0"], "is not a port number from 0 to 65535"),
        ("METRICS_PORT", &["off", "tcp://10.0.0.1:9090"], "is not a port number from 0 to 65535"),
        ("METRICS_PORT", &["8000"], "is also PORT"),
        (
            "ALLOWED_HOSTS",
            &[
                "https://a.example",
                "a.example/mcp",
                "*.example.com",
                "a b",
                "a:b",
                "a:0",
                "a:",
                "[::1",
                "[::1]8000",
                "[nope]",
                "a..b",
                "a..",
                ".",
                "300.1.1.1",
                "ü.example",
            ],
            "expected `host`, `host:port`",
        ),
        ("ALLOWED_HOSTS", &["*,localhost"], "stands alone or not at all"),
        ("ALLOWED_ORIGINS", &["*"], "any web site"),
        ("ALLOWED_ORIGINS", &["null", "NULL"], "identifies nobody"),
        (
            "ALLOWED_ORIGINS",
            &[
                "app.example.com",
                "https://a/b",
                "https://a?b",
                "https://*.example.com",
                "https://u@a",
                "https://",
                "x-y://",
                "1x://a",
                "vscode-webview://a/b",
                "https://a b",
            ],
            "is not an origin",
        ),
        ("TRUSTED_PROXIES", &["10.0.0.0/33", "proxy", "10.0.0.0/8/8", "10.0.0.1:80"], "is not a network"),
        ("TRUSTED_PROXIES", &["0.0.0.0/0", "::/0"], "would believe every client"),
        ("RATE_LIMIT_PER_CALLER", &["-1", "10001", "1e-9", "NaN"], "is neither 0 nor a number from 0.001 to 10000"),
        ("RATE_LIMIT_PER_ADDRESS", &["-1", "inf"], "is neither 0 nor a number from 0.001 to 10000"),
        ("RATE_LIMIT_REFUSED_TOKENS", &["-1", "10001"], "is neither 0 nor a number from 0.001 to 10000"),
        ("RATE_LIMIT_BURST", &["0", "65537"], "is not a whole number from 1 to 65536"),
        ("MAX_IN_FLIGHT_PER_CALLER", &["-1", "65537"], "is not a whole number from 0 to 65536"),
        ("BACKEND_AUTH", &["user", "obo"], "expected `server` or `on-behalf-of`"),
        ("BACKEND_AUTH", &["on-behalf-of"], "without INBOUND_AUTH=entra there is none"),
        ("OBO_APP_FALLBACK", &["true"], "has no meaning unless BACKEND_AUTH is `on-behalf-of`"),
        ("OBO_APP_FALLBACK", &["perhaps"], "expected true, false, 1, 0, yes or no"),
        ("FORWARD_CALLER", &["true"], "unless INBOUND_AUTH is `entra`"),
        ("FORWARD_CALLER", &["perhaps"], "expected true, false, 1, 0, yes or no"),
        ("MAX_REQUEST_BYTES", &["0", "96K"], "is not a whole number from 1024 to 67108864"),
        ("MAX_CONNECTIONS", &["0", "65537", "many"], "is not a whole number from 1 to 65536"),
        ("MAX_IN_FLIGHT", &["0"], "is not a whole number from 1 to 65536"),
        ("MAX_IN_FLIGHT_PER_TOOL", &["0"], "is not a whole number from 1 to 65536"),
        ("BACKEND_MAX_CONCURRENCY", &["0"], "is not a whole number from 1 to 65536"),
        ("BACKEND_MAX_ATTEMPTS", &["0", "11"], "is not a whole number from 1 to 10"),
        ("BACKEND_RETRY_PERCENT", &["-1", "101"], "is not a whole number from 0 to 100"),
        ("BACKEND_RETRY_FLOOR", &["-1", "10001"], "is not a whole number from 0 to 10000"),
        ("BACKEND_CIRCUIT_BREAKER", &["maybe"], "expected true, false, 1, 0, yes or no"),
        ("BACKEND_IDEMPOTENT_CREATES", &["maybe"], "expected true, false, 1, 0, yes or no"),
        ("REQUEST_HEADER_TIMEOUT", &["0"], "above 0"),
        ("REQUEST_BODY_TIMEOUT", &["0", "-1", "ten"], "above 0"),
        ("KEEP_ALIVE_TIMEOUT", &["-0"], "above 0"),
        ("RESPONSE_WRITE_TIMEOUT", &["0"], "above 0"),
        ("DRAIN_DELAY", &["-1", "soon"], "is not a number of seconds from 0 to 86400"),
        ("DRAIN_DELAY", &["25.5"], "is longer than SHUTDOWN_GRACE, of which it is a part; expected at most 25"),
        ("SHUTDOWN_GRACE", &["0", "forever"], "above 0"),
    ];
    for (name, values, accepted) in rows {
        for value in *values {
            let found = mistakes(&[(name, value)]);
            let [mistake] = found.as_slice() else { panic!("{name}={value:?} made {found:?}") };
            assert!(mistake.starts_with(&format!("{name}: `")) && mistake.contains(accepted), "{value:?}: {mistake}");
        }
    }
}

#[test]
fn all_mistakes_are_reported_at_once_one_to_a_line() {
    let error = Settings::read_with(
        &BTreeMap::from(
            [("PORT", "http"), ("BACKEND_API_TIMEOUT", "-1"), ("ALLOWED_HOSTS", "a/b,ok,c d")]
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        ),
        |_| false,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "8 mistakes in the settings:\n  \
         AZURE_TENANT_ID: is required, but not set\n  \
         AZURE_CLIENT_ID: is required, but not set\n  \
         AZURE_FEDERATED_TOKEN_FILE or AZURE_CLIENT_SECRET: there is no credential: workload identity needs a federated \
         token file, but `/var/run/secrets/azure/tokens/token` does not exist and AZURE_FEDERATED_TOKEN_FILE is not set; \
         a client secret needs AZURE_CLIENT_SECRET, which is not set\n  \
         BACKEND_API_URL: is required, but not set\n  \
         BACKEND_API_TIMEOUT: `-1` is not a number of seconds above 0 and up to 86400\n  \
         ALLOWED_HOSTS: `a/b` is not a host; expected `host`, `host:port`, `[IPv6]` or `[IPv6]:port`, or `*` alone\n  \
         ALLOWED_HOSTS: `c d` is not a host; expected `host`, `host:port`, `[IPv6]` or `[IPv6]:port`, or `*` alone\n  \
         PORT: `http` is not a port number from 0 to 65535"
    );
}

#[test]
fn combinations_that_cannot_work_name_both_variables() {
    assert_eq!(mistakes(&[("PORT", "0"), ("METRICS_PORT", "0")]), [""; 0]);
    for (extra, both) in [
        ([("PORT", "9090"), ("METRICS_PORT", "")], ["METRICS_PORT", "PORT"]),
        ([("DRAIN_DELAY", "5"), ("SHUTDOWN_GRACE", "3")], ["DRAIN_DELAY", "SHUTDOWN_GRACE"]),
        ([("AZURE_SCOPES", "api://one/.default,api://two/.default"), ("DEBUG", "")], ["AZURE_SCOPES", "api://two"]),
    ] {
        let found = mistakes(&extra);
        assert!(found.len() == 1 && both.iter().all(|name| found[0].contains(name)), "{found:?}");
    }
}

#[test]
fn what_needs_to_know_the_caller_works_where_callers_have_to_say_who_they_are() {
    for (extra, auth, forward) in [
        (&[][..], BackendAuth::Server, false),
        (&[("BACKEND_AUTH", "on-behalf-of")], BackendAuth::OnBehalfOf { app_fallback: false }, false),
        (
            &[("BACKEND_AUTH", "ON-BEHALF-OF"), ("OBO_APP_FALLBACK", "yes")],
            BackendAuth::OnBehalfOf { app_fallback: true },
            false,
        ),
        (&[("FORWARD_CALLER", "1")], BackendAuth::Server, true),
    ] {
        let mut vars = vars(extra);
        vars.insert("INBOUND_AUTH".to_owned(), "entra".to_owned());
        let mut reader = Reader::new(&vars);
        let backend = backend(&mut reader, Url::parse("http://127.0.0.1").ok()).unwrap();
        assert_eq!((backend.auth, backend.forward_caller), (auth, forward), "{extra:?}");
        assert!(reader.finish(Some(())).is_ok());
    }
}

#[test]
fn tokens_are_exchanged_by_the_app_that_they_are_for() {
    let other = "00000000-7777-8888-9999-000000000000";
    let both = format!("{other},{CLIENT}");
    let uri = format!("{other},https://mcp.example.com/mcp");
    for (audience, auth, good) in [
        (CLIENT, "on-behalf-of", true),
        (&both, "on-behalf-of", true),
        (&uri, "on-behalf-of", true),
        (other, "on-behalf-of", false),
        (other, "server", true),
    ] {
        let mistakes = mistakes(&[
            ("INBOUND_AUTH", "entra"),
            ("INBOUND_AUDIENCE", audience),
            ("PUBLIC_URL", "https://mcp.example.com/mcp"),
            ("BACKEND_AUTH", auth),
        ]);
        assert_eq!(mistakes.is_empty(), good, "{audience}: {mistakes:?}");
        assert!(
            mistakes.iter().all(|mistake| mistake.contains("AZURE_CLIENT_ID") && mistake.contains("INBOUND_AUDIENCE"))
        );
    }
}

#[test]
fn identity_bindings_are_refused() {
    for name in ["TOKEN_PROXY", "SNI_NAME", "CA_FILE", "CA_DATA"].map(|end| format!("AZURE_KUBERNETES_{end}")) {
        let found = mistakes(&[(&name, "something")]);
        assert!(found.len() == 1 && found[0].starts_with(&name), "{found:?}");
        assert!(found[0].contains("identity bindings") && !found[0].contains("something"), "{found:?}");
    }
}

#[test]
fn the_credential_follows_the_existence_of_the_token_file() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path().join("token").display().to_string();
    std::fs::write(&there, "").unwrap();
    let missing = directory.path().join("missing").display().to_string();

    let settings = Settings::read(&vars(&[("AZURE_FEDERATED_TOKEN_FILE", &there)])).unwrap();
    assert_eq!(settings.identity.credential.token_file(), Some(Path::new(&there)));
    assert_eq!(
        settings.identity.summary(),
        format!(
            "workload identity with the token file `{there}`, client `{CLIENT}`, tenant `{TENANT}`, \
             authority `https://login.microsoftonline.com/`"
        )
    );

    let settings = Settings::read(&vars(&[("AZURE_FEDERATED_TOKEN_FILE", &missing)])).unwrap();
    let Credential::ClientSecret { secret } = &settings.identity.credential else { panic!("{settings:?}") };
    assert_eq!(secret.expose_secret(), SECRET);
    assert!(settings.warnings.iter().any(|warning| warning.contains(&missing)), "{:?}", settings.warnings);

    let found = mistakes(&[("AZURE_FEDERATED_TOKEN_FILE", &missing), ("AZURE_CLIENT_SECRET", " ")]);
    assert!(found.len() == 1 && found[0].contains(&missing) && found[0].contains("AZURE_CLIENT_SECRET"), "{found:?}");
}

#[test]
fn an_empty_token_file_variable_means_the_built_in_path() {
    let vars = vars(&[("AZURE_FEDERATED_TOKEN_FILE", ""), ("AZURE_CLIENT_SECRET", "")]);
    let settings = Settings::read_with(&vars, |path| path == Path::new(BUILT_IN_TOKEN_FILE)).unwrap();
    assert_eq!(settings.identity.credential.token_file(), Some(Path::new(BUILT_IN_TOKEN_FILE)));
}

#[test]
fn what_is_legal_but_unwise_gets_a_warning() {
    let wise = [("AZURE_SCOPES", "api://app/.default"), ("BACKEND_API_URL", "https://backend"), ("HOST", "127.0.0.1")];
    for (extra, warned) in [
        ([].as_slice(), None),
        (&[("BACKEND_API_URL", "http://localhost:9000")], None),
        (&[("BACKEND_API_URL", "http://127.8.8.8")], None),
        (&[("BACKEND_API_URL", "http://[::1]:80")], None),
        (&[("BACKEND_API_URL", "http://backend.internal/v1")], Some("plain http to `backend.internal`")),
        (&[("AZURE_SCOPES", "")], Some("api://<backend-app-id>/.default")),
        (&[("ALLOWED_HOSTS", "*")], Some("DNS rebinding")),
        (&[("BACKEND_MAX_CONCURRENCY", "10")], None),
        (&[("BACKEND_MAX_CONCURRENCY", "2000")], Some("MAX_IN_FLIGHT is 768")),
        (&[("MAX_IN_FLIGHT", "512")], Some("MAX_IN_FLIGHT_PER_TOOL is 512")),
        (&[("MAX_IN_FLIGHT_PER_TOOL", "10"), ("BACKEND_MAX_CONCURRENCY", "10")], Some("BACKEND_MAX_CONCURRENCY is 10")),
    ] {
        let warnings = read(&[wise.as_slice(), extra].concat()).unwrap().warnings;
        assert_eq!(warnings.len(), usize::from(warned.is_some()), "{extra:?}: {warnings:?}");
        assert!(warned.is_none_or(|part| warnings[0].contains(part) && warnings[0].ends_with('.')), "{warnings:?}");
    }
}

#[test]
fn no_secret_is_ever_shown() {
    let settings = read(&[]).unwrap();
    assert!(!format!("{settings:?} {settings:#?} {}", settings.identity.summary()).contains(SECRET));

    let entra_like = "a1B8Q~abcdefghijklmnopqrstuvwxyz0123456";
    let token = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl";
    let long = "x".repeat(500);
    let found = mistakes(&[
        ("AZURE_CLIENT_ID", entra_like),
        ("AZURE_FEDERATED_TOKEN_FILE", token),
        ("BACKEND_API_URL", "https://user:hunter2@backend/?sig=hunter3"),
        ("AZURE_AUTHORITY_HOST", "https://login.example/?code=hunter4"),
        ("HOST", "two\nlines"),
        ("PORT", &long),
    ])
    .join("\n");
    for hidden in [SECRET, entra_like, token, "hunter", &long] {
        assert!(!found.contains(hidden), "{hidden}: {found}");
    }
    assert_eq!(found.lines().count(), 6, "{found}");
    assert!(found.contains("`…@backend/?…`") && found.contains("`https://login.example/?…`"), "{found}");
}

#[test]
fn a_secret_in_another_variable_is_one_mistake_there_and_never_shown() {
    let guid_like = "12345678-90AB-cdef-1234-567890abcdef";
    for (secret, name, value, shown) in [
        ("canary-of-it", "AZURE_CLIENT_ID", "canary-of-it", false),
        ("canary-of-it", "AZURE_TENANT_ID", "canary-of-it", false),
        ("canary-of-it", "AZURE_TENANT_ID", "canary-of-it.example", false),
        ("canary-of-it", "AZURE_SCOPES", "api://canary-of-it/.default", false),
        ("canary-of-it", "AZURE_SCOPES", "api://a/.default,api://canary-of-it/.default", false),
        ("canary-of-it", "BACKEND_API_URL", "https://backend.example/canary-of-it", false),
        ("canary-of-it", "AZURE_FEDERATED_TOKEN_FILE", "/run/canary-of-it", false),
        (SECRET, "AZURE_CLIENT_ID", "kEx.8_3hKq9LmNoPqRsTuVwXyZ012345ab", false),
        (SECRET, "AZURE_CLIENT_ID", "q3J/8hKq9LmNoPq+RsTuVwXyZ012345abc=", false),
        (SECRET, "AZURE_SCOPES", "a1B8Q~abcdefghijklmnopqrstuvwxyz0123456/.default", false),
        (SECRET, "AZURE_TENANT_ID", "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", false),
        // What is only wrong is shown.
        (SECRET, "AZURE_CLIENT_ID", "12345678-90ab-cdef-1234-567890abcdeg", true),
        (SECRET, "AZURE_CLIENT_ID", &guid_like[1..], true),
        (SECRET, "AZURE_TENANT_ID", "contoso2026", true),
        (SECRET, "AZURE_SCOPES", "api://my-backend-app-of-2026", true),
        (SECRET, "ALLOWED_HOSTS", "mcp-server.mcp-system.svc.cluster.local:http", true),
    ] {
        let found = mistakes(&[("AZURE_CLIENT_SECRET", secret), (name, value)]);
        let of_it: Vec<_> = found.iter().filter(|mistake| mistake.starts_with(&format!("{name}: "))).collect();
        assert_eq!((found.len(), of_it.len()), (1, 1), "{name}={value}: {found:?}");
        assert_eq!(found[0].contains(value), shown, "{found:?}");
        assert!(shown || (found[0].contains("not shown") && !found[0].contains("canary")), "{found:?}");
    }
    // A short secret may be part of anything.
    assert_eq!(mistakes(&[("AZURE_CLIENT_SECRET", "https")]), [""; 0]);
}

#[cfg(unix)]
#[test]
fn a_value_that_is_not_unicode_is_one_mistake() {
    use std::os::unix::ffi::OsStringExt;

    let environment = Environment::new(
        |name| {
            matches!(name, "PORT" | "AZURE_TENANT_ID" | "AZURE_CLIENT_SECRET").then(|| OsString::from_vec(vec![0xff]))
        },
        EnvFile::parse(format!("AZURE_CLIENT_ID={CLIENT}\nBACKEND_API_URL=https://backend\nPORT=80").as_bytes()),
    );
    let error = Settings::read_with(&environment, |_| true).unwrap_err().to_string();
    for name in ["PORT", "AZURE_TENANT_ID", "AZURE_CLIENT_SECRET"] {
        assert!(error.contains(&format!("{name}: is not Unicode text")), "{error}");
    }
    assert_eq!(error.lines().count(), 4, "{error}");
}

#[test]
fn the_process_wins_over_the_file_unless_it_is_empty() {
    let file = format!(
        "\u{feff}# a comment\nAZURE_TENANT_ID={TENANT}\nexport AZURE_CLIENT_ID={CLIENT} # mine\r\n\
         AZURE_CLIENT_SECRET='a $ecret # with blanks'\nBACKEND_API_URL=\"https://backend\"\n\
         PORT=7000\nMETRICS_PORT=7001\nMAX_CONNECTIONS=7\nHTTPS_PROXY=http://from-file  "
    );
    let environment = Environment::new(
        |name| match name {
            "PORT" => Some("8001".into()),
            "METRICS_PORT" => Some(" ".into()),
            "HTTPS_PROXY" => Some("http://from-process".into()),
            _ => None,
        },
        EnvFile::parse(file.as_bytes()),
    );
    let settings = Settings::read_with(&environment, |_| false).unwrap();
    assert_eq!((settings.web.port, settings.web.metrics_port, settings.web.max_connections), (8001, Some(7001), 7));
    let Credential::ClientSecret { secret } = &settings.identity.credential else { panic!("{settings:?}") };
    assert_eq!(secret.expose_secret(), "a $ecret # with blanks");
    assert!(!format!("{environment:?}").contains("ecret #"));
}

#[test]
fn broken_lines_of_the_file_are_named_by_number_and_never_shown() {
    for (file, lines) in [
        ("PORT=80\nhunter2\nDEBUG=1\n\nhunter2 hunter2", vec![".env line 2", ".env line 5"]),
        ("# one\n\nAZURE_CLIENT_SECRET=hunter2 hunter2\n", vec![".env line 3"]),
        ("PORT=80\nAZURE_CLIENT_SECRET='hunter2\nDEBUG=1\nHOST=::", vec![".env line 2"]),
        ("A='two\nlines'\nhunter2", vec![".env line 3"]),
        ("DEBUG=1\nA='two\nlines' hunter2\nPORT=80\nhunter2 # comment\n\n", vec![".env line 2", ".env line 5"]),
    ] {
        let mistakes = Environment::new(|_| None, EnvFile::parse(file.as_bytes())).mistakes();
        let places: Vec<&str> = mistakes.iter().map(|mistake| mistake.variable.as_str()).collect();
        assert_eq!(places, lines, "{file}");
        assert!(!format!("{mistakes:?}").contains("hunter2"), "{mistakes:?}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_a_mistake_and_a_missing_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let mistakes = |file| Environment::new(|_| None, file).mistakes();
    assert!(mistakes(EnvFile::open(&directory.path().join(".env"))).is_empty());
    assert_eq!(mistakes(EnvFile::open(directory.path()))[0].variable, ".env");
    assert_eq!(mistakes(EnvFile::parse(b"PORT=\xff"))[0].problem, "is not UTF-8 text");
}

#[test]
fn what_only_libraries_read_is_refused_in_the_file() {
    for variable in LIBRARY_VARIABLES {
        let file = EnvFile::parse(format!("{}=something", variable.name).as_bytes());
        let mistakes = Environment::new(|_| None, file).mistakes();
        assert!(mistakes.len() == 1 && mistakes[0].variable == variable.name, "{mistakes:?}");
    }
}

/// Remembers what it was asked.
struct Recorder(BTreeMap<String, String>, RefCell<BTreeSet<String>>);

impl Vars for Recorder {
    fn get(&self, name: &str) -> Option<OsString> {
        self.1.borrow_mut().insert(name.to_owned());
        Vars::get(&self.0, name)
    }
}

#[test]
fn the_table_holds_exactly_the_variables_that_are_read() {
    let recorder = Recorder(vars(&[]), RefCell::default());
    Settings::read_with(&recorder, |_| false).unwrap();
    let read: BTreeSet<String> = recorder
        .1
        .take()
        .into_iter()
        .filter(|name| !name.starts_with("AZURE_KUBERNETES_") && *name == name.to_uppercase())
        .collect();
    // Of those of the libraries NO_PROXY alone can hold nothing that is wrong.
    let of_libraries = LIBRARY_VARIABLES.iter().filter(|variable| variable.name != "NO_PROXY");
    assert_eq!(read, VARIABLES.iter().chain(of_libraries).map(|variable| variable.name.to_owned()).collect());
}

#[test]
fn the_table_tells_the_truth_about_defaults_and_requirements() {
    let unset = format!("{:?}", read(&[]).unwrap());
    for variable in VARIABLES {
        let missing = !mistakes(&[(variable.name, " ")]).is_empty();
        // The client secret is the only credential here.
        assert_eq!(missing, variable.required || variable.name == "AZURE_CLIENT_SECRET", "{}", variable.name);
        // Naming the built-in token file asks for it, which is worth a warning where it is missing.
        if let Some(default) = variable.default.filter(|_| variable.name != "AZURE_FEDERATED_TOKEN_FILE") {
            assert_eq!(format!("{:?}", read(&[(variable.name, default)]).unwrap()), unset, "{}", variable.name);
        }
        assert!(variable.meaning.ends_with('.') && !variable.meaning.contains('\n'), "{}", variable.name);
    }
    let token_file = VARIABLES.iter().find(|variable| variable.name == "AZURE_FEDERATED_TOKEN_FILE").unwrap();
    assert_eq!(token_file.default, Some(BUILT_IN_TOKEN_FILE));

    let settings = read(&[]).unwrap();
    assert_eq!(format!("{:?}", settings.web), format!("{:?}", WebSettings::default()));
    assert_eq!(format!("{:?}", settings.log), format!("{:?}", LogSettings::default()));
    assert_eq!(
        format!("{:?}", settings.backend),
        format!("{:?}", BackendSettings::new(settings.backend.base_url.clone()))
    );
}

#[test]
fn the_example_file_is_the_table() {
    let example = include_str!("../../.env.example");
    // A paragraph that ends in `NAME=value`, commented out or not, declares a variable; its comment is the meaning.
    let declared: Vec<(String, String, String, bool)> = example
        .split("\n\n")
        .filter_map(|paragraph| {
            let (comment, last) = paragraph.trim_end().rsplit_once('\n')?;
            let (name, value) = last.trim_start_matches('#').split_once('=')?;
            let meaning: Vec<&str> = comment.lines().map(|line| line.trim_start_matches("# ")).collect();
            Some((name.to_owned(), value.to_owned(), meaning.join(" "), !last.starts_with('#')))
        })
        .collect();
    let table: Vec<(String, String, String, bool)> = VARIABLES
        .iter()
        .chain(LIBRARY_VARIABLES)
        .map(|variable| {
            let default = variable.default.unwrap_or_default().to_owned();
            (variable.name.to_owned(), default, variable.meaning.to_owned(), variable.required)
        })
        .collect();
    assert_eq!(declared, table);
}

#[test]
fn the_example_file_with_every_line_switched_on_gives_the_defaults() {
    let filled: String = include_str!("../../.env.example")
        .lines()
        .map(|line| line.trim_start_matches('#'))
        .filter(|line| !line.starts_with(' '))
        .map(|line| match line {
            "AZURE_TENANT_ID=" => format!("{line}{TENANT}\n"),
            "AZURE_CLIENT_ID=" => format!("{line}{CLIENT}\n"),
            "BACKEND_API_URL=" => format!("{line}https://backend.internal\n"),
            other => format!("{other}\n"),
        })
        .collect();
    let environment = Environment::new(|_| None, EnvFile::parse(filled.as_bytes()));
    let settings = Settings::read_with(&environment, |_| true).unwrap();
    let defaults = Settings::read_with(&vars(&[("AZURE_CLIENT_SECRET", "")]), |_| true).unwrap();
    assert_eq!(format!("{settings:?}"), format!("{defaults:?}"));
}

#[test]
fn the_demo_brings_its_identity_and_stays_on_loopback() {
    let identity = read(&[]).unwrap().identity;
    let backend = Url::parse("http://127.0.0.1:4000/").unwrap();
    let vars = BTreeMap::from(
        [
            ("HOST", "0.0.0.0"),
            ("ALLOWED_HOSTS", "*"),
            ("AZURE_TENANT_ID", ".."),
            ("BACKEND_API_URL", "ftp://x"),
            ("PORT", "0"),
            ("METRICS_PORT", "0"),
            ("DEBUG", "yes"),
            ("LOG_LEVEL", "ERROR"),
            ("BACKEND_API_TIMEOUT", "3"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    let settings = Settings::for_demo(&vars, identity.clone(), backend.clone(), None).unwrap();
    assert_eq!(settings.web.host.to_string(), "127.0.0.1");
    assert_eq!((settings.web.port, settings.web.metrics_port), (0, None));
    assert_eq!(settings.web.allowed_hosts, WebSettings::default().allowed_hosts);
    assert_eq!((settings.log.filter.as_str(), settings.log.debug), ("error", true));
    assert_eq!(
        (settings.backend.base_url.as_str(), settings.backend.timeout),
        (backend.as_str(), Duration::from_secs(3))
    );
    assert!(settings.warnings.is_empty());

    let wrong = BTreeMap::from([("PORT".to_owned(), "x".to_owned())]);
    assert_eq!(
        Settings::for_demo(&wrong, identity.clone(), backend.clone(), Some(API)).unwrap_err().mistakes().len(),
        1
    );

    // Whose callers need tokens is known by its URL.
    for (name, value, url) in [
        ("PORT", "8123", Some("http://127.0.0.1:8123/mcp")),
        ("PUBLIC_URL", "https://demo.example/mcp", Some("https://demo.example/mcp")),
        ("PORT", "0", None),
    ] {
        let vars = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let settings = Settings::for_demo(&vars, identity.clone(), backend.clone(), Some(API));
        match (settings.map(|settings| settings.inbound), url) {
            (Ok(InboundAuth::Entra(inbound)), Some(url)) => assert_eq!(inbound.public_url.as_str(), url),
            (Err(error), None) => assert!(error.to_string().contains("PORT: `0` lets the system choose"), "{error}"),
            (settings, _) => panic!("{name}={value}: {settings:?}"),
        }
    }
}

#[test]
fn the_health_check_asks_where_the_server_listens() {
    let address = |pairs: &[(&str, &str)]| {
        let vars: BTreeMap<String, String> =
            pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        healthcheck_address(&vars).map(|address| address.to_string()).map_err(|error| error.mistakes().len())
    };
    assert_eq!(address(&[]), Ok("127.0.0.1:8000".to_owned()));
    assert_eq!(address(&[("HOST", "::"), ("PORT", "81")]), Ok("[::1]:81".to_owned()));
    assert_eq!(address(&[("HOST", "10.1.2.3")]), Ok("10.1.2.3:8000".to_owned()));
    assert_eq!(address(&[("PORT", "0")]), Err(1));
    assert_eq!(address(&[("HOST", "nowhere"), ("PORT", "x")]), Err(2));
}

#[test]
fn a_pod_is_recognised() {
    assert!(!in_kubernetes(&vars(&[])));
    assert!(in_kubernetes(&vars(&[("KUBERNETES_SERVICE_HOST", "10.0.0.1")])));
}

const API: &str = "AAAAAAAA-0000-4000-8000-00000000000A";
/// All that `INBOUND_AUTH=entra` cannot do without.
const ENTRA: [(&str, &str); 3] =
    [("INBOUND_AUTH", "Entra"), ("INBOUND_AUDIENCE", API), ("PUBLIC_URL", "https://localhost/mcp")];

fn with_entra(extra: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    ENTRA.iter().chain(extra).copied().collect()
}

fn entra(extra: &[(&'static str, &'static str)]) -> (EntraInbound, Vec<String>) {
    let settings = read(&with_entra(extra)).unwrap();
    match settings.inbound {
        InboundAuth::Entra(inbound) => (*inbound, settings.warnings),
        InboundAuth::None => panic!("no door"),
    }
}

#[test]
fn inbound_authorization_needs_an_audience_and_a_url_and_knows_the_rest() {
    let (inbound, warnings) = entra(&[]);
    assert_eq!(inbound.client_ids, [API.to_ascii_lowercase()]);
    assert_eq!((inbound.tenants, inbound.clients.len(), inbound.app_id_uris.len()), (vec![TENANT.to_owned()], 0, 0));
    assert_eq!(inbound.public_url.as_str(), "https://localhost/mcp");
    assert_eq!((inbound.scopes, inbound.roles), (PermissionNames::default(), PermissionNames::default()));
    assert!(!warnings.iter().any(|warning| warning.contains("INBOUND") || warning.contains("PUBLIC")), "{warnings:?}");

    let other = "BBBBBBBB-0000-4000-8000-00000000000B";
    let (inbound, warnings) = entra(&[
        ("INBOUND_AUDIENCE", "api://mine, https://mcp.example.com/mcp"),
        ("INBOUND_TENANTS", other),
        ("INBOUND_CLIENTS", other),
        ("INBOUND_SCOPE_NAMES", "users.read=Users.Read, tickets.write = access_as_user"),
        ("INBOUND_ROLE_NAMES", "data.read=Data.Read.All"),
        ("PUBLIC_URL", "https://mcp.example.com/mcp"),
    ]);
    assert_eq!((inbound.client_ids.len(), &*inbound.app_id_uris[1]), (0, "https://mcp.example.com/mcp"));
    assert_eq!((&inbound.tenants[0], &inbound.clients[0]), (&other.to_lowercase(), &other.to_lowercase()));
    let names: Vec<_> = inbound.scopes.iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["Users.Read", "tickets.read", "access_as_user", "data.read"]);
    assert_eq!(inbound.roles.of(Permission::DataRead), "Data.Read.All");
    for beginning in ["INBOUND_AUDIENCE names no client id", "PUBLIC_URL is on `mcp.example.com`, which ALLOWED_HOSTS"]
    {
        assert!(warnings.iter().any(|warning| warning.starts_with(beginning)), "{warnings:?}");
    }
    let (_, warnings) =
        entra(&[("ALLOWED_HOSTS", "mcp.example.com:443"), ("PUBLIC_URL", "https://mcp.example.com/mcp")]);
    assert!(!warnings.iter().any(|warning| warning.contains("PUBLIC_URL")), "{warnings:?}");
}

#[test]
fn an_open_door_is_told_of_unless_only_this_machine_can_reach_it() {
    for (host, told) in [("", true), ("10.0.0.1", true), ("127.0.0.1", false), ("::1", false)] {
        let warnings = read(&[("HOST", host)]).unwrap().warnings;
        assert_eq!(warnings.iter().any(|text| text.starts_with("INBOUND_AUTH is `none`")), told, "{host} {warnings:?}");
    }
}

#[test]
fn half_an_authorization_is_a_mistake_and_never_an_open_door() {
    for (extra, expected) in [
        (&[("INBOUND_AUTH", "entra")][..], &["INBOUND_AUDIENCE: is required", "PUBLIC_URL: is required"][..]),
        (&with_entra(&[("INBOUND_AUDIENCE", "")]), &["INBOUND_AUDIENCE: is required with INBOUND_AUTH=entra"]),
        (&with_entra(&[("INBOUND_AUDIENCE", ",")]), &["INBOUND_AUDIENCE: is required with INBOUND_AUTH=entra"]),
        (&with_entra(&[("PUBLIC_URL", "")]), &["PUBLIC_URL: is required with INBOUND_AUTH=entra"]),
        (
            &with_entra(&[("AZURE_TENANT_ID", "contoso.example")]),
            &["INBOUND_TENANTS: is required when AZURE_TENANT_ID"],
        ),
        (&with_entra(&[("INBOUND_AUTH", "off")]), &["INBOUND_AUTH: `off` is no kind of inbound authorization"]),
        (&with_entra(&[("INBOUND_AUTH", "")]), &["INBOUND_AUDIENCE: is set, but INBOUND_AUTH is not `entra`"]),
        (&[("INBOUND_AUTH", "none"), ("INBOUND_AUDIENCE", API)], &["INBOUND_AUDIENCE: is set, but"]),
        (&[("INBOUND_TENANTS", TENANT)], &["INBOUND_TENANTS: is set, but"]),
        (&[("INBOUND_CLIENTS", CLIENT)], &["INBOUND_CLIENTS: is set, but"]),
        (&[("INBOUND_SCOPE_NAMES", "users.read=x")], &["INBOUND_SCOPE_NAMES: is set, but"]),
        (&[("INBOUND_ROLE_NAMES", "users.read=x")], &["INBOUND_ROLE_NAMES: is set, but"]),
        (&[("ENABLED_TOOLS", "create_ticket"), ("READ_ONLY", "yes")], &["ENABLED_TOOLS: lists only tools that"]),
    ] {
        let found = mistakes(extra);
        assert_eq!(found.len(), expected.len(), "{extra:?}: {found:?}");
        for (mistake, beginning) in found.iter().zip(expected) {
            assert!(mistake.starts_with(beginning), "{extra:?}: {mistake}");
        }
    }
    for (name, values, accepted) in [
        (
            "INBOUND_AUDIENCE",
            &["my-api", "api://", "://x", "api://a b", "api://a\"b"][..],
            "expected the API's client id",
        ),
        ("INBOUND_TENANTS", &["contoso.example", "common", "*"], "is not a tenant's GUID"),
        ("INBOUND_CLIENTS", &["vscode"], "expected a GUID"),
        (
            "INBOUND_SCOPE_NAMES",
            &["users.read", "users.read=", "read=x", "users.read=a b", "users.read=a\"b"],
            "is not `permission=name`",
        ),
        ("PUBLIC_URL", &["http://mcp.example.com/mcp"], "is plain http"),
        (
            "PUBLIC_URL",
            &["https://mcp.example.com", "https://mcp.example.com/", "https://a.example/mcp/"],
            "has no path",
        ),
        (
            "PUBLIC_URL",
            &["https://MCP.example.com/mcp", "https://a.example:443/mcp", "https://a.example/x/../mcp"],
            "is not in its normal form",
        ),
        (
            "PUBLIC_URL",
            &["https://a.example/:x/mcp", "https://a.example/*", "https://a.example/a%20b"],
            "unusual characters",
        ),
        ("PUBLIC_URL", &["mcp.example.com/mcp", "ftp://a/mcp"], "is not an absolute https or http URL"),
        ("ENABLED_TOOLS", &["drop_table", "List_Users"], "is no tool; expected some of create_ticket"),
        ("READ_ONLY", &["perhaps"], "expected true, false"),
    ] {
        for value in values {
            let found = mistakes(&[(name, value)]);
            let [mistake] = found.as_slice() else { panic!("{name}={value:?} made {found:?}") };
            assert!(mistake.starts_with(&format!("{name}: `")) && mistake.contains(accepted), "{value:?}: {mistake}");
        }
    }
}

#[test]
fn tools_can_be_switched_off() {
    let left = |extra: &[(&str, &str)]| {
        let tools = read(extra).unwrap().tools;
        TOOLS.into_iter().filter(|tool| tools.allows(tool, WRITING_TOOLS.contains(tool))).collect::<Vec<_>>()
    };
    assert_eq!(left(&[]), TOOLS);
    assert_eq!(left(&[("READ_ONLY", "true")]), TOOLS[1..]);
    assert_eq!(left(&[("ENABLED_TOOLS", "list_users, create_ticket,")]), ["create_ticket", "list_users"]);
    assert_eq!(left(&[("ENABLED_TOOLS", "list_users,create_ticket"), ("READ_ONLY", "1")]), ["list_users"]);
}

#[test]
fn traces_are_off_unless_there_is_an_endpoint_and_the_standard_variables_shape_them() {
    let traces = |extra: &[(&str, &str)]| read(extra).unwrap().telemetry.traces;
    assert!(traces(&[]).is_none());
    assert!(traces(&[("OTEL_SERVICE_NAME", "x"), ("OTEL_TRACES_SAMPLER", "always_on")]).is_none());
    let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318/");
    assert!(traces(&[base, ("OTEL_SDK_DISABLED", "true")]).is_none());

    let defaults = traces(&[base]).unwrap();
    assert_eq!(defaults.endpoint.as_str(), "http://localhost:4318/v1/traces");
    assert_eq!(defaults.resource, [("service.name".to_owned(), "mcp-server".to_owned())]);
    assert_eq!((defaults.timeout, defaults.schedule_delay), (Duration::from_secs(10), Duration::from_secs(5)));
    assert_eq!((defaults.max_queue, defaults.max_batch), (2_048, 512));
    for (endpoints, expected) in [
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector/otlp")][..], "https://collector/otlp/v1/traces"),
        (&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://collector/own/path")], "https://collector/own/path"),
        (&[base, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://other/t")], "https://other/t"),
    ] {
        assert_eq!(traces(endpoints).unwrap().endpoint.as_str(), expected);
    }
    for (sampler, parent_based, root) in [
        ("", true, RootSampler::All),
        ("always_on", false, RootSampler::All),
        ("always_off", false, RootSampler::None),
        ("traceidratio", false, RootSampler::Share(0.25)),
        ("parentbased_always_on", true, RootSampler::All),
        ("parentbased_always_off", true, RootSampler::None),
        ("parentbased_traceidratio", true, RootSampler::Share(0.25)),
    ] {
        let traces = traces(&[base, ("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", "0.25")]).unwrap();
        assert_eq!(traces.sampling, Sampling { parent_based, root }, "{sampler}");
    }
    let shaped = traces(&[
        base,
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=canary%20key, x=y"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=1%2C2,service.name=loses"),
        ("OTEL_SERVICE_NAME", "wins"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "250"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "7"),
    ])
    .unwrap();
    assert_eq!(shaped.headers["api-key"], "canary key");
    assert!(!format!("{shaped:?}").contains("canary"), "{shaped:?}");
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(shaped.resource, [pair("a", "1,2"), pair("service.name", "wins")]);
    assert_eq!((shaped.timeout, shaped.max_queue), (Duration::from_millis(250), 7));

    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "canary-without-a-value"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "bad name=canary"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=%ff"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
    ] {
        let told = mistakes(&[(name, value)]);
        assert!(matches!(told.as_slice(), [one] if one.starts_with(name) && !one.contains("canary")), "{told:?}");
    }
    let warned = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector"), ("OTEL_EXPORTER_OTLP_HEADERS", "k=v")]);
    assert!(warned.unwrap().warnings.iter().any(|warning| warning.starts_with("OTEL_EXPORTER_OTLP_HEADERS")));
}

#[test]
fn an_audit_that_is_required_needs_its_file() {
    let audit = |extra: &[(&str, &str)]| read(extra).unwrap().telemetry.audit;
    assert!(audit(&[]).file.is_none() && !audit(&[]).required);
    let both = audit(&[("AUDIT_LOG_FILE", "/var/log/audit.jsonl"), ("AUDIT_REQUIRED", "yes")]);
    assert_eq!((both.file.as_deref(), both.required), (Some(Path::new("/var/log/audit.jsonl")), true));
    assert!(matches!(mistakes(&[("AUDIT_REQUIRED", "true")]).as_slice(), [one] if one.contains("AUDIT_LOG_FILE")));
    assert_eq!(mistakes(&[("AUDIT_LOG_FILE", "/")]).len(), 1);
}
