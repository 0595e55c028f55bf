//! The real binary as a child process, with the stand-ins that it talks to, and what the system says about it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mcp_server::demo::entra::{CLIENT_ID, CLIENT_SECRET, SCOPE, TENANT_ID};
use mcp_server::demo::{DemoOptions, StandIns};
use tokio::net::TcpSocket;

use crate::client::Client;

/// So many lines of a server's log are kept, to tell what went before an end that was not wanted.
const KEPT_LINES: usize = 20;

/// The stand-ins, and how a server is led to them.
pub(crate) struct Stage {
    pub(crate) stand_ins: StandIns,
    folder: tempfile::TempDir,
    binary: std::path::PathBuf,
}

impl Stage {
    pub(crate) async fn set(binary: &Path) -> Self {
        Self::set_with(binary, DemoOptions::default()).await
    }

    pub(crate) async fn set_with(binary: &Path, options: DemoOptions) -> Self {
        let stand_ins = StandIns::start(options).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), stand_ins.entra.ca_pem()).unwrap();
        Self { stand_ins, folder, binary: binary.to_owned() }
    }

    /// A server on ports of its own, ready.
    pub(crate) async fn server(&self, environment: &[(&str, &str)]) -> Server {
        let mut server = self.server_on(Arc::new(Ports::reserve()), environment);
        server.ready().await;
        server
    }

    /// A server on these ports, just started.
    pub(crate) fn server_on(&self, ports: Arc<Ports>, environment: &[(&str, &str)]) -> Server {
        let (address, metrics) = (ports.main.local_addr().unwrap(), ports.metrics.local_addr().unwrap());
        let started = Instant::now();
        let mut child = Command::new(&self.binary)
            .arg("serve")
            .env_clear()
            .env("SSL_CERT_FILE", self.folder.path().join("ca.pem"))
            .env("AZURE_AUTHORITY_HOST", self.stand_ins.entra.authority().as_str())
            .env("AZURE_TENANT_ID", TENANT_ID)
            .env("AZURE_CLIENT_ID", CLIENT_ID)
            .env("AZURE_CLIENT_SECRET", CLIENT_SECRET)
            .env("AZURE_SCOPES", SCOPE)
            .env("BACKEND_API_URL", self.stand_ins.backend.base_url().as_str())
            .env("HOST", "127.0.0.1")
            .env("PORT", address.port().to_string())
            .env("METRICS_PORT", metrics.port().to_string())
            .envs(environment.iter().copied())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.binary.display()));
        let log = Arc::default();
        read(child.stdout.take().unwrap(), Arc::clone(&log));
        read(child.stderr.take().unwrap(), Arc::clone(&log));
        Server { child, started, address, metrics, log, ports }
    }
}

/// Two ports of loopback that stay reserved, though only the server listens on them, so that another can follow it there.
pub(crate) struct Ports {
    main: TcpSocket,
    metrics: TcpSocket,
}

impl Ports {
    pub(crate) fn reserve() -> Self {
        let port = || {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
            socket
        };
        Self { main: port(), metrics: port() }
    }
}

/// The server, running; dropping it kills it.
pub(crate) struct Server {
    child: Child,
    started: Instant,
    pub(crate) address: SocketAddr,
    metrics: SocketAddr,
    log: Arc<Mutex<Log>>,
    ports: Arc<Ports>,
}

/// What the log said.
#[derive(Default)]
struct Log {
    errors: u64,
    last: VecDeque<String>,
}

/// What the system says about the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Vitals {
    pub(crate) rss_mib: f64,
    pub(crate) peak_mib: f64,
    pub(crate) fds: usize,
    pub(crate) threads: usize,
}

impl Server {
    /// Waits until it is ready; tells how long that took from its start.
    pub(crate) async fn ready(&mut self) -> Duration {
        while self.started.elapsed() < Duration::from_secs(30) {
            if probe(self.address).await == Some(200) {
                return self.started.elapsed();
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}", self.last_lines());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the server is not ready after 30 s:\n{}", self.last_lines())
    }

    pub(crate) fn ports(&self) -> Arc<Ports> {
        Arc::clone(&self.ports)
    }

    pub(crate) fn vitals(&self) -> Vitals {
        let mut status = String::new();
        let file = File::open(format!("/proc/{}/status", self.child.id()));
        file.and_then(|mut file| file.read_to_string(&mut status)).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|number| number.parse::<f64>().ok()).unwrap_or_default()
        };
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count();
        Vitals {
            rss_mib: field("VmRSS:") / 1_024.0,
            peak_mib: field("VmHWM:") / 1_024.0,
            fds,
            threads: field("Threads:") as usize,
        }
    }

    /// The sum of the samples of `/metrics` that begin so, a name with or without labels.
    pub(crate) async fn metric(&self, beginning: &str) -> f64 {
        let answer = Client::new(self.metrics).ask(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let samples = text.lines().filter(|line| line.starts_with(beginning));
        samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until the gauges of work in flight are back at zero; tells how long that took.
    pub(crate) async fn at_rest(&self, within: Duration) -> Option<Duration> {
        let begin = Instant::now();
        while begin.elapsed() < within {
            let calls = self.metric("http_server_active_requests").await;
            // The server asks its backend for its health, too: that is no leak.
            if calls == 0.0 && self.metric("http_client_active_requests").await <= 1.0 {
                return Some(begin.elapsed());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        None
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let begin = Instant::now();
        while begin.elapsed() < within {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }

    /// How many lines of its log are errors: faults of its own.
    pub(crate) fn errors(&self) -> u64 {
        self.log.lock().unwrap().errors
    }

    /// The last lines of its log.
    pub(crate) fn last_lines(&self) -> String {
        self.log.lock().unwrap().last.iter().cloned().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `/health/ready` answers within a second, on a connection of its own, as a probe has it.
pub(crate) async fn probe(address: SocketAddr) -> Option<u16> {
    let mut client = Client::new(address);
    let probe = client.ask(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    Some(tokio::time::timeout(Duration::from_secs(1), probe).await.ok()?.ok()?.status)
}

/// Reads a stream of a child to its end, so that it never waits for us.
fn read(stream: impl Read + Send + 'static, log: Arc<Mutex<Log>>) {
    std::thread::spawn(move || {
        for line in BufReader::with_capacity(64 * 1_024, stream).lines().map_while(Result::ok) {
            let mut log = log.lock().unwrap();
            log.errors += u64::from(line.contains(r#""level":"ERROR""#) || line.contains("panicked"));
            log.last.push_back(line);
            if log.last.len() > KEPT_LINES {
                log.last.pop_front();
            }
        }
    });
}
