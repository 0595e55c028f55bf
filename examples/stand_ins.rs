//! Runs the stand-ins of `mcp-server demo` alone, for clients of other languages: prints one JSON line that says where
//! they are and how to get a token, and serves until standard input ends.
//!
//! `--fault …`, as often as wanted, makes them misbehave; see `mcp_server::demo::Fault`.

use std::io::Write;

use mcp_server::demo::entra::{EXPIRED_CLIENT_SECRET, SCOPE};
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
    let line = json!({
        "authority": stand_ins.entra.authority().as_str(),
        "ca_file": ca,
        "tenant_id": options.tenant_id,
        "client_id": options.client_id,
        "client_secret": options.client_secrets.first(),
        "expired_client_secret": EXPIRED_CLIENT_SECRET,
        "federated_token_file": assertion,
        "scope": SCOPE,
        "backend_url": stand_ins.backend.base_url().as_str(),
    });
    writeln!(std::io::stdout(), "{line}")?;
    tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await??;
    Ok(())
}
