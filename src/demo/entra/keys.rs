//! The keys of the stand-in Entra and of its cluster, and what can be done with them: publish, sign, verify.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, crypto};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::super::wire::unix_now;

/// How many retired keys stay published.
const KEPT_KEYS: usize = 2;

/// One RSA key.
pub(super) struct SigningKey {
    kid: String,
    n: String,
    e: String,
    certificate: String,
    public_pem: String,
    private: EncodingKey,
    public: DecodingKey,
}

impl SigningKey {
    /// Makes a new key; that takes some tenths of a second.
    pub(super) fn generate(name: &str) -> io::Result<Self> {
        let pair = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).map_err(io::Error::other)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&pair).map_err(io::Error::other)?;
        let private = EncodingKey::from_rsa_pem(pair.serialize_pem().as_bytes()).map_err(io::Error::other)?;
        let jwk = Jwk::from_encoding_key(&private, Algorithm::RS256).map_err(io::Error::other)?;
        let AlgorithmParameters::RSA(numbers) = jwk.algorithm else {
            return Err(io::Error::other("an RSA key without RSA parameters"));
        };
        let hash = Sha256::digest(certificate.der());
        Ok(Self {
            kid: URL_SAFE_NO_PAD.encode(hash.get(..20).unwrap_or_default()),
            public: DecodingKey::from_rsa_components(&numbers.n, &numbers.e).map_err(io::Error::other)?,
            n: numbers.n,
            e: numbers.e,
            certificate: STANDARD.encode(certificate.der()),
            public_pem: pair.public_key_pem(),
            private,
        })
    }

    /// As Entra publishes a key: no `alg`, and the issuer it is for.
    pub(super) fn entra_jwk(&self, issuer: &str) -> Value {
        json!({ "kty": "RSA", "use": "sig", "kid": self.kid, "x5t": self.kid, "n": self.n, "e": self.e,
                "x5c": [self.certificate], "issuer": issuer })
    }

    /// As a Kubernetes API server publishes a key.
    pub(super) fn kubernetes_jwk(&self) -> Value {
        json!({ "kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid, "n": self.n, "e": self.e })
    }

    /// Signs whatever it is given; see [`super::StandInEntra::sign`].
    pub(super) fn sign(&self, header: &Value, claims: &Value) -> String {
        let mut full = json!({ "typ": "JWT", "alg": "RS256", "kid": self.kid, "x5t": self.kid });
        overlay(&mut full, header);
        let alg = full.get("alg").and_then(Value::as_str).unwrap_or("RS256").to_owned();
        let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let message = format!("{}.{}", encode(&full), encode(claims));
        let signature = match alg.parse() {
            _ if alg.eq_ignore_ascii_case("none") => Ok(String::new()),
            Ok(hmac @ (Algorithm::HS256 | Algorithm::HS384 | Algorithm::HS512)) => {
                crypto::sign(message.as_bytes(), &EncodingKey::from_secret(self.public_pem.as_bytes()), hmac)
            }
            Ok(
                rsa @ (Algorithm::RS384 | Algorithm::RS512 | Algorithm::PS256 | Algorithm::PS384 | Algorithm::PS512),
            ) => crypto::sign(message.as_bytes(), &self.private, rsa),
            _ => crypto::sign(message.as_bytes(), &self.private, Algorithm::RS256),
        };
        format!("{message}.{}", signature.unwrap_or_default())
    }
}

/// Puts the fields of `changes` over those of `target`; `null` takes a field away.
pub(super) fn overlay(target: &mut Value, changes: &Value) {
    let (Some(target), Some(changes)) = (target.as_object_mut(), changes.as_object()) else { return };
    for (name, value) in changes {
        if value.is_null() {
            target.remove(name);
        } else {
            target.insert(name.clone(), value.clone());
        }
    }
}

/// The key that signs now, and those that signed before.
pub(super) struct KeySet(Vec<Arc<SigningKey>>);

/// A key set that many hold.
#[derive(Clone)]
pub(super) struct SharedKeys(Arc<RwLock<KeySet>>);

impl SharedKeys {
    pub(super) fn new(key: Arc<SigningKey>) -> Self {
        Self(Arc::new(RwLock::new(KeySet(vec![key]))))
    }

    /// All published keys, the signing one first.
    pub(super) fn all(&self) -> Vec<Arc<SigningKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// `key` signs from now on; the keys before it stay published if `keep` says so.
    pub(super) fn rotate(&self, key: Arc<SigningKey>, keep: bool) {
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        keys.0.truncate(if keep { KEPT_KEYS } else { 0 });
        keys.0.insert(0, key);
    }

    pub(super) fn sign(&self, header: &Value, claims: &Value) -> String {
        self.all().first().map(|key| key.sign(header, claims)).unwrap_or_default()
    }
}

/// A token taken apart. Nothing in it is checked yet.
pub(super) struct Jws<'a> {
    header: Map<String, Value>,
    pub(super) claims: Map<String, Value>,
    message: &'a str,
    signature: &'a str,
}

