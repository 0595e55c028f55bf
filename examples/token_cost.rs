//! What it costs to check one caller's token: microseconds per token, for a good one and for each way to be bad that an attacker
//! can have for nothing.
//!
//! `cargo run --release --example token_cost [TOKENS]`: rounds of each kind take turns, so that a busy moment of the machine hits
//! all of them; what is printed is the median of the rounds, with the fastest and the slowest.

use std::hint::black_box;
use std::io::Write as _;
use std::time::{Duration, Instant};

use mcp_server::auth::Verifier;
use mcp_server::demo::entra::{API_APP_ID, DemoCaller, EntraOptions, StandInEntra};
use mcp_server::settings::{EntraInbound, PermissionNames};
use serde_json::json;

const ROUNDS: usize = 21;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let tokens: usize = std::env::args().nth(1).map_or(Ok(20_000), |count| count.parse())?;
    let entra = StandInEntra::start(EntraOptions::default()).await?;
    let inbound = EntraInbound {
        client_ids: vec![API_APP_ID.to_owned()],
        app_id_uris: Vec::new(),
        tenants: vec![entra.options().tenant_id.clone()],
        clients: Vec::new(),
        public_url: "https://mcp.contoso.example/mcp".parse()?,
        scopes: PermissionNames::default(),
        roles: PermissionNames::default(),
    };
    let verifier = Verifier::start(&inbound, &entra.authority(), Some(entra.ca_pem()), false)?;
    while !verifier.is_ready() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let good = entra.caller_token(DemoCaller::Writer, &json!({}));
    let claims = entra.caller_claims(DemoCaller::Writer, &json!({}));
    let forged = format!("{}AAAA", good.get(..good.len() - 4).unwrap_or_default());
    let kinds = [
        ("good", good),
        ("good, of an app", entra.caller_token(DemoCaller::Agent, &json!({}))),
        ("expired", entra.caller_token(DemoCaller::Writer, &json!({ "exp": 1 }))),
        ("forged signature", forged),
        ("unknown key", entra.sign(&json!({ "kid": "unknown" }), &claims)),
        ("foreign issuer", entra.caller_token(DemoCaller::Writer, &json!({ "iss": "https://evil.example" }))),
        ("garbage", "garbage".repeat(100)),
    ];
    // The one fetch that an unknown key may cause is not a part of the cost.
    for (_, token) in &kinds {
        let _ = verifier.verify(token).await;
    }
    let each = (tokens / ROUNDS).max(1);
    let mut costs = vec![Vec::new(); kinds.len()];
    for _ in 0..ROUNDS {
        for (costs, (_, token)) in costs.iter_mut().zip(&kinds) {
            let begin = Instant::now();
            for _ in 0..each {
                let _ = black_box(verifier.verify(black_box(token)).await);
            }
            costs.push(begin.elapsed().as_secs_f64() * 1e6 / each as f64);
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "microseconds per token, {ROUNDS} rounds of {each} of each kind\n")?;
    for ((name, token), costs) in kinds.iter().zip(&mut costs) {
        costs.sort_by(f64::total_cmp);
        let at = |place: usize| costs.get(place).copied().unwrap_or_default();
        let (median, least, most) = (at(ROUNDS / 2), at(0), at(ROUNDS - 1));
        writeln!(out, "{name:18} {median:7.2}   ({least:.2} to {most:.2}, {} bytes)", token.len())?;
    }
    Ok(())
}
