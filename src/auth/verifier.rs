//! Is this token good, and who does it speak of? The checks of an access token of Entra ID, all of them or none.
//!
//! `jsonwebtoken` does signature, times and audience; who the issuers are is known from `keys`, and what makes the token Entra's, and an access token, is checked here.
//! A token that was good is known when it comes again (`proven`): its times and its key are asked each time, so that its end is its end.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Validation, dangerous, decode, decode_header};
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;
use uuid::Uuid;

use super::discovery::{Authority, DocumentSource, Version};
use super::keys::{TenantKeys, Undecided, parse};
use super::proven::{Proof, ProvenTokens};
use super::{Identity, Permissions, Refusal, Said, Verdict};
use crate::settings::{EntraInbound, PermissionNames};
use crate::telemetry::audit::Subject;

/// How far the clocks of Entra and of this machine may be apart, in seconds.
const LEEWAY: u64 = 60;

/// Why tokens cannot be checked on this machine.
#[derive(Debug, thiserror::Error)]
pub enum VerifierError {
    /// The extra certificate authority is no certificate in PEM.
    #[error("the extra certificate authority is not a certificate in PEM")]
    ExtraCa,
    /// No HTTPS client: mostly an image without any certificate authority.
    #[error("no HTTPS client for Entra's keys can be built (are there certificate authorities?)")]
    Client(#[from] reqwest::Error),
}

/// Checks the tokens of callers.
pub struct Verifier {
    tenants: Vec<Tenant>,
    authority: Url,
    /// By the version of the token; the issuer is compared here, for only Entra says who it is.
    validations: [(Version, Validation); 2],
    clients: Vec<String>,
    scopes: PermissionNames,
    roles: PermissionNames,
    keep_assertion: bool,
    proven: ProvenTokens,
    /// The machine's clock, or a test's.
    pub(super) clock: fn() -> SystemTime,
}

/// What is known of a token before it is checked.
#[derive(Debug)]
pub enum Recalled {
    /// It was good, and still is.
    Good(Identity),
    /// It was good, and has to be checked again.
    Stale,
    /// Nothing.
    Unknown,
}

struct Tenant {
    id: String,
    keys: TenantKeys,
}

/// What is looked at before the signature is known to be good: only to find the key that has to have made it.
#[derive(Deserialize)]
struct Unverified {
    iss: String,
}

/// What a token has to say. Lists where Entra writes one text are refused, for two readers could take them for two things.
#[derive(Deserialize)]
struct Claims {
    iss: String,
    #[serde(rename = "aud")]
    _aud: String,
    tid: String,
    oid: String,
    sub: String,
    ver: String,
    exp: f64,
    nbf: f64,
    azp: Option<String>,
    appid: Option<String>,
    scp: Option<String>,
    roles: Option<Vec<String>>,
    idtyp: Option<String>,
}

impl Verifier {
    /// Begins to fetch what the tenants publish, and does not wait for it. With `keep_assertion` identities keep their token, to exchange it.
    /// Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When TLS cannot be set up on this machine.
    pub fn start(
        settings: &EntraInbound,
        authority: &Url,
        extra_ca_pem: Option<&str>,
        keep_assertion: bool,
    ) -> Result<Self, VerifierError> {
        let source = Arc::new(documents(settings, authority, extra_ca_pem)?);
        Ok(Self::with_source(settings, authority, source, keep_assertion))
    }

    pub(super) fn with_source(
        settings: &EntraInbound,
        authority: &Url,
        source: Arc<dyn DocumentSource>,
        keep_assertion: bool,
    ) -> Self {
        let tenant = |id: &String| Tenant { id: id.clone(), keys: TenantKeys::start(Arc::clone(&source), id.clone()) };
        // The audience of a version 1 token is what was asked for: the App ID URI, or the client id.
        let of_v1 = [&settings.app_id_uris[..], &settings.client_ids[..]].concat();
        Self {
            tenants: settings.tenants.iter().map(tenant).collect(),
            authority: authority.clone(),
            validations: [(Version::V2, validation(&settings.client_ids)), (Version::V1, validation(&of_v1))],
            clients: settings.clients.clone(),
            scopes: settings.scopes.clone(),
            roles: settings.roles.clone(),
            keep_assertion,
            proven: ProvenTokens::new(),
            clock: SystemTime::now,
        }
    }

    /// The issuers of the tenants' tokens, which is what their authorization servers are called; while those are not known yet, by
    /// the rule that holds in most clouds.
    pub fn authorization_servers(&self) -> Vec<String> {
        let server =
            |tenant: &Tenant| tenant.keys.v2_issuer().unwrap_or_else(|| v2_issuer(&self.authority, &tenant.id));
        self.tenants.iter().map(server).collect()
    }

