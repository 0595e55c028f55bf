//! `mcp-server demo`: the server on a laptop, against stand-ins for Entra ID and the backend, through the very same [`App`].
//!
//! [`App`]: super::App

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::demo::entra::{API_APP_ID, DemoCaller, PEOPLES_CLIENT_ID};
use crate::demo::{DemoOptions, Fault, StandIns};
use crate::settings::{InboundAuth, Settings, SettingsError, Vars};

/// How long the server may take to become ready before the introduction gives up on its call.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the demo can be asked for.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Let a stand-in fail, to watch the server cope: `backend=503:0.2`, `backend=slow:1.5`, `entra=down`, … (repeatable)
    #[arg(long = "fault", value_name = "WHERE=WHAT")]
    faults: Vec<Fault>,
    /// Let only callers in who have a token of the stand-in Entra ID, and print three that do
    #[arg(long)]
    auth: bool,
    /// Write the certificate authority of the stand-in Entra ID there, for clients that sign in at it
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

/// The stand-ins, running.
pub struct Demo {
    stand_ins: StandIns,
    faults: Vec<Fault>,
    auth: bool,
}

impl Demo {
    /// Starts the stand-ins on loopback ports of their own.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(options: &Options) -> anyhow::Result<Self> {
        let stand_ins = StandIns::start(DemoOptions::default()).await.context("cannot start the stand-ins")?;
        if let Some(file) = &options.ca_file {
            std::fs::write(file, stand_ins.entra.ca_pem())
                .with_context(|| format!("cannot write the certificate authority to {}", file.display()))?;
        }
        Ok(Self { stand_ins, faults: options.faults.clone(), auth: options.auth })
    }

    /// The settings that lead the server to them.
    ///
    /// # Errors
    ///
    /// When a variable that the demo honours cannot be read.
    pub fn settings(&self, vars: &impl Vars) -> Result<Settings, SettingsError> {
        let (identity, backend) = (self.stand_ins.identity_settings(), self.stand_ins.backend.base_url());
        let settings = Settings::for_demo(vars, identity, backend, self.auth.then_some(API_APP_ID))?;
        if let InboundAuth::Entra(inbound) = &settings.inbound {
            // As the recipe has it: the URL that clients use is the App ID URI, to the letter.
            self.stand_ins.entra.publish_api([String::from(inbound.public_url.clone())]);
        }
        Ok(settings)
    }

    /// Says where the server is and how to use it, makes one real call over HTTP, and shows it. Then lets the faults begin.
    /// Returns only with an error.
    pub async fn introduce(&self, address: SocketAddr, metrics: Option<SocketAddr>) -> anyhow::Error {
        match self.say_hello(address, metrics).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn token(&self, caller: DemoCaller) -> String {
        self.stand_ins.entra.caller_token(caller, &json!({}))
    }

    /// The tokens of those who may call, ready to paste into a shell.
    fn tokens(&self) -> String {
        if !self.auth {
            return String::new();
        }
        let mut text = "\nCallers need a token of the stand-in. These are good for an hour:\n".to_owned();
        for caller in DemoCaller::ALL {
            let (name, granted) = (caller.name(), caller.permissions().join(", "));
            let token = self.token(caller);
            text.push_str(&format!("\n  # the {name}: {granted}\n  {}='{token}'\n", name.to_uppercase()));
        }
        text.push_str(&format!(
            "\nClients that sign in by themselves: client id {PEOPLES_CLIENT_ID}; they have to trust the stand-in's certificate \
             authority (--ca-file).\n"
        ));
        text
    }

    #[expect(clippy::print_stdout, reason = "the demo's answer is for the person who started it")]
    async fn say_hello(&self, address: SocketAddr, metrics: Option<SocketAddr>) -> anyhow::Result<Infallible> {
        let base = format!("http://{address}");
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
        wait_until_ready(&http, &base).await?;
        let question = json!({
            "jsonrpc": "2.0", "id": 1, "method": "tools/call",
            "params": { "name": "get_user_profile", "arguments": { "user_id": "42", "include_details": true } },
        });
        let mut request = http
            .post(format!("{base}/mcp"))
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .header("mcp-protocol-version", "2025-11-25")
            .body(question.to_string());
        if self.auth {
            request = request.bearer_auth(self.token(DemoCaller::Writer));
        }
        let answer = request.send().await?.text().await?;
        let answer: Value = serde_json::from_str(&answer).context("the server's answer is no JSON")?;
        let result =
            answer.pointer("/result/structuredContent").with_context(|| format!("the first call failed: {answer}"))?;
        let list = json!({ "jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": { "name": "list_tickets", "arguments": { "status": "open", "limit": 3 } } });
        let metrics = metrics.map(|address| format!("\nMetrics        http://{address}/metrics")).unwrap_or_default();
        let mut vscode = json!({ "type": "http", "url": format!("{base}/mcp") });
        let mut claude = vec!["-y".to_owned(), "mcp-remote".to_owned(), format!("{base}/mcp")];
        if self.auth {
            let header = format!("Bearer {}", self.token(DemoCaller::Writer));
            claude.extend(["--header".to_owned(), format!("Authorization: {header}")]);
            vscode = json!({ "type": "http", "url": format!("{base}/mcp"), "headers": { "Authorization": header } });
        }
        println!(
            "\
mcp-server {version} (demo: stand-in Entra ID at {authority}, stand-in backend at {backend})

A call was made over HTTP, and a token fetched for it:

  -> {question}
  <- {result}

MCP endpoint   {base}/mcp
Health         {base}/health/ready{metrics}
{tokens}
Call a tool from a shell:

  curl -s {base}/mcp -H 'Content-Type: application/json' -H 'Accept: application/json, text/event-stream' \\
    {header}-d '{list}'

VS Code (.vscode/mcp.json):

  {vscode}

Claude Code:

  claude mcp add --transport http mcp-server-demo {base}/mcp{claude_header}

Claude Desktop (through the npm package mcp-remote):

  {claude}

Ctrl-C stops it.
",
            version = env!("CARGO_PKG_VERSION"),
            authority = self.stand_ins.entra.authority(),
            backend = self.stand_ins.backend.base_url(),
            tokens = self.tokens(),
            header = if self.auth { "-H \"Authorization: Bearer $WRITER\" " } else { "" },
            claude_header = if self.auth { " --header \"Authorization: Bearer $WRITER\"" } else { "" },
            vscode = json!({ "servers": { "mcp-server-demo": vscode } }),
            claude = json!({ "mcpServers": { "mcp-server-demo": { "command": "npx", "args": claude } } }),
        );
        for fault in &self.faults {
            fault.apply(&self.stand_ins).await?;
            println!("From now on: {fault}");
        }
        std::future::pending().await
    }
}

async fn wait_until_ready(http: &reqwest::Client, base: &str) -> anyhow::Result<()> {
    let ready = async {
        loop {
            if http.get(format!("{base}/health/ready")).send().await.is_ok_and(|answer| answer.status().is_success()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.context("the server did not become ready")
}
