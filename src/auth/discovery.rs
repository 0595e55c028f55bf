//! What a tenant publishes about its tokens: which issuer they name, and the keys that sign them.
//!
//! Both come from the tenant's metadata documents at the authority (OpenID Connect Discovery), one for each version of tokens: in some
//! clouds the issuer is on another host than the authority, and no rule derives one from the other. The authority is a setting, and TLS
//! vouches for it. What its documents say is held against two rules all the same: an issuer is an https URL whose path is that of this
//! one tenant, `/<tenant>/v2.0` or `/<tenant>/`; and keys come over https from the host of the authority or of one of those issuers.

use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture, try_join_all};
use serde_json::Value;
use url::Url;

/// One request, and all of those that one fetch takes.
pub(super) const FETCH: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(3);
/// Fetches are an hour apart, and the requests of one follow each other.
const IDLE: Duration = Duration::from_secs(5);
/// Entra's key sets have some ten KiB, with certificates.
const MAX_BODY: usize = 512 * 1024;

/// The form in which Entra writes a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// The issuers of a tenant's tokens, to the letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Issuers {
    pub(super) v2: String,
    /// `None` where version 1 tokens are not accepted.
    pub(super) v1: Option<String>,
}

impl Issuers {
    /// In which version this issuer writes.
    pub(super) fn version_of(&self, issuer: &str) -> Option<Version> {
        match issuer {
            _ if issuer == self.v2 => Some(Version::V2),
            _ if self.v1.as_deref() == Some(issuer) => Some(Version::V1),
            _ => None,
        }
    }
}

/// What a tenant publishes, as it came.
pub(super) struct Documents {
    pub(super) issuers: Issuers,
    /// The key set that version 2's metadata name.
    pub(super) keys: Vec<u8>,
    /// That of version 1's, where it is another one.
    pub(super) keys_of_v1: Option<Vec<u8>>,
}

/// Where the documents of a tenant come from.
pub(super) trait DocumentSource: Send + Sync + 'static {
    /// All of them, within bounds.
    fn fetch<'a>(&'a self, tenant: &'a str) -> BoxFuture<'a, Result<Documents, String>>;
}

/// The authority, over HTTPS.
pub(super) struct Authority {
    client: reqwest::Client,
    url: Url,
    accepts_v1: bool,
}

struct Metadata {
    issuer: Url,
    keys: Url,
}

impl Authority {
    pub(super) fn new(url: &Url, extra_ca: Vec<reqwest::Certificate>, accepts_v1: bool) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none()) // whoever could redirect us would choose the keys
            .connect_timeout(CONNECT)
            .timeout(FETCH)
            .pool_idle_timeout(IDLE)
            .tls_certs_merge(extra_ca)
            .build()?;
        Ok(Self { client, url: url.clone(), accepts_v1 })
    }

    async fn documents(&self, tenant: &str) -> Result<Documents, String> {
        let v1: OptionFuture<_> = self.accepts_v1.then(|| self.metadata(tenant, Version::V1)).into();
        let (v2, v1) = tokio::join!(self.metadata(tenant, Version::V2), v1);
        let (v2, v1) = (v2?, v1.transpose()?);
        let hosts: Vec<&Url> = [&self.url, &v2.issuer].into_iter().chain(v1.as_ref().map(|v1| &v1.issuer)).collect();
        let mut addresses = vec![&v2.keys];
        addresses.extend(v1.as_ref().map(|v1| &v1.keys).filter(|keys| **keys != v2.keys));
        for address in &addresses {
            if address.scheme() != "https" || !hosts.iter().any(|host| is_same_host(host, address)) {
                return Err(
                    "the metadata name keys that are not on the host of the authority or of the issuer".to_owned()
                );
            }
        }
        let mut sets = try_join_all(addresses.into_iter().map(|address| self.get(address.clone()))).await?.into_iter();
        let keys = sets.next().unwrap_or_default();
        let issuers = Issuers { v2: v2.issuer.into(), v1: v1.map(|v1| v1.issuer.into()) };
        Ok(Documents { issuers, keys, keys_of_v1: sets.next() })
    }

    async fn metadata(&self, tenant: &str, version: Version) -> Result<Metadata, String> {
        let (folder, path) = match version {
            Version::V1 => (tenant.to_owned(), format!("/{tenant}/")),
            Version::V2 => (format!("{tenant}/v2.0"), format!("/{tenant}/v2.0")),
        };
        let mut url = self.url.clone();
        url.set_path(&format!("{folder}/.well-known/openid-configuration"));
        let document: Value = serde_json::from_slice(&self.get(url).await?).map_err(|_| "the answer is not JSON")?;
        let text = |name: &str| document.get(name).and_then(Value::as_str);
        let named = text("issuer")
            .filter(|named| named.len() <= 200 && named.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'`'))
            .ok_or("the authority does not say which issuer its tokens have")?;
        let issuer = Url::parse(named)
            .ok()
            .filter(|url| url.scheme() == "https" && url.path() == path && is_bare(url) && url.as_str() == named);
        let issuer = issuer.ok_or_else(|| {
            format!("the authority says that its tokens have the issuer `{named}`, which is none of this tenant: expected `https://<host>{path}`")
        })?;
        let keys = text("jwks_uri").and_then(|keys| Url::parse(keys).ok()).filter(is_bare);
        Ok(Metadata { issuer, keys: keys.ok_or("the authority does not say where its keys are")? })
    }

    async fn get(&self, url: Url) -> Result<Vec<u8>, String> {
        let mut response = self.client.get(url).send().await.map_err(root_cause)?;
        if !response.status().is_success() {
            return Err(format!("HTTP {}", response.status().as_u16()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(root_cause)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(format!("the answer is larger than {MAX_BODY} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

impl DocumentSource for Authority {
    fn fetch<'a>(&'a self, tenant: &'a str) -> BoxFuture<'a, Result<Documents, String>> {
        Box::pin(self.documents(tenant))
    }
}

/// Without user info, query and fragment.
fn is_bare(url: &Url) -> bool {
    url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none()
}

fn is_same_host(one: &Url, other: &Url) -> bool {
    one.host().is_some() && one.host() == other.host() && one.port_or_known_default() == other.port_or_known_default()
}

fn root_cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut root: &dyn std::error::Error = &error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string()
}
