//! The candidates: built, started on their cores, asked, stopped. Each is a process of its own.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::backend;
use crate::calls::authorization;
use crate::machine::{Placement, pause, stay_on};

/// As long as the token that the server gets.
const TOKEN_LENGTH: usize = 1_144;
/// Where `server-observed` keeps its audit.
const AUDIT_FILE: &str = "audit";

/// What is measured: this server, a plain rmcp server, and a bare pass-through; and the server with more, or less, switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Name {
    Server,
    RmcpRaw,
    Floor,
    /// Nothing observed: no log but the audit, no metrics.
    ServerQuiet,
    /// Everything observed: beside logs and metrics each call is traced, and kept in the audit file.
    ServerObserved,
    /// Every caller needs a token, which is checked at each call.
    ServerGuarded,
}

impl Name {
    /// Those that are measured unless others are named.
    pub const ALL: [Self; 3] = [Self::Server, Self::RmcpRaw, Self::Floor];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::RmcpRaw => "rmcp-raw",
            Self::Floor => "floor",
            Self::ServerQuiet => "server-quiet",
            Self::ServerObserved => "server-observed",
            Self::ServerGuarded => "server-guarded",
        }
    }

    /// Whether it is this server, however it is set.
    pub fn is_ours(self) -> bool {
        !matches!(self, Self::RmcpRaw | Self::Floor)
    }

    /// Whether it hands the backend's answers through as they are.
    pub fn passes_through(self) -> bool {
        self == Self::Floor
    }

    /// Builds what is missing or stale, and returns the executable.
    pub fn build(self) -> anyhow::Result<PathBuf> {
        match self {
            // As a newcomer would, and as a careful maintainer would: see the profiles.
            Self::RmcpRaw => build("Cargo.toml", &["--release", "--package", "rmcp-raw"]),
            Self::Floor => build("Cargo.toml", &["--profile=tuned", "--package", "floor"]),
            _ => build("../Cargo.toml", &["--release", "--bin", "mcp-server"]),
        }
    }
}

fn build(manifest: &str, arguments: &[&str]) -> anyhow::Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join(manifest);
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--locked", "--message-format=json-render-diagnostics", "--manifest-path"]).arg(manifest);
    let output = cargo.args(arguments).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    anyhow::ensure!(output.status.success(), "cargo build {} failed", arguments.join(" "));
    let executable = output.stdout.rsplit(|byte| *byte == b'\n').find_map(|line| {
        let message: Value = serde_json::from_slice(line).ok()?;
        message["executable"].as_str().map(PathBuf::from)
    });
    executable.context("cargo names no executable")
}

/// The server's own stand-in of Entra ID, a process that ends with its standard input. It is asked for one token.
struct StandIns {
    child: Child,
    told: Told,
}

/// What it tells of itself.
#[derive(Deserialize)]
struct Told {
    authority: String,
    ca_file: String,
    tenant_id: String,
    client_id: String,
    client_secret: String,
    scope: String,
    user_token: String,
}

impl StandIns {
    fn start(executable: &Path) -> anyhow::Result<Self> {
        let mut child = Command::new(executable).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        Ok(Self { child, told: serde_json::from_str(&line).context("the stand-ins do not start")? })
    }
}

impl Drop for StandIns {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// What all candidates share: the backend, the stand-in of Entra ID, and the cores.
pub struct Stage {
    placement: Placement,
    backend: SocketAddr,
    entra: StandIns,
    folder: TempDir,
}

impl Stage {
    /// Builds what is needed beside the candidates, on all cores, then starts it on those of the load, where this thread stays.
    pub fn set(placement: Placement) -> anyhow::Result<Self> {
        let stand_ins = build("../Cargo.toml", &["--example", "stand_ins"])?;
        stay_on(&placement.load)?;
        let (entra, folder) = (StandIns::start(&stand_ins)?, tempfile::tempdir()?);
        Ok(Self { placement, backend: backend::start()?, entra, folder })
    }