/// Why a token's signature does not count.
pub(super) enum BadSignature {
    /// No key of the set has the token's key id, or the algorithm is not RS256.
    NoKey,
    /// The key says no.
    Mismatch,
}

impl<'a> Jws<'a> {
    pub(super) fn parse(token: &'a str) -> Option<Self> {
        let (message, signature) = token.rsplit_once('.')?;
        let (header, claims) = message.split_once('.')?;
        let object = |part| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok();
        Some(Self { header: object(header)?, claims: object(claims)?, message, signature })
    }

    pub(super) fn text(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim).and_then(Value::as_str)
    }

    pub(super) fn seconds(&self, claim: &str) -> Option<i64> {
        self.claims.get(claim).and_then(Value::as_f64).map(|seconds| seconds as i64)
    }

    pub(super) fn check_signature<'k>(
        &self,
        keys: impl IntoIterator<Item = &'k SigningKey>,
    ) -> Result<(), BadSignature> {
        let named = |name| self.header.get(name).and_then(Value::as_str);
        let fits = |key: &&SigningKey| named("alg") == Some("RS256") && named("kid") == Some(&key.kid);
        let key = keys.into_iter().find(fits).ok_or(BadSignature::NoKey)?;
        match crypto::verify(self.signature, self.message.as_bytes(), &key.public, Algorithm::RS256) {
            Ok(true) => Ok(()),
            _ => Err(BadSignature::Mismatch),
        }
    }
}

/// Checks access tokens as a resource server does: by signature, issuer, audience and time. It shares the stand-in's
/// keys, so a rotation is known at once. Cheap to clone.
#[derive(Clone)]
pub struct Verifier {
    pub(super) keys: SharedKeys,
    pub(super) issuers: Arc<[String]>,
    pub(super) audiences: Arc<[String]>,
}

/// Why a bearer token was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenRejected {
    /// It cannot be taken apart.
    #[error("the token is malformed")]
    Malformed,
    /// No published key has its key id, or its algorithm is not RS256.
    #[error("the token's signing key is not known")]
    UnknownKey,
    /// The signature does not fit.
    #[error("the token's signature is wrong")]
    Signature,
    /// Another issuer made it.
    #[error("the token's issuer is not trusted")]
    Issuer,
    /// It was made for another resource.
    #[error("the token is for another audience")]
    Audience,
    /// Its time is over, or it names none.
    #[error("the token is expired")]
    Expired,
    /// Its time has not come.
    #[error("the token is not valid yet")]
    NotYetValid,
}

impl Verifier {
    /// The token's claims, if it is good. No leeway is given: issuer and resource share one clock here.
    ///
    /// # Errors
    /// The first check that the token fails.
    pub fn verify(&self, token: &str) -> Result<Map<String, Value>, TokenRejected> {
        let jws = Jws::parse(token).ok_or(TokenRejected::Malformed)?;
        let keys = self.keys.all();
        jws.check_signature(keys.iter().map(Arc::as_ref)).map_err(|bad| match bad {
            BadSignature::NoKey => TokenRejected::UnknownKey,
            BadSignature::Mismatch => TokenRejected::Signature,
        })?;
        let one_of = |list: &[String], claim| jws.text(claim).is_some_and(|value| list.iter().any(|one| one == value));
        let now = unix_now();
        if !one_of(&self.issuers, "iss") {
            return Err(TokenRejected::Issuer);
        }
        if !one_of(&self.audiences, "aud") {
            return Err(TokenRejected::Audience);
        }
        if jws.seconds("exp").is_none_or(|exp| exp <= now) {
            return Err(TokenRejected::Expired);
        }
        if jws.seconds("nbf").is_some_and(|nbf| nbf > now) {
            return Err(TokenRejected::NotYetValid);
        }
        Ok(jws.claims)
    }
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier")
            .field("issuers", &self.issuers)
            .field("audiences", &self.audiences)
            .finish_non_exhaustive()
    }
}
