//! Accepting connections, within bounds: how many, how long a request's head may take, how long a connection may idle.
//!
//! HTTP/1.1 only. `axum::serve` has no timers, so the loop is ours; hyper parses. Beyond the limit of connections more are accepted
//! without a place: they may ask for our health, so that a crowd cannot make the orchestrator believe that we are dead, and with any
//! other request they get the place of a connection that is idle.

mod room;
mod timeout_io;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, Weak};
use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use http::{HeaderValue, header};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use room::{Activity, Phase, Room};
use rustix::io::Errno;
use timeout_io::{AnswerBody, TimeoutIo};

use super::Web;
use crate::settings::WebSettings;
use crate::telemetry::metrics::{GaugeGuard, Metrics};

/// Connections that the kernel may hold for us until we accept them.
const BACKLOG: u32 = 1_024;
/// What hyper reads of a head, in fields and bytes, before it gives up with a bare 431. `Web::answer` is stricter, and explains.
const READ_HEADERS: usize = 128;
const READ_HEAD_BYTES: usize = 32 * 1024;
/// Connections without a place. One more closes the oldest of them: as many as the kernel may hand over at once, or else a probe
/// among them would be pushed out before anybody looks at it.
const WAITING_CONNECTIONS: usize = BACKLOG as usize;
/// Connections of the management listener with and without a place, each: a few that scrape, and whoever looks.
const MANAGEMENT_CONNECTIONS: usize = 64;
/// How many connections are closed at once when there are no file descriptors for another.
const CLOSED_FOR_DESCRIPTORS: usize = 16;
/// How long such a connection may take to send a request, and one that was accepted shortly before the stop.
const HEALTH_HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// How often it is logged that connections cannot be accepted.
const WARN_INTERVAL: Duration = Duration::from_secs(1);

/// How many connections, and how patient we are with them.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: usize,
    head_timeout: Duration,
    idle_timeout: Duration,
    write_timeout: Duration,
}

impl From<&WebSettings> for Limits {
    fn from(settings: &WebSettings) -> Self {
        Self {
            connections: settings.max_connections,
            head_timeout: settings.request_header_timeout,
            idle_timeout: settings.keep_alive_timeout,
            write_timeout: settings.response_write_timeout,
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
    /// A connection beyond the limit of its listener.
    HealthOnly,
}

/// How connections are told to end.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Nothing more is accepted; each connection answers what has been asked by then, and closes.
    pub gracefully: CancellationToken,
    /// After that: connections that are open still are dropped, with the requests in them.
    pub at_once: CancellationToken,
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

    /// How many connections the two listeners may have open at most, with and without a place.
    pub fn most_connections(max_connections: usize) -> usize {
        max_connections + WAITING_CONNECTIONS + 2 * MANAGEMENT_CONNECTIONS
    }

    /// Where it listens, with the port that the system chose if none was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until `stop` comes. Connections run as tasks of `connections`; when `stop` comes they finish the request
    /// that they are at and close.
    pub async fn serve(
        self,
        web: Arc<Web>,
        lane: Lane,
        limits: Limits,
        metrics: Arc<Metrics>,
        connections: TaskTracker,
        stop: Stop,
    ) {
        // The loop is one of the tasks that the stop waits for, so that none is missed that it spawns.
        let _accepting = connections.token();
        let (places, max_waiting) = match lane {
            Lane::Management => (MANAGEMENT_CONNECTIONS.min(limits.connections), MANAGEMENT_CONNECTIONS),
            Lane::Main | Lane::HealthOnly => (limits.connections, WAITING_CONNECTIONS),
        };
        let room = Arc::new(Room::new(places));
        let mut acceptor =
            Acceptor { web, lane, limits, metrics, connections, stop, room, waiting: VecDeque::new(), max_waiting };
        let mut warned = None;
        loop {
            let accepted = tokio::select! {
                biased;
                () = acceptor.stop.gracefully.cancelled() => break,
                accepted = self.tcp.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => acceptor.serve(stream, peer),
                Err(error) => {
                    if warned.is_none_or(|warned: Instant| warned.elapsed() > WARN_INTERVAL) {
                        warned = Some(Instant::now());
                        warn!(error = %error, "could not accept a connection: {error}; closing idle ones, if it is for them");
                    }
                    tokio::time::sleep(acceptor.close_some_after(&error)).await;
                }
            }
        }
        // What the kernel has accepted for us are connections to its clients, who may have sent their requests already.
        let queued = self.tcp.into_std().into_iter().flat_map(|tcp| std::iter::from_fn(move || queued(&tcp)));
        for (stream, peer) in queued.take(BACKLOG as usize) {
            acceptor.serve(stream, peer);
        }
    }
}

/// A connection that waits to be accepted.
fn queued(tcp: &std::net::TcpListener) -> Option<(TcpStream, SocketAddr)> {
    let (stream, peer) = tcp.accept().ok()?;
    stream.set_nonblocking(true).ok()?;
    Some((TcpStream::from_std(stream).ok()?, peer))
}

/// What the connections of a listener have in common.
struct Acceptor {
    web: Arc<Web>,
    lane: Lane,
    limits: Limits,
    metrics: Arc<Metrics>,
    connections: TaskTracker,
    stop: Stop,
    room: Arc<Room>,
    /// Connections without a place, the oldest first, and some that got one or ended.
    waiting: VecDeque<Weak<Activity>>,
    max_waiting: usize,
}

impl Acceptor {
    /// Begins to serve a connection.
    fn serve(&mut self, stream: TcpStream, peer: SocketAddr) {
        // Small answers must not wait for the acknowledgement of the last ones.
        let _ = stream.set_nodelay(true);
        let (activity, at_once) = (Activity::new(&self.stop.gracefully), self.stop.at_once.clone());
        let (web, lane, limits) = (Arc::clone(&self.web), self.lane, self.limits.clone());
        let (room, metrics) = (Arc::clone(&self.room), Arc::clone(&self.metrics));
        let connection = Connection { web, lane, limits, peer };
        let place = Place { room, metrics, lane, held: OnceLock::new() };
        if !place.take_free(&activity) {
            if self.waiting.len() >= self.max_waiting {
                self.close_oldest_waiting();
            }
            self.waiting.push_back(Arc::downgrade(&activity));
        }
        self.connections.spawn(async move { connection.serve_in(stream, &activity, &at_once, Some(&place)).await });
    }

