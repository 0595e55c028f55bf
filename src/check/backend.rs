//! Is the backend there, does it accept the token, and is it well?

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use super::{BACKEND, DEPLOYER, HEALTH, Outcome, Step, listed, quoted};
use crate::backend::{BackendClient, BackendError, Failure, Route};
use crate::identity::{BearerToken, Claims, FaultClass, TokenSource, classify, resolves};
use crate::settings::{BackendSettings, Settings};
use crate::telemetry::metrics::Metrics;

/// However patient the calls are.
const PATIENCE: Duration = Duration::from_secs(10);
const TEAM: &str = "whoever runs the backend";
const NETWORK: &str = "whoever runs the network between here and the backend";
const DIRECTORY: &str = "whoever administers the backend's app registration in Entra";

/// Asks the backend for its health, once, as the server does: whether it could be asked, and what it said.
pub(super) async fn ask(settings: &Settings, token: BearerToken, claims: Option<&Claims>) -> (Step, Step) {
    let backend = BackendSettings { timeout: settings.backend.timeout.min(PATIENCE), ..settings.backend.clone() };
    let metrics = Arc::new(Metrics::new(&[], &Route::TEMPLATES));
    let url = &backend.base_url;
    let client = match BackendClient::new(&backend, TokenSource::holding(token, "the token of this check"), metrics) {
        Ok(client) => client,
        Err(error) => {
            let step = Step::fail(BACKEND, format!("no HTTP client can be built: {error}"))
                .mend(DEPLOYER, "check SSL_CERT_FILE and SSL_CERT_DIR");
            return (step, Step::needs(HEALTH, BACKEND));
        }
    };
    let started = Instant::now();
    match client.health().await {
        Ok(()) => {
            let healthy = format!("`GET /health` says healthy, in {} ms", started.elapsed().as_millis());
            (Step::ok(BACKEND, format!("`{url}` answers")), Step::ok(HEALTH, healthy))
        }
        Err(BackendError { failure: Failure::Unreachable(error), .. }) => {
            let (mut class, detail) = classify(&error);
            if class == FaultClass::Timeout && !resolves(url).await {
                class = FaultClass::Dns;
            }
            (unreachable(&backend, class, &detail), Step::needs(HEALTH, BACKEND))
        }
        Err(error) => {
            let found = match error.failure {
                Failure::Timeout(_) | Failure::Interrupted(_) => format!("`{url}` takes connections"),
                _ => format!("`{url}` answers"),
            };
            (Step::ok(BACKEND, found), unwell(&backend, &error, claims))
        }
    }
}

fn unreachable(backend: &BackendSettings, class: FaultClass, detail: &str) -> Step {
    let url = &backend.base_url;
    let host = url.host_str().unwrap_or_default();
    let step = Step::fail(BACKEND, format!("`{url}` cannot be reached: {detail}"));
    match class {
        FaultClass::Dns => step
            .wrong(format!("The name `{host}` cannot be resolved here"))
            .mend(DEPLOYER, "correct the host in BACKEND_API_URL: of a service in another namespace it is `<service>.<namespace>.svc`"),
        FaultClass::Tls => step
            .wrong("The backend's certificate is not trusted, or it does not speak TLS on this port")
            .mend(DEPLOYER, "make SSL_CERT_FILE hold the certificate authorities of Entra and of the backend, and check scheme and port of BACKEND_API_URL"),
        FaultClass::Timeout => step
            .wrong("Nobody takes the connection: a firewall or a NetworkPolicy swallows it, or the host is wrong")
            .mend(NETWORK, "let this server reach the host and port of BACKEND_API_URL; no proxy is used on this way"),
        _ => step
            .wrong("Nobody listens there, or the connection is refused on the way")
            .mend(TEAM, "start the backend, or correct host and port of BACKEND_API_URL; no proxy is used on this way"),
    }
}