    /// Starts a candidate on its cores, and waits until it is alive.
    fn start(&self, name: Name, executable: &Path) -> anyhow::Result<Candidate> {
        let [address, metrics] = free_addresses()?;
        let written = |file: &str| File::options().create(true).append(true).open(self.folder.path().join(file));
        let mut files = vec![written(name.as_str())?];
        let (mut command, entra) = (Command::new(executable), &self.entra.told);
        command
            .env_clear()
            .env("BACKEND_API_URL", format!("http://{}", self.backend))
            .env("HOST", "127.0.0.1")
            .env("PORT", address.port().to_string())
            .stdin(Stdio::null())
            .stdout(written(name.as_str())?)
            .stderr(written(name.as_str())?)
            .current_dir(self.folder.path());
        if name.is_ours() {
            // With its defaults: logs, metrics, limits, retries, circuit breaker. It need not wait for a load balancer at its end.
            command
                .env("DRAIN_DELAY", "0")
                .env("METRICS_PORT", metrics.port().to_string())
                .env("AZURE_AUTHORITY_HOST", &entra.authority)
                .env("AZURE_TENANT_ID", &entra.tenant_id)
                .env("AZURE_CLIENT_ID", &entra.client_id)
                .env("AZURE_CLIENT_SECRET", &entra.client_secret)
                .env("AZURE_SCOPES", &entra.scope)
                .env("SSL_CERT_FILE", &entra.ca_file);
        } else {
            command.env("BEARER_TOKEN", "x".repeat(TOKEN_LENGTH));
        }
        match name {
            Name::ServerQuiet => command.env("LOG_LEVEL", "off").env("METRICS_PORT", "0"),
            Name::ServerObserved => {
                files.push(written(AUDIT_FILE)?);
                command
                    .env("AUDIT_LOG_FILE", self.folder.path().join(AUDIT_FILE))
                    .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", self.backend))
            }
            // One caller makes all calls here, and would be limited long before the server is.
            Name::ServerGuarded => command
                .env("INBOUND_AUTH", "entra")
                .env("INBOUND_AUDIENCE", &entra.client_id)
                .env("PUBLIC_URL", "https://localhost/mcp")
                .env("RATE_LIMIT_PER_CALLER", "0"),
            _ => &mut command,
        };
        // A thread that has moved to the candidate's cores starts it there.
        let started = std::thread::scope(|scope| {
            let cores = &self.placement.candidate;
            let start = scope.spawn(move || stay_on(cores).and_then(|()| Ok((Instant::now(), command.spawn()?))));
            start.join().map_err(|_| anyhow::anyhow!("the starting thread panicked"))?
        });
        let (began, child) = started.with_context(|| format!("cannot start {}", executable.display()))?;
        let bearer = (name == Name::ServerGuarded).then(|| entra.user_token.clone());
        let mut candidate = Candidate { name, address, bearer, child, files, started_in: Duration::ZERO };
        let alive = format!("GET /health/live HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        while !candidate.answers(&alive) {
            anyhow::ensure!(candidate.child.try_wait()?.is_none(), "{} ended: {}", name.as_str(), self.said(name));
            anyhow::ensure!(began.elapsed() < Duration::from_secs(30), "{} does not start", name.as_str());
            pause(Duration::from_millis(1));
        }
        candidate.started_in = began.elapsed();
        Ok(candidate)
    }

    /// Starts a candidate, and has it make everything that is made at first use.
    pub fn warm(&self, name: Name, executable: &Path) -> anyhow::Result<Candidate> {
        let candidate = self.start(name, executable)?;
        candidate.warm_up()?;
        Ok(candidate)
    }

    /// The end of what a candidate has printed.
    fn said(&self, name: Name) -> String {
        let log = std::fs::read(self.folder.path().join(name.as_str())).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(2_000)..]).into_owned()
    }
}

/// A candidate that runs. Dropping it ends it.
pub struct Candidate {
    pub name: Name,
    pub address: SocketAddr,
    /// The token that calls carry.
    pub bearer: Option<String>,
    /// From before its start to its first answer.
    pub started_in: Duration,
    child: Child,
    /// What it writes to.
    files: Vec<File>,
}

impl Candidate {
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Makes one call.
    fn warm_up(&self) -> anyhow::Result<()> {
        let params = json!({ "name": "get_user_profile", "arguments": { "user_id": "u000000001" } });
        let body = json!({ "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params }).to_string();
        let head = format!(
            "POST /mcp HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Accept: application/json, text/event-stream\r\nMcp-Protocol-Version: 2025-11-25\r\n{}Content-Length: {}\r\n\r\n",
            self.address,
            authorization(self.bearer.as_deref()),
            body.len()
        );
        let begun = Instant::now();
        // Keys to check tokens with are fetched in the background.
        while !self.answers(&format!("{head}{body}")) {
            anyhow::ensure!(
                begun.elapsed() < Duration::from_secs(10),
                "{} does not answer its first call",
                self.name.as_str()
            );
            pause(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Throws away what it has written: a million calls make long files, and memory that a machine has never used before is slow at
    /// first.
    pub fn trim_files(&self) {
        for file in &self.files {
            let _ = file.set_len(0);
        }
    }

    /// Whether a request on a connection of its own is answered with a 200.
    fn answers(&self, request: &str) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(5))?;
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer.starts_with(b"HTTP/1.1 200 "))
        };
        ask().unwrap_or(false)
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        // In good order if possible: a candidate that is run under a profiler writes down what it saw.
        let process = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
        let told = Instant::now();
        while told.elapsed() < Duration::from_secs(5) && matches!(self.child.try_wait(), Ok(None)) {
            pause(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two that are not the same: both are held until both are known.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let [one, other] = [TcpListener::bind(("127.0.0.1", 0))?, TcpListener::bind(("127.0.0.1", 0))?];
    Ok([one.local_addr()?, other.local_addr()?])
}
