//! Accepting connections, within bounds: how many, how long a request's head may take, how long a connection may idle.
//!
//! HTTP/1.1 only. `axum::serve` has no timers, so the loop is ours; hyper parses. Beyond the limit of connections a few are let
//! in all the same to ask for our health, so that a crowd cannot make the orchestrator believe that we are dead.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::Web;
use crate::settings::WebSettings;
use crate::telemetry::metrics::Metrics;

/// Connections that the kernel may hold for us until we accept them.
const BACKLOG: u32 = 1_024;
/// What hyper reads of a head, in fields and bytes, before it gives up with a bare 431. `Web::answer` is stricter, and explains.
const READ_HEADERS: usize = 128;
const READ_HEAD_BYTES: usize = 32 * 1024;
/// Connections that are let in beyond the limit, to ask for our health only. One more closes the oldest of them: as many as the
/// kernel may hand over at once, or else a probe among them would be pushed out before anybody looks at it.
const HEALTH_CONNECTIONS: usize = BACKLOG as usize;
/// How long such a connection may take to ask.
const HEALTH_HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// How many connections, and how patient we are with them.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: usize,
    head_timeout: Duration,
    idle_timeout: Duration,
}

impl From<&WebSettings> for Limits {
    fn from(settings: &WebSettings) -> Self {
        Self {
            connections: settings.max_connections,
            head_timeout: settings.request_header_timeout,
            idle_timeout: settings.keep_alive_timeout,
        }
    }
}

/// Which requests a listener answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The main listener.
    Main,
    /// The management listener: it shares no limit with the main one.
    Management,
    /// A connection beyond the main listener's limit.
    HealthOnly,
}

/// A bound socket.
pub struct Listener {
    tcp: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds; nothing is accepted yet.
    ///
    /// # Errors
    ///
    /// When the address cannot be had.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A restart must not wait for the old connections to time out.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let tcp = socket.listen(BACKLOG)?;
        let address = tcp.local_addr()?;
        Ok(Self { tcp, address })
    }

    /// Where it listens, with the port that the system chose if none was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until `stop` is cancelled. Connections run as tasks of `connections`; when `stop` comes they finish the request
    /// that they are at and close.
    pub async fn serve(
        self,
        web: Arc<Web>,
        lane: Lane,
        limits: Limits,
        metrics: Arc<Metrics>,
        connections: TaskTracker,
        stop: CancellationToken,
    ) {
        let room = Arc::new(Semaphore::new(limits.connections));
        // Letting go of a guard closes its connection: a crowd of silent ones cannot keep a probe out for longer than it is silent.
        let mut health_lane: VecDeque<DropGuard> = VecDeque::with_capacity(HEALTH_CONNECTIONS);
        let health_limits = Limits { head_timeout: HEALTH_HEAD_TIMEOUT.min(limits.head_timeout), ..limits.clone() };
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.tcp.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: waiting for some to be closed is all that can be done.
                    warn!(error = %error, "could not accept a connection: {error}; pausing for 100 ms");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Small answers must not wait for the acknowledgement of the last ones.
            let _ = stream.set_nodelay(true);
            let web = Arc::clone(&web);
            match Arc::clone(&room).try_acquire_owned() {
                Ok(permit) => {
                    let open = (lane == Lane::Main).then(|| metrics.open_connection());
                    let connection = Connection { web, lane, limits: limits.clone(), peer };
                    let stop = stop.clone();
                    connections.spawn(async move {
                        connection.serve(stream, stop).await;
                        drop((open, permit));
                    });
                }
                Err(_) if lane == Lane::Main => {
                    let stop = stop.child_token();
                    if health_lane.len() >= HEALTH_CONNECTIONS {
                        health_lane.pop_front();
                    }
                    health_lane.push_back(stop.clone().drop_guard());
                    let connection = Connection { web, lane: Lane::HealthOnly, limits: health_limits.clone(), peer };
                    connections.spawn(async move { connection.serve(stream, stop).await });
                }
                // Closing at once is the cheapest answer.
                Err(_) => drop(stream),
            }
        }
    }
}

pub(super) struct Connection {
    pub(super) web: Arc<Web>,
    pub(super) lane: Lane,
    pub(super) limits: Limits,
    pub(super) peer: SocketAddr,
}

