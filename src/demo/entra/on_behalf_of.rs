//! The On-Behalf-Of grant: who shows a user's token for itself, and proves to be the app that it is for, gets a token for the backend
//! in the user's name.
//!
//! That an app's own token is 7000114 and `unauthorized_client`, and a bad signature 50013 and `invalid_grant`, is what Entra answers;
//! the status and the `error` of the other refusals follow from these.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::wire::{lock, unix_now};
use super::grants::{Form, Proof, Refusal, known_resource};
use super::keys::{BadSignature, Jws, overlay};
use super::{Directory, Resource, TokenVersion, USER_SCOPE};

/// The grant type.
pub(super) const GRANT: &str = "urn:ietf:params:oauth:grant-type:jwt-bearer";
/// What official clients ask for besides.
const OPENID_SCOPES: [&str; 4] = ["openid", "profile", "offline_access", "email"];

/// The exchange, for a client that has proved who it is.
pub(super) fn exchange(directory: &Directory, form: &Form, proof: &Proof) -> Result<Value, Refusal> {
    let field = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let assertion = field("assertion").filter(|text| !text.is_empty()).ok_or_else(|| Refusal::missing("assertion"))?;
    match field("requested_token_use") {
        Some("on_behalf_of") => {}
        None | Some("") => return Err(Refusal::missing("requested_token_use")),
        Some(_) => {
            let text = "The value of the parameter 'requested_token_use' is not supported.";
            return Err(Refusal::bad_request("invalid_request", 90014, text));
        }
    }
    let user = user_of(directory, assertion)?;
    let asked: Vec<&str> = field("scope").unwrap_or_default().split(' ').filter(|scope| !scope.is_empty()).collect();
    let (resource, identifier) = resource_of(directory, &asked)?;
    check_context(directory, &user)?;
    let lifetime = directory.token_lifetime().as_secs();
    let mut response = json!({
        "token_type": "Bearer",
        "scope": format!("{identifier}/{USER_SCOPE}"),
        "expires_in": lifetime,
        "ext_expires_in": lifetime,
        "access_token": directory.keys.sign(&json!({}), &user_claims(directory, &user, resource, identifier, proof)),
    });
    if asked.contains(&"offline_access") {
        overlay(&mut response, &json!({ "refresh_token": format!("1.{}", Uuid::new_v4().simple()) }));
    }
    if asked.contains(&"openid") {
        let mut claims = common_claims(directory, &user);
        overlay(
            &mut claims,
            &json!({ "aud": directory.options.client_id, "iss": directory.issuer(TokenVersion::V2), "ver": "2.0" }),
        );
        overlay(&mut response, &json!({ "id_token": directory.keys.sign(&json!({}), &claims) }));
    }
    if field("client_info") == Some("1") {
        let of = |claim| user.text(claim).unwrap_or_default();
        let info = json!({ "uid": of("oid"), "utid": of("tid") }).to_string();
        overlay(&mut response, &json!({ "client_info": URL_SAFE_NO_PAD.encode(info) }));
    }
    Ok(response)
}

/// The user's token, if it is good, for this app, and a user's.
fn user_of<'a>(directory: &Directory, assertion: &'a str) -> Result<Jws<'a>, Refusal> {
    let invalid = |aadsts, text: &str| Refusal::bad_request("invalid_grant", aadsts, text);
    let jws = Jws::parse(assertion)
        .ok_or_else(|| Refusal::bad_request("invalid_request", 50027, "JWT token is invalid or malformed."))?;
    let keys = directory.keys.all();
    jws.check_signature(keys.iter().map(AsRef::as_ref)).map_err(|bad| {
        let reason = match bad {
            BadSignature::NoKey => "The key was not found.",
            BadSignature::Mismatch => "The provided signature value did not match the expected signature value.",
        };
        invalid(50013, &format!("Assertion failed signature validation. [Reason - {reason}]"))
    })?;
    let issuers = [TokenVersion::V1, TokenVersion::V2].map(|version| directory.issuer(version));
    if !issuers.iter().any(|issuer| jws.text("iss") == Some(issuer)) {
        return Err(invalid(50013, "Assertion contains an invalid issuer."));
    }
    let client_id = &directory.options.client_id;
    let audience = jws.text("aud").unwrap_or_default();
    let own_uri =
        || known_resource(directory, client_id).is_ok_and(|app| app.identifier_uris.iter().any(|uri| uri == audience));
    if audience != client_id && !own_uri() {
        let text = format!(
            "Assertion audience does not match the Client app presenting the assertion. The audience in the assertion was \
             '{audience}' and the expected audience is '{client_id}' or one of the Application Uris of this application with App \
             ID '{client_id}'. The downstream client must request a token for the expected audience (the application that made \
             the OBO request) and this application should use that token as the assertion."
        );
        return Err(invalid(500_131, &text));
    }
    let (now, skew) = (unix_now(), directory.options.clock_skew.as_secs() as i64);
    if jws.seconds("exp").is_none_or(|expires| expires + skew <= now)
        || jws.seconds("nbf").is_some_and(|from| from - skew > now)
    {
        let text = format!("Assertion is not within its valid time range. Current time: {now}.");
        return Err(invalid(500_133, &text));
    }
    if jws.text("scp").is_none() {
        let text = format!("Application '{client_id}' is not allowed to make application on-behalf-of calls.");
        return Err(Refusal::bad_request("unauthorized_client", 7_000_114, text));
    }
    Ok(jws)
}