    /// Where a connection was not accepted for want of a file descriptor, closes those that have been idle for longest. Returns how long
    /// to wait before the next is accepted.
    fn close_some_after(&mut self, error: &io::Error) -> Duration {
        let is_out_of_descriptors = matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE));
        if !is_out_of_descriptors {
            return Duration::from_millis(100);
        }
        self.close_oldest_waiting();
        let closed = (0..CLOSED_FOR_DESCRIPTORS).take_while(|_| self.room.close_longest_idle()).count();
        Duration::from_millis(if closed > 0 { 5 } else { 100 })
    }

    /// Closes the oldest connection without a place.
    fn close_oldest_waiting(&mut self) {
        let oldest = self.waiting.pop_front().and_then(|oldest| oldest.upgrade());
        if let Some(oldest) = oldest.filter(|oldest| !oldest.is_admitted()) {
            oldest.close();
        }
    }
}

/// A connection's place within the limit of its listener.
struct Place {
    room: Arc<Room>,
    metrics: Arc<Metrics>,
    lane: Lane,
    held: OnceLock<(OwnedSemaphorePermit, Option<GaugeGuard>)>,
}

impl Place {
    /// Takes a place if one is free.
    fn take_free(&self, activity: &Arc<Activity>) -> bool {
        self.room.admit(activity).is_some_and(|permit| self.hold(permit))
    }

    /// In which lane a request on the connection is answered. The first one that needs a place takes it.
    async fn lane_of(&self, path: &str, activity: &Arc<Activity>) -> Lane {
        let is_held = activity.is_admitted()
            || !path.starts_with("/health/")
                && self.room.admit_in_place_of_idle(activity).await.is_some_and(|permit| self.hold(permit));
        if is_held { self.lane } else { Lane::HealthOnly }
    }

    fn hold(&self, permit: OwnedSemaphorePermit) -> bool {
        let open = (self.lane == Lane::Main).then(|| self.metrics.open_connection());
        self.held.set((permit, open)).is_ok()
    }
}

pub(super) struct Connection {
    pub(super) web: Arc<Web>,
    pub(super) lane: Lane,
    pub(super) limits: Limits,
    pub(super) peer: SocketAddr,
}