    /// Whether there are keys to check anything with.
    pub fn is_ready(&self) -> bool {
        self.tenants.iter().any(|tenant| tenant.keys.has_keys())
    }

    /// Who the token speaks of, if it was good before and nothing has changed.
    pub fn recall(&self, token: &str) -> Recalled {
        let Some(proof) = self.proven.get(token) else { return Recalled::Unknown };
        let holds = self.tenants.get(proof.tenant).is_some_and(|tenant| tenant.keys.hold(&proof.key));
        if holds && proof.is_timely((self.clock)()) {
            Recalled::Good(self.identity(&proof.said, token))
        } else {
            Recalled::Stale
        }
    }

    /// Who the token speaks of, by all the checks. Waits at most for one fetch of keys, and only where its key is unknown.
    ///
    /// # Errors
    ///
    /// The first check that it fails.
    pub async fn verify(&self, token: &str) -> Result<Identity, Refusal> {
        match self.prove(token).await {
            Ok(proof) => {
                let identity = self.identity(&proof.said, token);
                self.proven.insert(token, proof);
                Ok(identity)
            }
            Err(refusal) => {
                if refusal.verdict() != Verdict::Unavailable {
                    self.proven.remove(token);
                }
                Err(refusal)
            }
        }
    }

    fn identity(&self, said: &Arc<Said>, token: &str) -> Identity {
        Identity { said: Arc::clone(said), assertion: self.keep_assertion.then(|| SecretString::from(token)) }
    }

    async fn prove(&self, token: &str) -> Result<Proof, Refusal> {
        if (self.clock)() < UNIX_EPOCH {
            // There is no time to compare a token's with, and `jsonwebtoken` would panic.
            return Err(Refusal::Clock);
        }
        let header = decode_header(token).map_err(|_| Refusal::MalformedToken)?;
        if header.alg != Algorithm::RS256 {
            return Err(Refusal::Algorithm);
        }
        if header.crit.is_some() {
            // RFC 7515, section 4.1.11: what must be understood is not.
            return Err(Refusal::MalformedToken);
        }
        let kid = header.kid.filter(|kid| !kid.is_empty()).ok_or(Refusal::NoKeyId)?;
        let Unverified { iss } = dangerous::insecure_decode_claims(token).map_err(|_| Refusal::MalformedToken)?;
        let (place, tenant, version) = self.issuer(&iss)?;
        let key = match tenant.keys.find(&kid).await {
            Ok(key) => key.ok_or(Refusal::UnknownKey)?,
            Err(Undecided::NoKeys) => return Err(Refusal::KeysUnavailable),
            Err(Undecided::Crowded) => return Err(Refusal::KeysAwaited),
        };
        if !key.may_sign(version) {
            return Err(Refusal::KeyIssuer);
        }
        let validation = self.validations.iter().find(|(of, _)| *of == version).ok_or(Refusal::Version)?;
        let claims: Claims = decode(token, &key.decoding, &validation.1).map_err(|error| refusal(&error))?.claims;
        if claims.iss != iss {
            return Err(Refusal::Issuer);
        }
        let good = claims.good();
        let said = Arc::new(self.said(tenant, version, claims)?);
        Ok(Proof { said, tenant: place, key, good })
    }

    /// Which tenant's issuer this is, with its place, and in which version it writes.
    fn issuer(&self, name: &str) -> Result<(usize, &Tenant, Version), Refusal> {
        for (place, tenant) in self.tenants.iter().enumerate() {
            if let Some(version) = tenant.keys.version_of(name) {
                return Ok((place, tenant, version));
            }
        }
        // A tenant of which nothing is known yet may turn out to have this issuer.
        let may_be = |tenant: &Tenant| !tenant.keys.has_keys() && name.split('/').any(|part| part == tenant.id);
        Err(if self.tenants.iter().any(may_be) { Refusal::KeysUnavailable } else { Refusal::Issuer })
    }

