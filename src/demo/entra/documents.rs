//! What the tenant, and the cluster that it trusts, publish for everybody: their metadata and their keys.

use serde_json::{Value, json};

use super::grants::Refusal;
use super::keys::SigningKey;
use super::{Directory, TokenVersion};

impl Directory {
    fn openid_configuration(&self, tenant: &str, version: TokenVersion) -> Result<Value, Refusal> {
        let common = ["common", "organizations"].contains(&tenant);
        if !common && !self.is_tenant(tenant) {
            return Err(Refusal::unknown_tenant("invalid_tenant", tenant));
        }
        let authority = &self.authority;
        let issuer = if common { self.issuer_of("{tenantid}", version) } else { self.issuer(version) };
        let (oauth2, keys) = match version {
            TokenVersion::V1 => ("oauth2", "common/discovery/keys".into()),
            TokenVersion::V2 => ("oauth2/v2.0", format!("{tenant}/discovery/v2.0/keys")),
        };
        Ok(json!({
            "token_endpoint": format!("{authority}/{tenant}/{oauth2}/token"),
            "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt"],
            "jwks_uri": format!("{authority}/{keys}"),
            "response_modes_supported": ["query", "fragment", "form_post"],
            "subject_types_supported": ["pairwise"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "response_types_supported": ["code", "id_token", "code id_token", "id_token token"],
            "scopes_supported": ["openid", "profile", "email", "offline_access"],
            "issuer": issuer,
            "request_uri_parameter_supported": false,
            "authorization_endpoint": format!("{authority}/{tenant}/{oauth2}/authorize"),
            "device_authorization_endpoint": format!("{authority}/{tenant}/{oauth2}/devicecode"),
            "end_session_endpoint": format!("{authority}/{tenant}/{oauth2}/logout"),
            "http_logout_supported": true,
            "frontchannel_logout_supported": true,
            "claims_supported": ["sub", "iss", "aud", "exp", "iat", "nonce", "name", "tid", "ver"],
            "tenant_region_scope": "EU",
            "cloud_instance_name": authority.trim_start_matches("https://"),
            "msgraph_host": "graph.microsoft.com",
        }))
    }

    fn published_keys(&self, issuer: &str) -> Value {
        json!({ "keys": self.keys.all().iter().map(|key| key.entra_jwk(issuer)).collect::<Vec<_>>() })
    }

    /// The documents that are there for everybody.
    pub(super) fn document(&self, segments: &[&str]) -> Option<Result<Value, Refusal>> {
        let authority = &self.authority;
        let host = authority.trim_start_matches("https://");
        let any_tenant = || self.issuer_of("{tenantid}", TokenVersion::V2);
        Some(Ok(match segments {
            ["common", "discovery", "instance"] => json!({
                "tenant_discovery_endpoint":
                    format!("{authority}/{}/v2.0/.well-known/openid-configuration", self.options.tenant_id),
                "api-version": "1.1",
                "metadata": [{ "preferred_network": host, "preferred_cache": host, "aliases": [host] }],
            }),
            ["cluster", ".well-known", "openid-configuration"] => json!({
                "issuer": self.cluster_issuer,
                "jwks_uri": format!("{}openid/v1/jwks", self.cluster_issuer),
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
            }),
            ["cluster", "openid", "v1", "jwks"] => json!({
                "keys": self.cluster_key().into_iter().map(SigningKey::kubernetes_jwk).collect::<Vec<_>>(),
            }),
            [tenant, "v2.0", ".well-known", "openid-configuration"] => {
                return Some(self.openid_configuration(tenant, TokenVersion::V2));
            }
            [tenant, ".well-known", "openid-configuration"] => {
                return Some(self.openid_configuration(tenant, TokenVersion::V1));
            }
            ["common" | "organizations", "discovery", "keys"]
            | ["common" | "organizations", "discovery", "v2.0", "keys"] => self.published_keys(&any_tenant()),
            [tenant, "discovery", "keys"] | [tenant, "discovery", "v2.0", "keys"] => {
                if !self.is_tenant(tenant) {
                    return Some(Err(Refusal::unknown_tenant("invalid_tenant", tenant)));
                }
                self.published_keys(&self.issuer(TokenVersion::V2))
            }
            _ => return None,
        }))
    }
}
