//! Tokens that nobody asked for over HTTP, the keys that sign all of them, and how long they live.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use super::keys::{self, SigningKey, Verifier};
use super::{Directory, StandInEntra, grants};
use crate::demo::wire::unix_now;

/// Which claims a resource wants in its tokens (`requestedAccessTokenVersion`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenVersion {
    /// `iss` is `sts.windows.net`, `aud` is what was asked for, the client is `appid`.
    V1,
    /// `iss` ends in `/v2.0`, `aud` is the resource's client id, the client is `azp`.
    V2,
}

impl StandInEntra {
    /// The issuer of its tokens, as their `iss` has it.
    #[must_use]
    pub fn issuer(&self, version: TokenVersion) -> String {
        self.state.directory.issuer(version)
    }

    /// A verifier for tokens of the first resource.
    #[must_use]
    pub fn verifier(&self) -> Verifier {
        let directory = &self.state.directory;
        let resource = directory.options.resources.iter().take(1);
        Verifier {
            keys: directory.keys.clone(),
            issuers: [TokenVersion::V1, TokenVersion::V2].map(|version| directory.issuer(version)).into(),
            audiences: resource
                .flat_map(|one| std::iter::once(&one.app_id).chain(&one.identifier_uris))
                .cloned()
                .collect(),
        }
    }

    /// A token as the kubelet projects it for the trusted service account, good for an hour. The fields of `changes`
    /// replace claims, `null` removes one.
    #[must_use]
    pub fn service_account_token(&self, changes: &Value) -> String {
        let (directory, now) = (&self.state.directory, unix_now());
        let subject = &directory.options.federated_subject;
        let mut account = subject.rsplit(':');
        let (name, namespace) = (account.next().unwrap_or_default(), account.next().unwrap_or_default());
        let uid = Uuid::nil().to_string();
        let mut claims = json!({
            "aud": ["api://AzureADTokenExchange"], "iss": directory.cluster_issuer, "sub": subject,
            "iat": now, "nbf": now, "exp": now + 3600, "jti": Uuid::new_v4().to_string(),
            "kubernetes.io": { "namespace": namespace, "serviceaccount": { "name": name, "uid": uid } },
        });
        keys::overlay(&mut claims, changes);
        let header = json!({ "typ": null, "x5t": null });
        directory.cluster_key().map(|key| key.sign(&header, &claims)).unwrap_or_default()
    }

    /// An app-only access token for the first resource, without asking over HTTP. The fields of `changes` replace
    /// claims, `null` removes one.
    #[must_use]
    pub fn access_token(&self, changes: &Value) -> String {
        let directory = &self.state.directory;
        let mut claims = match directory.options.resources.first() {
            Some(resource) => grants::app_claims(directory, resource, &resource.app_id),
            None => json!({}),
        };
        keys::overlay(&mut claims, changes);
        self.sign(&json!({}), &claims)
    }

    /// Signs any claims with the current key. `header` is laid over `typ`, `alg`, `kid` and `x5t`; its `alg` is obeyed
    /// where that can be done: the RSA ones, `none` (no signature), and the HMAC ones, whose secret is then the public
    /// key as PEM. Anything else is signed as RS256.
    #[must_use]
    pub fn sign(&self, header: &Value, claims: &Value) -> String {
        self.state.directory.keys.sign(header, claims)
    }

    /// A new key signs from now on; the one before stays published.
    ///
    /// # Errors
    /// When no key can be made.
    pub async fn rotate_keys(&self) -> io::Result<()> {
        self.state.directory.keys.rotate(new_entra_key().await?, true);
        Ok(())
    }

    /// A new key signs from now on and all others are gone: tokens handed out before are no longer accepted.
    ///
    /// # Errors
    /// When no key can be made.
    pub async fn replace_keys(&self) -> io::Result<()> {
        self.state.directory.keys.rotate(new_entra_key().await?, false);
        Ok(())
    }

    /// How long tokens live that are handed out from now on, in whole seconds.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.state.directory.token_lifetime_secs.store(lifetime.as_secs(), Ordering::Relaxed);
    }
}

impl Directory {
    pub(super) fn issuer(&self, version: TokenVersion) -> String {
        self.issuer_of(&self.options.tenant_id, version)
    }

    /// The same for any tenant, or for the template of all.
    pub(super) fn issuer_of(&self, tenant: &str, version: TokenVersion) -> String {
        match version {
            TokenVersion::V1 => format!("{}/{tenant}/", self.options.v1_issuer_origin),
            TokenVersion::V2 => {
                format!("{}/{tenant}/v2.0", self.options.issuer_origin.as_deref().unwrap_or(&self.authority))
            }
        }
    }

    pub(super) fn cluster_key(&self) -> Option<&SigningKey> {
        self.cluster_key.get_or_init(|| SigningKey::generate("kubernetes").ok()).as_ref()
    }

    pub(super) fn token_lifetime(&self) -> Duration {
        Duration::from_secs(self.token_lifetime_secs.load(Ordering::Relaxed))
    }
}

pub(super) async fn new_entra_key() -> io::Result<Arc<SigningKey>> {
    let key = tokio::task::spawn_blocking(|| SigningKey::generate("accounts.accesscontrol.windows.net"));
    key.await.map_err(io::Error::other)?.map(Arc::new)
}