impl Connection {
    pub(super) async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin, stop: CancellationToken) {
        let phase = Arc::new(Phase::default());
        let io = PatientIo::new(stream, Arc::clone(&phase), &self.limits);
        let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
            phase.enter(Phase::ANSWERING);
            let (web, phase, peer, lane) = (&self.web, &phase, self.peer, self.lane);
            async move {
                let response = web.answer(request.map(Body::new), peer, lane).await;
                phase.enter(Phase::IDLE);
                Ok::<_, std::convert::Infallible>(response)
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // hyper's one timer covers the idle time and the head together; `PatientIo` is stricter with each.
            .header_read_timeout(self.limits.idle_timeout + self.limits.head_timeout)
            .max_headers(READ_HEADERS)
            .max_buf_size(READ_HEAD_BYTES)
            .half_close(false)
            .serve_connection(TokioIo::new(io), service);
        // A connection that breaks is the client's affair: there is nobody to tell.
        let _ = until_stopped(connection, stop).await;
    }
}

/// Serves a connection to its end. When the stop comes it answers what has been asked by then, and closes.
async fn until_stopped<I, S, B>(connection: http1::Connection<I, S>, stop: CancellationToken) -> hyper::Result<()>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        biased;
        ended = connection.as_mut() => return ended,
        () = stop.cancelled() => {}
    }
    // What has arrived since the runtime last looked is seen when it looks again, which it does before we go on.
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        ended = connection.as_mut() => return ended,
        () = std::future::ready(()) => {}
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// What a connection is doing, told by the service and read by the IO beneath it.
#[derive(Default)]
struct Phase(AtomicU8);

impl Phase {
    /// A head is expected or has begun to arrive. New connections begin here.
    const HEAD: u8 = 0;
    /// A request is being answered.
    const ANSWERING: u8 = 1;
    /// Nothing has arrived since the last answer.
    const IDLE: u8 = 2;

    fn enter(&self, phase: u8) {
        self.0.store(phase, Relaxed);
    }

    fn is(&self, phase: u8) -> bool {
        self.0.load(Relaxed) == phase
    }
}

/// A stream that gives up on a head that takes too long, on a client that asks nothing more, and on a reader that takes nothing.
struct PatientIo<S> {
    stream: S,
    phase: Arc<Phase>,
    head_timeout: Duration,
    idle_timeout: Duration,
    /// Runs while a head is expected, while the connection idles, or while a write makes no progress.
    alarm: Pin<Box<Sleep>>,
    idling: bool,
    writing: bool,
}

impl<S> PatientIo<S> {
    fn new(stream: S, phase: Arc<Phase>, limits: &Limits) -> Self {
        Self {
            stream,
            phase,
            head_timeout: limits.head_timeout,
            idle_timeout: limits.idle_timeout,
            alarm: Box::pin(tokio::time::sleep(limits.head_timeout)),
            idling: false,
            writing: false,
        }
    }

    fn set_alarm(&mut self, after: Duration) {
        self.alarm.as_mut().reset(Instant::now() + after);
    }

    /// Bounds a write that makes no progress.
    fn wrote<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.writing = false;
            // The answer is still on its way: idling begins after it.
            self.idling = false;
            return written;
        }
        if !self.writing {
            self.writing = true;
            self.set_alarm(self.idle_timeout);
        }
        ready!(self.alarm.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for PatientIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() {
            if self.phase.is(Phase::IDLE) && buffer.filled().len() > before {
                self.phase.enter(Phase::HEAD);
                self.idling = false;
                let head_timeout = self.head_timeout;
                self.set_alarm(head_timeout);
            }
            return read;
        }
        if self.phase.is(Phase::ANSWERING) {
            return Poll::Pending;
        }
        if self.phase.is(Phase::IDLE) && !self.idling {
            self.idling = true;
            let idle_timeout = self.idle_timeout;
            self.set_alarm(idle_timeout);
        }
        ready!(self.alarm.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PatientIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[tokio::test]
    async fn a_request_that_has_arrived_when_the_stop_comes_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let service =
            service_fn(async |_request| Ok::<_, std::convert::Infallible>(hyper::Response::new(String::from("here"))));
        let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        let stop = CancellationToken::new();
        let serving = tokio::spawn(until_stopped(connection, stop.clone()));
        tokio::task::yield_now().await;
        // The runtime, which has this one thread, has not looked for it when the connection hears of the stop.
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        stop.cancel();
        serving.await.unwrap().unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
    }
}
