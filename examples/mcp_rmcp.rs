//! rmcp's own client: walks the plan and prints what it saw. Judges nothing: `scripts/interop` does.
//!
//! `mcp_rmcp URL MODE < plan.json`, where MODE is `auto`, `legacy`, or a version to pin.

#![expect(clippy::indexing_slicing, reason = "a `Value` without the field is `Null`: it does not panic")]

use std::error::Error;
use std::io::Write as _;
use std::time::Duration;

use futures_util::future::join_all;
use rmcp::model::{CallToolRequestParams, ProtocolVersion};
use rmcp::service::{ClientLifecycleMode, ClientServiceExt as _, RunningService, ServiceError};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::{Peer, RoleClient};
use serde_json::{Map, Value, json};

type Failure = Box<dyn Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(mode)) = (arguments.next(), arguments.next()) else {
        return Err("usage: mcp_rmcp URL MODE".into());
    };
    let plan: Value = serde_json::from_reader(std::io::stdin())?;
    let client = connect(&url, &mode).await?;
    let tools: Vec<_> = client.list_all_tools().await?.into_iter().map(|tool| tool.name).collect();
    let version = client.peer().peer_info().map(|server| server.protocol_version.clone());
    let mut steps = Map::new();
    for step in plan["steps"].as_array().into_iter().flatten() {
        steps.insert(step["name"].as_str().unwrap_or_default().to_owned(), seen(&client, step).await);
    }
    let parallel = plan["parallel"].as_array().into_iter().flatten().map(|call| seen(&client, call));
    let parallel = join_all(parallel).await;
    client.cancel().await?;
    let slow = match &plan["slow"] {
        Value::Null => Value::Null,
        slow => give_up(&mode, slow).await?.into(),
    };
    let seen = json!({ "version": version, "tools": tools, "steps": steps, "parallel": parallel, "slow": slow });
    writeln!(std::io::stdout(), "{seen}")?;
    Ok(())
}

async fn connect(url: &str, mode: &str) -> Result<RunningService<RoleClient, ()>, Failure> {
    let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
    let lifecycle = match mode {
        "legacy" => ClientLifecycleMode::Initialize,
        "auto" => ClientLifecycleMode::Auto { preferred_versions, legacy_version: None },
        _ => ClientLifecycleMode::Discover { preferred_versions },
    };
    Ok(().serve_with_lifecycle(StreamableHttpClientTransport::from_uri(url), lifecycle).await?)
}

fn request(step: &Value) -> CallToolRequestParams {
    let arguments = step["arguments"].as_object().cloned().unwrap_or_default();
    CallToolRequestParams::new(step["tool"].as_str().unwrap_or_default().to_owned()).with_arguments(arguments)
}

async fn seen(client: &Peer<RoleClient>, step: &Value) -> Value {
    match client.call_tool(request(step)).await {
        Ok(result) => json!({ "result": result }),
        Err(ServiceError::McpError(error)) => json!({ "error": { "code": error.code, "message": error.message } }),
        Err(error) => json!({ "threw": error.to_string() }),
    }
}

/// Stops waiting for a call, stays for a while, and leaves.
async fn give_up(mode: &str, slow: &Value) -> Result<&'static str, Failure> {
    let seconds = |name: &str| Duration::from_secs_f64(slow[name].as_f64().unwrap_or_default());
    let client = connect(slow["url"].as_str().unwrap_or_default(), mode).await?;
    let waited = tokio::time::timeout(seconds("patience_s"), client.call_tool(request(slow))).await;
    tokio::time::sleep(seconds("linger_s")).await;
    client.cancel().await?;
    Ok(if waited.is_err() { "gave up" } else { "was answered" })
}
