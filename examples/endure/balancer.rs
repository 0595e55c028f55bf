//! A balancer of TCP connections that follows readiness as kube-proxy does: late.
//!
//! It probes each endpoint; one that says 503, or nothing three times, leaves the rotation between one and three seconds after
//! that. Connections that are open stay. A connection that an endpoint refuses is the client's bad luck, unless the balancer
//! was told to try another.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::server::probe;

const PROBE_EVERY: Duration = Duration::from_millis(250);
/// So many probes in a row without an answer count as one 503.
const TOLERATED: u32 = 3;

/// The balancer, running; dropping it cuts everything.
pub(crate) struct Balancer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    endpoints: Mutex<Vec<Endpoint>>,
    refused: AtomicU64,
    tries: usize,
}

#[derive(Clone)]
struct Endpoint {
    address: SocketAddr,
    in_rotation: bool,
    open: Arc<AtomicUsize>,
}

impl Balancer {
    /// Connects to an endpoint that is drawn; when that refuses, to others, up to so many in all.
    pub(crate) async fn start(tries: usize) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { endpoints: Mutex::default(), refused: AtomicU64::new(0), tries });
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, tasks }
    }

    /// Takes an endpoint in, once it is ready.
    pub(crate) fn follow(&mut self, address: SocketAddr) {
        let endpoint = Endpoint { address, in_rotation: false, open: Arc::default() };
        self.shared.endpoints.lock().unwrap().push(endpoint);
        self.tasks.spawn(Arc::clone(&self.shared).follow(address));
    }

    /// Waits until so many endpoints are in the rotation.
    pub(crate) async fn has(&self, count: usize) {
        while self.shared.endpoints.lock().unwrap().iter().filter(|endpoint| endpoint.in_rotation).count() != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until an endpoint has left the rotation.
    pub(crate) async fn left(&self, address: SocketAddr) {
        while self.shared.endpoints.lock().unwrap().iter().any(|endpoint| endpoint.address == address) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many connections go to an endpoint.
    pub(crate) fn open(&self, address: SocketAddr) -> usize {
        let endpoints = self.shared.endpoints.lock().unwrap();
        let endpoint = endpoints.iter().find(|endpoint| endpoint.address == address);
        endpoint.map_or(0, |endpoint| endpoint.open.load(Relaxed))
    }

    /// How many connections endpoints have refused.
    pub(crate) fn refused(&self) -> u64 {
        self.shared.refused.load(Relaxed)
    }
}

impl Shared {
    /// Follows one endpoint until it has left.
    async fn follow(self: Arc<Self>, address: SocketAddr) {
        while probe(address).await != Some(200) {
            tokio::time::sleep(PROBE_EVERY).await;
        }
        self.change(address, |endpoint| endpoint.in_rotation = true);
        let mut silent = 0;
        loop {
            tokio::time::sleep(PROBE_EVERY).await;
            match probe(address).await {
                Some(200) => silent = 0,
                None if silent + 1 < TOLERATED => silent += 1,
                _ => break,
            }
        }
        tokio::time::sleep(Duration::from_secs_f64(1.0 + 2.0 * fastrand::f64())).await;
        self.endpoints.lock().unwrap().retain(|endpoint| endpoint.address != address);
    }

    fn change(&self, address: SocketAddr, change: impl FnOnce(&mut Endpoint)) {
        if let Some(endpoint) = self.endpoints.lock().unwrap().iter_mut().find(|endpoint| endpoint.address == address) {
            change(endpoint);
        }
    }

    fn draw(&self, tried: &[SocketAddr]) -> Option<Endpoint> {
        let endpoints = self.endpoints.lock().unwrap();
        let usable = |endpoint: &&Endpoint| endpoint.in_rotation && !tried.contains(&endpoint.address);
        let choice: Vec<_> = endpoints.iter().filter(usable).collect();
        fastrand::choice(choice).cloned()
    }

    async fn carry(self: Arc<Self>, mut client: TcpStream) {
        let _ = client.set_nodelay(true);
        let mut tried = Vec::new();
        while tried.len() < self.tries {
            let Some(endpoint) = self.draw(&tried) else { return };
            tried.push(endpoint.address);
            let Ok(mut server) = TcpStream::connect(endpoint.address).await else {
                self.refused.fetch_add(1, Relaxed);
                continue;
            };
            let _ = server.set_nodelay(true);
            endpoint.open.fetch_add(1, Relaxed);
            // An end with an error is an end: neither side gets another word.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            endpoint.open.fetch_sub(1, Relaxed);
            return;
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    connections.spawn(Arc::clone(&shared).carry(client));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}
