//! The way to a token: credential, token file, authority, clock, exchange, and whether the token is one for the backend.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::report::Report;
use super::{CLOCK, CREDENTIAL, DEPLOYER, DNS, Outcome, SCOPE, Step, TCP, TLS, TOKEN, TOKEN_FILE, listed, quoted};
use crate::identity::{
    BearerToken, Claims, FaultClass, Greeting, IdentityError, IdentityStartError, Inspection, advice,
};
use crate::settings::{Credential, IdentitySettings, Settings};

/// The audience that Entra's federation expects; the sovereign clouds append their name.
const FEDERATION_AUDIENCE: &str = "api://AzureADTokenExchange";
/// Entra is taken to forgive so much: five minutes are usual, it does not document them.
const FORGIVEN: i64 = 300;
/// A clock that is this far off deserves a word.
const NOTICEABLE: i64 = 30;
/// Codes whose remedy is a federated credential that fits the token.
const FEDERATION: [u32; 5] = [70_021, 700_211, 700_212, 700_213, 7_002_138];
/// Microsoft's own APIs that are taken for a backend's scope by mistake, and where they live.
const MICROSOFT_APIS: [(&str, &str); 5] = [
    ("management.azure.com", "Azure Resource Manager"),
    ("management.core.windows.net", "Azure Resource Manager"),
    ("graph.microsoft.com", "Microsoft Graph"),
    ("vault.azure.net", "Azure Key Vault"),
    ("database.windows.net", "Azure SQL"),
];

/// What the way led to.
pub(super) struct Way {
    pub(super) token: Option<BearerToken>,
    /// Those of the token, if it can be read.
    pub(super) claims: Option<Claims>,
    /// The namespace of the service account, if there is one.
    pub(super) namespace: Option<String>,
}

/// From the credential to the token.
pub(super) async fn walk(settings: &Settings, report: &mut Report<'_, impl Write>) -> io::Result<Way> {
    let identity = &settings.identity;
    let mut way = Way { token: None, claims: None, namespace: None };
    let inspection = Inspection::new(identity, settings.backend.timeout);
    report.add(credential(identity, inspection.as_ref().err()))?;
    let greet = async {
        match &inspection {
            Ok(inspection) => Some(inspection.greet().await),
            Err(_) => None,
        }
    };
    let (greeting, assertion) = tokio::join!(greet, assertion(&identity.credential));

    // The authority decides by its own clock.
    let now = greeting.as_ref().and_then(|greeting| greeting.as_ref().ok()?.date).unwrap_or_else(SystemTime::now);
    let claims = assertion.as_ref().and_then(|claims| claims.as_ref().ok()?.as_ref());
    way.namespace = claims.and_then(|claims| service_account(claims)).map(|(namespace, _)| namespace.to_owned());
    let command = claims.and_then(|claims| federated_credential(&identity.client_id, claims));
    let token_file = token_file(&identity.credential, assertion.as_ref(), now).command(command.clone());
    let mut failed = (token_file.outcome == Outcome::Fail).then_some(TOKEN_FILE);
    report.add(token_file)?;

    let authority = authority(identity, inspection.as_ref().err(), greeting.as_ref());
    // A clock that is wrong may still be right enough.
    let broken = |step: &&Step| step.outcome == Outcome::Fail && step.name != CLOCK;
    failed = authority.iter().find(broken).map(|step| step.name).or(failed);
    for step in authority {
        report.add(step)?;
    }
    let Some((inspection, None)) = inspection.ok().map(|inspection| (inspection, failed)) else {
        report.add(Step::needs(TOKEN, failed.unwrap_or(CREDENTIAL)))?;
        return Ok(way);
    };
    match inspection.token().await {
        Ok(token) => {
            way.claims = Claims::of_token(&token);
            report.add(good_token(&token, way.claims.as_ref()))?;
            way.token = Some(token);
        }
        Err(error) => report.add(no_token(identity, &error, command))?,
    }
    Ok(way)
}