/// The one resource that is asked for, and the identifier it was asked by.
fn resource_of<'a>(directory: &'a Directory, asked: &[&'a str]) -> Result<(&'a Resource, &'a str), Refusal> {
    let mut found: Option<&str> = None;
    for scope in asked.iter().filter(|scope| !OPENID_SCOPES.contains(scope)) {
        let (identifier, name) = scope.rsplit_once('/').unwrap_or(("", scope));
        if ![".default", USER_SCOPE].contains(&name) {
            let text = format!(
                "The user or administrator has not consented to use the application with ID '{}'. Send an interactive \
                 authorization request for this user and resource.",
                directory.options.client_id
            );
            return Err(Refusal::bad_request("invalid_grant", 65001, text));
        }
        if found.is_some_and(|before| before != identifier) {
            let text = "The provided value for the input parameter scope isn't valid because it contains more than one resource.";
            return Err(Refusal::bad_request("invalid_scope", 700_022, text));
        }
        found = Some(identifier);
    }
    let identifier = found.ok_or_else(|| Refusal::missing("scope"))?;
    Ok((known_resource(directory, identifier)?, identifier))
}

fn check_context(directory: &Directory, user: &Jws<'_>) -> Result<(), Refusal> {
    let Some(context) = lock(&directory.demanded_context).clone() else { return Ok(()) };
    let met = user.claims.get("acrs").and_then(Value::as_array);
    if met.is_some_and(|met| met.iter().any(|one| *one == context)) {
        return Ok(());
    }
    let text = "Due to a configuration change made by your administrator, or because you moved to a new location, you must use \
                multi-factor authentication to access the resource.";
    let claims = json!({ "access_token": { "acrs": { "essential": true, "value": context } } });
    Err(Refusal { claims: Some(claims), ..Refusal::bad_request("interaction_required", 50076, text) })
}

fn user_claims(directory: &Directory, user: &Jws<'_>, resource: &Resource, identifier: &str, proof: &Proof) -> Value {
    let client_id = &directory.options.client_id;
    let mut claims = common_claims(directory, user);
    let versioned = match resource.token_version {
        TokenVersion::V1 => json!({
            "ver": "1.0", "iss": directory.issuer(TokenVersion::V1), "aud": identifier, "appid": client_id,
            "appidacr": proof.as_claim(),
        }),
        TokenVersion::V2 => json!({
            "ver": "2.0", "iss": directory.issuer(TokenVersion::V2), "aud": resource.app_id, "azp": client_id,
            "azpacr": proof.as_claim(),
        }),
    };
    overlay(&mut claims, &versioned);
    overlay(&mut claims, &json!({ "scp": USER_SCOPE, "uti": Uuid::new_v4().simple().to_string() }));
    claims
}

/// Who the user is: the same in all their tokens, but for `sub`, which every app sees differently.
fn common_claims(directory: &Directory, user: &Jws<'_>) -> Value {
    let now = unix_now();
    let mut claims = json!({
        "iat": now, "nbf": now, "exp": now + directory.token_lifetime().as_secs() as i64,
        "sub": format!("{}-as-another-app-sees-them", user.text("oid").unwrap_or_default()),
    });
    for name in ["oid", "tid", "name", "preferred_username", "acrs"] {
        if let Some(value) = user.claims.get(name) {
            overlay(&mut claims, &json!({ name: value }));
        }
    }
    claims
}
