//! Is this token good, and who does it speak of? The checks of an access token of Entra ID, all of them or none.
//!
//! `jsonwebtoken` does signature, times, issuer and audience; what makes the token Entra's, and an access token, is checked here.
//! A token that was good is known when it comes again (`proven`): its times and its key are asked each time, so that its end is its end.

use std::ops::RangeInclusive;
use std::sync::Arc;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Validation, dangerous, decode, decode_header};
use secrecy::SecretString;
use serde::Deserialize;
use url::Url;
use uuid::Uuid;

use super::keys::{KeyEndpoint, KeySource, TenantKeys, Undecided};
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
    clients: Vec<String>,
    scopes: PermissionNames,
    roles: PermissionNames,
    keep_assertion: bool,
    proven: ProvenTokens,
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
    issuers: Vec<Issuer>,
    keys: TenantKeys,
}

/// One way in which a tenant writes tokens.
struct Issuer {
    name: String,
    version: Version,
    validation: Validation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// What is looked at before the signature is known to be good: only to find the key that has to have made it.
#[derive(Deserialize)]
struct Unverified {
    iss: String,
}

/// What a token has to say. Lists where Entra writes one text are refused, for two readers could take them for two things.
#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "iss")]
    _iss: String,
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
    /// Begins to fetch the keys, and does not wait for them. With `keep_assertion` identities keep their token, to exchange it.
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
        let source = Arc::new(key_endpoint(authority, extra_ca_pem)?);
        Ok(Self::with_source(settings, authority, source, keep_assertion))
    }

    pub(super) fn with_source(
        settings: &EntraInbound,
        authority: &Url,
        source: Arc<dyn KeySource>,
        keep_assertion: bool,
    ) -> Self {
        let tenant = |id: &String| {
            let v2 = v2_issuer(authority, id);
            let mut issuers = vec![Issuer::new(v2.clone(), Version::V2, &settings.client_ids)];
            if !settings.app_id_uris.is_empty() {
                // The audience of a version 1 token is what was asked for: the App ID URI, or the client id.
                let audiences = [&settings.app_id_uris[..], &settings.client_ids[..]].concat();
                issuers.push(Issuer::new(format!("https://sts.windows.net/{id}/"), Version::V1, &audiences));
            }
            let keys = TenantKeys::start(Arc::clone(&source), id.clone(), v2);
            Tenant { id: id.clone(), issuers, keys }
        };
        Self {
            tenants: settings.tenants.iter().map(tenant).collect(),
            clients: settings.clients.clone(),
            scopes: settings.scopes.clone(),
            roles: settings.roles.clone(),
            keep_assertion,
            proven: ProvenTokens::new(),
        }
    }

    /// Whether there are keys to check anything with.
    pub fn is_ready(&self) -> bool {
        self.tenants.iter().any(|tenant| tenant.keys.has_keys())
    }

    /// Who the token speaks of, if it was good before and nothing has changed.
    pub fn recall(&self, token: &str) -> Recalled {
        let Some(proof) = self.proven.get(token) else { return Recalled::Unknown };
        let holds = self.tenants.get(proof.tenant).is_some_and(|tenant| tenant.keys.hold(&proof.key));
        if holds && proof.is_timely() { Recalled::Good(self.identity(&proof.said, token)) } else { Recalled::Stale }
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
        let (place, tenant, issuer) = self.issuer(&iss).ok_or(Refusal::Issuer)?;
        let key = match tenant.keys.find(&kid).await {
            Ok(key) => key.ok_or(Refusal::UnknownKey)?,
            Err(Undecided::NoKeys) => return Err(Refusal::KeysUnavailable),
            Err(Undecided::Crowded) => return Err(Refusal::KeysAwaited),
        };
        if !key.issuer_fits {
            return Err(Refusal::KeyIssuer);
        }
        let claims: Claims = decode(token, &key.decoding, &issuer.validation).map_err(|error| refusal(&error))?.claims;
        let good = claims.good();
        let said = Arc::new(self.said(tenant, issuer.version, claims)?);
        Ok(Proof { said, tenant: place, key, good })
    }

    /// Who writes so, with the tenant's place.
    fn issuer(&self, name: &str) -> Option<(usize, &Tenant, &Issuer)> {
        self.tenants.iter().enumerate().find_map(|(place, tenant)| {
            let issuer = tenant.issuers.iter().find(|issuer| issuer.name == name)?;
            Some((place, tenant, issuer))
        })
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

impl Issuer {
    fn new(name: String, version: Version, audiences: &[String]) -> Self {
        let mut validation = Validation::new(Algorithm::RS256);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_required_spec_claims(&["exp", "nbf", "iss", "aud"]);
        validation.set_issuer(&[&name]);
        validation.set_audience(audiences);
        Self { name, version, validation }
    }
}

/// How many keys each tenant publishes that callers' tokens can be checked with, or why there are none. Asks once, for whoever
/// wants to see it.
///
/// # Errors
///
/// When TLS cannot be set up on this machine.
pub async fn inspect(
    settings: &EntraInbound,
    authority: &Url,
    extra_ca_pem: Option<&str>,
) -> Result<Vec<(String, Result<usize, String>)>, VerifierError> {
    let endpoint = key_endpoint(authority, extra_ca_pem)?;
    let ask = async |tenant: &String| {
        let keys = endpoint.inspect(tenant, &v2_issuer(authority, tenant)).await;
        (tenant.clone(), keys)
    };
    Ok(futures_util::future::join_all(settings.tenants.iter().map(ask)).await)
}

fn key_endpoint(authority: &Url, extra_ca_pem: Option<&str>) -> Result<KeyEndpoint, VerifierError> {
    let extra_ca = match extra_ca_pem {
        Some(pem) => reqwest::Certificate::from_pem_bundle(pem.as_bytes())
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or(VerifierError::ExtraCa)?,
        None => Vec::new(),
    };
    Ok(KeyEndpoint::new(authority, extra_ca)?)
}

/// What version 2 tokens of a tenant have as `iss`.
pub(crate) fn v2_issuer(authority: &Url, tenant: &str) -> String {
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
