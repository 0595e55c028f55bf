//! Who gets a token, and what is said to those who don't: the checks of the token endpoint, in the order they are made.
//!
//! The order, the 300 s of clock skew and a few texts are choices: Entra does not document them.

use http::StatusCode;
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::wire::unix_now;
use super::keys::{BadSignature, Jws, overlay};
use super::{Directory, Resource, TokenVersion, on_behalf_of, signin};

/// The one kind of client assertion that Entra takes.
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
/// The audience a federated credential expects in the assertion.
const FEDERATION_AUDIENCE: &str = "api://AzureADTokenExchange";
/// The longest life of an assertion, in seconds.
const LONGEST_ASSERTION: i64 = 25 * 3600;

/// The decoded form of a token request.
pub(super) type Form = Vec<(String, String)>;

/// An error answer of Entra: HTTP status, OAuth error, AADSTS number and text.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) error: &'static str,
    pub(super) aadsts: u32,
    pub(super) text: String,
    /// What the user's next sign-in has to satisfy.
    pub(super) claims: Option<Value>,
}

impl Refusal {
    pub(super) fn bad_request(error: &'static str, aadsts: u32, text: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, error, aadsts, text: text.into(), claims: None }
    }

    fn invalid_client(aadsts: u32, text: impl Into<String>) -> Self {
        Self { status: StatusCode::UNAUTHORIZED, ..Self::bad_request("invalid_client", aadsts, text) }
    }

    pub(super) fn unknown_tenant(error: &'static str, tenant: &str) -> Self {
        let text = format!(
            "Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID and are signing into the \
             correct cloud. Check with your subscription administrator, this may happen if there are no active \
             subscriptions for the tenant."
        );
        Self::bad_request(error, 90002, text)
    }

    pub(super) fn missing(parameter: &str) -> Self {
        let text = format!("The request body must contain the following parameter: '{parameter}'.");
        Self::bad_request("invalid_request", 900144, text)
    }
}

/// How the client proved who it is: the `azpacr` claim.
pub(super) enum Proof {
    Secret,
    Assertion,
}

impl Proof {
    pub(super) fn as_claim(&self) -> &'static str {
        match self {
            Self::Secret => "1",
            Self::Assertion => "2",
        }
    }
}

/// Answers a token request of a known tenant: the token response, or the refusal.
pub(super) fn grant(directory: &Directory, form: &Form) -> Result<Value, Refusal> {
    let field = |name: &str| form.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    let for_a_user = match field("grant_type") {
        Some("client_credentials") => false,
        Some(on_behalf_of::GRANT) => true,
        Some("authorization_code") => return signin::redeem(directory, form, true),
        Some("refresh_token") => return signin::redeem(directory, form, false),
        Some("") | None => return Err(Refusal::missing("grant_type")),
        Some(other) => {
            let text = format!("The app requested an unsupported grant type '{other}'.");
            return Err(Refusal::bad_request("unsupported_grant_type", 70003, text));
        }
    };
    let client_id = field("client_id").filter(|id| !id.is_empty()).ok_or_else(|| Refusal::missing("client_id"))?;
    if !client_id.eq_ignore_ascii_case(&directory.options.client_id) {
        let text = format!(
            "Application with identifier '{client_id}' was not found in the directory '{}'. This can happen if the \
             application has not been installed by the administrator of the tenant or consented to by any user in the \
             tenant. You may have sent your authentication request to the wrong tenant.",
            directory.options.tenant_domain
        );
        return Err(Refusal::bad_request("unauthorized_client", 700016, text));
    }
    let proof = match (field("client_assertion"), field("client_secret")) {
        (Some(assertion), _) if !assertion.is_empty() => {
            if field("client_assertion_type") != Some(JWT_BEARER) {
                return Err(Refusal::missing("client_assertion_type"));
            }
            check_assertion(directory, assertion)?;
            Proof::Assertion
        }
        (_, Some(secret)) if !secret.is_empty() => {
            check_secret(directory, secret)?;
            Proof::Secret
        }
        (None, None) => {
            let text = "'client_assertion', 'client_secret' or 'request' is required for the 'client_credentials' \
                        grant type.";
            return Err(Refusal::invalid_client(7_000_216, text));
        }
        _ => {
            let text = "The request body must contain the following parameter: 'client_assertion' or 'client_secret'.";
            return Err(Refusal::invalid_client(7_000_218, text));
        }
    };
    if for_a_user {
        return on_behalf_of::exchange(directory, form, &proof);
    }
    let (resource, audience) = resource_of(directory, field("scope").unwrap_or_default())?;
    Ok(token_response(directory, resource, audience, &proof))
}

