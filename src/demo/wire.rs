//! The plumbing both stand-ins share: a listener that can be shut and opened again, counters that can be waited for,
//! and a bounded log. It knows neither Entra nor the backend.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// The largest request body a stand-in reads.
pub(super) const MAX_BODY_BYTES: usize = 128 * 1024;

/// Ends the connection where an answer was due.
#[derive(Debug, thiserror::Error)]
#[error("the stand-in hung up")]
pub(super) struct Hangup;

/// What a handler gives back.
pub(super) type Answer = Result<Response<Body>, Hangup>;

/// How often something happened; a test can wait for it instead of sleeping.
#[derive(Debug)]
pub struct Counter(watch::Sender<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Counter {
    /// How often so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        *self.0.borrow()
    }

    /// Waits until it happened `times` times in all.
    pub async fn reaches(&self, times: u64) {
        // The sender lives as long as `self`: the wait cannot fail.
        let _ = self.0.subscribe().wait_for(|count| *count >= times).await;
    }

    pub(super) fn add(&self) {
        self.0.send_modify(|count| *count += 1);
    }
}

/// A request that is being answered. Dropped before [`InFlight::finish`], it counts as one whose client left.
pub(super) struct InFlight(Option<Arc<Counter>>);

impl InFlight {
    pub(super) fn new(cancelled: &Arc<Counter>) -> Self {
        Self(Some(Arc::clone(cancelled)))
    }

    pub(super) fn finish(mut self) {
        self.0 = None;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(cancelled) = &self.0 {
            cancelled.add();
        }
    }
}

/// The newest entries, up to a capacity.
#[derive(Debug)]
pub(super) struct Log<T> {
    entries: std::sync::Mutex<(u64, VecDeque<(u64, T)>)>,
    capacity: usize,
}

impl<T: Clone> Log<T> {
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: std::sync::Mutex::new((0, VecDeque::new())), capacity }
    }

    /// Adds an entry and gives the number by which [`Log::amend`] finds it.
    pub(super) fn push(&self, entry: T) -> u64 {
        let mut guard = lock(&self.entries);
        let (next, entries) = &mut *guard;
        *next += 1;
        entries.push_back((*next, entry));
        while entries.len() > self.capacity {
            entries.pop_front();
        }
        *next
    }

    pub(super) fn amend(&self, number: u64, change: impl FnOnce(&mut T)) {
        if let Some((_, entry)) = lock(&self.entries).1.iter_mut().rev().find(|(n, _)| *n == number) {
            change(entry);
        }
    }

    pub(super) fn all(&self) -> Vec<T> {
        lock(&self.entries).1.iter().map(|(_, entry)| entry.clone()).collect()
    }

    pub(super) fn clear(&self) {
        lock(&self.entries).1.clear();
    }
}

/// Locks, poisoned or not: what the mutexes here guard is never left half changed.
pub(super) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A port on loopback that is held from [`Port::bind`] on, so that its number is known before anything is served.
pub(super) struct Port {
    listener: TcpListener,
    pub(super) addr: SocketAddr,
}

impl Port {
    pub(super) async fn bind() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr })
    }

    /// Serves HTTP/1.1, over TLS when an acceptor is given, until the returned [`Server`] is dropped.
    pub(super) fn serve<H, F>(self, tls: Option<TlsAcceptor>, handler: H) -> Server
    where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let connections = Arc::new(Counter::default());
        let (control, commands) = mpsc::channel(1);
        let task = tokio::spawn(accept(self, tls, handler, Arc::clone(&connections), commands));
        Server { control, connections, _task: AbortOnDropHandle::new(task) }
    }
}

/// A running listener with its connections; dropping it ends them all.
pub(super) struct Server {
    control: mpsc::Sender<(bool, oneshot::Sender<io::Result<()>>)>,
    /// Connections accepted so far.
    pub(super) connections: Arc<Counter>,
    _task: AbortOnDropHandle<()>,
}

impl Server {
    /// Shut: every connection is cut and new ones are refused; the port stays ours. Returns when it is so.
    pub(super) async fn set_down(&self, down: bool) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.control.send((down, done)).await.map_err(io::Error::other)?;
        answer.await.map_err(io::Error::other)?
    }
}

