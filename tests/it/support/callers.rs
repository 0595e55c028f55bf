//! A server that wants tokens of its callers, and tokens of every kind for it.

use mcp_server::demo::entra::{API_APP_ID, DemoCaller};
use mcp_server::settings::{EntraInbound, InboundAuth, PermissionNames, Settings};
use serde_json::{Value, json};

use super::{Era, TestApp};

/// The URL that clients of these servers would write.
pub const PUBLIC_URL: &str = "https://mcp.contoso.example/mcp";
/// Where the challenge sends them.
pub const METADATA_URL: &str = "https://mcp.contoso.example/.well-known/oauth-protected-resource/mcp";

/// The settings of a server whose callers come from the stand-in's tenant.
pub fn inbound(tenant: &str) -> EntraInbound {
    EntraInbound {
        client_ids: vec![API_APP_ID.to_owned()],
        app_id_uris: Vec::new(),
        tenants: vec![tenant.to_owned()],
        clients: Vec::new(),
        public_url: PUBLIC_URL.parse().unwrap(),
        scopes: PermissionNames::default(),
        roles: PermissionNames::default(),
    }
}

impl TestApp {
    /// Its callers need tokens; ready when it can check them.
    pub async fn guarded() -> Self {
        Self::guarded_with(|_| {}, |_| {}).await
    }

    /// The same with other settings.
    pub async fn guarded_with(
        change_inbound: impl FnOnce(&mut EntraInbound),
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let app = Self::spawn_with(|settings| {
            let mut inbound = inbound(&settings.identity.tenant_id);
            change_inbound(&mut inbound);
            settings.inbound = InboundAuth::Entra(Box::new(inbound));
            change(settings);
        })
        .await;
        app.until_ready().await;
        app
    }

    /// A token of one of the stand-in's callers.
    pub fn token(&self, caller: DemoCaller) -> String {
        self.token_with(caller, json!({}))
    }

    /// The same with other claims.
    pub fn token_with(&self, caller: DemoCaller, changes: Value) -> String {
        self.stand_ins.entra.caller_token(caller, &changes)
    }

    /// Sends one MCP request with a token.
    pub async fn send_as(&self, token: &str, era: Era, method: &str, params: Value) -> reqwest::Response {
        self.request(era, method, params).bearer_auth(token).send().await.unwrap()
    }
}