fn check_secret(directory: &Directory, secret: &str) -> Result<(), Refusal> {
    let known = |secrets: &[String]| secrets.iter().any(|one| one == secret);
    let client_id = &directory.options.client_id;
    if known(&directory.options.client_secrets) {
        return Ok(());
    }
    if known(&directory.options.expired_client_secrets) {
        let text = format!(
            "The provided client secret keys for app '{client_id}' are expired. Visit the Azure portal to create new \
             keys for your app: https://aka.ms/NewClientSecret, or consider using certificate credentials for added \
             security: https://aka.ms/certCreds."
        );
        return Err(Refusal::invalid_client(7_000_222, text));
    }
    let text = format!(
        "Invalid client secret provided. Ensure the secret being sent in the request is the client secret value, not \
         the client secret ID, for a secret added to app '{client_id}'."
    );
    Err(Refusal::invalid_client(7_000_215, text))
}

fn check_assertion(directory: &Directory, assertion: &str) -> Result<(), Refusal> {
    let jws = Jws::parse(assertion)
        .ok_or_else(|| Refusal::bad_request("invalid_request", 50027, "JWT token is invalid or malformed."))?;
    let mismatch = |aadsts, what, value: &str| {
        let text = format!(
            "No matching federated identity record found for presented assertion {what} '{value}'. Check your \
             federated identity credential Subject, Audience and Issuer against the presented assertion. \
             https://learn.microsoft.com/entra/workload-id/workload-identity-federation"
        );
        Err(Refusal::invalid_client(aadsts, text))
    };
    let issuer = jws.text("iss").unwrap_or_default();
    if issuer != directory.cluster_issuer {
        return mismatch(700_211, "issuer", issuer);
    }
    let audience = match jws.claims.get("aud") {
        Some(Value::Array(list)) if list.iter().any(|one| one == FEDERATION_AUDIENCE) => FEDERATION_AUDIENCE,
        Some(Value::Array(list)) => list.first().and_then(Value::as_str).unwrap_or_default(),
        Some(Value::String(one)) => one,
        _ => "",
    };
    if audience != FEDERATION_AUDIENCE {
        return mismatch(700_212, "audience", audience);
    }
    let subject = jws.text("sub").unwrap_or_default();
    let expected = &directory.options.federated_subject;
    if subject != expected {
        let only_case = subject.eq_ignore_ascii_case(expected);
        return mismatch(if only_case { 7_002_138 } else { 700_213 }, "subject", subject);
    }
    jws.check_signature(directory.cluster_key.get().into_iter().flatten()).map_err(|bad| match bad {
        BadSignature::NoKey => Refusal::bad_request(
            "invalid_request",
            5_000_811,
            "Unable to verify token signature. The signing key identifier does not match any valid registered keys.",
        ),
        BadSignature::Mismatch => Refusal::bad_request(
            "invalid_request",
            50013,
            "Assertion failed signature validation. [Reason - The provided signature value did not match the expected \
             signature value.]",
        ),
    })?;
    let (now, skew) = (unix_now(), directory.options.clock_skew.as_secs() as i64);
    let Some(expires) = jws.seconds("exp") else {
        return Err(Refusal::bad_request("invalid_request", 50027, "JWT token is invalid or malformed: no 'exp'."));
    };
    match jws.seconds("iat") {
        Some(issued) if expires - issued <= LONGEST_ASSERTION => {}
        _ => {
            let text = "External OIDC provider token is of a lifetime that is too long, or has no 'iat' claim: the \
                        longest lifetime is 25 hours.";
            return Err(Refusal::invalid_client(70023, text));
        }
    }
    if expires + skew <= now || jws.seconds("nbf").is_some_and(|from| from - skew > now) {
        let text = format!(
            "Client assertion is not within its valid time range. Current time: {now}, assertion valid until \
             {expires}."
        );
        return Err(Refusal::invalid_client(700_024, text));
    }
    Ok(())
}

