//! The real binary, run as an operator would: with nothing in its environment but what the test put there, in a folder of its
//! own, on ports that nobody else has.

use std::io::{BufRead as _, BufReader, Read};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mcp_server::demo::StandIns;
use mcp_server::demo::entra::{CLIENT_ID, CLIENT_SECRET, SCOPE, TENANT_ID};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio::sync::watch;

use super::canaries::assert_clean;
use super::{CallResult, Era, message, until};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The binary with its arguments and its environment, not running yet.
pub struct Program {
    command: Command,
    folder: TempDir,
    /// Whether all that it prints is a log in JSON.
    logs_json: bool,
}

impl Program {
    pub fn new(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-server"));
        command.args(arguments).env_clear().current_dir(folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, folder, logs_json: matches!(arguments, [] | ["serve"]) }
    }

    /// `serve` against these stand-ins, with the client secret, on a port that the system chooses, and quick to stop.
    pub fn serve(stand_ins: &StandIns) -> Self {
        let program = Self::new(&["serve"]);
        let authorities = program.path("ca.pem");
        std::fs::write(&authorities, stand_ins.entra.ca_pem()).unwrap();
        program
            .env("SSL_CERT_FILE", authorities.to_str().unwrap())
            .env("AZURE_AUTHORITY_HOST", stand_ins.entra.authority().as_str())
            .env("AZURE_TENANT_ID", TENANT_ID)
            .env("AZURE_CLIENT_ID", CLIENT_ID)
            .env("AZURE_CLIENT_SECRET", CLIENT_SECRET)
            .env("AZURE_SCOPES", SCOPE)
            .env("BACKEND_API_URL", stand_ins.backend.base_url().as_str())
            .env("HOST", "127.0.0.1")
            .env("PORT", "0")
            .env("METRICS_PORT", "0")
            .env("DRAIN_DELAY", "0")
            .env("LOG_LEVEL", "trace")
    }

    /// `demo` on a port that the system chooses.
    pub fn demo(options: &[&str]) -> Self {
        Self::new(&[&["demo"], options].concat()).env("PORT", "0").env("METRICS_PORT", "0").env("DRAIN_DELAY", "0")
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self.logs_json &= name != "DEBUG";
        self
    }

    /// The same with these limits of open files.
    #[must_use]
    pub fn max_open_files(mut self, soft: u32, hard: u32) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\"")]);
        shell.arg(self.command.get_program()).args(self.command.get_args());
        shell.env_clear().current_dir(self.folder.path());
        shell.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = shell;
        self
    }

    #[must_use]
    pub fn without(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Limits how large the files are that it writes, in bytes, until [`Running::lift_file_size_limit`].
    #[must_use]
    pub fn file_size_limit(self, bytes: u64) -> Self {
        let mut prlimit = Command::new("prlimit");
        prlimit.arg(format!("--fsize={bytes}:")).arg("--");
        self.run_by(prlimit)
    }

    /// With SIGHUP ignored, as `nohup` starts programs.
    #[must_use]
    pub fn under_nohup(self) -> Self {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]);
        self.run_by(shell)
    }

    /// Lets another program start it, which gets its command line as the last arguments.
    fn run_by(mut self, mut starter: Command) -> Self {
        starter.arg(self.command.get_program()).args(self.command.get_args());
        starter.env_clear().current_dir(self.folder.path());
        starter.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        starter.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command = starter;
        self
    }

    /// Puts a file into the working directory.
    #[must_use]
    pub fn file(self, name: &str, content: &str) -> Self {
        std::fs::write(self.path(name), content).unwrap();
        self
    }

    /// A path in the working directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs it to its end.
    pub async fn run(self) -> Finished {
        self.start().ended().await
    }

    pub fn start(mut self) -> Running {
        let mut child = self.command.spawn().unwrap();
        let stdout = Lines::of(child.stdout.take().unwrap());
        let stderr = Lines::of(child.stderr.take().unwrap());
        Running { child, stdout, stderr, logs_json: self.logs_json, _folder: self.folder }
    }
}

/// The binary, running; dropping it kills it, and fails the test if it has printed what it must not.
pub struct Running {
    child: Child,
    pub stdout: Lines,
    pub stderr: Lines,
    logs_json: bool,
    _folder: TempDir,
}

impl Running {
    /// Where it serves MCP, once it does.
    pub async fn address(&self) -> SocketAddr {
        let line = self.stdout.line("serving MCP on http://").await;
        let (_, rest) = line.split_once("serving MCP on http://").unwrap();
        rest.split('/').next().unwrap().parse().unwrap()
    }

    /// A client of the server that it becomes.
    pub async fn client(&self) -> Client {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Client { http, address: self.address().await }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Files may grow again.
    pub fn lift_file_size_limit(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("prlimit").args(["--fsize=unlimited:", "--pid", &pid]).status().unwrap().success());
    }

    /// One figure of its metrics.
    pub async fn metric(&self, series: &str) -> f64 {
        let line = self.stdout.line("serving metrics on http://").await;
        let (_, rest) = line.split_once("serving metrics on ").unwrap();
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let text = http.get(rest.split('"').next().unwrap()).send().await.unwrap().text().await.unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no `{series}` in {text}")).parse().unwrap()
    }