/// It could be asked, but did not say that it is healthy.
fn unwell(backend: &BackendSettings, error: &BackendError, claims: Option<&Claims>) -> Step {
    let step = Step::fail(HEALTH, error.to_string());
    let health = quoted(&format!("{}/health", backend.base_url.as_str().trim_end_matches('/')));
    match &error.failure {
        Failure::Unauthorized => refused_token(step, claims),
        Failure::Status { status: StatusCode::FORBIDDEN, .. } => missing_role(step, claims),
        Failure::Status { status: StatusCode::NOT_FOUND, .. } => {
            let outcome = if backend.check_in_readiness { Outcome::Fail } else { Outcome::Warn };
            Step { outcome, ..step }.wrong("There is no `/health` below BACKEND_API_URL").mend(
                DEPLOYER,
                "make BACKEND_API_URL end where the backend's routes begin; if it has no `/health`, set READINESS_CHECK_BACKEND=false",
            )
        }
        Failure::Status { status, .. } if status.is_redirection() => step
            .wrong("The backend redirects, which is never followed: the token goes to one origin only")
            .mend(
                DEPLOYER,
                "set BACKEND_API_URL to the address behind the redirect, mostly https instead of http or another path",
            )
            .command(format!("curl --silent --show-error --head {health}")),
        Failure::Status { status: StatusCode::TOO_MANY_REQUESTS, .. } => step
            .wrong("The backend has too much to do, or takes us for too eager")
            .mend(TEAM, "wait and check again; if it lasts, raise the backend's limits for this caller"),
        Failure::Status { status, .. } if status.is_server_error() => step
            .wrong("The backend, or a gateway before it, is unwell")
            .mend(TEAM, "look at the backend's own log and at what it depends on"),
        Failure::Status { .. } => step
            .wrong("The backend does not serve `GET /health` as agreed")
            .mend(TEAM, "let `GET /health` answer 200 with `{\"status\":\"healthy\"}`, and check BACKEND_API_URL"),
        Failure::Unhealthy(found) => step
            .wrong(format!("`GET /health` answers 200 and says `{found}`; only `{{\"status\":\"healthy\"}}` counts as healthy"))
            .mend(
                TEAM,
                "if the backend is well, let `GET /health` answer `{\"status\":\"healthy\"}`; otherwise look at the backend's own log and \
                 at what it depends on",
            ),
        Failure::Encoded(_) => step
            .wrong(
                "The backend, or a gateway before it, encodes its answers although `Accept-Encoding: identity` is sent",
            )
            .mend(TEAM, "switch compression off for requests that do not ask for it"),
        Failure::Unreadable(_) | Failure::TooLarge(_) | Failure::NoMemory { .. } => step
            .wrong("What answers is not the backend as agreed: `GET /health` gives `{\"status\":\"healthy\"}` as JSON")
            .mend(DEPLOYER, "correct BACKEND_API_URL: it may lead to a web page, a sign-in or a gateway")
            .command(format!("curl --silent --show-error --include {health}")),
        Failure::Timeout(_) => step
            .wrong("The backend takes the request and does not answer in time")
            .mend(TEAM, "look at what keeps the backend busy; BACKEND_API_TIMEOUT is what a whole call may take"),
        Failure::Interrupted(_) => step
            .wrong("The backend, or something before it, broke the connection off")
            .mend(TEAM, "look at the backend's own log, and check scheme and port of BACKEND_API_URL"),
        Failure::Unreachable(_)
        | Failure::Identity(_)
        | Failure::OnBehalfOf(_)
        | Failure::NoUser
        | Failure::Busy
        | Failure::CircuitOpen(_) => step
            .wrong("The question was not asked")
            .mend("the developers of this server", "check again, and report it if it stays"),
    }
}

fn refused_token(step: Step, claims: Option<&Claims>) -> Step {
    let audience = claims.and_then(|claims| claims.audiences.first());
    let issued = match (audience, claims.and_then(|claims| claims.issuer.as_ref())) {
        (Some(audience), Some(issuer)) => format!(": it is for the audience `{audience}`, by the issuer `{issuer}`"),
        _ => String::new(),
    };
    step.wrong(format!("The backend does not accept this token{issued}; it expects another audience, tenant or version"))
        .mend(
            DEPLOYER,
            "set AZURE_SCOPES to `api://<backend-app-id>/.default`, of the backend's own app registration; if that is what it is, \
             whoever runs the backend has to accept this audience and issuer",
        )
        .command(audience.map(|audience| {
            let query = "'{name:displayName,appId:appId,names:servicePrincipalNames}'";
            format!("az ad sp show --id {} --query {query} --output json", quoted(audience))
        }))
}

fn missing_role(step: Step, claims: Option<&Claims>) -> Step {
    let roles = match claims {
        Some(claims) if claims.roles.is_empty() => "its token carries no app role".to_owned(),
        Some(claims) => format!("the app roles of its token do not suffice: {}", listed(&claims.roles)),
        None => "its token lacks an app role, most likely".to_owned(),
    };
    let command = claims
        .and_then(|claims| Some((quoted(claims.audiences.first()?), claims.object.as_deref().filter(|id| is_id(id))?)));
    step.wrong(format!("The backend knows this caller and does not let it in: {roles}"))
        .mend(DIRECTORY, "grant the app role that the backend asks for to this server's identity; it counts from the next token on")
        .command(command.map(|(audience, object)| {
            format!(
                "backend=$(az ad sp show --id {audience} --query id --output tsv); \
                 role=$(az ad sp show --id {audience} --query \"appRoles[?value=='<role>'].id\" --output tsv); \
                 az rest --method POST --url \"https://graph.microsoft.com/v1.0/servicePrincipals/$backend/appRoleAssignedTo\" \
                 --body \"{{\\\"principalId\\\":\\\"{object}\\\",\\\"resourceId\\\":\\\"$backend\\\",\\\"appRoleId\\\":\\\"$role\\\"}}\""
            )
        }))
}

fn is_id(text: &str) -> bool {
    uuid::Uuid::try_parse(text).is_ok()
}