/// Whether the token that was asked for can be one for the backend. What its audience should be only the backend knows.
pub(super) fn scope(settings: &Settings, claims: Option<&Claims>) -> Step {
    let scope = settings.identity.scopes.join(" ");
    let found = match claims {
        Some(claims) if !claims.audiences.is_empty() => {
            format!("`{scope}` gave a token for the audience {}", listed(&claims.audiences))
        }
        _ => format!("`{scope}`; the token does not tell its audience, which is its right"),
    };
    let resource = scope.trim_end_matches("/.default").trim_end_matches('/');
    let host = resource.split_once("://").map_or(resource, |(_, host)| host);
    let backend = settings.backend.base_url.host_str().unwrap_or_default();
    let elsewhere = |host: &str| backend != host && !backend.ends_with(&format!(".{host}"));
    match MICROSOFT_APIS.iter().find(|(api, _)| *api == host).filter(|(api, _)| elsewhere(api)) {
        None => Step::ok(SCOPE, found),
        Some((_, api)) => Step::warn(SCOPE, found)
            .wrong(format!("This is a token for {api}, not for the backend at `{backend}`, which should refuse it"))
            .mend(DEPLOYER, "set AZURE_SCOPES to `api://<backend-app-id>/.default`"),
    }
}

fn credential(identity: &IdentitySettings, refused: Option<&IdentityStartError>) -> Step {
    let why = match identity.credential {
        Credential::WorkloadIdentity { .. } => "that file exists",
        Credential::ClientSecret { .. } => "there is no federated token file, and AZURE_CLIENT_SECRET is set",
    };
    let found = format!("{}; chosen because {why}", identity.summary());
    match refused {
        Some(error @ IdentityStartError::Settings(_)) => Step::fail(CREDENTIAL, found)
            .wrong(error.to_string())
            .mend(DEPLOYER, "correct AZURE_TENANT_ID, AZURE_CLIENT_ID or AZURE_AUTHORITY_HOST"),
        _ => Step::ok(CREDENTIAL, found),
    }
}

/// `None` without a file to look at; the inner `None` when it holds no token.
async fn assertion(credential: &Credential) -> Option<Result<Option<Claims>, Box<IdentityError>>> {
    match credential {
        Credential::WorkloadIdentity { token_file } => Some(Claims::of_file(token_file).await),
        Credential::ClientSecret { .. } => None,
    }
}

fn token_file(
    credential: &Credential,
    assertion: Option<&Result<Option<Claims>, Box<IdentityError>>>,
    now: SystemTime,
) -> Step {
    let (Credential::WorkloadIdentity { token_file }, Some(assertion)) = (credential, assertion) else {
        return Step::skipped(TOKEN_FILE, "not used with a client secret");
    };
    let path = token_file.display();
    let claims = match assertion {
        Ok(Some(claims)) => claims,
        Ok(None) => {
            return advised(Step::fail(TOKEN_FILE, format!("`{path}` holds something that is no JWT")), 50_027);
        }
        Err(error) => {
            let advice = error.advice();
            return Step::fail(TOKEN_FILE, cause(error)).wrong(advice.means).mend(advice.hands, advice.remedy);
        }
    };
    let now = unix(now);
    let text = |claim: &Option<String>| claim.as_deref().map_or("none".to_owned(), |text| format!("`{text}`"));
    let found = format!(
        "`{path}`: issuer {}, subject {}, audience {}, {}, {}",
        text(&claims.issuer),
        text(&claims.subject),
        if claims.audiences.is_empty() { "none".to_owned() } else { listed(&claims.audiences) },
        claims.issued_at.map_or("no time of issue".to_owned(), |at| format!("issued {}", moment(at - now))),
        claims.expires_at.map_or("no expiry".to_owned(), |at| format!("expires {}", moment(at - now))),
    );
    match claims.expires_at.map(|at| now - at) {
        Some(ago) if ago >= FORGIVEN => advised(Step::fail(TOKEN_FILE, found), 700_024),
        Some(ago) if ago >= 0 => advised(Step::warn(TOKEN_FILE, found), 700_024),
        _ => Step::ok(TOKEN_FILE, found),
    }
}

/// What Entra would say of it, without asking.
fn advised(step: Step, code: u32) -> Step {
    match advice(code) {
        Some(advice) => step.wrong(advice.means).mend(advice.hands, advice.remedy),
        None => step,
    }
}

