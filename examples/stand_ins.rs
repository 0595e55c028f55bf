//! Runs the stand-ins of `mcp-server demo` alone, for clients of other languages: prints one JSON line that says where
//! they are and how to get a token, and serves until standard input ends.
//!
//! `--fault …`, as often as wanted, makes them misbehave; see `mcp_server::demo::Fault`.

use std::io::Write;

use mcp_server::demo::entra::{EXPIRED_CLIENT_SECRET, RESOURCE_APP_ID, SCOPE};
use mcp_server::demo::{DemoOptions, Fault, StandIns};
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let stand_ins = StandIns::start(DemoOptions::default()).await?;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().filter(|_| argument == "--fault");
        value.ok_or("usage: stand_ins [--fault FAULT]...")?.parse::<Fault>()?.apply(&stand_ins).await?;
    }

    let directory = tempfile::tempdir()?;
    let (ca, assertion) = (directory.path().join("ca.pem"), directory.path().join("token"));
    std::fs::write(&ca, stand_ins.entra.ca_pem())?;
    stand_ins.workload_identity_settings(&assertion)?;
    let options = stand_ins.entra.options();
    // Tokens of people and of an app for the application itself, to be exchanged on behalf of them.
    let token = |changes: serde_json::Value| {
        let mut claims = json!({
            "aud": options.client_id, "oid": "11111111-aaaa-4bbb-8ccc-dddddddddddd", "sub": "a-user-of-interop", "roles": null,
            "azp": "22222222-aaaa-4bbb-8ccc-dddddddddddd", "scp": "users.read tickets.read tickets.write data.read", "name": "A user",
        });
        if let (Some(claims), Some(changes)) = (claims.as_object_mut(), changes.as_object()) {
            claims.extend(changes.clone());
        }
        stand_ins.entra.access_token(&claims)
    };
    let line = json!({
        "authority": stand_ins.entra.authority().as_str(),
        "ca_file": ca,
        "tenant_id": options.tenant_id,
        "client_id": options.client_id,
        "client_secret": options.client_secrets.first(),
        "expired_client_secret": EXPIRED_CLIENT_SECRET,
        "federated_token_file": assertion,
        "scope": SCOPE,
        "user_id": "11111111-aaaa-4bbb-8ccc-dddddddddddd",
        "user_token": token(json!({})),
        "user_token_for_another_app": token(json!({ "aud": RESOURCE_APP_ID })),
        "app_token": token(json!({ "scp": null, "roles": ["users.read"] })),
        "backend_url": stand_ins.backend.base_url().as_str(),
    });
    writeln!(std::io::stdout(), "{line}")?;
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    Ok(())
}