impl Connection {
    /// Serves a connection that is not one of a listener.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) async fn serve(self, stream: impl AsyncRead + AsyncWrite + Unpin, stop: Stop) {
        let activity = Activity::new(&stop.gracefully);
        activity.admit();
        self.serve_in(stream, &activity, &stop.at_once, None).await;
    }

    async fn serve_in(
        self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        activity: &Arc<Activity>,
        at_once: &CancellationToken,
        place: Option<&Place>,
    ) {
        let io = TimeoutIo::new(stream, Arc::clone(activity), &self.limits);
        let service = service_fn(|request: hyper::Request<hyper::body::Incoming>| {
            activity.enter(Phase::Answering);
            let (web, peer) = (&self.web, self.peer);
            async move {
                let lane = match place {
                    Some(place) => place.lane_of(request.uri().path(), activity).await,
                    None => self.lane,
                };
                let mut response = web.answer(request.map(Body::new), peer, lane).await;
                if activity.is_closing() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, std::convert::Infallible>(response.map(|body| AnswerBody::new(body, Arc::clone(activity))))
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // hyper's one timer covers the idle time and the head together; `TimeoutIo` is stricter with each.
            .header_read_timeout(self.limits.idle_timeout + self.limits.head_timeout)
            .max_headers(READ_HEADERS)
            .max_buf_size(READ_HEAD_BYTES)
            .half_close(false)
            .serve_connection(TokioIo::new(io), service);
        // A connection that breaks is the client's affair: there is nobody to tell.
        let _ = until_closing(connection, activity, at_once).await;
    }
}

/// Serves a connection to its end. When it should close it answers what has been asked by then.
async fn until_closing<I, S, B>(
    connection: http1::Connection<I, S>,
    activity: &Activity,
    at_once: &CancellationToken,
) -> hyper::Result<()>
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
        () = activity.closing() => {}
    }
    let makes_room = activity.is_closing();
    activity.announce_close();
    // What has arrived since the runtime last looked is seen when it looks again, which it does before we go on.
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        ended = connection.as_mut() => return ended,
        () = std::future::ready(()) => {}
    }
    // At the stop, a client that has just connected has a request to send.
    if !makes_room && activity.phase() == Phase::Silent {
        let first_bytes = std::future::poll_fn(|context| match connection.as_mut().poll(context) {
            Poll::Pending if activity.phase() == Phase::Silent => Poll::Pending,
            polled => Poll::Ready(polled),
        });
        let deadline = activity.accepted() + HEALTH_HEAD_TIMEOUT;
        if let Ok(Poll::Ready(ended)) = tokio::time::timeout_at(deadline, first_bytes).await {
            return ended;
        }
    }
    // hyper would close a connection on which a part of a head has arrived after an answer. Its own answer closes it.
    if activity.phase() != Phase::Receiving {
        connection.as_mut().graceful_shutdown();
    }
    at_once.run_until_cancelled(connection).await.unwrap_or(Ok(()))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[tokio::test]
    async fn a_connection_that_is_told_to_end_at_once_drops_the_request_in_it() {
        let (mut client, server) = tokio::io::duplex(1_024);
        let (asked, left) = (Arc::new(tokio::sync::Semaphore::new(0)), CancellationToken::new());
        let service = service_fn(async |_request| {
            let _left = left.clone().drop_guard();
            asked.add_permits(1);
            std::future::pending::<Result<hyper::Response<String>, std::convert::Infallible>>().await
        });
        let connection = http1::Builder::new().serve_connection(TokioIo::new(server), service);
        let stop = Stop::default();
        let activity = Activity::new(&stop.gracefully);
        let orders = async {
            tokio::io::AsyncWriteExt::write_all(&mut client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            asked.acquire().await.unwrap().forget();
            stop.gracefully.cancel();
            tokio::task::yield_now().await;
            assert!(!left.is_cancelled());
            stop.at_once.cancel();
        };
        tokio::join!(until_closing(connection, &activity, &stop.at_once), orders).0.unwrap();
        assert!(left.is_cancelled());
    }

    #[tokio::test]
    async fn a_request_that_has_arrived_when_the_stop_comes_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let stop = CancellationToken::new();
        let activity = Activity::new(&stop);
        let io = TimeoutIo::new(stream, Arc::clone(&activity), &Limits::from(&WebSettings::default()));
        let answering = Arc::clone(&activity);
        let service = service_fn(move |_request| {
            answering.enter(Phase::Answering);
            let body = AnswerBody::new(Body::from("here"), Arc::clone(&answering));
            async { Ok::<_, std::convert::Infallible>(hyper::Response::new(body)) }
        });
        let connection = http1::Builder::new().serve_connection(TokioIo::new(io), service);
        let serving =
            tokio::spawn(async move { until_closing(connection, &activity, &CancellationToken::new()).await });
        tokio::task::yield_now().await;
        // The runtime, which has this one thread, has not looked for it when the connection hears of the stop.
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        stop.cancel();
        serving.await.unwrap().unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here"), "{answer}");
    }

    #[test]
    fn clients_that_have_connected_when_the_stop_comes_are_answered() {
        const REQUEST: &[u8] = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n";
        let web = crate::fuzzing::web();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let clients = runtime.block_on(async {
            let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
            let connect = || std::net::TcpStream::connect(listener.address()).unwrap();
            let mut clients: Vec<_> = std::iter::repeat_with(connect).take(3).collect();
            // Two requests wait in the kernel before anything is accepted, and one comes after that.
            for client in clients.iter_mut().take(2) {
                client.write_all(REQUEST).unwrap();
            }
            let (connections, stop) = (TaskTracker::new(), Stop::default());
            stop.gracefully.cancel();
            let metrics = Arc::new(Metrics::new(&[], &[]));
            let limits = Limits::from(&WebSettings::default());
            listener.serve(web, Lane::Main, limits, metrics, connections.clone(), stop).await;
            // Its connection looks for it, in vain, as often as it likes.
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            clients[2].write_all(REQUEST).unwrap();
            connections.close();
            connections.wait().await;
            clients
        });
        for mut client in clients {
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close\r\n"), "{answer}");
        }
    }
}