/// Name, connection, certificate and clock, as one unauthenticated request found them.
fn authority(
    identity: &IdentitySettings,
    refused: Option<&IdentityStartError>,
    greeting: Option<&Result<Greeting, Box<IdentityError>>>,
) -> [Step; 4] {
    let host = identity.authority.host_str().unwrap_or_default();
    let port = identity.authority.port_or_known_default().unwrap_or_default();
    // A proxy resolves the name for us, so that a connection that fails proves nothing about it.
    let unblamed = || Step::ok(DNS, format!("nothing wrong with the name `{host}`"));
    let greeting = match greeting {
        Some(Ok(greeting)) => greeting,
        Some(Err(error)) => {
            let advice = error.advice();
            let failed = |name| Step::fail(name, cause(error)).wrong(advice.means).mend(advice.hands, advice.remedy);
            let look_up = format!("nslookup {}", quoted(host));
            let rest = |name, failed| Step::needs(name, failed);
            return match error.class() {
                FaultClass::Dns => [failed(DNS).command(look_up), rest(TCP, DNS), rest(TLS, DNS), rest(CLOCK, DNS)],
                FaultClass::Tls => {
                    let show = format!(
                        "openssl s_client -connect {} -servername {} -showcerts </dev/null",
                        quoted(&format!("{host}:{port}")),
                        quoted(host)
                    );
                    [
                        unblamed(),
                        Step::ok(TCP, format!("`{host}:{port}` takes connections")),
                        failed(TLS).command(show),
                        rest(CLOCK, TLS),
                    ]
                }
                _ => [unblamed(), failed(TCP), rest(TLS, TCP), rest(CLOCK, TCP)],
            };
        }
        None => {
            let why = "not tried: this machine has no HTTPS client";
            let tls = match refused {
                Some(error @ (IdentityStartError::Client(_) | IdentityStartError::ExtraCa)) => {
                    Step::fail(TLS, error.to_string()).wrong("There is no certificate authority to trust").mend(
                        DEPLOYER,
                        "make SSL_CERT_FILE name a PEM file with at least one certificate authority, or leave it unset",
                    )
                }
                _ => Step::needs(TLS, CREDENTIAL),
            };
            return [Step::skipped(DNS, why), Step::skipped(TCP, why), tls, Step::skipped(CLOCK, why)];
        }
    };
    let (name, connection) = match greeting.peer {
        None => (unblamed(), format!("`{host}:{port}` takes connections")),
        Some(peer) if peer.port() == port => {
            (Step::ok(DNS, format!("`{host}` resolves")), format!("connected to {peer}"))
        }
        Some(proxy) => {
            (Step::ok(DNS, format!("`{host}` is left to the proxy")), format!("connected by the proxy at {proxy}"))
        }
    };
    [
        name,
        Step::ok(TCP, connection),
        Step::ok(TLS, format!("the certificate is trusted; answered in {} ms", greeting.took.as_millis())),
        clock(greeting.date, SystemTime::now()),
    ]
}

fn clock(date: Option<SystemTime>, now: SystemTime) -> Step {
    let Some(date) = date else { return Step::skipped(CLOCK, "the authority did not tell its time") };
    let ahead = unix(now) - unix(date);
    if ahead.abs() <= NOTICEABLE {
        return Step::ok(CLOCK, "agrees with the authority's");
    }
    let direction = if ahead > 0 { "ahead of" } else { "behind" };
    let found = format!("{} {direction} the authority's", span(ahead.unsigned_abs()));
    let step = if ahead.abs() < FORGIVEN { Step::warn(CLOCK, found) } else { Step::fail(CLOCK, found) };
    step.wrong("The clock of this machine is wrong: tokens and certificates look expired, or not valid yet")
        .mend("whoever runs this machine, or the cluster's node", "set the clock, and keep it by NTP")
        .command("timedatectl status && sudo timedatectl set-ntp true".to_owned())
}

fn good_token(token: &BearerToken, claims: Option<&Claims>) -> Step {
    let life = span(token.life().as_secs());
    let Some(claims) = claims else {
        return Step::ok(TOKEN, format!("good for {life}; opaque, so there is nothing to show of it"));
    };
    let text = |claim: &Option<String>| claim.as_deref().map_or("none".to_owned(), |text| format!("`{text}`"));
    let roles = if claims.roles.is_empty() { "none".to_owned() } else { listed(&claims.roles) };
    let found = format!(
        "good for {life}; audience {}, app {}, roles {roles}, version {}",
        listed(&claims.audiences),
        text(&claims.app),
        text(&claims.version)
    );
    Step::ok(TOKEN, found)
}

