//! The way to a token, gone once and step by step, without the background work of a token source: for `mcp-server check`.
//!
//! What a token claims is decoded here to be shown to a person. It is never verified, and nothing may be decided by it.

use std::path::Path;
use std::time::Duration;

use azure_core::base64::decode_url_safe;
use serde_json::{Map, Value};
use tokio::time::timeout;
use url::Url;

use super::chain::{Exchange, IdentityStartError, read_assertion};
use super::fault::{FaultClass, IdentityError};
use super::source::{BearerToken, budget};
use super::transport::Greeting;
use crate::settings::IdentitySettings;

/// For one look at the disk, or at DNS.
const LOOK: Duration = Duration::from_secs(3);
/// Claims are shown up to so many characters.
const LONGEST_CLAIM: usize = 256;

/// All that one look takes.
pub struct Inspection {
    settings: IdentitySettings,
    exchange: Exchange,
}

impl Inspection {
    /// As [`TokenSource::start`](super::TokenSource::start), but nothing is started.
    pub fn new(settings: &IdentitySettings, call_timeout: Duration) -> Result<Self, IdentityStartError> {
        Ok(Self { settings: settings.clone(), exchange: Exchange::new(settings, budget(call_timeout))? })
    }

    /// Asks the authority something that needs no credential: fails when there is no connection to it.
    pub async fn greet(&self) -> Result<Greeting, Box<IdentityError>> {
        match self.exchange.greet().await {
            Err(error) if error.class == FaultClass::Timeout && !resolves(&self.settings.authority).await => {
                Err(Box::new(IdentityError { class: FaultClass::Dns, ..*error }))
            }
            answer => answer,
        }
    }

    /// One exchange, as the server makes it.
    pub async fn token(&self) -> Result<BearerToken, Box<IdentityError>> {
        self.exchange.run().await
    }
}

/// Whether the name of this host can be resolved: a time limit for connections covers the resolver too, and hides which it was.
pub async fn resolves(url: &Url) -> bool {
    let Some(url::Host::Domain(name)) = url.host() else { return true };
    matches!(timeout(LOOK, tokio::net::lookup_host((name, 0))).await, Ok(Ok(_)))
}

/// What a token says of itself, unverified. Texts are cut and free of control characters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claims {
    /// `iss`: who issued it.
    pub issuer: Option<String>,
    /// `sub`: for whom.
    pub subject: Option<String>,
    /// `aud`: for whose eyes.
    pub audiences: Vec<String>,
    /// `iat`, in seconds since 1970.
    pub issued_at: Option<i64>,
    /// `exp`, in seconds since 1970.
    pub expires_at: Option<i64>,
    /// `azp`, or `appid` in version 1: which app asked.
    pub app: Option<String>,
    /// `oid`: that app's object in the tenant.
    pub object: Option<String>,
    /// `roles`: the app roles granted to it.
    pub roles: Vec<String>,
    /// `ver`: the version of an Entra token.
    pub version: Option<String>,
}

impl Claims {
    /// Of the federated token in a file; `None` when the file holds something else.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or is empty.
    pub async fn of_file(path: &Path) -> Result<Option<Self>, Box<IdentityError>> {
        match timeout(LOOK, read_assertion(path)).await {
            Ok(assertion) => Ok(Self::decode(&assertion?)),
            Err(_elapsed) => {
                let error = IdentityError::new(FaultClass::Config, "workload identity");
                let path = path.display();
                Err(Box::new(error.with_detail(format!("federated token file {path}: cannot be read within {LOOK:?}"))))
            }
        }
    }

    /// Of a token for the backend; `None` when it is opaque, as a token may be.
    pub fn of_token(token: &BearerToken) -> Option<Self> {
        Self::decode(token.authorization().to_str().ok()?.strip_prefix("Bearer ")?)
    }

    fn decode(token: &str) -> Option<Self> {
        let parts: Vec<&str> = token.split('.').collect();
        let [header, claims, signature] = parts.as_slice() else { return None };
        let object = |part| serde_json::from_slice::<Map<String, Value>>(&decode_url_safe(part).ok()?).ok();
        if signature.is_empty() || object(*header).is_none() {
            return None;
        }
        let claims = object(*claims)?;
        let text = |name: &str| claims.get(name).and_then(Value::as_str).map(shown);
        let texts = |name: &str| match claims.get(name) {
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).map(shown).collect(),
            Some(Value::String(one)) => vec![shown(one)],
            _ => Vec::new(),
        };
        // A fraction of a second is legal in a JWT.
        let seconds = |name: &str| claims.get(name).and_then(Value::as_f64).map(|seconds| seconds as i64);
        Some(Self {
            issuer: text("iss"),
            subject: text("sub"),
            audiences: texts("aud"),
            issued_at: seconds("iat"),
            expires_at: seconds("exp"),
            app: text("azp").or_else(|| text("appid")),
            object: text("oid"),
            roles: texts("roles"),
            version: text("ver"),
        })
    }
}

fn shown(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(LONGEST_CLAIM).collect()
}

#[cfg(test)]
mod tests {
    use azure_core::base64::encode_url_safe;

    use super::*;

    fn token(claims: &str) -> String {
        format!("{}.{}.c2ln", encode_url_safe(r#"{"alg":"RS256"}"#), encode_url_safe(claims))
    }

    #[test]
    fn claims_are_read_in_either_form_and_one_odd_claim_costs_only_itself() {
        let version_1 =
            r#"{"iss":"https://sts/","aud":"api://x","appid":"a","roles":["r","s",7],"iat":1.5,"exp":"never"}"#;
        let expected = Claims {
            issuer: Some("https://sts/".to_owned()),
            audiences: vec!["api://x".to_owned()],
            issued_at: Some(1),
            app: Some("a".to_owned()),
            roles: vec!["r".to_owned(), "s".to_owned()],
            ..Claims::default()
        };
        assert_eq!(Claims::decode(&token(version_1)), Some(expected));
        let federated = Claims::decode(&token("{\"aud\":[\"a\",\"b\"],\"sub\":\"x\\u001b\\ny\",\"exp\":9}")).unwrap();
        assert_eq!(
            (federated.audiences.len(), federated.subject.as_deref(), federated.expires_at),
            (2, Some("xy"), Some(9))
        );
    }

    #[test]
    fn what_is_no_token_has_no_claims() {
        let whole = token("{}");
        let (header_and_claims, _) = whole.rsplit_once('.').unwrap();
        for text in
            ["", "canary", "a.b.c", "a.b.c.d.e", header_and_claims, &format!("{header_and_claims}."), &token("[]")]
        {
            assert_eq!(Claims::decode(text), None, "{text}");
        }
        assert_eq!(Claims::decode(&whole), Some(Claims::default()));
    }
}