enum Door {
    Open(TcpListener),
    /// Bound but not listening: connections are refused, and nobody else can take the port meanwhile.
    Shut(TcpSocket),
}

impl Door {
    async fn accept(&self) -> io::Result<TcpStream> {
        match self {
            Self::Open(listener) => Ok(listener.accept().await?.0),
            Self::Shut(_) => std::future::pending().await,
        }
    }
}

async fn accept<H, F>(
    port: Port,
    tls: Option<TlsAcceptor>,
    handler: H,
    accepted: Arc<Counter>,
    mut commands: mpsc::Receiver<(bool, oneshot::Sender<io::Result<()>>)>,
) where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut door = Door::Open(port.listener);
    loop {
        tokio::select! {
            stream = door.accept() => match stream {
                Ok(stream) => {
                    accepted.add();
                    connections.spawn(converse(stream, tls.clone(), handler.clone()));
                }
                // Out of file descriptors, usually: give the open connections a moment to end.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
            command = commands.recv() => {
                let Some((down, done)) = command else { return };
                let turned = match (door, down) {
                    (Door::Open(listener), true) => {
                        drop(listener);
                        connections.shutdown().await;
                        reserve(port.addr).await.map(Door::Shut)
                    }
                    (Door::Shut(socket), false) => socket.listen(1024).map(Door::Open),
                    (door, _) => Ok(door),
                };
                match turned {
                    Ok(turned) => {
                        door = turned;
                        let _ = done.send(Ok(()));
                    }
                    Err(e) => {
                        let _ = done.send(Err(e));
                        return;
                    }
                }
            }
        }
    }
}

/// Binds the port again. A process that this one is just starting holds a copy of the old listener for a moment.
async fn reserve(addr: SocketAddr) -> io::Result<TcpSocket> {
    let mut tries_left = 200;
    loop {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        match socket.bind(addr) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tries_left > 0 => tries_left -= 1,
            bound => return bound.map(|()| socket),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn converse<H, F>(stream: TcpStream, tls: Option<TlsAcceptor>, handler: H)
where
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let _ = stream.set_nodelay(true);
    match tls {
        None => speak_http(stream, handler).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                speak_http(stream, handler).await;
            }
        }
    }
}

async fn speak_http<S, H, F>(stream: S, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    // An error here is a client that left, or a fault that was asked for: both are what a stand-in is for.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service_fn(handler))
        .await;
}

/// The whole body, or `None` when it is too large or does not arrive.
pub(super) async fn read_body(body: Incoming) -> Option<Bytes> {
    Limited::new(body, MAX_BODY_BYTES).collect().await.ok().map(http_body_util::Collected::to_bytes)
}

/// Stands for a secret in a log: equal secrets have equal digests, and nothing else can be read from it.
#[must_use]
pub fn digest(secret: impl AsRef<[u8]>) -> String {
    let hash = URL_SAFE_NO_PAD.encode(Sha256::digest(secret));
    format!("sha256:{}", hash.get(..22).unwrap_or_default())
}

/// The headers with the credentials in them replaced by their digest.
pub(super) fn without_credentials(headers: &HeaderMap) -> HeaderMap {
    let mut headers = headers.clone();
    if let Some(credentials) = headers.get_mut(AUTHORIZATION) {
        let shown = digest(credentials.as_bytes());
        *credentials = HeaderValue::try_from(shown).unwrap_or_else(|_| HeaderValue::from_static("sha256:"));
    }
    headers
}

/// Seconds since 1970.
pub(super) fn unix_now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// RFC 3339 in UTC, with milliseconds.
pub(super) fn rfc3339(at: SystemTime) -> String {
    let t = OffsetDateTime::from(at);
    let (date, time) = (t.date(), t.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_newest_entries() {
        let log = Log::new(2);
        let first = log.push("a");
        let second = log.push("b");
        log.push("c");
        log.amend(first, |entry| *entry = "gone");
        log.amend(second, |entry| *entry = "B");
        assert_eq!(log.all(), ["B", "c"]);
    }

    #[test]
    fn times_are_rfc_3339() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_763_817_296_007);
        assert_eq!(rfc3339(at), "2025-11-22T13:14:56.007Z");
    }
}