fn no_token(identity: &IdentitySettings, error: &IdentityError, federated_credential: Option<String>) -> Step {
    let ids = [
        error.correlation_id().map(|id| format!("correlation id {id}")),
        error.trace_id().map(|id| format!("trace id {id}")),
        error.timestamp().map(|time| format!("at {time}")),
    ];
    let ids: Vec<_> = ids.into_iter().flatten().collect();
    let found = format!("{} ({})", cause(error), ids.join(", "));
    let advice = error.advice();
    let wait = match error.asked_pause() {
        Some(pause) => format!("wait {}, as Entra asks; if it lasts, ", span(pause.as_secs())),
        None if error.retryable() => "wait a little and check again; if it lasts, ".to_owned(),
        None => String::new(),
    };
    let look_up = match error.aadsts() {
        Some(code) if advice.codes.is_empty() => {
            format!(", and look the code up at https://login.microsoftonline.com/error?code={code}")
        }
        _ => String::new(),
    };
    let command = error.aadsts().and_then(|code| command(identity, code, federated_credential));
    let remedy = format!("{wait}{}{look_up}", advice.remedy);
    Step::fail(TOKEN, found).wrong(advice.means).mend(advice.hands, remedy).command(command)
}

/// What to run after some of Entra's refusals.
fn command(identity: &IdentitySettings, code: u32, federated_credential: Option<String>) -> Option<String> {
    let client_id = quoted(&identity.client_id);
    match code {
        code if FEDERATION.contains(&code) => federated_credential,
        50_013 | 5_000_811 => Some(of_identity(
            &identity.client_id,
            "az identity federated-credential list --identity-name \"$name\" --resource-group \"$group\" --output table",
        )),
        7_000_215 | 7_000_222 => Some(format!(
            "az ad app credential reset --id {client_id} --append --display-name mcp-server --query password --output tsv"
        )),
        700_016 => Some(format!("az account show --query tenantId --output tsv; az ad sp show --id {client_id} --query displayName")),
        90_002 => Some("az account show --query tenantId --output tsv".to_owned()),
        500_011 | 70_011 | 1_002_012 | 700_022 => Some(
            "az ad app list --display-name '<backend app>' --query '[].{appId:appId,uris:identifierUris}' --output json"
                .to_owned(),
        ),
        _ => None,
    }
}

/// The federated credential by which Entra would trust this token; `None` when the token lacks what it takes.
fn federated_credential(client_id: &str, claims: &Claims) -> Option<String> {
    let (issuer, subject) = (quoted(claims.issuer.as_deref()?), quoted(claims.subject.as_deref()?));
    // With any other audience it is the projection that has to change.
    let audience = claims.audiences.iter().find(|audience| audience.starts_with(FEDERATION_AUDIENCE));
    let audience = quoted(audience.map_or(FEDERATION_AUDIENCE, String::as_str));
    let is_name = |name: &&str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let namespace = service_account(claims).map(|(namespace, _)| namespace).filter(is_name).unwrap_or("<namespace>");
    let name = quoted(&format!("mcp-server-<cluster>-{namespace}"));
    let create = of_identity(
        client_id,
        &format!(
            "az identity federated-credential create --name {name} --identity-name \"$name\" --resource-group \"$group\" \
             --issuer {issuer} --subject {subject} --audiences {audience}"
        ),
    );
    Some(format!(
        "# One name for each cluster and namespace: `create` replaces the credential that has the name already.\n{create}"
    ))
}

/// A command that needs the name of the managed identity, of which we know the client id.
fn of_identity(client_id: &str, command: &str) -> String {
    format!(
        "az identity list --query \"[?clientId=='{client_id}'].[name,resourceGroup]\" --output tsv | \
         {{ read -r name group; {command}; }}"
    )
}

/// Namespace and name of the service account that the subject names.
fn service_account(claims: &Claims) -> Option<(&str, &str)> {
    claims.subject.as_deref()?.strip_prefix("system:serviceaccount:")?.split_once(':')
}

