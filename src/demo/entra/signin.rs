//! How a person signs in to a client: `/authorize` and the code that it hands out, with PKCE, and what the token endpoint gives
//! for it. There is no page: whoever `login_hint` names has signed in and consented already, and is the writer by default.
//!
//! As Entra does it: no registration of clients, no `iss` in the answer, `resource` compared to the letter, and scopes that are
//! asked for in their qualified form and named in tokens by the short one.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use url::Url;
use uuid::Uuid;

use super::callers::{API_APP_ID, DemoCaller, PEOPLES_CLIENT_ID, user_claims};
use super::grants::{Form, Refusal};
use super::keys::overlay;
use super::{Directory, StandInEntra};

/// Microsoft's own client id of Visual Studio Code, which the recipe pre-authorises.
const VS_CODE_CLIENT_ID: &str = "aebc6443-996d-45c2-90f0-388ff96faa56";
const CODE_LIFE: Duration = Duration::from_secs(600);
const REFRESH_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How many codes and refresh tokens are kept.
const MOST_TICKETS: usize = 256;
const OF_OPENID: [&str; 4] = ["openid", "profile", "email", "offline_access"];

/// What the tenant knows of people who are signing in.
#[derive(Default)]
pub(super) struct SignIns {
    /// The App ID URIs of the MCP server's API: what `resource` and scopes may name.
    api: RwLock<Vec<String>>,
    /// Codes and refresh tokens, by their text.
    tickets: Mutex<HashMap<String, Ticket>>,
}

/// What somebody may have tokens for.
#[derive(Clone)]
struct Ticket {
    is_code: bool,
    client_id: String,
    redirect_uri: String,
    challenge: Option<String>,
    person: DemoCaller,
    /// The scopes as they were asked for.
    asked: Vec<String>,
    /// The App ID URI that they belong to.
    resource: String,
    until: Instant,
}

impl StandInEntra {
    /// Gives the MCP server's API these App ID URIs, as the recipe has it: each exact URL that clients use.
    pub fn publish_api(&self, identifier_uris: impl IntoIterator<Item = String>) {
        let signins = &self.state.directory.signins;
        *signins.api.write().unwrap_or_else(PoisonError::into_inner) = identifier_uris.into_iter().collect();
    }
}

fn field<'a>(form: &'a Form, name: &str) -> Option<&'a str> {
    form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
}

/// Answers `/authorize`: where to send the browser, or what to show in it.
pub(super) fn authorize(directory: &Directory, query: &Form) -> Result<Url, Refusal> {
    let refuse = Refusal::bad_request;
    let client_id = known_client(directory, field(query, "client_id"))?;
    let redirect_uri = field(query, "redirect_uri").unwrap_or_default();
    let mut answer = Url::parse(redirect_uri).ok().filter(is_loopback).ok_or_else(|| {
        let text = format!(
            "The redirect URI '{redirect_uri}' specified in the request does not match the redirect URIs configured for \
             the application '{client_id}'."
        );
        refuse("invalid_request", 50011, text)
    })?;
    // From here on the client itself is told.
    let outcome = ticket(directory, query, client_id, redirect_uri);
    let mut pairs = answer.query_pairs_mut();
    match outcome {
        Ok(ticket) => {
            pairs.append_pair("code", &directory.signins.keep(ticket));
            pairs.append_pair("session_state", &Uuid::new_v4().to_string());
        }
        Err(refusal) => {
            pairs.append_pair("error", refusal.error);
            pairs.append_pair("error_description", &format!("AADSTS{}: {}", refusal.aadsts, refusal.text));
        }
    }
    if let Some(state) = field(query, "state") {
        pairs.append_pair("state", state);
    }
    drop(pairs);
    Ok(answer)
}

fn ticket(directory: &Directory, query: &Form, client_id: String, redirect_uri: &str) -> Result<Ticket, Refusal> {
    let refuse = Refusal::bad_request;
    if field(query, "response_type") != Some("code") {
        return Err(refuse("unsupported_response_type", 700_051, "Only 'code' is enabled for the application."));
    }
    let challenge = field(query, "code_challenge").map(str::to_owned);
    if challenge.is_some() && field(query, "code_challenge_method") != Some("S256") {
        return Err(refuse("invalid_request", 501_491, "Invalid CodeChallengeMethod: this stand-in takes S256 only."));
    }
    let (asked, resource) = scopes(directory, field(query, "scope").unwrap_or_default())?;
    check_resource(directory, field(query, "resource"), &resource)?;
    let hint = field(query, "login_hint").unwrap_or_default();
    let person = if hint.split('@').next() == Some("reader") { DemoCaller::Reader } else { DemoCaller::Writer };
    let until = Instant::now() + CODE_LIFE;
    Ok(Ticket {
        is_code: true,
        client_id,
        redirect_uri: redirect_uri.to_owned(),
        challenge,
        person,
        asked,
        resource,
        until,
    })
}

/// Answers the grants `authorization_code` and `refresh_token`.
pub(super) fn redeem(directory: &Directory, form: &Form, with_code: bool) -> Result<Value, Refusal> {
    let client_id = known_client(directory, field(form, "client_id"))?;
    let text = field(form, if with_code { "code" } else { "refresh_token" }).unwrap_or_default();
    let invalid = |aadsts, text: &'static str| Refusal::bad_request("invalid_grant", aadsts, text);
    let mut ticket = directory
        .signins
        .take(text)
        .filter(|ticket| ticket.is_code == with_code && ticket.client_id == client_id)
        .ok_or_else(|| {
            invalid(70008, "The provided authorization code or refresh token has expired, was used, or is none.")
        })?;
    if with_code {
        if field(form, "redirect_uri") != Some(&ticket.redirect_uri) {
            return Err(invalid(500_112, "The reply address does not match the one of the authorization request."));
        }
        let hash = |verifier: &str| URL_SAFE_NO_PAD.encode(Sha256::digest(verifier));
        if ticket.challenge.is_some() && field(form, "code_verifier").map(hash) != ticket.challenge {
            return Err(invalid(
                501_481,
                "The Code_Verifier does not match the code_challenge supplied in the authorization request.",
            ));
        }
    }
    if let Some(asked) = field(form, "scope") {
        (ticket.asked, ticket.resource) = scopes(directory, asked)?;
    }
    check_resource(directory, field(form, "resource"), &ticket.resource)?;
    Ok(response(directory, ticket))
}