    /// Waits for its end.
    pub async fn ended(mut self) -> Finished {
        let waiting = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status.code();
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let code = tokio::time::timeout(PATIENCE, waiting).await.expect("the program does not end");
        Finished { code, stdout: self.stdout.all().await, stderr: self.stderr.all().await }
    }
}

impl Running {
    /// Its memory in bytes, now and at most so far.
    pub fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let kilobytes = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
        };
        (kilobytes("VmRSS:") << 10, kilobytes("VmHWM:") << 10)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A kill may cut the last line off.
        let mut whole_lines = self.stdout.so_far();
        if matches!(self.child.try_wait(), Ok(Some(status)) if status.code().is_none()) {
            whole_lines.pop();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            if self.logs_json {
                whole_lines.iter().for_each(|line| assert_form(&parsed(line)));
            }
            for line in [self.stdout.so_far(), self.stderr.so_far()].concat() {
                assert_clean(&line);
            }
        }
    }
}

/// A client of the binary.
#[derive(Clone)]
pub struct Client {
    pub http: reqwest::Client,
    pub address: SocketAddr,
}

impl Client {
    pub fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.http.get(format!("http://{}{path}", self.address))
    }

    /// A tool call, not sent yet.
    pub fn call(&self, tool: &str, arguments: Value) -> reqwest::RequestBuilder {
        let params = json!({ "name": tool, "arguments": arguments });
        self.http
            .post(format!("http://{}/mcp", self.address))
            .header("content-type", "application/json")
            .header("accept", "application/json, text/event-stream")
            .header("mcp-protocol-version", Era::Legacy.version())
            .body(message(Era::Legacy, "tools/call", params).to_string())
    }

    /// The status and the body of `/health/ready`.
    pub async fn readiness(&self) -> (u16, Value) {
        let answer = self.get("/health/ready").send().await.unwrap();
        (answer.status().as_u16(), serde_json::from_str(&answer.text().await.unwrap()).unwrap())
    }

    pub async fn until_ready(&self) {
        until(|| async { self.readiness().await.0 == 200 }).await;
    }
}

/// The tool result in the answer to a call.
pub async fn result_of(answer: reqwest::Response) -> CallResult {
    let text = answer.text().await.unwrap();
    CallResult(parsed(&text)["result"].clone())
}

/// What is left of the binary.
#[derive(Debug)]
pub struct Finished {
    /// `None` when a signal killed it.
    pub code: Option<i32>,
    pub stdout: Vec<String>,
    pub stderr: Vec<String>,
}

impl Finished {
    /// The log, of which every line must be an object.
    pub fn log(&self) -> Vec<Value> {
        self.stdout.iter().map(|line| parsed(line)).collect()
    }
}

/// The lines that a stream has given so far.
pub struct Lines(watch::Receiver<(Vec<String>, bool)>);

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let (lines, received) = watch::channel((Vec::new(), false));
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                lines.send_modify(|(lines, _)| lines.push(line));
            }
            lines.send_modify(|(_, complete)| *complete = true);
        });
        Self(received)
    }

    /// What there is now.
    pub fn so_far(&self) -> Vec<String> {
        self.0.borrow().0.clone()
    }

    /// Waits for a line that contains this text.
    pub async fn line(&self, text: &str) -> String {
        self.lines(text, 1).await.remove(0)
    }

    /// Waits for so many lines that contain this text.
    pub async fn lines(&self, text: &str, count: usize) -> Vec<String> {
        let mut received = self.0.clone();
        let found = |lines: &[String]| lines.iter().filter(|line| line.contains(text)).cloned().collect::<Vec<_>>();
        let enough = received.wait_for(|(lines, complete)| *complete || found(lines).len() >= count);
        let lines = match tokio::time::timeout(PATIENCE, enough).await {
            Ok(lines) => found(&lines.unwrap().0),
            Err(_) => Vec::new(),
        };
        assert!(lines.len() >= count, "no `{text}` ({count}x) in {:#?}", self.so_far());
        lines
    }

    /// Waits for the stream's end.
    async fn all(&self) -> Vec<String> {
        let mut received = self.0.clone();
        let complete = received.wait_for(|(_, complete)| *complete);
        tokio::time::timeout(PATIENCE, complete).await.expect("the stream does not end").unwrap().0.clone()
    }
}

/// A line of the log.
pub fn parsed(line: &str) -> Value {
    let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    assert!(value.is_object(), "{line}");
    value
}

/// The form of every line of the log (contract §6).
pub fn assert_form(line: &Value) {
    for field in ["timestamp", "level", "logger", "message", "module", "function", "trace_id"] {
        assert!(line[field].is_string(), "`{field}` in {line}");
    }
    assert!(line["line"].is_u64(), "{line}");
    assert!(["DEBUG", "INFO", "WARNING", "ERROR"].contains(&line["level"].as_str().unwrap()), "{line}");
    let form: String =
        line["timestamp"].as_str().unwrap().chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(form, "0000-00-00T00:00:00.000000Z", "{line}");
    let trace_id = line["trace_id"].as_str().unwrap();
    assert!(trace_id.is_empty() || (trace_id.len() == 32 && trace_id.bytes().all(|b| b.is_ascii_hexdigit())), "{line}");
}

/// A port of loopback that stays reserved, though nobody listens on it, for a program that has to be told a number.
pub struct ReservedPort(TcpSocket);

impl ReservedPort {
    pub fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
        Self(socket)
    }

    pub fn number(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }
}