/// What failed, with our own words for the cause: what Entra writes may hold anything, and goes to the server's log only.
fn cause(error: &IdentityError) -> String {
    match (error.class(), error.detail()) {
        (FaultClass::Http | FaultClass::Internal, _) | (_, None) => error.to_string(),
        (_, Some(detail)) => format!("{error}: {detail}"),
    }
}

fn unix(time: SystemTime) -> i64 {
    let seconds = |span: Duration| i64::try_from(span.as_secs()).unwrap_or(i64::MAX);
    time.duration_since(UNIX_EPOCH).map_or_else(|before| -seconds(before.duration()), seconds)
}

fn moment(from_now: i64) -> String {
    let span = span(from_now.unsigned_abs());
    match from_now {
        ..=-2 => format!("{span} ago"),
        -1..=1 => "just now".to_owned(), // the authority tells whole seconds
        2.. => format!("in {span}"),
    }
}

fn span(seconds: u64) -> String {
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min"),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn settings(scope: &str, backend: &str) -> Settings {
        let id = "2f7c9a40-8d1b-4e6a-b3f5-71c0d9e8a6b2";
        let vars = [
            ("AZURE_TENANT_ID", id),
            ("AZURE_CLIENT_ID", id),
            ("AZURE_CLIENT_SECRET", "x"),
            ("AZURE_SCOPES", scope),
            ("BACKEND_API_URL", backend),
        ];
        let vars: BTreeMap<_, _> = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Settings::read(&vars).unwrap()
    }

    #[test]
    fn a_scope_of_microsofts_own_fits_no_other_backend() {
        for (scope_of, backend, outcome) in [
            ("api://backend/.default", "https://backend.example.com", Outcome::Ok),
            ("b7d1c3e5-0f2a-4b6c-8d9e-1a2b3c4d5e6f/.default", "https://backend.example.com", Outcome::Ok),
            ("https://management.azure.com/.default", "https://backend.example.com", Outcome::Warn),
            ("https://graph.microsoft.com//.default", "https://backend.example.com", Outcome::Warn),
            ("https://graph.microsoft.com/.default", "https://graph.microsoft.com/v1.0", Outcome::Ok),
            ("https://vault.azure.net/.default", "https://mine.vault.azure.net", Outcome::Ok),
            ("https://vault.azure.net/.default", "https://not-vault.azure.net", Outcome::Warn),
        ] {
            assert_eq!(scope(&settings(scope_of, backend), None).outcome, outcome, "{scope_of} {backend}");
        }
    }

    #[test]
    fn a_clock_may_be_off_a_little() {
        let now = SystemTime::now();
        let second = Duration::from_secs(1);
        for (date, outcome) in [
            (Some(now), Outcome::Ok),
            (Some(now - 20 * second), Outcome::Ok),
            (Some(now + 100 * second), Outcome::Warn),
            (Some(now - 400 * second), Outcome::Fail),
            (Some(UNIX_EPOCH - second), Outcome::Fail),
            (None, Outcome::Skipped),
        ] {
            assert_eq!(clock(date, now).outcome, outcome, "{date:?}");
        }
    }

    #[test]
    fn spans_are_told_in_two_units_at_most() {
        for (seconds, told) in
            [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (7260, "2 h 1 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(span(seconds), told);
        }
        assert_eq!((moment(-120), moment(1), moment(120)), ("2 min ago".into(), "just now".into(), "in 2 min".into()));
    }

    #[test]
    fn the_federated_credential_fits_the_token_or_is_not_offered() {
        let mut claims = Claims {
            issuer: Some("https://oidc.example.com/".to_owned()),
            subject: Some("system:serviceaccount:mcp-system:mcp-server".to_owned()),
            audiences: vec!["api://AzureADTokenExchangeUSGov".to_owned()],
            ..Claims::default()
        };
        let command = federated_credential("id", &claims).unwrap();
        for part in [
            "[?clientId=='id']",
            "--issuer 'https://oidc.example.com/' --subject 'system:serviceaccount:mcp-system:mcp-server'",
            "--audiences 'api://AzureADTokenExchangeUSGov'",
        ] {
            assert!(command.contains(part), "{command}");
        }
        assert_eq!(service_account(&claims), Some(("mcp-system", "mcp-server")));
        claims.subject = None;
        assert_eq!(federated_credential("id", &claims), None);
    }
}