    /// What `jsonwebtoken` knows nothing of. The signature is good here.
    fn said(&self, tenant: &Tenant, version: Version, claims: Claims) -> Result<Said, Refusal> {
        if claims.tid != tenant.id {
            return Err(Refusal::Tenant);
        }
        let (its_version, client) = match version {
            Version::V1 => ("1.0", claims.appid),
            Version::V2 => ("2.0", claims.azp),
        };
        if claims.ver != its_version {
            return Err(Refusal::Version);
        }
        // An ID token of the same app has the same audience and issuer, and may have roles. This is what it lacks.
        let app = guid(&client.ok_or(Refusal::NotAnAccessToken)?).ok_or(Refusal::Claims)?;
        let object = guid(&claims.oid).ok_or(Refusal::Claims)?;
        if !self.clients.is_empty() && !self.clients.contains(&app) {
            return Err(Refusal::Client);
        }
        let of_an_app = match claims.idtyp.as_deref() {
            Some(kind) => kind == "app",
            // Of an app without a user, both name its service principal.
            None => claims.sub == claims.oid,
        };
        let permissions = match &claims.scp {
            // `scp` is about a user, who may have roles too: they are not the client's to use.
            Some(_) if claims.idtyp.as_deref() == Some("app") => return Err(Refusal::Claims),
            Some(scopes) => Permissions::named(scopes.split(' '), &self.scopes),
            None if of_an_app => Permissions::named(claims.roles.iter().flatten().map(String::as_str), &self.roles),
            None => Permissions::default(),
        };
        if permissions.is_empty() {
            return Err(Refusal::NoPermission);
        }
        let [tenant, object, app] = [tenant.id.as_str(), &object, &app].map(Box::from);
        let subject = Arc::new(Subject { tenant, object, app });
        Ok(Said { subject, delegated: claims.scp.is_some(), permissions })
    }
}

impl Claims {
    /// When the token is good, in whole seconds since 1970, with the leeway.
    fn good(&self) -> RangeInclusive<u64> {
        (self.nbf.ceil() as u64).saturating_sub(LEEWAY)..=(self.exp.floor() as u64).saturating_add(LEEWAY)
    }
}

fn validation(audiences: &[String]) -> Validation {
    let mut validation = Validation::new(Algorithm::RS256);
    validation.leeway = LEEWAY;
    validation.validate_nbf = true;
    validation.set_required_spec_claims(&["exp", "nbf", "iss", "aud"]);
    validation.set_audience(audiences);
    validation
}

/// What a tenant publishes that tokens of its callers can be checked with.
#[derive(Debug)]
pub struct Published {
    /// The issuers of its tokens, of version 2 and, where it is accepted, of version 1.
    pub issuers: Vec<String>,
    /// How many usable keys there are.
    pub keys: usize,
    /// How many of them are for these issuers.
    pub fitting_keys: usize,
}

/// What each tenant publishes, or why that cannot be had. Asks once, for whoever wants to see it.
///
/// # Errors
///
/// When TLS cannot be set up on this machine.
pub async fn inspect(
    settings: &EntraInbound,
    authority: &Url,
    extra_ca_pem: Option<&str>,
) -> Result<Vec<(String, Result<Published, String>)>, VerifierError> {
    let source = documents(settings, authority, extra_ca_pem)?;
    let ask = async |tenant: &String| {
        let published = source.fetch(tenant).await.and_then(|documents| {
            let keys = parse(&documents, tenant)?;
            let fitting_keys = keys.values().filter(|key| key.may_sign(Version::V2)).count();
            let issuers = [Some(documents.issuers.v2), documents.issuers.v1].into_iter().flatten().collect();
            Ok(Published { issuers, keys: keys.len(), fitting_keys })
        });
        (tenant.clone(), published)
    };
    Ok(futures_util::future::join_all(settings.tenants.iter().map(ask)).await)
}

fn documents(settings: &EntraInbound, authority: &Url, extra_ca_pem: Option<&str>) -> Result<Authority, VerifierError> {
    let extra_ca = match extra_ca_pem {
        Some(pem) => reqwest::Certificate::from_pem_bundle(pem.as_bytes())
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or(VerifierError::ExtraCa)?,
        None => Vec::new(),
    };
    // Version 1 tokens are accepted only where an App ID URI is an audience.
    Ok(Authority::new(authority, extra_ca, !settings.app_id_uris.is_empty())?)
}

/// What version 2 tokens of a tenant have as `iss` where the issuer is on the authority's host.
fn v2_issuer(authority: &Url, tenant: &str) -> String {
    format!("{}/{tenant}/v2.0", authority.as_str().trim_end_matches('/'))
}

/// The form with hyphens, in lower case.
fn guid(text: &str) -> Option<String> {
    (text.len() == 36 && Uuid::try_parse(text).is_ok()).then(|| text.to_ascii_lowercase())
}

fn refusal(error: &jsonwebtoken::errors::Error) -> Refusal {
    match error.kind() {
        ErrorKind::InvalidSignature => Refusal::Signature,
        ErrorKind::ExpiredSignature => Refusal::Expired,
        ErrorKind::ImmatureSignature => Refusal::NotYetValid,
        ErrorKind::InvalidAudience => Refusal::Audience,
        ErrorKind::InvalidIssuer => Refusal::Issuer,
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => Refusal::Algorithm,
        // The header and the claims could be read before: a claim is missing, or no text where it has to be one.
        ErrorKind::Json(_) | ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => Refusal::Claims,
        _ => Refusal::MalformedToken,
    }
}