fn response(directory: &Directory, ticket: Ticket) -> Value {
    let prefix = format!("{}/", ticket.resource);
    let wants = |scope: &str| ticket.asked.iter().any(|asked| asked.strip_prefix(&prefix).unwrap_or(asked) == scope);
    let granted: Vec<_> =
        ticket.person.permissions().iter().copied().filter(|scope| wants(".default") || wants(scope)).collect();
    let mut claims = user_claims(directory, ticket.person, &ticket.client_id, &granted.join(" "));
    let lifetime = directory.token_lifetime().as_secs();
    let qualified: Vec<_> = granted.iter().map(|scope| format!("{prefix}{scope}")).collect();
    let mut response = json!({
        "token_type": "Bearer",
        "scope": qualified.join(" "),
        "expires_in": lifetime,
        "ext_expires_in": lifetime,
        "access_token": directory.keys.sign(&json!({}), &claims),
    });
    if wants("openid") {
        overlay(&mut claims, &json!({ "aud": ticket.client_id, "azp": null, "azpacr": null, "scp": null }));
        overlay(&mut response, &json!({ "id_token": directory.keys.sign(&json!({}), &claims) }));
    }
    if wants("offline_access") {
        let again = Ticket { is_code: false, challenge: None, until: Instant::now() + REFRESH_LIFE, ..ticket };
        overlay(&mut response, &json!({ "refresh_token": directory.signins.keep(again) }));
    }
    response
}

fn known_client(directory: &Directory, client_id: Option<&str>) -> Result<String, Refusal> {
    let client_id = client_id.unwrap_or_default();
    if [PEOPLES_CLIENT_ID, VS_CODE_CLIENT_ID].iter().any(|known| known.eq_ignore_ascii_case(client_id)) {
        return Ok(client_id.to_ascii_lowercase());
    }
    let text = format!(
        "Application with identifier '{client_id}' was not found in the directory '{}'.",
        directory.options.tenant_domain
    );
    Err(Refusal::bad_request("unauthorized_client", 700_016, text))
}

/// The scopes that are asked for, and the one App ID URI that those of an API belong to.
fn scopes(directory: &Directory, text: &str) -> Result<(Vec<String>, String), Refusal> {
    let api = directory.signins.api.read().unwrap_or_else(PoisonError::into_inner);
    let mut owner: Option<String> = None;
    for scope in text.split(' ').filter(|scope| !scope.is_empty() && !OF_OPENID.contains(scope)) {
        let (uri, name) = scope.rsplit_once('/').unwrap_or(("", scope));
        if uri.is_empty() {
            // A name alone is one of Microsoft Graph's.
            let text = format!(
                "The application asked for scope '{scope}' that doesn't exist on the resource \
                 '00000003-0000-0000-c000-000000000000'. Contact the app vendor."
            );
            return Err(Refusal::bad_request("invalid_client", 650_053, text));
        }
        if uri != API_APP_ID && !api.iter().any(|known| known == uri) {
            let text = format!("The resource principal named {uri} was not found in the tenant.");
            return Err(Refusal::bad_request("invalid_resource", 500_011, text));
        }
        if name != ".default" && !super::callers::PERMISSIONS.contains(&name) {
            let text =
                format!("The application asked for scope '{name}' that doesn't exist on the resource '{API_APP_ID}'.");
            return Err(Refusal::bad_request("invalid_client", 650_053, text));
        }
        if owner.as_ref().is_some_and(|owner| owner != uri) {
            let text = "The provided value for the input parameter scope contains more than one resource.";
            return Err(Refusal::bad_request("invalid_scope", 70011, text));
        }
        owner = Some(uri.to_owned());
    }
    Ok((text.split(' ').filter(|scope| !scope.is_empty()).map(str::to_owned).collect(), owner.unwrap_or_default()))
}

/// RFC 8707, as Entra has it since 2026: to the letter an App ID URI of the application that owns the scopes.
fn check_resource(directory: &Directory, resource: Option<&str>, owner: &str) -> Result<(), Refusal> {
    let api = directory.signins.api.read().unwrap_or_else(PoisonError::into_inner);
    match resource {
        None => Ok(()),
        Some(resource) if api.iter().any(|uri| uri == resource) && !owner.is_empty() => Ok(()),
        Some(resource) => {
            let text = format!(
                "The resource parameter provided in the request ('{resource}') doesn't match with the requested scopes."
            );
            Err(Refusal::bad_request("invalid_target", 9_010_010, text))
        }
    }
}

/// Native clients listen on any port of loopback.
fn is_loopback(url: &Url) -> bool {
    url.scheme() == "http" && matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"))
}

impl SignIns {
    fn keep(&self, ticket: Ticket) -> String {
        let text = format!("1.{}.{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| Instant::now() < ticket.until);
        if tickets.len() >= MOST_TICKETS {
            tickets.clear();
        }
        tickets.insert(text.clone(), ticket);
        text
    }

    /// A ticket is good once.
    fn take(&self, text: &str) -> Option<Ticket> {
        let mut tickets = self.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.remove(text).filter(|ticket| Instant::now() < ticket.until)
    }
}