/// The resource whose token is asked for, and the identifier it was asked by.
fn resource_of<'a>(directory: &'a Directory, scope: &'a str) -> Result<(&'a Resource, &'a str), Refusal> {
    if scope.trim().is_empty() {
        return Err(Refusal::missing("scope"));
    }
    if scope.chars().any(|c| c.is_control() || c == '"' || c == '\\') {
        let text = format!(
            "The provided value for the input parameter 'scope' is not valid. The scope '{}' is not valid.",
            scope.escape_debug()
        );
        return Err(Refusal::bad_request("invalid_scope", 70011, text));
    }
    let mut asked: Option<&str> = None;
    for one in scope.split(' ').filter(|one| !one.is_empty()) {
        let identifier = one.strip_suffix("/.default").filter(|identifier| !identifier.is_empty()).ok_or_else(|| {
            let text = format!(
                "The provided value for scope {scope} is not valid. Client credential flows must have a scope value \
                 with /.default suffixed to the resource identifier (application ID URI)."
            );
            Refusal::bad_request("invalid_scope", 1_002_012, text)
        })?;
        if asked.is_some_and(|before| before != identifier) {
            let text = format!(
                "The provided value for the input parameter scope '{scope}' isn't valid because it contains more than \
                 one resource."
            );
            return Err(Refusal::bad_request("invalid_scope", 700_022, text));
        }
        asked = Some(identifier);
    }
    let asked = asked.unwrap_or_default();
    known_resource(directory, asked).map(|resource| (resource, asked))
}

/// The resource with this client id or App ID URI; a final slash counts for nothing.
pub(super) fn known_resource<'a>(directory: &'a Directory, asked: &str) -> Result<&'a Resource, Refusal> {
    fn trimmed(identifier: &str) -> &str {
        identifier.strip_suffix('/').unwrap_or(identifier)
    }
    let known = directory.options.resources.iter().find(|resource| {
        resource.app_id == asked || resource.identifier_uris.iter().any(|uri| trimmed(uri) == trimmed(asked))
    });
    known.ok_or_else(|| {
        let text = format!(
            "The resource principal named {asked} was not found in the tenant named {}. This can happen if the \
             application has not been installed by the administrator of the tenant or consented to by any user in the \
             tenant. You might have sent your authentication request to the wrong tenant.",
            directory.options.tenant_domain
        );
        Refusal::bad_request("invalid_resource", 500_011, text)
    })
}

fn token_response(directory: &Directory, resource: &Resource, asked: &str, proof: &Proof) -> Value {
    let lifetime = directory.token_lifetime().as_secs();
    let mut claims = app_claims(directory, resource, asked);
    let proof = proof.as_claim();
    let proof = match resource.token_version {
        TokenVersion::V1 => json!({ "appidacr": proof }),
        TokenVersion::V2 => json!({ "azpacr": proof }),
    };
    overlay(&mut claims, &proof);
    let mut response = json!({
        "token_type": "Bearer",
        "expires_in": lifetime,
        "ext_expires_in": lifetime,
        "access_token": directory.keys.sign(&json!({}), &claims),
    });
    if lifetime >= 7200 {
        overlay(&mut response, &json!({ "refresh_in": lifetime / 2 }));
    }
    response
}

/// The claims of an app-only token, in the version that the resource asks for.
pub(super) fn app_claims(directory: &Directory, resource: &Resource, asked: &str) -> Value {
    let (options, now) = (&directory.options, unix_now());
    let expires = now + directory.token_lifetime().as_secs() as i64;
    let mut claims = json!({
        "iat": now, "nbf": now, "exp": expires,
        "aio": format!("k2{}", Uuid::new_v4().simple()),
        "oid": options.service_principal_id, "sub": options.service_principal_id, "tid": options.tenant_id,
        "rh": "1.AAAA", "uti": Uuid::new_v4().simple().to_string(),
    });
    let versioned = match resource.token_version {
        TokenVersion::V1 => json!({
            "ver": "1.0", "iss": directory.issuer(TokenVersion::V1), "aud": asked,
            "appid": options.client_id, "idp": directory.issuer(TokenVersion::V1),
        }),
        TokenVersion::V2 => json!({
            "ver": "2.0", "iss": directory.issuer(TokenVersion::V2), "aud": resource.app_id, "azp": options.client_id,
        }),
    };
    overlay(&mut claims, &versioned);
    if !resource.granted_roles.is_empty() {
        overlay(&mut claims, &json!({ "roles": resource.granted_roles }));
    }
    claims
}
